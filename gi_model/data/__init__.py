"""Photos in, training and validation samples out; needs the extra ``training`` or ``evaluation``."""

from gi_model.data.distortions import Distortions
from gi_model.data.draws import Batches, Draw, Draws
from gi_model.data.masks import build_mask
from gi_model.data.photos import Photos, find_photos, published_photos
from gi_model.data.validation import ValidationSet

__all__ = [
    "Batches",
    "Distortions",
    "Draw",
    "Draws",
    "Photos",
    "ValidationSet",
    "build_mask",
    "find_photos",
    "published_photos",
]
