"""Dense inverse search, from OpenCV: needs no weights."""

from __future__ import annotations

import cv2
import numpy as np
import torch


class DISFlow:
    """Optical flow by Kroeger et al., "Fast Optical Flow using Dense Inverse Search", 2016."""

    #: The patches of the coarsest level need about this many pixels along each side.
    SMALLEST = 32

    def __init__(self) -> None:
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        # The preset stops at half resolution. Chained over many frames, its errors add up.
        self._dis.setFinestScale(0)

    def __call__(self, image1: torch.Tensor, image2: torch.Tensor) -> torch.Tensor:
        """Flow ``[B,2,H,W]`` in pixels, x first, from ``image1`` to ``image2`` (``[B,3,H,W]`` uint8)."""
        flows = [self._estimate(_grey(a), _grey(b)) for a, b in zip(image1, image2, strict=True)]
        return torch.from_numpy(np.stack(flows))

    def _estimate(self, image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        height, width = image1.shape
        bottom, right = max(0, self.SMALLEST - height), max(0, self.SMALLEST - width)
        padded = [cv2.copyMakeBorder(i, 0, bottom, 0, right, cv2.BORDER_REPLICATE) for i in (image1, image2)]
        flow = self._dis.calc(padded[0], padded[1], None)[:height, :width]  # type: ignore[call-overload]
        return flow.transpose(2, 0, 1)


def _grey(image: torch.Tensor) -> np.ndarray:
    """``[3,H,W]`` RGB -> ``[H,W]``."""
    return cv2.cvtColor(np.ascontiguousarray(image.numpy().transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY)
