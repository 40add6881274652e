"""Definition of ``complete_flow``."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

POINTS = 20
#: The first numbers of 32 bits that the generator of the points makes: some more than there are points,
#: since it passes over a few.
RAW = [int(n) for n in np.random.default_rng(1).integers(0, 2**32, POINTS + 12, dtype=np.uint32)]


def complete_flow(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Flow [B,2,H,W] filled inside mask [B,1,H,W] from points on the mask's rim; see the public doc."""
    if flow.numel() == 0:
        return flow.clone()
    H, W = flow.shape[2:]
    rows = torch.arange(H, dtype=flow.dtype, device=flow.device)[:, None, None]
    columns = torch.arange(W, dtype=flow.dtype, device=flow.device)[None, :, None]
    frames = []
    for f, m, points in zip(flow, mask, drawn(rim(mask[:, 0])), strict=True):  # [2,H,W], [1,H,W], [20]
        y, x = points // W, points % W
        squared = (rows - y) ** 2 + (columns - x) ** 2  # [H,W,20]
        weight = torch.where(squared > 0, squared.clamp(min=1) ** -3, 1e10)
        values = f.flatten(1)[:, points]  # [2,20]
        filled = torch.stack([(weight * v).sum(dim=2) / weight.sum(dim=2) for v in values])
        blended = (1 - m) * f + m * filled
        frames.append(torch.where(m == 0, f, torch.where(m == 1, filled, blended)))
    return torch.stack(frames)


def rim(mask: torch.Tensor) -> torch.Tensor:
    """Where masks [B,H,W] have their rim.

    Above 0.5, with a neighbour of the 3x3 cross at most 0.5, and not on the frame's edge.
    """
    outside = F.pad(mask <= 0.5, (1, 1, 1, 1), value=False)
    touches = outside[:, :-2, 1:-1] | outside[:, 2:, 1:-1] | outside[:, 1:-1, :-2] | outside[:, 1:-1, 2:]
    found = (mask > 0.5) & touches
    for edge in (found[:, :1], found[:, -1:], found[:, :, :1], found[:, :, -1:]):
        edge.fill_(False)
    return found


def drawn(rims: torch.Tensor) -> torch.Tensor:
    """Of each rim [B,H,W] 20 points in a row, as pixels' numbers [B,20]; pixel 0 if there are none.

    Those that ``numpy.random.default_rng(1).choice(count, 20)`` takes of the rim's points in row-major
    order. By sums and searches, so that a GPU need not tell the host how many points there are.
    """
    up_to = rims.flatten(1).cumsum(1)  # [B,HW]: how many points up to a pixel, itself included
    count = up_to[:, -1:]
    found = torch.searchsorted(up_to, choice(count) + 1)
    return torch.where(count > 0, found, 0)


def choice(count: torch.Tensor) -> torch.Tensor:
    """``numpy.random.default_rng(1).choice(count, 20)`` for each count [B,1] -> [B,20]; 0 for no count.

    NumPy maps a number of 32 bits to ``number * count / 2**32``, and passes over it where the fraction
    is so small that some results would come up more often than others (Lemire, "Fast Random Integer
    Generation in an Interval", 2019).
    """
    products = torch.cat([count * number for number in RAW], dim=1)  # [B,len(RAW)], below 2**63
    passed_over = (products & 0xFFFFFFFF) < (2**32 - count) % count.clamp(min=1)
    first = passed_over.byte().argsort(dim=1, stable=True)[:, :POINTS]
    return (products >> 32).gather(1, first)
