"""``convex_upsample`` on the GPU: a program works on the 64 fine pixels of a few coarse ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gi_kernels import jit
from gi_kernels.jit.device import narrow, widen
from gi_kernels.jit.launch import index_type, launch, sums
from gi_kernels.ops.convex_upsample.reference import FACTOR

#: Coarse pixels of a program.
P = 64 if jit.INTERPRETED else 16
BLOCK = 256


def convex_upsample(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``gi_triton::convex_upsample``."""
    B, _, h, w = mask.shape
    out = flow.new_empty(B, 2, FACTOR * h, FACTOR * w)
    launch(
        _forward, B * triton.cdiv(h * w, P), flow.contiguous(), mask, out, h, w, *mask.stride(),
        P=P, ACC=sums(mask), INDEX=index_type(mask, out),
    )  # fmt: skip
    return out


def convex_upsample_backward(
    grad: torch.Tensor, flow: torch.Tensor, mask: torch.Tensor, need_flow: bool, need_mask: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``gi_triton::convex_upsample_backward``."""
    B, _, h, w = mask.shape
    flow = flow.contiguous()
    grad_mask = torch.empty_like(mask) if need_mask else mask.new_empty(0)
    grad_flow = torch.empty_like(flow) if need_flow else flow.new_empty(0)
    parts = flow.new_empty((B, 9, 2, h, w) if need_flow else 0)
    launch(
        _backward, B * triton.cdiv(h * w, P), grad, flow, mask, grad_mask, parts, h, w,
        *grad.stride(), *mask.stride(), *(grad_mask.stride() if need_mask else mask.stride()),
        FLOW=need_flow, MASK=need_mask, P=P, ACC=sums(mask), INDEX=index_type(mask, grad, parts),
    )  # fmt: skip
    if need_flow:
        launch(
            _sum_neighbours, triton.cdiv(flow.numel(), BLOCK), parts, grad_flow, flow.numel(), h, w,
            BLOCK=BLOCK, ACC=sums(flow), INDEX=index_type(parts),
        )  # fmt: skip
    return grad_flow, grad_mask


@triton.jit
def _neighbour(flow, b, y, x, k, h, w, valid, INDEX: tl.constexpr):
    """Both components [P] of the k-th of the 3x3 coarse pixels around (y, x), eightfold; zero outside."""
    y, x = y + k // 3 - 1, x + k % 3 - 1
    inside = valid & (y >= 0) & (y < h) & (x >= 0) & (x < w)
    address = flow + b * 2 * h * w + (y * w + x)
    u = tl.load(address, mask=inside, other=0.0)
    v = tl.load(address + h * w, mask=inside, other=0.0)
    return 8 * u, 8 * v


@triton.jit
def _forward(
    flow, mask, out, h, w, msb, msc, msy, msx, P: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr
):
    blocks = tl.cdiv(h * w, P)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = ((tl.program_id(0) % blocks) * P + tl.arange(0, P)).to(INDEX)
    s = tl.arange(0, 64).to(INDEX)
    valid = p < h * w
    y, x = p // w, p % w
    from_mask = mask + b * msb + (y * msy + x * msx)[:, None] + (s * msc)[None, :]
    largest = tl.full([P, 64], float("-inf"), ACC)
    total = tl.zeros([P, 64], ACC)
    u = tl.zeros([P, 64], ACC)
    v = tl.zeros([P, 64], ACC)
    for k in range(9):
        logit = widen(tl.load(from_mask + tl.cast(64 * k, INDEX) * msc, mask=valid[:, None], other=0.0), ACC)
        near_u, near_v = _neighbour(flow, b, y, x, k, h, w, valid, INDEX)
        now = tl.maximum(largest, logit)
        reference = tl.where(now == float("-inf"), 0.0, now)
        keep = tl.exp(largest - reference)
        weight = tl.exp(logit - reference)
        total = total * keep + weight
        u = u * keep + weight * near_u[:, None]
        v = v * keep + weight * near_v[:, None]
        largest = now
    to = (
        out + b * 128 * h * w + (8 * y[:, None] + s[None, :] // 8) * (8 * w) + 8 * x[:, None] + s[None, :] % 8
    )
    tl.store(to, u / total, mask=valid[:, None])
    tl.store(to + 64 * tl.cast(h, INDEX) * w, v / total, mask=valid[:, None])


@triton.jit
def _backward(
    grad, flow, mask, grad_mask, parts, h, w,
    gsb, gsc, gsy, gsx, msb, msc, msy, msx, osb, osc, osy, osx,
    FLOW: tl.constexpr, MASK: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(h * w, P)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    p = ((tl.program_id(0) % blocks) * P + tl.arange(0, P)).to(INDEX)
    s = tl.arange(0, 64).to(INDEX)
    valid = p < h * w
    y, x = p // w, p % w
    fine_y, fine_x = 8 * y[:, None] + s[None, :] // 8, 8 * x[:, None] + s[None, :] % 8
    from_grad = grad + b * gsb + fine_y * gsy + fine_x * gsx
    grad_u = tl.load(from_grad, mask=valid[:, None], other=0.0).to(ACC)
    grad_v = tl.load(from_grad + gsc, mask=valid[:, None], other=0.0).to(ACC)
    from_mask = mask + b * msb + (y * msy + x * msx)[:, None] + (s * msc)[None, :]
    largest = tl.full([P, 64], float("-inf"), ACC)
    total = tl.zeros([P, 64], ACC)
    mean = tl.zeros([P, 64], ACC)  # of what a neighbour's weight changes
    for k in range(9):
        logit = widen(tl.load(from_mask + tl.cast(64 * k, INDEX) * msc, mask=valid[:, None], other=0.0), ACC)
        near_u, near_v = _neighbour(flow, b, y, x, k, h, w, valid, INDEX)
        now = tl.maximum(largest, logit)
        reference = tl.where(now == float("-inf"), 0.0, now)
        keep = tl.exp(largest - reference)
        weight = tl.exp(logit - reference)
        total = total * keep + weight
        mean = mean * keep + weight * (grad_u * near_u[:, None] + grad_v * near_v[:, None])
        largest = now
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    mean = mean / total
    for k in range(9):
        logit = widen(tl.load(from_mask + tl.cast(64 * k, INDEX) * msc, mask=valid[:, None], other=0.0), ACC)
        weight = tl.exp(logit - largest) / total
        if MASK:
            near_u, near_v = _neighbour(flow, b, y, x, k, h, w, valid, INDEX)
            change = weight * (grad_u * near_u[:, None] + grad_v * near_v[:, None] - mean)
            to = grad_mask + b * osb + (y * osy + x * osx)[:, None] + ((64 * k + s) * osc)[None, :]
            tl.store(to, narrow(change, grad_mask.dtype.element_ty), mask=valid[:, None])
        if FLOW:
            to = parts + (b * 9 + k) * 2 * h * w + p
            tl.store(to, 8 * tl.sum(weight * grad_u, axis=1), mask=valid)
            tl.store(to + h * w, 8 * tl.sum(weight * grad_v, axis=1), mask=valid)


@triton.jit
def _sum_neighbours(
    parts, grad_flow, count, h, w, BLOCK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr
):
    """A coarse pixel is the k-th neighbour of nine pixels."""
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    x, y, plane = i % w, (i // w) % h, i // w // h
    b, component = plane // 2, plane % 2
    sums = tl.zeros([BLOCK], ACC)
    for k in range(9):
        Y, X = y - k // 3 + 1, x - k % 3 + 1
        inside = valid & (Y >= 0) & (h > Y) & (X >= 0) & (w > X)
        sums += tl.load(parts + (((b * 9 + k) * 2 + component) * h + Y) * w + X, mask=inside, other=0.0)
    tl.store(grad_flow + i, sums, mask=valid)
