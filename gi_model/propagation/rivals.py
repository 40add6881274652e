"""One picture from several motions that a hole may have."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from gi_model.propagation.edges import continue_edges
from gi_model.propagation.fusion import NOISE, Fusion, Sample, mean_square

# How much worse a mean of frames is than their differences tell, and the deviation in pixels of the window
# over which these are averaged. Where something passes, frames differ because some show something else.
SHARED, SPREAD = 8.0, 2.0
# Half the width of a hole, in widths of the ring around it, at which edges miss twice what the ring tells.
DEEP = 2.0
# Where few frames show a pixel their differences say little; the least share of it that is divided by.
FEW = 0.02


class Rival(Fusion):
    """What frames show of a hole if it moves in one way, and how far that is to be believed."""

    def __init__(self, image: np.ndarray, hole: np.ndarray, ring: np.ndarray, cell: int) -> None:
        super().__init__(image, hole, ring, cell)
        self.power, self.square, self.judged = np.zeros((3, *hole.shape), np.float32)

    def add(self, sample: Sample) -> None:
        """As for a fusion."""
        super().add(sample)
        part = sample.part
        share = sample.share * (sample.shown & self.hole[part])
        self.power[part] += share**2
        self.square[part] += share * mean_square(sample.colour)
        self.judged[part] += np.where(share > 0, sample.weight, 0)  # that is the share times the error

    def error(self) -> np.ndarray:
        """Mean square error ``[h,w]`` to be expected of the blend: as judged, and as frames differ."""
        side = self.sides[0]
        seen = self.hole & (side.weight > 0)
        weight = np.where(seen, side.weight, 1)
        mean = side.total / weight[..., None]
        variance = (self.square / weight - mean_square(mean)).clip(0) * seen
        apart = (1 - self.power / weight**2) * seen  # none where a single frame shows it
        variance, apart = (cv2.GaussianBlur(v, (0, 0), SPREAD) for v in (variance, apart))
        return NOISE**2 + self.judged / weight + SHARED * variance / np.maximum(apart, FEW)


def settle(rivals: Sequence[Rival], known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours ``[h,w,3]`` float32 for a hole, and where there are any ``[h,w]`` bool.

    The rivals, and the continuation of edges from what is ``known`` ``[h,w]`` around it, are weighed by one
    over the square of their errors. So where frames contradict each other, or what is around the hole,
    little of them is shown.
    """
    first = rivals[0]
    image, deep = first.image, (first.depth / (DEEP * first.cell)) ** 2
    share = known.any() / (NOISE**2 + first.contrast * (1 + deep)) ** 2
    total, weight = continue_edges(image, known) * share[..., None], share
    anywhere = np.zeros(known.shape, bool)
    for rival in rivals:
        colour, seen = rival.blend()
        share = seen / rival.error() ** 2
        total += np.where(seen[..., None], colour, 0) * share[..., None]
        weight = weight + share
        anywhere |= seen
    return total / np.where(anywhere, weight, 1)[..., None], anywhere
