"""Optical flow between frames: anything that maps two images to a flow."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from gi_model.flow.dis import DISFlow

__all__ = ["DISFlow", "FlowEstimator"]


class FlowEstimator(Protocol):
    """Estimates optical flow."""

    def __call__(self, image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        """Flow ``[2,H,W]`` float32 in pixels, x first: where a pixel of ``image1`` lies in ``image2``.

        Images are ``[H,W,3]`` uint8, RGB.
        """
        ...
