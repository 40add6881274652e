"""``correlation_lookup`` on the GPU, from stored volumes or on demand: all levels in one launch.

The samples of a window share one fractional part, so each reads the four whole pixels around it. In the
backward pass a volume's number is read by at most four samples of its own pixel's window: it gathers them.

On demand, a pixel's products with the patch of (2r+2)^2 whole pixels are kept for a moment, a few hundred
numbers, and the window is blended from them. A tile of pixels is multiplied with the box around its patches
by the matrix units: what is smooth shares nearly all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gi_kernels import jit
from gi_kernels.jit.along_flow import LANGUAGE_INTEGERS, ordered
from gi_kernels.jit.device import blend, narrow, product, slope, widen
from gi_kernels.jit.launch import index_type, launch, sums
from gi_kernels.precision import accumulation_dtype

#: Numbers of a program's tile: pixels times the samples of a window, padded.
TILE = 8192 if jit.INTERPRETED else 2048
#: With more pixels in a tile, Triton 3.7 fails to compile the lookup in float64.
MOST_PIXELS = 256 if jit.INTERPRETED else 16
BLOCK = 256
#: Products on demand: side of a tile of pixels, whose patches overlap where the flow is smooth, and how many
#: pixels of the box around these are multiplied with it at a time.
TILE_SIDE = 8
COLUMNS = 256 if jit.INTERPRETED else 64


def correlation_lookup(volumes: Sequence[torch.Tensor], coords: torch.Tensor, radius: int) -> torch.Tensor:
    """``gi_triton::correlation_lookup``."""
    B, _, H1, W1 = coords.shape
    shape = (B, len(volumes) * (2 * radius + 1) ** 2, H1, W1)
    first = volumes[0]
    out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=torch.channels_last)
    options, programs = _options(volumes, coords, radius, out)
    launch(
        _lookup, programs, tuple(volumes), coords.contiguous(), out, B * H1 * W1, H1 * W1,
        *_sizes(volumes), **options,
    )  # fmt: skip
    return out


def correlation_lookup_backward(
    grad: torch.Tensor,
    volumes: Sequence[torch.Tensor],
    coords: torch.Tensor,
    radius: int,
    need_volumes: bool,
    need_coords: bool,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """``gi_triton::correlation_lookup_backward``."""
    B, _, H1, W1 = coords.shape
    coords = coords.contiguous()
    grad_volumes = [v.new_empty(v.shape if need_volumes else 0) for v in volumes]
    grad_coords = coords.new_empty(coords.shape if need_coords else 0)
    if need_volumes:
        for level, volume in enumerate(grad_volumes):
            H, W = volume.shape[2:]
            block = min(BLOCK, triton.next_power_of_2(max(H * W, 1)))
            launch(
                _gather_samples, B * H1 * W1 * triton.cdiv(H * W, block), grad, coords, volume,
                H1 * W1, W1, H, W, *grad.stride(), LEVEL=level, RADIUS=radius, BLOCK=block, ACC=sums(volume),
            )  # fmt: skip
    if need_coords:
        options, programs = _options(volumes, coords, radius, grad, tile=TILE // 4)  # four taps and sums
        launch(
            _slopes, programs, grad, tuple(volumes), coords, grad_coords, B * H1 * W1, H1 * W1, W1,
            *_sizes(volumes), *grad.stride(), **options,
        )  # fmt: skip
    return grad_volumes, grad_coords


def correlation_lookup_on_demand(
    features1: torch.Tensor, features2: Sequence[torch.Tensor], coords: torch.Tensor, radius: int
) -> torch.Tensor:
    """``gi_triton::correlation_lookup_on_demand``."""
    B, _, H1, W1 = coords.shape
    shape = (B, len(features2) * (2 * radius + 1) ** 2, H1, W1)
    out = torch.empty(
        shape, dtype=features1.dtype, device=features1.device, memory_format=torch.channels_last
    )
    coords = coords.contiguous()
    patches = _patches(features1, features2, coords, radius)
    options, programs = _options(features2, coords, radius, out)
    launch(_blend, programs, patches, coords, out, B * H1 * W1, H1 * W1, _sizes(features2)[0], **options)
    return out


def correlation_lookup_on_demand_backward(
    grad: torch.Tensor,
    features1: torch.Tensor,
    features2: Sequence[torch.Tensor],
    coords: torch.Tensor,
    radius: int,
    need_features1: bool,
    need_features2: bool,
    need_coords: bool,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """``gi_triton::correlation_lookup_on_demand_backward``."""
    B, _, H1, W1 = coords.shape
    C, pixels = features1.shape[1], H1 * W1
    coords = coords.contiguous()
    grad_features1 = torch.empty_like(features1) if need_features1 else features1.new_empty(0)
    grad_features2 = [torch.empty_like(f) if need_features2 else f.new_empty(0) for f in features2]
    grad_coords = coords.new_empty(coords.shape if need_coords else 0)
    sizes = _sizes(features2)
    if need_coords:
        patches = _patches(features1, features2, coords, radius)
        options, programs = _options(features2, coords, radius, grad, tile=TILE // 4)
        launch(
            _patch_slopes, programs, grad, patches, coords, grad_coords, B * pixels, pixels, W1, sizes[0],
            *grad.stride(), **options,
        )  # fmt: skip
    if not (need_features1 or need_features2):
        return grad_features1, grad_features2, grad_coords
    patches = coords.new_empty(B * pixels, len(features2), (2 * radius + 2) ** 2)
    options, programs = _options(features2, coords, radius, grad, side=2 * radius + 2)
    launch(
        _patch_gradients, programs, grad, coords, patches, B * pixels, pixels, W1, sizes[0], *grad.stride(),
        **options,
    )  # fmt: skip
    CB = _channels(C)
    options = {k: options[k] for k in ("LEVELS", "RADIUS", "S", "ACC")}
    options["INDEX"] = index_type(features1, *features2, *grad_features2)
    if need_features1:
        launch(
            _gradient1, B * pixels * triton.cdiv(C, CB), patches, tuple(features2), coords,
            _undefined(features2), grad_features1, pixels, W1, C, *sizes, *grad_features1.stride(),
            CB=CB, **options,
        )  # fmt: skip
    undefined = _undefined([features1]) if need_features2 else None
    for level, result in enumerate(grad_features2 if need_features2 else []):
        H, W = result.shape[2:]
        if B * H * W == 0:
            continue
        counts, ends, readers = _windows_by_corner(coords, H, W, level, radius)
        launch(
            _gradient2, B * H * W * triton.cdiv(C, CB), patches, features1, coords, counts, ends, readers,
            undefined, result, pixels, W1, C, H, W, *features1.stride(), *result.stride(),
            LEVEL=level, E=16, CB=CB, **{k: v for k, v in options.items() if k != "S"},
        )  # fmt: skip
    return grad_features1, grad_features2, grad_coords


def _undefined(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """NaN [B,C] where a channel of the features has one, or an infinity, and 0 elsewhere.

    The definition multiplies every pixel with every other, with zeros mostly, so that such a number
    reaches the gradients of all of them.
    """
    wide = [f.to(accumulation_dtype(f.dtype)) for f in features]
    return torch.stack([(f * 0).sum((2, 3)) for f in wide]).sum(0)


def _patches(
    features1: torch.Tensor, features2: Sequence[torch.Tensor], coords: torch.Tensor, radius: int
) -> torch.Tensor:
    """Products [B*H1*W1,levels,(2r+2)^2] with the whole pixels around each position; rows move y."""
    B, C, H1, W1 = features1.shape
    patches = coords.new_zeros(B * H1 * W1, len(features2), (2 * radius + 2) ** 2)
    tiles = triton.cdiv(H1, TILE_SIDE) * triton.cdiv(W1, TILE_SIDE)
    launch(
        _products, B * tiles * len(features2), features1, tuple(features2), coords, patches, H1, W1, C,
        *features1.stride(), *_sizes(features2), LEVELS=len(features2), RADIUS=radius, SIDE=TILE_SIDE,
        K=COLUMNS, CB=min(32, max(16, triton.next_power_of_2(C))), ACC=sums(features1),
        INDEX=index_type(features1, *features2), num_warps=8,
    )  # fmt: skip
    return patches


def _channels(C: int) -> int:
    """Channels of a block beside the pixels of a patch."""
    return min(256 if jit.INTERPRETED else 32, triton.next_power_of_2(C))


def _windows_by_corner(
    coords: torch.Tensor, H: int, W: int, level: int, radius: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lists of the pixels whose patches have each corner; corners lie up to a patch outside the map."""
    B, _, H1, W1 = coords.shape
    reach = 2 * radius + 1
    corners = B * (H + reach) * (W + reach)
    integer = torch.int64 if max(corners, B * H1 * W1) >= 2**31 else torch.int32
    counts = torch.zeros(corners, dtype=integer, device=coords.device)
    targets, slots = (torch.empty(B * H1 * W1, dtype=integer, device=coords.device) for _ in range(2))
    launch(
        _count_corners, triton.cdiv(B * H1 * W1, BLOCK), coords, counts, targets, slots, B * H1 * W1, H1 * W1,
        H, W, LEVEL=level, RADIUS=radius, BLOCK=BLOCK, ACC=sums(coords), INDEX=LANGUAGE_INTEGERS[integer],
    )  # fmt: skip
    return counts, *ordered(counts, targets, slots, H1 * W1)


def _options(
    volumes: Sequence[torch.Tensor],
    coords: torch.Tensor,
    radius: int,
    other: torch.Tensor,
    side: int | None = None,
    tile: int = TILE,
) -> tuple[dict, int]:
    """Constants of a kernel that works on windows, or patches of a ``side``; its number of programs."""
    S = triton.next_power_of_2((side or 2 * radius + 1) ** 2)
    pixels = coords.shape[0] * coords.shape[2] * coords.shape[3]
    P = min(max(tile // S, 1), MOST_PIXELS, triton.next_power_of_2(max(pixels, 1)))
    options = {
        "LEVELS": len(volumes), "RADIUS": radius, "P": P, "S": S,
        "ACC": sums(volumes[0]), "INDEX": index_type(*volumes, other),
    }  # fmt: skip
    return options, triton.cdiv(pixels, P)


def _sizes(volumes: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Heights and widths in turn, and strides in turn."""
    sizes = tuple(n for v in volumes for n in v.shape[2:])
    return sizes, tuple(s for v in volumes for s in v.stride())


@triton.jit
def _centre(coords, b, p, pixels, H, W, there, LEVEL: tl.constexpr, RADIUS: tl.constexpr, ACC: tl.constexpr):
    """Whether windows reach the map, their centres' whole pixels, and the fractions behind these."""
    x = tl.load(coords + b * 2 * pixels + p, mask=there, other=0.0) * (1 / 2**LEVEL)
    y = tl.load(coords + (b * 2 + 1) * pixels + p, mask=there, other=0.0) * (1 / 2**LEVEL)
    reaches = there & (x >= -1 - RADIUS) & (x < W + RADIUS) & (y >= -1 - RADIUS) & (y < H + RADIUS)
    # Finite whatever comes in. Not by tl.where(reaches, ...): Triton 3.6 cannot compile that in float64.
    x = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -1 - RADIUS), W + RADIUS)
    y = tl.minimum(tl.maximum(tl.where(y == y, y, 0.0), -1 - RADIUS), H + RADIUS)
    left, top = tl.floor(x), tl.floor(y)
    return reaches, left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def _tap(row, x, y, H, W, reads, sy, sx, ACC: tl.constexpr, INDEX: tl.constexpr):
    mask = reads & (x >= 0) & (x < W) & (y >= 0) & (y < H)
    return widen(tl.load(row + y.to(INDEX) * sy + x.to(INDEX) * sx, mask=mask, other=0.0), ACC)


@triton.jit
def _four_taps(row, x, y, H, W, reads, sy, sx, ACC: tl.constexpr, INDEX: tl.constexpr):
    a = _tap(row, x, y, H, W, reads, sy, sx, ACC, INDEX)
    b = _tap(row, x + 1, y, H, W, reads, sy, sx, ACC, INDEX)
    c = _tap(row, x, y + 1, H, W, reads, sy, sx, ACC, INDEX)
    d = _tap(row, x + 1, y + 1, H, W, reads, sy, sx, ACC, INDEX)
    return a, b, c, d


@triton.jit
def _patch_taps(patch, mask, N: tl.constexpr):
    a = tl.load(patch, mask=mask, other=0.0)
    b = tl.load(patch + 1, mask=mask, other=0.0)
    c = tl.load(patch + N, mask=mask, other=0.0)
    d = tl.load(patch + N + 1, mask=mask, other=0.0)
    return a, b, c, d


@triton.jit
def _lookup(
    volumes, coords, out, count, pixels, sizes, strides,
    LEVELS: tl.constexpr, RADIUS: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    SIDE: tl.constexpr = 2 * RADIUS + 1
    i = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    b, p = i // pixels, i % pixels
    s = tl.arange(0, S)
    dx, dy = s // SIDE - RADIUS, s % SIDE - RADIUS
    for level in tl.static_range(LEVELS):
        H, W = sizes[2 * level], sizes[2 * level + 1]
        reaches, x0, y0, fx, fy = _centre(coords, b, p, pixels, H, W, i < count, level, RADIUS, ACC)
        row = volumes[level] + (b * strides[4 * level] + p * strides[4 * level + 1])[:, None]
        reads = reaches[:, None] & (s < SIDE * SIDE)[None, :]
        x, y = x0[:, None] + dx[None, :], y0[:, None] + dy[None, :]
        sy, sx = strides[4 * level + 2], strides[4 * level + 3]
        a, c, d, e = _four_taps(row, x, y, H, W, reads, sy, sx, ACC, INDEX)
        value = blend(a, c, d, e, fx, fy)
        to = out + (i * (LEVELS * SIDE * SIDE) + level * SIDE * SIDE)[:, None] + s[None, :]
        mask = (i < count)[:, None] & (s < SIDE * SIDE)[None, :]
        tl.store(to, narrow(value, out.dtype.element_ty), mask=mask)


@triton.jit
def _slopes(
    grad, volumes, coords, grad_coords, count, pixels, width, sizes, strides, gsb, gsc, gsy, gsx,
    LEVELS: tl.constexpr, RADIUS: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    SIDE: tl.constexpr = 2 * RADIUS + 1
    i = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    b, p = i // pixels, i % pixels
    s = tl.arange(0, S)
    dx, dy = s // SIDE - RADIUS, s % SIDE - RADIUS
    from_grad = grad + (b * gsb + (p // width) * gsy + (p % width) * gsx)[:, None]
    along_x = tl.zeros([P], ACC)
    along_y = tl.zeros([P], ACC)
    for level in tl.static_range(LEVELS):
        H, W = sizes[2 * level], sizes[2 * level + 1]
        reaches, x0, y0, fx, fy = _centre(coords, b, p, pixels, H, W, i < count, level, RADIUS, ACC)
        row = volumes[level] + (b * strides[4 * level] + p * strides[4 * level + 1])[:, None]
        reads = reaches[:, None] & (s < SIDE * SIDE)[None, :]
        x, y = x0[:, None] + dx[None, :], y0[:, None] + dy[None, :]
        sy, sx = strides[4 * level + 2], strides[4 * level + 3]
        a, c, d, e = _four_taps(row, x, y, H, W, reads, sy, sx, ACC, INDEX)
        channel = (level * SIDE * SIDE + s).to(tl.int64) * gsc
        g = widen(tl.load(from_grad + channel[None, :], mask=reads, other=0.0), ACC)
        slope_x, slope_y = slope(a, c, d, e, fx, fy)
        along_x += tl.sum(g * slope_x, axis=1) * (1 / 2**level)
        along_y += tl.sum(g * slope_y, axis=1) * (1 / 2**level)
    to = grad_coords + b * 2 * pixels + p
    tl.store(to, along_x, mask=i < count)
    tl.store(to + pixels, along_y, mask=i < count)


@triton.jit
def _gather_samples(
    grad, coords, grad_volume, pixels, width, H, W, gsb, gsc, gsy, gsx,
    LEVEL: tl.constexpr, RADIUS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    SIDE: tl.constexpr = 2 * RADIUS + 1
    blocks = tl.cdiv(H * W, BLOCK)
    i = (tl.program_id(0) // blocks).to(tl.int64)
    b, p = i // pixels, i % pixels
    q = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    valid = q < H * W
    reaches, x0, y0, fx, fy = _centre(coords, b, p, pixels, H, W, b >= 0, LEVEL, RADIUS, ACC)
    from_grad = grad + b * gsb + (p // width) * gsy + (p % width) * gsx
    total = tl.zeros([BLOCK], ACC)
    for k in tl.static_range(4):
        dx, dy = q % W - x0 - k % 2, q // W - y0 - k // 2
        reads = valid & reaches & (dx >= -RADIUS) & (dx <= RADIUS) & (dy >= -RADIUS) & (dy <= RADIUS)
        channel = LEVEL * SIDE * SIDE + (dx + RADIUS) * SIDE + dy + RADIUS
        g = widen(tl.load(from_grad + channel.to(tl.int64) * gsc, mask=reads, other=0.0), ACC)
        total += g * ((fx if k % 2 == 1 else 1 - fx) * (fy if k >= 2 else 1 - fy))
    tl.store(grad_volume + i * H * W + q, narrow(total, grad_volume.dtype.element_ty), mask=valid)


@triton.jit
def _products(
    features1, features2, coords, patches, height, width, C, asb, asc, asy, asx, sizes, strides,
    LEVELS: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr, K: tl.constexpr, CB: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A tile of pixels at one level: the box around its patches, ``K`` pixels of it at a time.

    Every pixel of the tile is multiplied with all of them, and keeps what lies in its own patch.
    """
    across, down = tl.cdiv(width, SIDE), tl.cdiv(height, SIDE)
    own = tl.program_id(0) % LEVELS
    tile = (tl.program_id(0) // LEVELS) % (across * down)
    b = (tl.program_id(0) // LEVELS // (across * down)).to(tl.int64)
    t = tl.arange(0, SIDE * SIDE)
    px, py = tile % across * SIDE + t % SIDE, tile // across * SIDE + t // SIDE
    there = (px < width) & (py < height)
    row = features1 + b * asb + py.to(INDEX) * asy + px.to(INDEX) * asx
    i = (b * height + py) * width + px
    for level in tl.static_range(LEVELS):
        if own == level:
            _products_of_level(
                row, features2[level] + b * strides[4 * level], coords, patches, b, i, there, C, asc,
                height * width, sizes[2 * level], sizes[2 * level + 1],
                strides[4 * level + 1], strides[4 * level + 2], strides[4 * level + 3],
                level, LEVELS, RADIUS, SIDE, K, CB, ACC, INDEX,
            )  # fmt: skip


@triton.jit
def _products_of_level(
    row, other, coords, patches, b, i, there, C, asc, pixels, H, W, bsc, bsy, bsx,
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, RADIUS: tl.constexpr, SIDE: tl.constexpr, K: tl.constexpr,
    CB: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = 2 * RADIUS + 2
    reaches, x0, y0, _, _ = _centre(coords, b, i - b * pixels, pixels, H, W, there, LEVEL, RADIUS, ACC)
    left, top = x0 - RADIUS, y0 - RADIUS
    x_begin = tl.maximum(tl.min(tl.where(reaches, left, W), 0), 0)
    y_begin = tl.maximum(tl.min(tl.where(reaches, top, H), 0), 0)
    x_end = tl.minimum(tl.max(tl.where(reaches, left + N, 0), 0), W)
    y_end = tl.minimum(tl.max(tl.where(reaches, top + N, 0), 0), H)
    wide = tl.maximum(x_end - x_begin, 1)  # nothing is divided by zero, nor read, in an empty box
    count = tl.maximum(x_end - x_begin, 0) * tl.maximum(y_end - y_begin, 0)
    to = patches + (i * LEVELS + LEVEL) * (N * N)
    scale = 1 / tl.sqrt(tl.cast(C, ACC))
    for start in range(0, count, K):
        k = start + tl.arange(0, K)
        x, y = x_begin + k % wide, y_begin + k // wide
        column = other + y.to(INDEX) * bsy + x.to(INDEX) * bsx
        total = tl.zeros([SIDE * SIDE, K], ACC)
        for c0 in range(0, C, CB):
            c = c0 + tl.arange(0, CB)
            of_own = row[:, None] + (c.to(INDEX) * asc)[None, :]
            of_other = column[None, :] + (c.to(INDEX) * bsc)[:, None]
            mine = tl.load(of_own, mask=reaches[:, None] & (c < C)[None, :], other=0.0)
            read = tl.load(of_other, mask=(k < count)[None, :] & (c < C)[:, None], other=0.0)
            total = product(widen(mine, ACC), widen(read, ACC), total, other.dtype.element_ty)
        dx, dy = x[None, :] - left[:, None], y[None, :] - top[:, None]
        keeps = reaches[:, None] & (k < count)[None, :] & (dx >= 0) & (dx < N) & (dy >= 0) & (dy < N)
        tl.store(to[:, None] + dy * N + dx, total * scale, mask=keeps)


@triton.jit
def _blend(
    patches, coords, out, count, pixels, sizes,
    LEVELS: tl.constexpr, RADIUS: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    SIDE: tl.constexpr = 2 * RADIUS + 1
    N: tl.constexpr = SIDE + 1
    i = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    b, p = i // pixels, i % pixels
    s = tl.arange(0, S)
    mask = (i < count)[:, None] & (s < SIDE * SIDE)[None, :]
    for level in tl.static_range(LEVELS):
        H, W = sizes[2 * level], sizes[2 * level + 1]
        _, _, _, fx, fy = _centre(coords, b, p, pixels, H, W, i < count, level, RADIUS, ACC)
        patch = patches + ((i * LEVELS + level) * (N * N))[:, None] + (s % SIDE * N + s // SIDE)[None, :]
        a, c, d, e = _patch_taps(patch, mask, N)
        value = blend(a, c, d, e, fx, fy)
        to = out + (i * (LEVELS * SIDE * SIDE) + level * SIDE * SIDE)[:, None] + s[None, :]
        tl.store(to, narrow(value, out.dtype.element_ty), mask=mask)


@triton.jit
def _patch_slopes(
    grad, patches, coords, grad_coords, count, pixels, width, sizes, gsb, gsc, gsy, gsx,
    LEVELS: tl.constexpr, RADIUS: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    SIDE: tl.constexpr = 2 * RADIUS + 1
    N: tl.constexpr = SIDE + 1
    i = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    b, p = i // pixels, i % pixels
    s = tl.arange(0, S)
    from_grad = grad + (b * gsb + (p // width) * gsy + (p % width) * gsx)[:, None]
    along_x = tl.zeros([P], ACC)
    along_y = tl.zeros([P], ACC)
    for level in tl.static_range(LEVELS):
        H, W = sizes[2 * level], sizes[2 * level + 1]
        reaches, _, _, fx, fy = _centre(coords, b, p, pixels, H, W, i < count, level, RADIUS, ACC)
        mask = reaches[:, None] & (s < SIDE * SIDE)[None, :]
        patch = patches + ((i * LEVELS + level) * (N * N))[:, None] + (s % SIDE * N + s // SIDE)[None, :]
        a, c, d, e = _patch_taps(patch, mask, N)
        channel = (level * SIDE * SIDE + s).to(tl.int64) * gsc
        g = widen(tl.load(from_grad + channel[None, :], mask=mask, other=0.0), ACC)
        slope_x, slope_y = slope(a, c, d, e, fx, fy)
        along_x += tl.sum(g * slope_x, axis=1) * (1 / 2**level)
        along_y += tl.sum(g * slope_y, axis=1) * (1 / 2**level)
    to = grad_coords + b * 2 * pixels + p
    tl.store(to, along_x, mask=i < count)
    tl.store(to + pixels, along_y, mask=i < count)


@triton.jit
def _patch_gradients(
    grad, coords, patches, count, pixels, width, sizes, gsb, gsc, gsy, gsx,
    LEVELS: tl.constexpr, RADIUS: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    SIDE: tl.constexpr = 2 * RADIUS + 1
    N: tl.constexpr = SIDE + 1
    i = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    b, p = i // pixels, i % pixels
    s = tl.arange(0, S)
    from_grad = grad + (b * gsb + (p // width) * gsy + (p % width) * gsx)[:, None]
    for level in tl.static_range(LEVELS):
        H, W = sizes[2 * level], sizes[2 * level + 1]
        reaches, _, _, fx, fy = _centre(coords, b, p, pixels, H, W, i < count, level, RADIUS, ACC)
        fx, fy = fx[:, None], fy[:, None]
        total = tl.zeros([P, S], ACC)
        for k in tl.static_range(4):
            dx, dy = s % N - k % 2, s // N - k // 2
            valid = (s < N * N) & (dx >= 0) & (dx < SIDE) & (dy >= 0) & (dy < SIDE)
            channel = (level * SIDE * SIDE + dx * SIDE + dy).to(tl.int64) * gsc
            mask = reaches[:, None] & valid[None, :]
            g = widen(tl.load(from_grad + channel[None, :], mask=mask, other=0.0), ACC)
            total += g * ((fx if k % 2 == 1 else 1 - fx) * (fy if k >= 2 else 1 - fy))
        to = patches + ((i * LEVELS + level) * (N * N))[:, None] + s[None, :]
        tl.store(to, total, mask=(i < count)[:, None] & (s < N * N)[None, :])


@triton.jit
def _gradient1(
    patches, features2, coords, undefined, grad_features1, pixels, width, C, sizes, strides,
    osb, osc, osy, osx, LEVELS: tl.constexpr, RADIUS: tl.constexpr, S: tl.constexpr, CB: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = 2 * RADIUS + 2
    blocks = tl.cdiv(C, CB)
    i = (tl.program_id(0) // blocks).to(tl.int64)
    b, p = i // pixels, i % pixels
    c = ((tl.program_id(0) % blocks) * CB + tl.arange(0, CB)).to(INDEX)
    s = tl.arange(0, S)
    total = tl.load(undefined + b * C + c, mask=c < C, other=0.0)
    for level in tl.static_range(LEVELS):
        H, W = sizes[2 * level], sizes[2 * level + 1]
        reaches, x0, y0, _, _ = _centre(coords, b, p, pixels, H, W, b >= 0, level, RADIUS, ACC)
        x, y = x0 - RADIUS + s % N, y0 - RADIUS + s // N
        inside = reaches & (s < N * N) & (x >= 0) & (x < W) & (y >= 0) & (y < H)
        address = features2[level] + b * strides[4 * level]
        address += (y.to(INDEX) * strides[4 * level + 2] + x.to(INDEX) * strides[4 * level + 3])[:, None]
        address += (c * strides[4 * level + 1])[None, :]
        mask = inside[:, None] & (c < C)[None, :]
        pixel = widen(tl.load(address, mask=mask, other=0.0), ACC)
        change = tl.load(patches + (i * LEVELS + level) * (N * N) + s, mask=inside, other=0.0)
        total += tl.sum(tl.where(mask, pixel * change[:, None], 0.0), axis=0)
    total = total * (1 / tl.sqrt(tl.cast(C, ACC)))
    to = grad_features1 + b * osb + (p // width) * osy + (p % width) * osx + c * osc
    tl.store(to, narrow(total, grad_features1.dtype.element_ty), mask=c < C)


@triton.jit
def _count_corners(
    coords, counts, targets, slots, count, pixels, H, W,
    LEVEL: tl.constexpr, RADIUS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Per pixel the corner of its patch (-1 where that does not touch the map), and a place in its list."""
    REACH: tl.constexpr = 2 * RADIUS + 1
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b, p = i // pixels, i % pixels
    reaches, x0, y0, _, _ = _centre(coords, b, p, pixels, H, W, i < count, LEVEL, RADIUS, ACC)
    x, y = x0 - RADIUS + REACH, y0 - RADIUS + REACH
    target = ((b * (H + REACH) + y) * (W + REACH) + x).to(INDEX)
    slot = tl.atomic_add(counts + target, tl.full([BLOCK], 1, INDEX), mask=reaches)
    tl.store(targets + i, tl.where(reaches, target, -1), mask=i < count)
    tl.store(slots + i, slot, mask=i < count)


@triton.jit
def _gradient2(
    patches, features1, coords, counts, ends, readers, undefined, grad_features2, pixels, width, C, H, W,
    asb, asc, asy, asx, osb, osc, osy, osx,
    LEVELS: tl.constexpr, LEVEL: tl.constexpr, RADIUS: tl.constexpr, E: tl.constexpr, CB: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A pixel sums over the patches that hold it: in each row of corners they are one stretch of readers."""
    N: tl.constexpr = 2 * RADIUS + 2
    REACH: tl.constexpr = 2 * RADIUS + 1
    blocks = tl.cdiv(C, CB)
    q = (tl.program_id(0) // blocks).to(tl.int64)
    qx, qy, b = q % W, (q // W) % H, q // W // H
    c = ((tl.program_id(0) % blocks) * CB + tl.arange(0, CB)).to(INDEX)
    total = tl.load(undefined + b * C + c, mask=c < C, other=0.0)
    for j in range(N):  # the pixel lies in row j of these patches
        first = (b * (H + REACH) + qy - j + REACH) * (W + REACH) + qx
        begin = tl.load(ends + first) - tl.load(counts + first)
        end = tl.load(ends + first + REACH)
        for start in range(begin, end, E):
            listed = start + tl.arange(0, E) < end
            p = tl.load(readers + start + tl.arange(0, E), mask=listed, other=0).to(tl.int64)
            x = tl.load(coords + b * 2 * pixels + p, mask=listed, other=0.0) * (1 / 2**LEVEL)
            place = j * N + qx - (tl.floor(x).to(tl.int64) - RADIUS)
            change = tl.load(
                patches + ((b * pixels + p) * LEVELS + LEVEL) * (N * N) + place, mask=listed, other=0.0
            )
            address = (
                features1 + b * asb + ((p // width) * asy + (p % width) * asx)[:, None] + (c * asc)[None, :]
            )
            mask = listed[:, None] & (c < C)[None, :]
            own = widen(tl.load(address, mask=mask, other=0.0), ACC)
            total += tl.sum(tl.where(mask, own * change[:, None], 0.0), axis=0)
    total = total * (1 / tl.sqrt(tl.cast(C, ACC)))
    to = grad_features2 + b * osb + qy * osy + qx * osx + c * osc
    tl.store(to, narrow(total, grad_features2.dtype.element_ty), mask=c < C)
