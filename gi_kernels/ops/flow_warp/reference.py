"""Definition of ``flow_warp``."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def flow_warp(input: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Bilinear samples of ``input`` [B,C,H,W] at ``p + flow(p)``, zeros outside; see the public doc."""
    flow = resize_flow(flow, input.shape[2], input.shape[3])
    return sample(input, pixel_grid(flow) + flow)


def resize_flow(flow: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Flow [B,2,h,w] -> [B,2,height,width], its components scaled with the frame."""
    h, w = flow.shape[2:]
    if (h, w) == (height, width):
        return flow
    flow = resize(flow, height, width)
    return torch.stack([flow[:, 0] * (width / w), flow[:, 1] * (height / h)], dim=1)


def resize(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Maps [B,C,h,w] -> [B,C,height,width], bilinear with ``align_corners=True``; a size may be 0."""
    if height * width == 0:
        return maps.sum() * maps.new_zeros(*maps.shape[:2], height, width)
    return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=True)


def pixel_grid(flow: torch.Tensor) -> torch.Tensor:
    """Pixel coordinates [2,H,W] of a map [...,H,W], x first."""
    h, w = flow.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(h, dtype=flow.dtype, device=flow.device),
        torch.arange(w, dtype=flow.dtype, device=flow.device),
        indexing="ij",
    )
    return torch.stack([x, y])


def sample(input: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Samples of ``input`` [B,C,H,W] at pixel positions [B,2,h,w], x first -> [B,C,h,w].

    The weight of a tap outside the frame, or of a position that is not finite, is zero, and so is
    its gradient. At an integer position the derivative is the one to the right.
    """
    B, C, H, W = input.shape
    x, y = position[:, 0], position[:, 1]  # [B,h,w]
    finite = torch.isfinite(x) & torch.isfinite(y)
    x, y = torch.where(finite, x, -2), torch.where(finite, y, -2)
    x0, y0 = x.detach().floor(), y.detach().floor()
    pixels = input.flatten(2)  # [B,C,HW]
    out = torch.zeros(B, C, *x.shape[1:], dtype=input.dtype, device=input.device)
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = x0 + dx, y0 + dy
            inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)  # [B,h,w]
            weight = (x - x0 if dx else 1 - (x - x0)) * (y - y0 if dy else 1 - (y - y0))
            row, column = torch.where(inside, row, 0).long(), torch.where(inside, column, 0).long()
            index = (row * W + column).flatten(1)  # [B,hw]
            tap = pixels.gather(2, index[:, None].expand(B, C, -1)).view(B, C, *x.shape[1:])
            inside = inside[:, None]
            out = out + torch.where(inside, tap, 0) * torch.where(inside, weight[:, None], 0).to(input.dtype)
    return out
