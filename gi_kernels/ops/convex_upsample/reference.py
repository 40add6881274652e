"""Definition of ``convex_upsample``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

FACTOR = 8


def convex_upsample(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Flow [B,2,h,w], mask [B,576,h,w] -> [B,2,8h,8w]; see the public doc."""
    B, _, h, w = flow.shape
    weights = mask.reshape(B, 9, FACTOR, FACTOR, h, w).softmax(dim=1)
    padded = F.pad(FACTOR * flow, (1, 1, 1, 1))
    out = torch.zeros(B, 2, FACTOR, FACTOR, h, w, dtype=weights.dtype, device=flow.device)
    for k in range(9):
        neighbour = padded[:, :, k // 3 : k // 3 + h, k % 3 : k % 3 + w]  # [B,2,h,w]
        out = out + weights[:, None, k] * neighbour[:, :, None, None]
    return out.permute(0, 1, 4, 2, 5, 3).reshape(B, 2, FACTOR * h, FACTOR * w)
