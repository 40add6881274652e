"""``flow_consistency`` on the GPU: one pass over the pixels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gi_kernels.jit.device import cell, inside_frame, narrow, widen
from gi_kernels.jit.launch import index_type, launch, sums

BLOCK = 256


def flow_consistency(flow: torch.Tensor, flow_backward: torch.Tensor) -> torch.Tensor:
    """``gi_triton::flow_consistency``."""
    B, _, H, W = flow.shape
    out = flow.new_empty(B, 1, H, W)
    launch(
        _forward, triton.cdiv(B * H * W, BLOCK), flow, flow_backward, out, B * H * W, H, W,
        *flow.stride(), *flow_backward.stride(),
        BLOCK=BLOCK, ACC=sums(flow), INDEX=index_type(flow, flow_backward, out),
    )  # fmt: skip
    return out


@triton.jit
def _forward(
    flow, flow_backward, out, count, H, W, fsb, fsc, fsy, fsx, bsb, bsc, bsy, bsx,
    BLOCK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    px, py, b = i % W, (i // W) % H, (i // W // H).to(tl.int64)
    own = flow + b * fsb + py * fsy + px * fsx
    u = widen(tl.load(own, mask=valid, other=0.0), ACC)
    v = widen(tl.load(own + fsc, mask=valid, other=0.0), ACC)
    near, x0, y0, fx, fy = cell(px.to(ACC) + u, py.to(ACC) + v, H, W)
    back_u = tl.zeros([BLOCK], ACC)
    back_v = tl.zeros([BLOCK], ACC)
    for k in tl.static_range(4):
        x, y = x0 + k % 2, y0 + k // 2
        inside = inside_frame(near & valid, x, y, H, W)
        weight = (fx if k % 2 == 1 else 1 - fx) * (fy if k >= 2 else 1 - fy)
        other = flow_backward + b * bsb + y.to(INDEX) * bsy + x.to(INDEX) * bsx
        back_u += weight * widen(tl.load(other, mask=inside, other=0.0), ACC)
        back_v += weight * widen(tl.load(other + bsc, mask=inside, other=0.0), ACC)
    value = (tl.abs(u + back_u) + tl.abs(v + back_v)) * 0.5
    tl.store(out + i, narrow(value, out.dtype.element_ty), mask=valid)
