"""Definition of ``fused_convolution``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def fused_convolution(
    inputs: Sequence[torch.Tensor],  # [N,C_i,H,W]
    weight: torch.Tensor,  # [O,C,h,w]
    bias: torch.Tensor | None = None,  # [O]
    addend: torch.Tensor | None = None,  # [N,O,H,W]
    activation: str = "none",
    padding: str = "zeros",
) -> torch.Tensor:
    """A convolution that keeps the size, with what surrounds it; see the public doc."""
    down, across = weight.shape[2] // 2, weight.shape[3] // 2
    mode = "reflect" if padding == "reflect" else "constant"
    padded = F.pad(torch.cat(tuple(inputs), dim=1), (across, across, down, down), mode=mode)
    out = F.conv2d(padded, weight, bias)
    if addend is not None:
        out = out + addend
    return out if activation == "none" else getattr(torch, activation)(out)
