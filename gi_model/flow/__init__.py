"""Optical flow between frames: anything that maps two images to a flow."""

from __future__ import annotations

from typing import Protocol

import torch

from gi_model.flow.dis import DISFlow

__all__ = ["DISFlow", "FlowEstimator"]


class FlowEstimator(Protocol):
    """Estimates optical flow."""

    def __call__(self, image1: torch.Tensor, image2: torch.Tensor) -> torch.Tensor:
        """Flow ``[B,2,H,W]`` float32 in pixels, x first: where a pixel of ``image1`` lies in ``image2``.

        Images are ``[B,3,H,W]`` uint8, RGB.
        """
        ...
