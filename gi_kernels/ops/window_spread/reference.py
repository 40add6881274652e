"""Definition of ``window_spread``."""

from __future__ import annotations

import torch

from gi_kernels.ops.window_pool.reference import join_windows, split_windows


def window_spread(logits: torch.Tensor, latents: torch.Tensor, windows: tuple[int, int]) -> torch.Tensor:
    """Per pixel, the sigmoid-gated sum over heads of its window's latents; see the public doc."""
    gates = split_windows(logits, windows).sigmoid()  # [B,rs,h,P]
    parts = latents.transpose(2, 3) @ gates  # [B,rs,C,P]
    return join_windows(parts, windows, (logits.shape[2], logits.shape[3]))
