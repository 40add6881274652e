"""Frames in and out: video files and folders of images.

A frame is ``[height, width, 3]`` RGB: uint8, or uint16 where a file has more than 8 bits per channel. 10 and
12 bits are spread over all 16.
"""

from gi_model.video.colour import Colour
from gi_model.video.davis import Sequence, davis_sequence
from gi_model.video.images import to_8_bit, write_image
from gi_model.video.masks import MaskSource, aligned
from gi_model.video.reading import DEFAULT_RATE, FrameSource
from gi_model.video.threads import read_ahead, write_behind
from gi_model.video.writing import CODECS, VIDEOS, FrameWriter

__all__ = [
    "CODECS",
    "DEFAULT_RATE",
    "VIDEOS",
    "Colour",
    "FrameSource",
    "FrameWriter",
    "MaskSource",
    "Sequence",
    "aligned",
    "davis_sequence",
    "read_ahead",
    "to_8_bit",
    "write_behind",
    "write_image",
]
