"""Definition of ``complete_flow``."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

POINTS = 20


def complete_flow(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Flow [B,2,H,W] filled inside mask [B,1,H,W] from points on the mask's rim; see the public doc."""
    if flow.numel() == 0:
        return flow.clone()
    H, W = flow.shape[2:]
    rows = torch.arange(H, dtype=flow.dtype, device=flow.device)[:, None, None]
    columns = torch.arange(W, dtype=flow.dtype, device=flow.device)[None, :, None]
    frames = []
    for f, m in zip(flow, mask, strict=True):  # [2,H,W], [1,H,W]
        points = boundary(m[0])
        points = points[np.random.default_rng(1).choice(len(points), POINTS)]  # [20,2], row first
        y, x = points[:, 0], points[:, 1]
        squared = (rows - y) ** 2 + (columns - x) ** 2  # [H,W,20]
        weight = torch.where(squared > 0, squared.clamp(min=1) ** -3, 1e10)
        filled = torch.stack([(weight * c[y, x]).sum(dim=2) / weight.sum(dim=2) for c in f])
        blended = (1 - m) * f + m * filled
        frames.append(torch.where(m == 0, f, torch.where(m == 1, filled, blended)))
    return torch.stack(frames)


def boundary(mask: torch.Tensor) -> torch.Tensor:
    """Row and column [n,2] of the rim of ``mask`` [H,W] in row-major order; [[0,0]] if it has none.

    The rim: above 0.5, with a neighbour of the 3x3 cross at most 0.5, and not on the frame's edge.
    """
    outside = F.pad(mask[None, None] <= 0.5, (1, 1, 1, 1), value=False)[0, 0]
    touches = outside[:-2, 1:-1] | outside[2:, 1:-1] | outside[1:-1, :-2] | outside[1:-1, 2:]
    rim = (mask > 0.5) & touches
    rim[[0, -1], :] = False
    rim[:, [0, -1]] = False
    points = rim.nonzero()
    return points if len(points) else torch.zeros(1, 2, dtype=torch.long, device=mask.device)
