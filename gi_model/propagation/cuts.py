"""Scene cuts, found while the clip is read."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from gi_model.propagation.membrane import membrane

# Pixels of a thumbnail's longer side.
LONG_SIDE = 128
# Thumbnails are compared by squares of that many pixels: large enough to be found again only where the
# scene is the same, small enough that one of them stays in the frame through a fast pan.
SQUARE = 28
# Deviation, in grey levels, below which a square has nothing to be recognised by.
FLAT = 1.5
# Correlation at which a square counts as found.
FOUND = 0.7
# Share of the squares that must be found for frames to be of one scene.
ENOUGH = 0.35
# Frames that a flash may last: a frame unlike its scene starts no new one if the scene comes back.
FLASH = 3


@dataclass
class Thumbnail:
    """Attributes: detail ``[h,w]`` float32, grey without its local mean; hidden ``[h,w]`` bool."""

    detail: np.ndarray
    hidden: np.ndarray


def thumbnail(image: np.ndarray, mask: np.ndarray) -> Thumbnail:
    """What a frame ``[H,W,3]`` uint8 is recognised by, apart from its mask ``[H,W]``."""
    scale = LONG_SIDE / max(mask.shape)
    size = max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale))
    hidden = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA)
    grey = membrane(grey.astype(np.float32)[..., None], ~hidden)[..., 0]
    detail = cv2.GaussianBlur(grey, (0, 0), 0.7) - cv2.GaussianBlur(grey, (0, 0), SQUARE / 4)
    return Thumbnail(detail, hidden)


def same_scene(first: Thumbnail, second: Thumbnail) -> bool:
    """Whether enough of the first frame is found somewhere in the second.

    Squares are correlated at every position, so neither pans nor a change of brightness matter. Frames
    without detail are taken to belong to the scene before them.
    """
    scores = match_scores(first, second)
    return not len(scores) or float((scores > FOUND).mean()) >= ENOUGH


def match_scores(first: Thumbnail, second: Thumbnail) -> np.ndarray:
    """The best correlation of each recognisable square of ``first`` in ``second``."""
    height, width = first.detail.shape
    side = min(SQUARE, height, width)
    if second.detail.std() < FLAT:
        return np.zeros(0)
    scores = []
    for top in _starts(height, side):
        for left in _starts(width, side):
            here = slice(top, top + side), slice(left, left + side)
            square = first.detail[here]
            if first.hidden[here].mean() < 0.3 and square.std() >= FLAT:
                scores.append(cv2.matchTemplate(second.detail, square, cv2.TM_CCOEFF_NORMED).max())
    return np.array(scores)


def _starts(length: int, side: int) -> np.ndarray:
    count = max(1, round(length / side))
    return np.linspace(0, length - side, count).astype(int)
