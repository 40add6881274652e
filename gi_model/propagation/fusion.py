"""One picture from what several frames show of a hole."""

from __future__ import annotations

import cv2
import numpy as np

from gi_model.propagation.membrane import membrane
from gi_model.propagation.neighbours import dilate
from gi_model.propagation.sampling import Box, bounding_box, from_levels, to_levels

# Colours are in grey levels of 8 bits, whatever the frames' depth.

# Deviation that noise and rounding cause in any case, in grey levels.
NOISE = 2.0
# Deviation that is assumed where too little of the ring is seen to measure it, in grey levels. Less is never
# a reason to refuse what a frame shows.
UNKNOWN = 10.0
# Pixels of the ring that are needed to measure it, and that are looked at.
FEWEST, MOST = 30, 2000
# As many points near a pixel the mean over the whole ring counts for.
PRIOR = 1.0
# Width in pixels of the rim on which both the frame and the filling are known.
RIM = 4
# Difference across the rim, in grey levels, that may be lighting; what is larger is an object.
RIM_STEP = 12.0


class Fusion:
    """Collects what frames show of a hole, and blends it.

    Each frame is judged by the ring around the hole, where the truth is known: its gain is matched to it,
    and its weight is one over the mean square of the difference that is left nearby, whether that comes
    from blur, from flow that has drifted or from something that has moved. Where a smooth filling would be
    as good, the frame shows something else and is refused. At last, what remains of a step at the
    rim is spread over the hole.

    Args:
        image: ``[h,w,3]`` float32, a box of the frame.
        hole, ring: ``[h,w]`` bool: what to fill, and the visible pixels around it.
        cell: pixels over which differences are averaged.
    """

    def __init__(self, image: np.ndarray, hole: np.ndarray, ring: np.ndarray, cell: int) -> None:
        self.image, self.hole, self.cell = image, hole, cell
        self.rim = ring & dilate(hole, RIM)
        rows, columns = np.nonzero(ring)
        step = 1 + len(rows) // MOST
        self.points = rows[::step], columns[::step]
        self.truth = image[self.points]
        self.grid = -(-hole.shape[0] // cell), -(-hole.shape[1] // cell)
        self.cells = self.points[0] // cell * self.grid[1] + self.points[1] // cell
        self.contrast = self._contrast(ring)
        self.total = np.zeros(image.shape, np.float32)
        self.weight = np.zeros(hole.shape, np.float32)

    def judge(self, colour: np.ndarray, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gain per channel of a frame, and its mean squared error ``[h,w]``, infinite where it is refused.

        Args:
            colour, shown: its colours at ``points``, ``[N,3]`` float32, and whether it shows them, ``[N]``.
        """
        if shown.sum() < FEWEST:
            return np.ones(3, np.float32), np.full(self.hole.shape, UNKNOWN**2, np.float32)
        truth, colour = self.truth[shown], colour[shown]
        gain = np.ones(3, np.float32)
        for _ in range(4):  # what has moved counts little
            weight = 1 / (NOISE + np.abs(colour * gain - truth))
            gain = (weight * colour * truth).sum(axis=0) / np.maximum((weight * colour**2).sum(axis=0), 1e-6)
            gain = np.clip(gain, 0.5, 2.0).astype(np.float32)
        error = self._nearby(((colour * gain - truth) ** 2).mean(axis=1), shown)
        return gain, np.where(error > np.maximum(self.contrast, UNKNOWN**2), np.inf, NOISE**2 + error)

    def _contrast(self, ring: np.ndarray) -> np.ndarray:
        """``[h,w]``: mean square that a filling would miss which is smooth over the width of the hole."""
        depth = cv2.distanceTransform(self.hole.astype(np.uint8), cv2.DIST_L2, 3).max()
        half = int(min(depth, *self.hole.shape))  # a hole without a border has no depth
        size = 2 * half + 1, 2 * half + 1
        share = cv2.blur(ring.astype(np.float32), size)[self.points][:, None]
        smooth = cv2.blur(self.image * ring[..., None], size)[self.points] / np.maximum(share, 1e-6)
        return self._nearby(((self.truth - smooth) ** 2).mean(axis=1), np.ones(len(self.truth), bool))

    def _nearby(self, values: np.ndarray, shown: np.ndarray) -> np.ndarray:
        """Means ``[h,w]`` of values ``[N]`` at the points that are ``shown`` ``[N]``, around every pixel."""
        count, total = (
            np.bincount(self.cells[shown], weights, self.grid[0] * self.grid[1]).reshape(self.grid)
            for weights in (None, values)
        )
        count, total = (
            cv2.GaussianBlur(v.astype(np.float32), (0, 0), 1.5, borderType=cv2.BORDER_CONSTANT)
            for v in (count, total)
        )
        mean = (total + PRIOR * (values.mean() if len(values) else 0)) / (count + PRIOR)
        size = self.grid[1] * self.cell, self.grid[0] * self.cell
        height, width = self.hole.shape
        return cv2.resize(mean, size, interpolation=cv2.INTER_LINEAR)[:height, :width]

    def part(self, weight: np.ndarray) -> Box | None:
        """The box that a frame with these weights ``[h,w]`` has a share in; None if it has none."""
        return bounding_box(weight > 0, RIM) if (weight > 0).any() else None

    def add(self, part: Box, colour: np.ndarray, weight: np.ndarray, shown: np.ndarray) -> None:
        """Add colours of a part: ``[h,w,3]`` float32, ``[h,w]`` float32 in the hole, ``[h,w]`` bool.

        Beside the hole they count as much as at the nearest of its pixels, so that a step at the rim is
        that of the frames that fill the hole there.
        """
        beside = cv2.dilate(weight, np.ones((2 * RIM + 1, 2 * RIM + 1), np.uint8))
        weight = np.where(self.hole[part], weight, np.where(self.rim[part], beside, 0)) * shown
        self.total[part] += weight[..., None] * colour
        self.weight[part] += weight

    def blend(self) -> tuple[np.ndarray, np.ndarray]:
        """Colours ``[h,w,3]`` float32 for the hole, and where there are any ``[h,w]`` bool."""
        known = self.weight > 0
        blended = self.total / np.where(known, self.weight, 1)[..., None]
        seen = self.hole & known
        return blended + rim_correction(self.image, blended, self.rim & known, seen), seen


def rim_correction(image: np.ndarray, filled: np.ndarray, rim: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """What to add to ``filled`` inside ``hole`` so that no step to ``image`` shows at its ``rim``.

    The difference is averaged along the rim, so that noise is not drawn into the hole, and continued
    into the hole as a membrane.
    """
    if not rim.any() or not hole.any():
        return np.zeros_like(filled)
    difference = np.where(rim[..., None], image - filled, 0).astype(np.float32)
    size = np.sqrt((difference**2).mean(axis=2))
    weight = np.where(rim, 1 / (1 + (size / RIM_STEP) ** 2), 0).astype(np.float32)
    share = cv2.GaussianBlur(weight, (0, 0), RIM)
    smooth = (
        cv2.GaussianBlur(difference * weight[..., None], (0, 0), RIM) / np.maximum(share, 1e-3)[..., None]
    )
    return membrane(smooth, rim) * hole[..., None]


def fill_smoothly(image: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """``image`` ``[H,W,3]`` uint8 or uint16 with a membrane where ``missing``; grey if it is altogether.

    It is closer to the truth than what OpenCV's inpainting draws into large holes, and has no false edges.
    """
    if not missing.any():
        return image
    if missing.all():
        return np.full_like(image, np.iinfo(image.dtype).max // 2)
    box = bounding_box(missing, 1)
    filled = membrane(to_levels(image[box]), ~missing[box])
    image = image.copy()
    image[box] = np.where(missing[box][..., None], from_levels(filled, image.dtype), image[box])
    return image
