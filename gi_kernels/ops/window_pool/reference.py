"""Definition of ``window_pool``."""

from __future__ import annotations

import torch


def window_pool(logits: torch.Tensor, features: torch.Tensor, windows: tuple[int, int]) -> torch.Tensor:
    """Per window and head, the softmax-weighted mean of the features; see the public doc."""
    weights = split_windows(logits, windows).softmax(dim=3)  # [B,rs,h,P]
    return weights @ split_windows(features, windows).transpose(2, 3)  # [B,rs,h,C]


def split_windows(maps: torch.Tensor, windows: tuple[int, int]) -> torch.Tensor:
    """Maps [B,C,H,W] -> [B,r*s,C,P]: windows in row-major order, P pixels each in row-major order."""
    B, C, H, W = maps.shape
    r, s = windows
    maps = maps.reshape(B, C, r, H // r, s, W // s)
    return maps.permute(0, 2, 4, 1, 3, 5).reshape(B, r * s, C, (H // r) * (W // s))


def join_windows(parts: torch.Tensor, windows: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """The inverse of ``split_windows``: [B,r*s,C,P] -> [B,C,H,W]."""
    B, _, C, _ = parts.shape
    (r, s), (H, W) = windows, size
    return parts.reshape(B, r, s, C, H // r, W // s).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
