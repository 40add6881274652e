"""``global_attention`` on the GPU: blocks of keys pass by a block of queries, segment after segment.

Weights are rounded to the storage type before they meet the values, and their sum is that of the rounded
ones: values that agree then give exactly that value, on which the gradients' differences rely. The
gradients' own weights are divided by the exact sum: an error of that would be common to a whole row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gi_kernels import jit
from gi_kernels.jit.device import INTERPRETED, narrow, product, rounded, widen
from gi_kernels.jit.launch import LANGUAGE_DTYPES, index_type, launch, sums
from gi_kernels.precision import accumulation_dtype

#: Segments of one launch; more take several, which hand on their sums.
SEGMENTS = 8
#: Programs below which blocks of queries are made smaller: about two for each multiprocessor.
FEWEST_PROGRAMS = 256
#: Widest heads whose weights are rounded to the storage type, for its matrix units.
WIDEST_ROUNDED = 128
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

Segments = Sequence[torch.Tensor]


def global_attention(
    query: torch.Tensor, keys: Segments, values: Segments
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``gi_triton::global_attention``: the result, what rounding took from it, log-sum-exp of the scores."""
    B, h, N, d = query.shape
    out = query.new_empty(B, N, h, d).transpose(1, 2)
    accumulated = accumulation_dtype(query.dtype)
    remainder = torch.empty_like(out) if accumulated != query.dtype else query.new_empty(0)
    log_sum = query.new_empty(B, h, N, dtype=accumulated)
    if out.numel() == 0:
        return out, remainder, log_sum
    query, segments = _rows(query), _segments(keys, values)
    cut = _blocks(query)
    BM = cut["BM"] if B * h * triton.cdiv(N, cut["BM"]) >= FEWEST_PROGRAMS else min(cut["BM"], 64)
    groups = [segments[i : i + SEGMENTS] for i in range(0, len(segments), SEGMENTS)]
    sizes = (B * h * N * cut["D"], B * h * N) if len(groups) > 1 else (0, 0)
    state = tuple(query.new_empty(n, dtype=accumulated) for n in (*sizes, sizes[1], sizes[1]))
    rounds = remainder.numel() > 0
    for i, group in enumerate(groups):
        tensors, lengths, strides = _arguments(group)
        launch(
            _forward, B * h * triton.cdiv(N, BM), query, *tensors, out, remainder if rounds else out, log_sum,
            *state, h, N, lengths, strides, *query.stride()[:3], *out.stride()[:3],
            S=len(group), FIRST=i == 0, LAST=i == len(groups) - 1, ROUNDS=rounds,
            **_constants(query, *tensors[0], *tensors[1], out), **{**cut, "BM": BM},
        )  # fmt: skip
    return out, remainder, log_sum


def global_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    keys: Segments,
    values: Segments,
    out: torch.Tensor,
    remainder: torch.Tensor,
    log_sum: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """``gi_triton::global_attention_backward``."""
    B, h, N, d = query.shape
    grad_query = query.new_empty(query.shape)
    fresh = torch.zeros if query.numel() == 0 else torch.empty
    grad_keys, grad_values = (
        [fresh(t.shape, dtype=t.dtype, device=t.device) for t in side] for side in (keys, values)
    )
    if query.numel() == 0:
        return grad_query, grad_keys, grad_values
    query, grad, out, log_sum = _rows(query), _rows(grad), _rows(out), log_sum.contiguous()
    rounds = remainder.numel() > 0
    remainder = _rows(remainder) if rounds else out
    constants, cut = _constants(query, grad, *keys, *values), _blocks(query, backward=True)
    delta = torch.empty_like(log_sum)
    launch(
        _differences, B * h * triton.cdiv(N, cut["BM"]), grad, out, remainder, delta, h, N,
        *grad.stride()[:3], *out.stride()[:3], *remainder.stride()[:3],
        ROUNDS=rounds, **constants, **{k: v for k, v in cut.items() if k != "BN"},
    )  # fmt: skip
    segments = _segments(keys, values)
    groups = [segments[i : i + SEGMENTS] for i in range(0, len(segments), SEGMENTS)]
    state = query.new_empty(B * h * N * cut["D"] if len(groups) > 1 else 0, dtype=delta.dtype)
    for i, group in enumerate(groups):
        tensors, lengths, strides = _arguments(group)
        launch(
            _backward_query, B * h * triton.cdiv(N, cut["BM"]), query, *tensors, grad, log_sum, delta,
            grad_query, state, h, N, lengths, strides, *query.stride()[:3], *grad.stride()[:3],
            *grad_query.stride()[:3],
            S=len(group), FIRST=i == 0, LAST=i == len(groups) - 1, **constants, **cut,
        )  # fmt: skip
    for key, value, grad_key, grad_value in zip(keys, values, grad_keys, grad_values, strict=True):
        key, value, M = _rows(key), _rows(value), key.shape[2]
        launch(
            _backward_segment, B * h * triton.cdiv(M, cut["BN"]), query, key, value, grad, log_sum, delta,
            grad_key, grad_value, h, N, M, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            *grad.stride()[:3], *grad_key.stride()[:3], **constants, **cut,
        )  # fmt: skip
    return grad_query, grad_keys, grad_values


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the numbers of a head side by side, copied where they are not."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _segments(keys: Segments, values: Segments) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(_rows(k), _rows(v)) for k, v in zip(keys, values, strict=True) if k.shape[2] > 0]


def _arguments(group: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[tuple, tuple, tuple]:
    """Keys and values, lengths, and the first three strides of each key and value in turn."""
    keys, values = zip(*group, strict=True)
    strides = tuple(s for pair in group for t in pair for s in t.stride()[:3])
    return (keys, values), tuple(k.shape[2] for k in keys), strides


def _constants(query: torch.Tensor, *others: torch.Tensor) -> dict:
    d = query.shape[3]
    # A weight's rounding is common to a whole row: in wide heads it would stand out among the others.
    operands = LANGUAGE_DTYPES[query.dtype] if d <= WIDEST_ROUNDED else sums(query)
    return {
        "SCALE": d**-0.5, "WIDTH": d, "DTYPE": operands,
        "ACC": sums(query), "INDEX": index_type(query, *others),
    }  # fmt: skip


def _blocks(query: torch.Tensor, backward: bool = False) -> dict[str, int]:
    """Queries and keys of a block: what fits the registers beside sums of the head's width."""
    D = max(triton.next_power_of_2(query.shape[3]), 16)
    if query.element_size() > 2 or D > WIDEST_ROUNDED:  # float32 products take three times the registers
        BM, BN, warps, stages = (32, 32, 8, 1) if D <= 64 else (16, 16, 4, 1)
    elif backward:
        BM, BN, warps, stages = 64, 64, 4 if D <= 64 else 8, 2
    else:
        BM, BN, warps, stages = (64, 64, 4, 3) if D < 64 else (128, 64, 8, 3)
    if jit.INTERPRETED:
        BM = BN = 64
    return {"BM": BM, "BN": BN, "D": D, "num_warps": warps, "num_stages": stages}


@triton.jit
def _load_rows(base, row, rows, stride, width, WIDTH: tl.constexpr, INDEX: tl.constexpr):
    mask = (row < rows)[:, None] & (width < WIDTH)[None, :]
    return tl.load(base + (row.to(INDEX) * stride)[:, None] + width[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(base, value, row, rows, stride, width, WIDTH: tl.constexpr, INDEX: tl.constexpr):
    mask = (row < rows)[:, None] & (width < WIDTH)[None, :]
    address = base + (row.to(INDEX) * stride)[:, None] + width[None, :]
    tl.store(address, narrow(value, base.dtype.element_ty), mask=mask)


@triton.jit
def _operand(x, ACC: tl.constexpr):
    """Stored numbers as ``product`` wants them: as they are, but for the interpreter."""
    if INTERPRETED:
        return widen(x, ACC)
    return x


@triton.jit
def _forward(
    query, keys, values, out, remainder, log_sum, state_sum, state_max, state_exact, state_total,
    h, N, lengths, strides, qsb, qsh, qsn, osb, osh, osn,
    S: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, ROUNDS: tl.constexpr,
    SCALE: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BM)
    row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, i = head // h, head % h
    width = tl.arange(0, D)
    scale = tl.full([], SCALE * LOG2E, ACC)  # exponentials of two are the faster ones
    q = _operand(_load_rows(query + b * qsb + i * qsh, row, N, qsn, width, WIDTH, INDEX), ACC)
    if FIRST:
        exact = tl.zeros([BM], ACC)
        total = tl.zeros([BM], ACC)
        largest = tl.full([BM], float("-inf"), ACC)
        sums = tl.zeros([BM, D], ACC)
    else:
        exact = tl.load(state_exact + head * N + row, mask=row < N, other=0.0)
        total = tl.load(state_total + head * N + row, mask=row < N, other=0.0)
        largest = tl.load(state_max + head * N + row, mask=row < N, other=0.0)
        sums = _load_rows(state_sum + head * N * D, row, N, D, width, D, INDEX)
    for s in tl.static_range(S):
        key = keys[s] + b * strides[6 * s] + i * strides[6 * s + 1]
        value = values[s] + b * strides[6 * s + 3] + i * strides[6 * s + 4]
        for start in range(0, lengths[s], BN):
            column = start + tl.arange(0, BN)
            k = _operand(_load_rows(key, column, lengths[s], strides[6 * s + 2], width, WIDTH, INDEX), ACC)
            v = _operand(_load_rows(value, column, lengths[s], strides[6 * s + 5], width, WIDTH, INDEX), ACC)
            scores = product(q, tl.trans(k), tl.zeros([BM, BN], ACC), DTYPE) * scale
            scores = tl.where((column < lengths[s])[None, :], scores, float("-inf"))
            now = tl.maximum(largest, tl.max(scores, axis=1))
            reference = tl.where(now == float("-inf"), 0.0, now)  # only infinitely small scores so far
            weights = tl.exp2(scores - reference[:, None])
            keep = tl.exp2(largest - reference)
            exact = exact * keep + tl.sum(weights, axis=1)
            weights = rounded(weights, DTYPE, ACC)
            total = total * keep + tl.sum(weights, axis=1)
            sums = product(weights, v, sums * keep[:, None], DTYPE)
            largest = now
    if LAST:
        value = sums / total[:, None]
        target = b * osb + i * osh
        _store_rows(out + target, value, row, N, osn, width, WIDTH, INDEX)
        if ROUNDS:
            lost = value - rounded(value, out.dtype.element_ty, ACC)
            _store_rows(remainder + target, lost, row, N, osn, width, WIDTH, INDEX)
        logarithm = (largest + tl.log2(exact)) * tl.full([], LN2, ACC)
        tl.store(log_sum + head * N + row, logarithm, mask=row < N)
    else:
        _store_rows(state_sum + head * N * D, sums, row, N, D, width, D, INDEX)
        tl.store(state_max + head * N + row, largest, mask=row < N)
        tl.store(state_exact + head * N + row, exact, mask=row < N)
        tl.store(state_total + head * N + row, total, mask=row < N)


@triton.jit
def _differences(
    grad, out, remainder, delta, h, N, gsb, gsh, gsn, osb, osh, osn, rsb, rsh, rsn,
    ROUNDS: tl.constexpr,
    SCALE: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Per query the product of the gradient with the result before it was rounded."""
    blocks = tl.cdiv(N, BM)
    row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, i = head // h, head % h
    width = tl.arange(0, D)
    g = widen(_load_rows(grad + b * gsb + i * gsh, row, N, gsn, width, WIDTH, INDEX), ACC)
    value = widen(_load_rows(out + b * osb + i * osh, row, N, osn, width, WIDTH, INDEX), ACC)
    if ROUNDS:
        value += widen(_load_rows(remainder + b * rsb + i * rsh, row, N, rsn, width, WIDTH, INDEX), ACC)
    tl.store(delta + head * N + row, tl.sum(g * value, axis=1), mask=row < N)


@triton.jit
def _backward_query(
    query, keys, values, grad, log_sum, delta, grad_query, state, h, N, lengths, strides,
    qsb, qsh, qsn, gsb, gsh, gsn, osb, osh, osn,
    S: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    SCALE: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BM)
    row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, i = head // h, head % h
    width = tl.arange(0, D)
    scale = tl.full([], SCALE * LOG2E, ACC)
    q = _operand(_load_rows(query + b * qsb + i * qsh, row, N, qsn, width, WIDTH, INDEX), ACC)
    g = _operand(_load_rows(grad + b * gsb + i * gsh, row, N, gsn, width, WIDTH, INDEX), ACC)
    logarithm = tl.load(log_sum + head * N + row, mask=row < N, other=0.0) * tl.full([], LOG2E, ACC)
    mean = tl.load(delta + head * N + row, mask=row < N, other=0.0)
    if FIRST:
        sums = tl.zeros([BM, D], ACC)
    else:
        sums = _load_rows(state + head * N * D, row, N, D, width, D, INDEX)
    for s in tl.static_range(S):
        key = keys[s] + b * strides[6 * s] + i * strides[6 * s + 1]
        value = values[s] + b * strides[6 * s + 3] + i * strides[6 * s + 4]
        for start in range(0, lengths[s], BN):
            column = start + tl.arange(0, BN)
            k = _operand(_load_rows(key, column, lengths[s], strides[6 * s + 2], width, WIDTH, INDEX), ACC)
            v = _operand(_load_rows(value, column, lengths[s], strides[6 * s + 5], width, WIDTH, INDEX), ACC)
            scores = product(q, tl.trans(k), tl.zeros([BM, BN], ACC), DTYPE) * scale
            weights = tl.exp2(scores - logarithm[:, None])
            change = product(g, tl.trans(v), tl.zeros([BM, BN], ACC), DTYPE) - mean[:, None]
            change = tl.where((column < lengths[s])[None, :], weights * change, 0.0)
            sums = product(rounded(change, DTYPE, ACC), k, sums, DTYPE)
    if LAST:
        sums *= tl.full([], SCALE, ACC)
        _store_rows(grad_query + b * osb + i * osh, sums, row, N, osn, width, WIDTH, INDEX)
    else:
        _store_rows(state + head * N * D, sums, row, N, D, width, D, INDEX)


@triton.jit
def _backward_segment(
    query, key, value, grad, log_sum, delta, grad_key, grad_value, h, N, M,
    qsb, qsh, qsn, ksb, ksh, ksn, vsb, vsh, vsn, gsb, gsh, gsn, osb, osh, osn,
    SCALE: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values; all queries pass by."""
    blocks = tl.cdiv(M, BN)
    column = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, i = head // h, head % h
    width = tl.arange(0, D)
    scale = tl.full([], SCALE * LOG2E, ACC)
    k = _operand(_load_rows(key + b * ksb + i * ksh, column, M, ksn, width, WIDTH, INDEX), ACC)
    v = _operand(_load_rows(value + b * vsb + i * vsh, column, M, vsn, width, WIDTH, INDEX), ACC)
    key_sums = tl.zeros([BN, D], ACC)
    value_sums = tl.zeros([BN, D], ACC)
    for start in range(0, N, BM):
        row = start + tl.arange(0, BM)
        q = _operand(_load_rows(query + b * qsb + i * qsh, row, N, qsn, width, WIDTH, INDEX), ACC)
        g = _operand(_load_rows(grad + b * gsb + i * gsh, row, N, gsn, width, WIDTH, INDEX), ACC)
        logarithm = tl.load(log_sum + head * N + row, mask=row < N, other=0.0) * tl.full([], LOG2E, ACC)
        mean = tl.load(delta + head * N + row, mask=row < N, other=0.0)
        scores = product(k, tl.trans(q), tl.zeros([BN, BM], ACC), DTYPE) * scale
        weights = tl.where((row < N)[None, :], tl.exp2(scores - logarithm[None, :]), 0.0)
        value_sums = product(rounded(weights, DTYPE, ACC), g, value_sums, DTYPE)
        change = weights * (product(v, tl.trans(g), tl.zeros([BN, BM], ACC), DTYPE) - mean[None, :])
        key_sums = product(rounded(change, DTYPE, ACC), q, key_sums, DTYPE)
    target = b * osb + i * osh
    key_sums *= tl.full([], SCALE, ACC)
    _store_rows(grad_key + target, key_sums, column, M, osn, width, WIDTH, INDEX)
    _store_rows(grad_value + target, value_sums, column, M, osn, width, WIDTH, INDEX)
