"""``complete_flow`` on the GPU; the points are drawn there by the definition's sums and searches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gi_kernels.jit.device import narrow, widen
from gi_kernels.jit.launch import index_type, launch, sums
from gi_kernels.ops.complete_flow.reference import POINTS, drawn, rim

BLOCK = 128


def complete_flow(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``gi_triton::complete_flow``."""
    B, _, H, W = flow.shape
    out = flow.new_empty(flow.shape)
    if out.numel() == 0:
        return out
    launch(
        _fill, triton.cdiv(B * H * W, BLOCK), flow, mask, drawn(rim(mask[:, 0])), out, B * H * W, H, W,
        *flow.stride(), *mask.stride(),
        POINTS=POINTS, BLOCK=BLOCK, ACC=sums(flow), INDEX=index_type(flow, mask, out),
    )  # fmt: skip
    return out


@triton.jit
def _fill(
    flow, mask, points, out, count, H, W, fsb, fsc, fsy, fsx, msb, msc, msy, msx,
    POINTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    x, y, b = i % W, (i // W) % H, (i // W // H).to(tl.int64)
    m = widen(tl.load(mask + b * msb + y * msy + x * msx, mask=valid, other=0.0), ACC)
    own = flow + b * fsb + y * fsy + x * fsx
    u = widen(tl.load(own, mask=valid, other=0.0), ACC)
    v = widen(tl.load(own + fsc, mask=valid, other=0.0), ACC)
    total = tl.zeros([BLOCK], ACC)
    sum_u = tl.zeros([BLOCK], ACC)
    sum_v = tl.zeros([BLOCK], ACC)
    for k in range(POINTS):
        point = tl.load(points + b * POINTS + k, mask=valid, other=0)
        point_y, point_x = point // W, point % W
        dy, dx = (y - point_y).to(ACC), (x - point_x).to(ACC)
        squared = dy * dy + dx * dx
        near = tl.maximum(squared, 1.0)
        weight = tl.where(squared > 0, 1 / (near * near * near), 1e10)
        there = flow + b * fsb + point_y * fsy + point_x * fsx
        total += weight
        sum_u += weight * widen(tl.load(there, mask=valid, other=0.0), ACC)
        sum_v += weight * widen(tl.load(there + fsc, mask=valid, other=0.0), ACC)
    filled_u, filled_v = sum_u / total, sum_v / total
    u = tl.where(m == 0, u, tl.where(m == 1, filled_u, (1 - m) * u + m * filled_u))
    v = tl.where(m == 0, v, tl.where(m == 1, filled_v, (1 - m) * v + m * filled_v))
    size = tl.cast(H, INDEX) * W
    to = out + b * 2 * size + i - b * size
    tl.store(to, narrow(u, out.dtype.element_ty), mask=valid)
    tl.store(to + size, narrow(v, out.dtype.element_ty), mask=valid)
