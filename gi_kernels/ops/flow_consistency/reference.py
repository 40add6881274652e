"""Definition of ``flow_consistency``."""

from __future__ import annotations

import torch

from gi_kernels.ops.flow_warp.reference import flow_warp


def flow_consistency(flow: torch.Tensor, flow_backward: torch.Tensor) -> torch.Tensor:
    """Forward-backward error [B,1,H,W] of two flows [B,2,H,W]; see the public doc."""
    return (flow + flow_warp(flow_backward, flow)).abs().mean(dim=1, keepdim=True)
