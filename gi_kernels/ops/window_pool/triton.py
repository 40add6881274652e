"""``window_pool`` on the GPU, and the kernels that ``window_spread`` shares with it.

A map [B,C,H,W] is cut into windows; per window there are vectors [h,C], and weights [h,P] that tie them
to its P pixels: the softmax of the logits over the window, or their sigmoid. Three products occur:
``gather`` makes vectors from weights and map, ``spread`` a map from weights and vectors, and ``dots``
the gradient of the weights from vectors and map.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gi_kernels import jit
from gi_kernels.jit.device import narrow, product, widen
from gi_kernels.jit.launch import index_type, launch, sums

#: Heads of a block: the smallest number of rows of a matrix instruction.
HEADS = 16


def window_pool(logits: torch.Tensor, features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``gi_triton::window_pool``."""
    out = features.new_empty(features.shape[0], rows * columns, logits.shape[1], features.shape[1])
    gather(logits, features, out, rows, columns, softmax=True)
    return out


def window_pool_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    features: torch.Tensor,
    rows: int,
    columns: int,
    need_logits: bool,
    need_features: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``gi_triton::window_pool_backward``."""
    grad_logits, grad_features = logits.new_empty(0), features.new_empty(0)
    log_sums = _log_sums(logits, rows, columns)
    if need_features:
        grad_features = torch.empty_like(features)
        spread(logits, grad, grad_features, rows, columns, log_sums)
    if need_logits:
        grad_logits = torch.empty_like(logits)
        weight_gradients = torch.empty(logits.shape, dtype=log_sums.dtype, device=logits.device)
        dots(logits, grad, features, weight_gradients, rows, columns, sigmoid=False)
        B, h, H, W = logits.shape
        launch(
            _softmax_backward, B * rows * columns * triton.cdiv(h, HEADS), logits, log_sums, weight_gradients,
            grad_logits, h, H // rows, W // columns, rows, columns,
            *logits.stride(), *weight_gradients.stride(), *grad_logits.stride(),
            **_constants(logits, logits, grad_logits),
        )  # fmt: skip
    return grad_logits, grad_features


def gather(
    logits: torch.Tensor, maps: torch.Tensor, vectors: torch.Tensor, rows: int, columns: int, softmax: bool
) -> None:
    """Write to ``vectors`` [B,windows,h,C] the weighted sums of ``maps`` [B,C,H,W] over the windows."""
    B, C, H, W = maps.shape
    h, cut = logits.shape[1], _cut(maps, rows, columns)
    blocks = triton.cdiv(C, cut["CB"]) * triton.cdiv(h, HEADS)
    launch(
        _gather, blocks * rows * columns * B, logits, maps, vectors,
        h, C, H // rows, W // columns, rows, columns, triton.cdiv(C, cut["CB"]),
        *logits.stride(), *maps.stride(), *vectors.stride(),
        SOFTMAX=softmax, **cut, **_constants(maps, logits, maps, vectors),
    )  # fmt: skip


def spread(
    logits: torch.Tensor,
    vectors: torch.Tensor,
    maps: torch.Tensor,
    rows: int,
    columns: int,
    log_sums: torch.Tensor | None,
) -> None:
    """Write to ``maps`` the weighted sums of their windows' ``vectors`` over the heads."""
    B, C, H, W = maps.shape
    cut = _cut(maps, rows, columns)
    pixel_blocks = triton.cdiv((H // rows) * (W // columns), cut["PB"])
    launch(
        _spread, triton.cdiv(C, cut["CB"]) * pixel_blocks * rows * columns * B, logits, vectors, maps,
        vectors if log_sums is None else log_sums,
        logits.shape[1], C, H // rows, W // columns, rows, columns, triton.cdiv(C, cut["CB"]), pixel_blocks,
        *logits.stride(), *vectors.stride(), *maps.stride(),
        SOFTMAX=log_sums is not None, **cut, **_constants(maps, logits, maps, vectors),
    )  # fmt: skip


def dots(
    logits: torch.Tensor,
    vectors: torch.Tensor,
    maps: torch.Tensor,
    out: torch.Tensor,
    rows: int,
    columns: int,
    sigmoid: bool,
) -> None:
    """Write to ``out`` [B,h,H,W] products of vectors and pixels, for a sigmoid's logits its gradient."""
    B, C, H, W = maps.shape
    h, cut = logits.shape[1], _cut(maps, rows, columns)
    pixel_blocks = triton.cdiv((H // rows) * (W // columns), cut["PB"])
    launch(
        _dots, pixel_blocks * rows * columns * B * triton.cdiv(h, HEADS), logits, vectors, maps, out,
        h, C, H // rows, W // columns, rows, columns, pixel_blocks,
        *logits.stride(), *vectors.stride(), *maps.stride(), *out.stride(),
        SIGMOID=sigmoid, **cut, **_constants(maps, logits, maps, vectors, out),
    )  # fmt: skip


def _log_sums(logits: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Log-sum-exp of the logits of each window, [B,windows,h]."""
    B, h, H, W = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    out = torch.empty(B, rows * columns, h, dtype=dtype, device=logits.device)
    launch(
        _log_sum, B * rows * columns * triton.cdiv(h, HEADS), logits, out,
        h, H // rows, W // columns, rows, columns, *logits.stride(), **_constants(logits, logits),
    )  # fmt: skip
    return out


def _cut(maps: torch.Tensor, rows: int, columns: int) -> dict[str, int]:
    """Pixels and channels of a block."""
    C, pixels = maps.shape[1], (maps.shape[2] // rows) * (maps.shape[3] // columns)
    most = (256, 256) if jit.INTERPRETED else (64, 64)
    return {
        "PB": min(most[0], triton.next_power_of_2(max(pixels, 16))),
        "CB": min(most[1], triton.next_power_of_2(max(C, 16))),
    }


def _constants(like: torch.Tensor, *tensors: torch.Tensor) -> dict:
    return {"ACC": sums(like), "INDEX": index_type(*tensors), "HB": HEADS}


@triton.jit
def _pixels(window, start, height, width, columns, PB: tl.constexpr, INDEX: tl.constexpr):
    """Rows and columns of a block of pixels of a window, and which there are."""
    j = start + tl.arange(0, PB)
    y = (window // columns) * height + j // width
    x = (window % columns) * width + j % width
    return y.to(INDEX), x.to(INDEX), j < height * width


@triton.jit
def _load_logits(logits, head, heads, y, x, there, lsh, lsy, lsx, ACC: tl.constexpr, INDEX: tl.constexpr):
    """Logits [HB,PB], minus infinity where there are none."""
    address = logits + (head.to(INDEX) * lsh)[:, None] + (y * lsy + x * lsx)[None, :]
    mask = (head < heads)[:, None] & there[None, :]
    return tl.where(mask, widen(tl.load(address, mask=mask, other=0.0), ACC), float("-inf"))


@triton.jit
def _load(base, first, first_there, second, second_there, ACC: tl.constexpr):
    """Numbers at the sums of two lists of offsets."""
    mask = first_there[:, None] & second_there[None, :]
    return widen(tl.load(base + first[:, None] + second[None, :], mask=mask, other=0.0), ACC)


@triton.jit
def _store(base, value, first, first_there, second, second_there):
    mask = first_there[:, None] & second_there[None, :]
    tl.store(base + first[:, None] + second[None, :], narrow(value, base.dtype.element_ty), mask=mask)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _gather(
    logits, maps, vectors, heads, C, height, width, rows, columns, channel_blocks,
    lsb, lsh, lsy, lsx, msb, msc, msy, msx, vsb, vsl, vsh, vsc,
    SOFTMAX: tl.constexpr, PB: tl.constexpr, CB: tl.constexpr, HB: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    c = ((program % channel_blocks) * CB + tl.arange(0, CB)).to(INDEX)
    program = program // channel_blocks
    window = program % (rows * columns)
    program = program // (rows * columns)
    head_blocks = tl.cdiv(heads, HB)
    head = (program % head_blocks) * HB + tl.arange(0, HB)
    b = (program // head_blocks).to(tl.int64)
    largest = tl.full([HB], float("-inf"), ACC)
    total = tl.zeros([HB], ACC)
    sums = tl.zeros([HB, CB], ACC)
    for start in range(0, height * width, PB):
        y, x, there = _pixels(window, start, height, width, columns, PB, INDEX)
        logit = _load_logits(logits + b * lsb, head, heads, y, x, there, lsh, lsy, lsx, ACC, INDEX)
        pixels = _load(maps + b * msb, y * msy + x * msx, there, c * msc, c < C, ACC)
        if SOFTMAX:
            now = tl.maximum(largest, tl.max(logit, axis=1))
            reference = tl.where(now == float("-inf"), 0.0, now)
            keep = tl.exp(largest - reference)
            weights = tl.exp(logit - reference[:, None])
            total = total * keep + tl.sum(weights, axis=1)
            sums = sums * keep[:, None]
            largest = now
        else:
            weights = _sigmoid(logit)
        sums = product(weights, pixels, sums, ACC)
    if SOFTMAX:
        sums = sums / total[:, None]
    target = vectors + b * vsb + window.to(tl.int64) * vsl
    _store(target, sums, head.to(INDEX) * vsh, head < heads, c * vsc, c < C)


@triton.jit
def _spread(
    logits, vectors, maps, log_sums, heads, C, height, width, rows, columns, channel_blocks, pixel_blocks,
    lsb, lsh, lsy, lsx, vsb, vsl, vsh, vsc, msb, msc, msy, msx,
    SOFTMAX: tl.constexpr, PB: tl.constexpr, CB: tl.constexpr, HB: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    c = ((program % channel_blocks) * CB + tl.arange(0, CB)).to(INDEX)
    program = program // channel_blocks
    block = program % pixel_blocks
    program = program // pixel_blocks
    window = program % (rows * columns)
    b = (program // (rows * columns)).to(tl.int64)
    y, x, there = _pixels(window, block * PB, height, width, columns, PB, INDEX)
    vector = vectors + b * vsb + window.to(tl.int64) * vsl
    sums = tl.zeros([PB, CB], ACC)
    for first in range(0, heads, HB):
        head = first + tl.arange(0, HB)
        logit = _load_logits(logits + b * lsb, head, heads, y, x, there, lsh, lsy, lsx, ACC, INDEX)
        if SOFTMAX:
            address = log_sums + (b * rows * columns + window) * heads + head
            weights = tl.exp(logit - tl.load(address, mask=head < heads, other=0.0)[:, None])
        else:
            weights = _sigmoid(logit)
        v = _load(vector, head.to(INDEX) * vsh, head < heads, c * vsc, c < C, ACC)
        sums = product(tl.trans(weights), v, sums, ACC)
    _store(maps + b * msb, sums, y * msy + x * msx, there, c * msc, c < C)


@triton.jit
def _dots(
    logits, vectors, maps, out, heads, C, height, width, rows, columns, pixel_blocks,
    lsb, lsh, lsy, lsx, vsb, vsl, vsh, vsc, msb, msc, msy, msx, osb, osh, osy, osx,
    SIGMOID: tl.constexpr, PB: tl.constexpr, CB: tl.constexpr, HB: tl.constexpr,
    ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program % pixel_blocks
    program = program // pixel_blocks
    window = program % (rows * columns)
    program = program // (rows * columns)
    head_blocks = tl.cdiv(heads, HB)
    head = (program % head_blocks) * HB + tl.arange(0, HB)
    b = (program // head_blocks).to(tl.int64)
    y, x, there = _pixels(window, block * PB, height, width, columns, PB, INDEX)
    vector = vectors + b * vsb + window.to(tl.int64) * vsl
    sums = tl.zeros([HB, PB], ACC)
    for c0 in range(0, C, CB):
        c = (c0 + tl.arange(0, CB)).to(INDEX)
        v = _load(vector, head.to(INDEX) * vsh, head < heads, c * vsc, c < C, ACC)
        pixels = _load(maps + b * msb, y * msy + x * msx, there, c * msc, c < C, ACC)
        sums = product(v, tl.trans(pixels), sums, ACC)
    if SIGMOID:
        gate = _sigmoid(_load_logits(logits + b * lsb, head, heads, y, x, there, lsh, lsy, lsx, ACC, INDEX))
        sums = sums * gate * (1 - gate)
    _store(out + b * osb, sums, head.to(INDEX) * osh, head < heads, y * osy + x * osx, there)


@triton.jit
def _log_sum(
    logits, out, heads, height, width, rows, columns, lsb, lsh, lsy, lsx,
    HB: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0) % (rows * columns)
    head_blocks = tl.cdiv(heads, HB)
    program = tl.program_id(0) // (rows * columns)
    head = (program % head_blocks) * HB + tl.arange(0, HB)
    b = (program // head_blocks).to(tl.int64)
    largest = tl.full([HB], float("-inf"), ACC)
    total = tl.zeros([HB], ACC)
    for start in range(0, height * width, 64):
        y, x, there = _pixels(window, start, height, width, columns, 64, INDEX)
        logit = _load_logits(logits + b * lsb, head, heads, y, x, there, lsh, lsy, lsx, ACC, INDEX)
        now = tl.maximum(largest, tl.max(logit, axis=1))
        reference = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(largest - reference) + tl.sum(tl.exp(logit - reference[:, None]), axis=1)
        largest = now
    tl.store(out + (b * rows * columns + window) * heads + head, largest + tl.log(total), mask=head < heads)


@triton.jit
def _softmax_backward(
    logits, log_sums, weight_gradients, out, heads, height, width, rows, columns,
    lsb, lsh, lsy, lsx, wsb, wsh, wsy, wsx, osb, osh, osy, osx,
    HB: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    window = tl.program_id(0) % (rows * columns)
    head_blocks = tl.cdiv(heads, HB)
    program = tl.program_id(0) // (rows * columns)
    head = (program % head_blocks) * HB + tl.arange(0, HB)
    b = (program // head_blocks).to(tl.int64)
    address = log_sums + (b * rows * columns + window) * heads + head
    log_sum = tl.load(address, mask=head < heads, other=0.0)[:, None]
    mean = tl.zeros([HB], ACC)
    for start in range(0, height * width, 64):
        y, x, there = _pixels(window, start, height, width, columns, 64, INDEX)
        logit = _load_logits(logits + b * lsb, head, heads, y, x, there, lsh, lsy, lsx, ACC, INDEX)
        change = _load(
            weight_gradients + b * wsb, head.to(INDEX) * wsh, head < heads, y * wsy + x * wsx, there, ACC
        )
        mean += tl.sum(tl.exp(logit - log_sum) * change, axis=1)
    for start in range(0, height * width, 64):
        y, x, there = _pixels(window, start, height, width, columns, 64, INDEX)
        logit = _load_logits(logits + b * lsb, head, heads, y, x, there, lsh, lsy, lsx, ACC, INDEX)
        change = _load(
            weight_gradients + b * wsb, head.to(INDEX) * wsh, head < heads, y * wsy + x * wsx, there, ACC
        )
        value = tl.exp(logit - log_sum) * (change - mean[:, None])
        _store(out + b * osb, value, head.to(INDEX) * osh, head < heads, y * osy + x * osx, there)
