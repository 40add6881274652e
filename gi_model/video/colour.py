"""How a video's colours are coded, and the conversion between that and RGB.

RGB is converted with the matrix and the range that the file is tagged with and, on the way out, with the
same ones, so that what a repair does not touch comes out as it went in. A file that says nothing is taken as
BT.601 in limited range, both ways, and the result says nothing either: a player that guesses otherwise
guesses the same for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from gi_model.video.images import to_8_bit

# Numbers of ITU-T H.273.
RGB, BT709, UNSAID = 0, 1, 2
LIMITED, FULL = 1, 2  # FFmpeg's numbers of ranges: luma from 16 to 235, from 0 to 255

_MATRICES = {1: "ITU709", 4: "FCC", 5: "ITU601", 6: "ITU601", 7: "SMPTE240M", 9: "BT2020", 10: "BT2020"}
# Without these swscale takes the nearest chroma sample and rounds down: a level too dark on average.
_ACCURATE = (
    Interpolation.BILINEAR
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)
# swscale garbles 16 bits with these flags, and without them between RGB and halved chroma of an odd width.
_DEEP, _WHOLE = Interpolation.BILINEAR, "yuv444p16le"


@dataclass(frozen=True)
class Colour:
    """Tags of a video stream.

    Attributes:
        matrix, primaries, transfer: numbers of ITU-T H.273; 2 where nothing is said.
        range: FFmpeg's number: 0 not said, 1 limited, 2 full.
    """

    matrix: int = BT709
    primaries: int = UNSAID
    transfer: int = UNSAID
    range: int = LIMITED

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Colour:
        """The tags of a decoded frame; those that we write by default, if it is RGB."""
        if frame.format.is_rgb or frame.colorspace == RGB:
            return cls()
        full = frame.format.name.startswith("yuvj")
        return cls(
            int(frame.colorspace),
            int(frame.color_primaries),
            int(frame.color_trc),
            FULL if full else int(frame.color_range),
        )

    @property
    def swscale(self) -> tuple[Colorspace, ColorRange]:
        """Matrix and range to convert with."""
        matrix = Colorspace[_MATRICES.get(self.matrix, "ITU601")]
        return matrix, ColorRange.JPEG if self.range == FULL else ColorRange.MPEG


def bits(frame: av.VideoFrame) -> int:
    """Bits per channel."""
    return max(component.bits for component in frame.format.components)


def to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """A decoded frame as ``[H,W,3]``: uint8, or uint16 if it has more than 8 bits."""
    deep = bits(frame) > 8
    matrix, levels = Colour.of(frame).swscale
    if deep and not frame.format.is_rgb:
        frame = frame.reformat(format=_WHOLE)
    return frame.to_ndarray(
        format="rgb48le" if deep else "rgb24",
        src_colorspace=matrix,
        src_color_range=ColorRange.JPEG if frame.format.is_rgb else levels,
        dst_color_range=ColorRange.JPEG,
        interpolation=_DEEP if deep else _ACCURATE,
    )


def from_rgb(image: np.ndarray, pixels: str, colour: Colour) -> av.VideoFrame:
    """A frame of the pixel format ``pixels`` from ``[H,W,3]``: uint16 where that has more than 8 bits."""
    deep = max(component.bits for component in av.VideoFormat(pixels).components) > 8
    image = image if deep else to_8_bit(image)
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb48le" if deep else "rgb24")
    if av.VideoFormat(pixels).is_rgb:
        return picture.reformat(format=pixels)
    matrix, levels = colour.swscale
    coded = picture.reformat(
        format=_WHOLE if deep else pixels,
        dst_colorspace=matrix,
        src_color_range=ColorRange.JPEG,
        dst_color_range=levels,
        interpolation=_DEEP if deep else _ACCURATE,
    )
    return coded.reformat(format=pixels) if deep else coded
