"""``fused_convolution`` on the GPU: PyTorch's convolution, and one kernel before and one behind it.

Several maps, and maps that are reflected, are first laid side by side in a channels-last map with its rim.
Bias, addend and activation are one pass over the result, in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from gi_kernels.jit.device import narrow, widen
from gi_kernels.jit.launch import index_type, launch, sums

BLOCK = 1024


def fused_convolution(
    inputs: Sequence[torch.Tensor],
    packed: torch.Tensor,
    channels: int,
    kernel: Sequence[int],
    addend: torch.Tensor | None,
    activation: int,
    reflect: bool,
) -> torch.Tensor:
    """``gi_triton::fused_convolution``; ``packed`` is what ``pack`` makes of weight and bias."""
    N, _, H, W = inputs[0].shape
    height, width = kernel
    weight = packed[:-channels].view(channels, height, width, -1).permute(0, 3, 1, 2)
    padding = [height // 2, width // 2]
    if N == 0:
        return packed.new_empty(N, H, W, channels).permute(0, 3, 1, 2)
    if len(inputs) > 1 or reflect:
        inputs = [_joined(inputs, *(padding if reflect else (0, 0)))]
    maps = inputs[0].contiguous(memory_format=torch.channels_last)
    out = F.conv2d(maps, weight, None, padding=[0, 0] if reflect else padding)
    out = out.contiguous(memory_format=torch.channels_last)
    if addend is not None:
        addend = addend.contiguous(memory_format=torch.channels_last)
    launch(
        _finish, triton.cdiv(out.numel(), BLOCK), out, packed[-channels:], out if addend is None else addend,
        out.numel(), channels,
        ADDS=addend is not None, ACTIVATION=activation, BLOCK=BLOCK, ACC=sums(out), INDEX=index_type(out),
    )  # fmt: skip
    return out


def _joined(inputs: Sequence[torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    """The maps side by side [N,C,H+2*rows,W+2*columns], channels-last, mirrored at the rim."""
    N, _, H, W = inputs[0].shape
    C = sum(x.shape[1] for x in inputs)
    shape = (N, H + 2 * rows, W + 2 * columns, C)
    out = inputs[0].new_empty(shape).permute(0, 3, 1, 2)
    first = 0
    for x in inputs:
        part = x.shape[1]
        if part:
            CB = min(128, triton.next_power_of_2(part))
            P = max(BLOCK // CB, 1)
            pixels = N * shape[1] * shape[2]
            launch(
                _place, triton.cdiv(pixels, P) * triton.cdiv(part, CB), x, out, pixels, part, first, C,
                H, W, rows, columns, triton.cdiv(part, CB), *x.stride(),
                P=P, CB=CB, INDEX=index_type(x, out),
            )  # fmt: skip
        first += part
    return out


@triton.jit
def _mirrored(i, size):
    """The pixel that is seen ``i`` pixels from the frame's first, beyond its last ones mirrored."""
    i = tl.where(i < 0, -i, i)
    return tl.where(i >= size, 2 * (size - 1) - i, i)


@triton.jit
def _place(
    x, out, pixels, part, first, C, H, W, rows, columns, channel_blocks, sn, sc, sy, sx,
    P: tl.constexpr, CB: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % channel_blocks
    p = (tl.program_id(0) // channel_blocks).to(INDEX) * P + tl.arange(0, P)
    c = block * CB + tl.arange(0, CB)
    across, down = W + 2 * columns, H + 2 * rows
    u, v, n = p % across, (p // across) % down, p // across // down
    y, x_ = _mirrored(v - rows, H), _mirrored(u - columns, W)
    mask = (p < pixels)[:, None] & (c < part)[None, :]
    address = x + (n * sn + y * sy + x_ * sx)[:, None] + (c.to(INDEX) * sc)[None, :]
    value = tl.load(address, mask=mask, other=0.0)
    tl.store(out + (p * C)[:, None] + (first + c)[None, :], value, mask=mask)


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    far = tl.where(x < 0, -(1 - e) / (1 + e), (1 - e) / (1 + e))
    square = x * x
    near = x * (1 - square * (1.0 / 3) + square * square * (2.0 / 15))  # where 1 - e would cancel
    return tl.where(tl.abs(x) < 0.02, near, far)


@triton.jit
def _finish(
    out, bias, addend, count, C,
    ADDS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """``out`` becomes f(out + bias + addend), all of them channels-last; f by its number."""
    i = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    value = widen(tl.load(out + i, mask=mask, other=0.0), ACC)
    value += widen(tl.load(bias + i % C, mask=mask, other=0.0), ACC)
    if ADDS:
        value += widen(tl.load(addend + i, mask=mask, other=0.0), ACC)
    if ACTIVATION == 1:
        value = tl.where(value < 0, 0.0, value)  # a NaN stays one
    if ACTIVATION == 2:
        value = 1 / (1 + tl.exp(-value))
    if ACTIVATION == 3:
        value = _tanh(value)
    tl.store(out + i, narrow(value, out.dtype.element_ty), mask=mask)
