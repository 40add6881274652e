"""What operators that read along flow share: resizing small maps, and summing what flows to a pixel.

The gradient of sampling is a scatter. It is turned into a gather, so that no two programs share a sum
and the result is the same every time: for each pixel, the list of the taps that read it, in the order of
the reading pixels. The lists depend on the flow only and serve all channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gi_kernels.jit.device import cell, inside_frame, narrow, ratio, widen
from gi_kernels.jit.launch import index_type, launch, sums, tiling

BLOCK = 256
LANGUAGE_INTEGERS = {torch.int32: tl.int32, torch.int64: tl.int64}


def resized(maps: torch.Tensor, height: int, width: int, flow: bool) -> torch.Tensor:
    """Contiguous maps [N,c,H,W] from maps [N,c,h,w], bilinear with corners aligned.

    The two components of a ``flow`` grow with the frame. Maps of that size are returned as they are.
    """
    N, c, h, w = maps.shape
    maps = maps.contiguous()
    if (h, w) == (height, width) or N * height * width == 0:
        return maps if (h, w) == (height, width) else maps.new_empty(N, c, height, width)
    out = maps.new_empty(N, c, height, width)
    launch(
        _resize, triton.cdiv(out.numel(), BLOCK), maps, out, out.numel(), c, h, w, height, width,
        FLOW=flow, BLOCK=BLOCK, ACC=sums(maps), INDEX=index_type(maps, out),
    )  # fmt: skip
    return out


def resized_backward(grad: torch.Tensor, height: int, width: int, flow: bool) -> torch.Tensor:
    """Gradient [N,c,h,w] of what ``resized`` read, from that [N,c,H,W] of its result."""
    N, c, H, W = grad.shape
    grad = grad.contiguous()
    if (height, width) == (H, W):
        return grad
    out = grad.new_empty(N, c, height, width)
    if N * H * W == 0:
        return out.zero_()
    launch(
        _resize_backward, triton.cdiv(out.numel(), BLOCK), grad, out, out.numel(), c, height, width, H, W,
        _reach(height, H), _reach(width, W),
        FLOW=flow, BLOCK=BLOCK, ACC=sums(grad), INDEX=index_type(grad, out),
    )  # fmt: skip
    return out


def _reach(small: int, large: int) -> int:
    """Most pixels of a side of ``large`` that can read one pixel of a side of ``small``."""
    return large if small == 1 or large == 1 else min(large, 2 * (large - 1) // (small - 1) + 4)


@triton.jit
def _axis(i, size, length, ACC: tl.constexpr):
    """The two pixels of an axis of ``size`` that output ``i`` of ``length`` lies between, and how far."""
    position = i.to(ACC) * tl.where(length > 1, ratio(size - 1, tl.maximum(length - 1, 1), ACC), 0.0)
    i0 = tl.minimum(position.to(tl.int32), size - 1)
    return i0, tl.minimum(i0 + 1, size - 1), position - i0.to(ACC)


@triton.jit
def _component_scale(component, h, w, H, W, ACC: tl.constexpr):
    return tl.where(component == 0, ratio(W, w, ACC), ratio(H, h, ACC))


@triton.jit
def _resize(
    maps, out, count, c, h, w, H, W,
    FLOW: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    x, y, plane = (i % W).to(tl.int32), ((i // W) % H).to(tl.int32), (i // W) // H
    y0, y1, fy = _axis(y, h, H, ACC)
    x0, x1, fx = _axis(x, w, W, ACC)
    row0, row1 = (plane * h + y0) * w, (plane * h + y1) * w
    a = tl.load(maps + row0 + x0, mask=valid, other=0.0)
    b = tl.load(maps + row0 + x1, mask=valid, other=0.0)
    d = tl.load(maps + row1 + x0, mask=valid, other=0.0)
    e = tl.load(maps + row1 + x1, mask=valid, other=0.0)
    value = (1 - fy) * ((1 - fx) * a + fx * b) + fy * ((1 - fx) * d + fx * e)
    if FLOW:
        value *= _component_scale(plane % c, h, w, H, W, ACC)
    tl.store(out + i, value, mask=valid)


@triton.jit
def _first(i, size, length):
    """An output at or before the first one that reads pixel ``i`` of an axis."""
    return tl.maximum((i - 1) * (length - 1) // tl.maximum(size - 1, 1) - 1, 0) * tl.where(size > 1, 1, 0)


@triton.jit
def _share(i, output, size, length, ACC: tl.constexpr):
    """Whether ``output`` reads pixel ``i`` of an axis, and with which weight."""
    i0, i1, f = _axis(output, size, length, ACC)
    reads = (output < length) & ((i0 == i) | (i1 == i))
    return reads, tl.where(i0 == i, 1 - f, 0.0) + tl.where(i1 == i, f, 0.0)


@triton.jit
def _resize_backward(
    grad, out, count, c, h, w, H, W, rows, columns,
    FLOW: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    x, y, plane = (i % w).to(tl.int32), ((i // w) % h).to(tl.int32), (i // w) // h
    sums = tl.zeros([BLOCK], ACC)
    for row in range(rows):
        Y = _first(y, h, H) + row
        reads_row, weight_row = _share(y, Y, h, H, ACC)
        for column in range(columns):
            X = _first(x, w, W) + column
            reads, weight = _share(x, X, w, W, ACC)
            reads = reads & reads_row & valid
            g = tl.load(grad + (plane * H + Y) * W + X, mask=reads, other=0.0)
            sums += tl.where(reads, g * (weight_row * weight), 0.0)
    if FLOW:
        sums *= _component_scale(plane % c, h, w, H, W, ACC)
    tl.store(out + i, sums, mask=valid)


@dataclass(frozen=True)
class Readers:
    """For each pixel of N frames, the taps that read it, in order.

    ``taps[end - count : end]`` are those of a pixel with ``counts`` and ``ends`` [N*H*W]; a tap is
    four times the reading pixel plus 0 to 3: (y0,x0), (y0,x1), (y1,x0), (y1,x1).
    """

    flow: torch.Tensor  # [N,2,H,W], contiguous
    counts: torch.Tensor
    ends: torch.Tensor
    taps: torch.Tensor


def readers(flow: torch.Tensor) -> Readers:
    """The readers of every pixel of frames that are sampled along ``flow`` [N,2,H,W]."""
    N, _, H, W = flow.shape
    flow = flow.contiguous()
    integer = torch.int64 if 4 * N * H * W >= 2**31 else torch.int32
    counts = torch.zeros(N * H * W, dtype=integer, device=flow.device)
    targets, slots = (torch.empty(4 * N * H * W, dtype=integer, device=flow.device) for _ in range(2))
    launch(
        _count, triton.cdiv(N * H * W, BLOCK), flow, counts, targets, slots, N * H * W, H, W,
        BLOCK=BLOCK, ACC=sums(flow), INDEX=LANGUAGE_INTEGERS[integer],
    )  # fmt: skip
    return Readers(flow, counts, *ordered(counts, targets, slots, 4 * H * W))


def ordered(
    counts: torch.Tensor, targets: torch.Tensor, slots: torch.Tensor, per_frame: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of the readers of each target: where they end, and the readers in ascending order.

    ``targets`` says what each reader reads (-1 for nothing) and ``slots`` numbers the readers of a target
    in any order. A reader's name in the lists is its index modulo ``per_frame``.
    """
    ends = counts.cumsum(0, dtype=counts.dtype)
    unordered, listed = torch.empty_like(targets), torch.empty_like(targets)
    programs = triton.cdiv(len(targets), BLOCK)
    constants = {"BLOCK": BLOCK, "INDEX": LANGUAGE_INTEGERS[counts.dtype]}
    launch(_fill, programs, counts, ends, targets, slots, unordered, len(targets), per_frame, **constants)
    launch(_order, programs, counts, ends, targets, unordered, listed, len(targets), per_frame, **constants)
    return ends, listed


@triton.jit
def _count(
    flow, counts, targets, slots, pixels, H, W, BLOCK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr
):
    """Per tap the pixel it reads (-1 for none) and a place among that pixel's readers."""
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    valid = i < pixels
    size = tl.cast(H, INDEX) * W
    n, p = i // size, i % size
    u = tl.load(flow + n * 2 * size + p, mask=valid, other=0.0)
    v = tl.load(flow + (n * 2 + 1) * size + p, mask=valid, other=0.0)
    near, x0, y0, _, _ = cell((p % W).to(ACC) + u, (p // W).to(ACC) + v, H, W)
    for k in tl.static_range(4):
        x, y = x0 + k % 2, y0 + k // 2
        inside = inside_frame(near & valid, x, y, H, W)
        target = n * size + y.to(INDEX) * W + x
        slot = tl.atomic_add(counts + target, tl.full([BLOCK], 1, INDEX), mask=inside)
        tl.store(targets + 4 * i + k, tl.where(inside, target, -1), mask=valid)
        tl.store(slots + 4 * i + k, slot, mask=valid)


@triton.jit
def _fill(
    counts, ends, targets, slots, unordered, readers, per_frame, BLOCK: tl.constexpr, INDEX: tl.constexpr
):
    """The lists, in the order in which the counting came by: another one each time."""
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets + i, mask=i < readers, other=-1)
    reads = target >= 0
    start = tl.load(ends + target, mask=reads, other=0) - tl.load(counts + target, mask=reads, other=0)
    slot = tl.load(slots + i, mask=reads, other=0)
    tl.store(unordered + start + slot, i % per_frame, mask=reads)


@triton.jit
def _order(
    counts, ends, targets, unordered, listed, readers, per_frame, BLOCK: tl.constexpr, INDEX: tl.constexpr
):
    """The lists in order: a reader's place is the number of smaller ones in its list."""
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets + i, mask=i < readers, other=-1)
    reads = target >= 0
    count = tl.load(counts + target, mask=reads, other=0)
    start = tl.load(ends + target, mask=reads, other=0) - count
    own = i % per_frame
    place = tl.zeros([BLOCK], INDEX)
    for j in range(tl.max(count, axis=0)):
        other = tl.load(unordered + start + j, mask=j < count, other=0)
        place += tl.where((j < count) & (other < own), 1, 0)
    tl.store(listed + start + place, own, mask=reads)


def sum_readers(grad: torch.Tensor, lists: Readers, out: torch.Tensor) -> None:
    """Write to ``out`` [N,C,H,W] the gradient of sampled maps, from that of the samples, ``grad``."""
    N, C, H, W = out.shape
    cut = tiling(out)
    launch(
        _sum, cut.pixel_blocks * cut.splits * N, grad, lists.flow, lists.counts, lists.ends, lists.taps, out,
        C, H, W, cut.channels, cut.splits, cut.pixel_blocks, *grad.stride(), *out.stride(),
        ACC=sums(out), INDEX=index_type(grad, out, lists.taps), **cut.options,
    )  # fmt: skip


@triton.jit
def _sum(
    grad, flow, counts, ends, taps, out, C, H, W, channels, splits, pixel_blocks,
    gsb, gsc, gsy, gsx, osb, osc, osy, osx,
    P: tl.constexpr, CB: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = (program // pixel_blocks) % splits
    n = (program // pixel_blocks // splits).to(tl.int64)
    size = tl.cast(H, INDEX) * W
    q = (program % pixel_blocks).to(INDEX) * P + tl.arange(0, P)
    valid = q < size
    count = tl.load(counts + n * size + q, mask=valid, other=0)
    start = tl.load(ends + n * size + q, mask=valid, other=0) - count
    most = tl.max(count, axis=0)
    to = (q // W) * osy + (q % W) * osx
    for c0 in range(split * channels, tl.minimum((split + 1) * channels, C), CB):
        c = c0 + tl.arange(0, CB)
        in_channels = c < C
        total = tl.zeros([P, CB], ACC)
        for i in range(most):
            listed = i < count
            entry = tl.load(taps + start + i, mask=listed, other=0)
            p, k = entry // 4, entry % 4
            py, px = p // W, p % W
            x = px.to(ACC) + tl.load(flow + n * 2 * size + p, mask=listed, other=0.0)
            y = py.to(ACC) + tl.load(flow + (n * 2 + 1) * size + p, mask=listed, other=0.0)
            fx, fy = x - tl.floor(x), y - tl.floor(y)
            weight = tl.where(k % 2 == 1, fx, 1 - fx) * tl.where(k >= 2, fy, 1 - fy)
            address = grad + n * gsb + (py.to(INDEX) * gsy + px.to(INDEX) * gsx)[:, None]
            address += (c.to(INDEX) * gsc)[None, :]
            g = widen(tl.load(address, mask=listed[:, None] & in_channels[None, :], other=0.0), ACC)
            total += g * tl.where(listed, weight, 0.0)[:, None]
        address = out + n * osb + to[:, None] + (c.to(INDEX) * osc)[None, :]
        tl.store(address, narrow(total, out.dtype.element_ty), mask=valid[:, None] & in_channels[None, :])
