"""One picture from what several frames show of a hole."""

from __future__ import annotations

import cv2
import numpy as np

from gi_model.propagation.membrane import membrane
from gi_model.propagation.neighbours import dilate
from gi_model.propagation.sampling import Box, bounding_box

# Colours are in grey levels of 8 bits, whatever the frames' depth.

# Deviation that noise and rounding cause in any case, in grey levels.
NOISE = 2.0
# Deviation that is assumed where too little of the ring is seen to measure it, in grey levels.
UNKNOWN = 10.0
# Pixels of the ring that are needed to measure it, and that are looked at.
FEWEST, MOST = 30, 2000
# Width in pixels of the rim on which both the frame and the filling are known.
RIM = 4
# Difference across the rim, in grey levels, that may be lighting; what is larger is an object.
RIM_STEP = 12.0


class Fusion:
    """Collects what frames show of a hole, and blends it.

    Each frame is judged by the ring around the hole, where the truth is known: its gain is matched to it,
    and its weight is one over the mean square of the difference that is left, whether that comes from
    blur, from flow that has drifted or from something that has moved. At last, what remains of a step
    at the rim is spread over the hole.

    Args:
        image: ``[h,w,3]`` float32, a box of the frame.
        hole, ring: ``[h,w]`` bool: what to fill, and the visible pixels around it.
    """

    def __init__(self, image: np.ndarray, hole: np.ndarray, ring: np.ndarray) -> None:
        self.image, self.hole = image, hole
        self.rim = ring & dilate(hole, RIM)
        rows, columns = np.nonzero(ring)
        step = 1 + len(rows) // MOST
        self.points = rows[::step], columns[::step]
        self.total = np.zeros(image.shape, np.float32)
        self.weight = np.zeros(hole.shape, np.float32)

    def judge(self, colour: np.ndarray, shown: np.ndarray) -> tuple[np.ndarray, float]:
        """Gain per channel and mean squared error of a frame, from its colours at ``points``.

        Args:
            colour, shown: ``[N,3]`` float32 and ``[N]`` bool: whether the frame shows a point.
        """
        if shown.sum() < FEWEST:
            return np.ones(3, np.float32), UNKNOWN**2
        truth, colour = self.image[self.points][shown], colour[shown]
        gain = np.ones(3, np.float32)
        for _ in range(4):  # what has moved counts little
            weight = 1 / (NOISE + np.abs(colour * gain - truth))
            gain = (weight * colour * truth).sum(axis=0) / np.maximum((weight * colour**2).sum(axis=0), 1e-6)
            gain = np.clip(gain, 0.5, 2.0).astype(np.float32)
        return gain, NOISE**2 + float(((colour * gain - truth) ** 2).mean())

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
