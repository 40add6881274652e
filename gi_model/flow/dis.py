"""Dense inverse search, from OpenCV: needs no weights."""

from __future__ import annotations

import cv2
import numpy as np


class DISFlow:
    """Optical flow by Kroeger et al., "Fast Optical Flow using Dense Inverse Search", 2016."""

    #: The patches of the coarsest level need about this many pixels along each side.
    SMALLEST = 32

    def __init__(self) -> None:
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        # The preset stops at half resolution. Chained over many frames, its errors add up.
        self._dis.setFinestScale(0)

    def __call__(self, image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        """Flow ``[2,H,W]`` in pixels, x first, from ``image1`` to ``image2`` (``[H,W,3]`` uint8)."""
        height, width = image1.shape[:2]
        bottom, right = max(0, self.SMALLEST - height), max(0, self.SMALLEST - width)
        gray = [
            cv2.copyMakeBorder(cv2.cvtColor(i, cv2.COLOR_RGB2GRAY), 0, bottom, 0, right, cv2.BORDER_REPLICATE)
            for i in (image1, image2)
        ]
        flow = self._dis.calc(gray[0], gray[1], None)[:height, :width]  # type: ignore[call-overload]
        return np.ascontiguousarray(flow.transpose(2, 0, 1))
