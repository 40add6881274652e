"""Definition of the correlation lookup."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from gi_kernels.ops.flow_warp.reference import sample


def correlation_lookup(
    features1: torch.Tensor,
    features2: torch.Tensor,
    coords: torch.Tensor,
    levels: int,
    radius: int,
    mode: str,
) -> torch.Tensor:
    """[B,C,H1,W1], [B,C,H2,W2], [B,2,H1,W1] -> [B,levels*(2r+1)^2,H1,W1]; see the public doc.

    ``mode`` changes where the numbers come from, never what they are.
    """
    return lookup(volume_pyramid(features1, features2, levels), coords, radius)


def volume_pyramid(features1: torch.Tensor, features2: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """Correlation volumes [B,H1*W1,H2/2^l,W2/2^l], each level the 2x2 average of the one before."""
    B, C, H1, W1 = features1.shape
    H2, W2 = features2.shape[2:]
    volume = features1.flatten(2).transpose(1, 2) @ features2.flatten(2) * C**-0.5  # [B,H1W1,H2W2]
    return pool_pyramid(volume.view(B, H1 * W1, H2, W2), levels)


def pool_pyramid(maps: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """``maps`` [B,C,H,W] and its 2x2 averages; odd rows and columns are dropped, down to size zero."""
    pyramid = [maps]
    for _ in range(levels - 1):
        H, W = pyramid[-1].shape[2:]
        if min(H, W) < 2:
            pyramid.append(pyramid[-1].new_zeros(*maps.shape[:2], H // 2, W // 2))
        else:
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    return pyramid


def lookup(volumes: Sequence[torch.Tensor], coords: torch.Tensor, radius: int) -> torch.Tensor:
    """Windows of radius ``radius`` of ``volumes`` [B,H1*W1,H,W] around ``coords`` [B,2,H1,W1] / 2^l.

    The outer offset of the window moves x, the inner one y.
    """
    B, _, H1, W1 = coords.shape
    side = 2 * radius + 1
    offset = torch.arange(-radius, radius + 1, dtype=coords.dtype, device=coords.device)
    dx, dy = torch.meshgrid(offset, offset, indexing="ij")
    windows = torch.stack([dx, dy])[None]  # [1,2,side,side]
    out = []
    for level, volume in enumerate(volumes):
        H, W = volume.shape[2:]
        centre = coords.permute(0, 2, 3, 1).reshape(-1, 2, 1, 1) / 2**level
        if H * W == 0:
            nothing = volume.sum() + coords[:, :, :0].sum()  # zero, and part of the graph
            out.append(nothing.to(volume.dtype).expand(B, side * side, H1, W1))
            continue
        read = sample(volume.reshape(B * H1 * W1, 1, H, W), centre + windows)  # [BH1W1,1,side,side]
        out.append(read.view(B, H1, W1, side * side).permute(0, 3, 1, 2))
    return torch.cat(out, dim=1)


def lookup_on_demand(
    features1: torch.Tensor, features2: Sequence[torch.Tensor], coords: torch.Tensor, radius: int
) -> torch.Tensor:
    """The same as ``lookup``, from features [B,C,H1,W1] and their counterpart's pyramid [B,C,H,W]."""
    C = features1.shape[1]
    rows = features1.flatten(2).transpose(1, 2) * C**-0.5  # [B,H1W1,C]
    volumes = [(rows @ f.flatten(2)).view(*rows.shape[:2], *f.shape[2:]) for f in features2]
    return lookup(volumes, coords, radius)
