"""Functions of the kernels: storage types, bilinear taps. They are inlined where they are called."""

from __future__ import annotations

import triton
import triton.language as tl

from gi_kernels import jit

INTERPRETED = tl.constexpr(jit.INTERPRETED)


@triton.jit
def widen(x, ACC: tl.constexpr):
    """Stored numbers in the type of sums. The interpreter's own bfloat16 is wrong for some numbers."""
    if INTERPRETED:
        if x.dtype == tl.bfloat16:
            x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(ACC)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Sums rounded to nearest even in a storage type; the interpreter would truncate to bfloat16."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
            up = bits + 0x7FFF + ((bits >> 16) & 1)
            bits = tl.where(x == x, up, bits | 0x400000) >> 16  # a NaN stays one
            return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def rounded(x, dtype: tl.constexpr, ACC: tl.constexpr):
    """``x`` as it would be read back after being stored as ``dtype``."""
    return widen(narrow(x, dtype), ACC)


@triton.jit
def product(a, b, sums, dtype: tl.constexpr):
    """``sums + a @ b`` by the matrix units of ``dtype``.

    float32 is split into three products of tf32, which together lose about 2^-21 of a factor.
    """
    if INTERPRETED:
        return tl.dot(a.to(sums.dtype), b.to(sums.dtype), sums, input_precision="ieee", out_dtype=sums.dtype)
    if dtype == tl.float32:
        return tl.dot(a.to(dtype), b.to(dtype), sums, input_precision="tf32x3", out_dtype=sums.dtype)
    return tl.dot(a.to(dtype), b.to(dtype), sums, input_precision="ieee", out_dtype=sums.dtype)


@triton.jit
def ratio(a, b, ACC: tl.constexpr):
    """``a / b`` correctly rounded."""
    if tl.float32 == ACC:
        return tl.div_rn(tl.cast(a, tl.float32), tl.cast(b, tl.float32))
    return tl.cast(a, ACC) / tl.cast(b, ACC)


@triton.jit
def cell(x, y, H, W):
    """Which positions touch the frame, their upper left pixel and the fractions behind it.

    A position that is not finite touches nothing.
    """
    near = (x >= -1) & (x < W) & (y >= -1) & (y < H)
    x = tl.where(near, x, 0.0)
    y = tl.where(near, y, 0.0)
    left, top = tl.floor(x), tl.floor(y)
    return near, left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def inside_frame(near, x, y, H, W):
    """Which taps lie inside the frame."""
    return near & (x >= 0) & (x < W) & (y >= 0) & (y < H)


@triton.jit
def tap(rows, inside, x, y, channel_offset, in_channels, sy, sx, ACC: tl.constexpr, INDEX: tl.constexpr):
    """Numbers [P,CB] of the pixels (y, x) [P], zero where they are not inside."""
    offset = y.to(INDEX) * sy + x.to(INDEX) * sx
    address = rows + offset[:, None] + channel_offset[None, :]
    return widen(tl.load(address, mask=inside[:, None] & in_channels[None, :], other=0.0), ACC)


@triton.jit
def four_taps(
    rows, near, x0, y0, channel_offset, in_channels, H, W, sy, sx, ACC: tl.constexpr, INDEX: tl.constexpr
):
    """Numbers [P,CB] of the four pixels around each position, all loads before their use."""
    x1, y1 = x0 + 1, y0 + 1
    in0, in1 = inside_frame(near, x0, y0, H, W), inside_frame(near, x1, y0, H, W)
    in2, in3 = inside_frame(near, x0, y1, H, W), inside_frame(near, x1, y1, H, W)
    a = tap(rows, in0, x0, y0, channel_offset, in_channels, sy, sx, ACC, INDEX)
    b = tap(rows, in1, x1, y0, channel_offset, in_channels, sy, sx, ACC, INDEX)
    c = tap(rows, in2, x0, y1, channel_offset, in_channels, sy, sx, ACC, INDEX)
    d = tap(rows, in3, x1, y1, channel_offset, in_channels, sy, sx, ACC, INDEX)
    return a, b, c, d


@triton.jit
def blend(a, b, c, d, fx, fy):
    """Bilinear mean [P,CB] of four taps."""
    fx, fy = fx[:, None], fy[:, None]
    return a * ((1 - fx) * (1 - fy)) + b * (fx * (1 - fy)) + c * ((1 - fx) * fy) + d * (fx * fy)


@triton.jit
def slope(a, b, c, d, fx, fy):
    """Derivatives [P,CB] of the mean along x and along y."""
    fx, fy = fx[:, None], fy[:, None]
    return (b - a) * (1 - fy) + (d - c) * fy, (c - a) * (1 - fx) + (d - b) * fx
