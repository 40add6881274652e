"""Fused kernels for keyframe propagation: flow warping, deformable aggregation, global attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gi_kernels.dispatch import available_backends, backend, explain
from gi_kernels.ops.complete_flow import complete_flow
from gi_kernels.ops.convex_upsample import convex_upsample
from gi_kernels.ops.correlation_lookup import CorrelationPyramid, correlation_lookup
from gi_kernels.ops.deformable_aggregation import deformable_aggregation
from gi_kernels.ops.flow_consistency import flow_consistency
from gi_kernels.ops.flow_warp import flow_warp
from gi_kernels.ops.fused_convolution import FusedConvolution, fused_convolution
from gi_kernels.ops.global_attention import global_attention
from gi_kernels.ops.pixel_projection import pixel_projection
from gi_kernels.ops.projected_aggregation import projected_aggregation
from gi_kernels.ops.window_pool import window_pool
from gi_kernels.ops.window_query import window_query
from gi_kernels.ops.window_spread import window_spread

if TYPE_CHECKING:
    from gi_kernels.acceleration import accelerate

__version__ = "0.1.0"

__all__ = [
    "CorrelationPyramid",
    "FusedConvolution",
    "accelerate",
    "available_backends",
    "backend",
    "complete_flow",
    "convex_upsample",
    "correlation_lookup",
    "deformable_aggregation",
    "explain",
    "flow_consistency",
    "flow_warp",
    "fused_convolution",
    "global_attention",
    "pixel_projection",
    "projected_aggregation",
    "window_pool",
    "window_query",
    "window_spread",
]


def __getattr__(name: str) -> Any:
    """``accelerate``, and the layers it needs, are loaded when they are first used."""
    if name == "accelerate":
        from gi_kernels.acceleration import accelerate

        return accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
