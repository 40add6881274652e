"""Definition of ``pixel_projection``."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pixel_projection(
    input: torch.Tensor,  # [N,C,H,W]
    weight: torch.Tensor,  # [O,C]
) -> torch.Tensor:
    """The same linear map of the channels at every pixel; see the public doc."""
    return F.linear(input.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)
