"""Optical flow between frames: RAFT, OpenCV's DIS and homographies, by themselves and as stages of a model.

An estimator maps two images to a flow (:class:`FlowEstimator`). A stage maps a target and its
references to completed flows and their errors (:class:`Stage`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from gi_model.flow.raft import RAFT, ImageEncoding
from gi_model.flow.stage import FlowStage, FrameEncoding

if TYPE_CHECKING:
    from gi_model.flow.dis import DISFlow, DISStage
    from gi_model.flow.planar import PlanarStage

__all__ = [
    "RAFT",
    "DISFlow",
    "DISStage",
    "FlowEstimator",
    "FlowStage",
    "FrameEncoding",
    "ImageEncoding",
    "PlanarStage",
    "Stage",
    "stage_without_weights",
]


class FlowEstimator(Protocol):
    """Estimates optical flow."""

    def __call__(self, image1: torch.Tensor, image2: torch.Tensor) -> torch.Tensor:
        """Flow ``[B,2,H,W]`` float32 in pixels, x first: where a pixel of ``image1`` lies in ``image2``.

        Images are ``[B,3,H,W]`` uint8, RGB.
        """
        ...


class Stage(Protocol):
    """Flow from a target to each of its references, completed inside the target's mask, and its error."""

    def __call__(
        self, target: Any, sources: torch.Tensor | Sequence[Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Target ``[B,4,H,W]``, sources ``[B,T,4,H,W]`` -> flow ``[B,T,2,H,W]``, error ``[B,T,1,H,W]``.

        Sources may be a sequence of T frames instead. In place of any frame, what ``encode`` made of it.
        """
        ...

    def encode(self, rgba: torch.Tensor) -> Any:
        """Frames ``[B,4,H,W]`` -> what can stand for them in later calls, as target and as source."""
        ...


def stage_without_weights(kind: str) -> Stage | None:
    """The stage that is called ``dis`` or ``planar``; None for others, which need weights."""
    if kind == "dis":
        from gi_model.flow.dis import DISStage

        return DISStage()
    if kind == "planar":
        from gi_model.flow.planar import PlanarStage

        return PlanarStage()
    return None


def __getattr__(name: str) -> Any:
    # Only what uses these needs OpenCV.
    if name in ("DISFlow", "DISStage"):
        from gi_model.flow import dis

        return getattr(dis, name)
    if name == "PlanarStage":
        from gi_model.flow.planar import PlanarStage

        return PlanarStage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
