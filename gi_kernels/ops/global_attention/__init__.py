"""Attention over segments of keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gi_kernels import checks, dispatch, native
from gi_kernels.ops.global_attention import reference
from gi_kernels.precision import accumulation_dtype, autocast

#: Widest head of the Triton kernel.
WIDEST_HEAD = 256


def global_attention(
    query: torch.Tensor,
    keys: torch.Tensor | Sequence[torch.Tensor],
    values: torch.Tensor | Sequence[torch.Tensor],
) -> torch.Tensor:
    r"""Softmax attention of ``query`` over the concatenation of key/value segments.

    .. math:: out = \mathrm{softmax}(q k^T / \sqrt{d}) \, v, \quad
        k = [k_1; \dots; k_S], \; v = [v_1; \dots; v_S]

    The segments are never concatenated and no score matrix is kept: the softmax goes on from one
    block of keys to the next.

    Args:
        query: ``[B, h, N, d]``, float32, float64, bfloat16 or float16, any strides.
        keys, values: a tensor ``[B, h, M, d]`` or a sequence of tensors ``[B, h, M_i, d]``, one
            value segment per key segment; the dtype of ``query``. Segments may be empty, but not
            all of them.

    Returns:
        ``[B, h, N, d]`` in the dtype of ``query``. Under autocast all three are cast to its dtype.

    Differentiable once in all arguments.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size, dtype or device, or no key.

    Source: Dao, "FlashAttention-2", 2023; Milakov and Gimelshein, "Online normalizer calculation for
    softmax", 2018.
    """
    keys, values = checks.tensor_sequence("keys", keys), checks.tensor_sequence("values", values)
    if len(keys) != len(values):
        raise ValueError(f"values: expected {len(keys)} segments like keys, got {len(values)}")
    named = {f"keys[{i}]": k for i, k in enumerate(keys)} | {f"values[{i}]": v for i, v in enumerate(values)}
    query, *rest = autocast(query=query, **named)
    keys, values = rest[: len(keys)], rest[len(keys) :]
    checks.shapes(
        ("query", query, "B h N d"),
        *((f"keys[{i}]", k, f"B h M{i} d") for i, k in enumerate(keys)),
        *((f"values[{i}]", v, f"B h M{i} d") for i, v in enumerate(values)),
    )
    checks.nonempty("query", query, 3)
    checks.same_dtype(("query", query), *zip(named, rest, strict=True))
    if sum(k.shape[2] for k in keys) == 0:
        raise ValueError("keys: expected at least one key in all segments together, got none")
    return dispatch.run(OPERATOR, query, keys, values)


def _cpp(query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    return torch.ops.gi.global_attention(query, keys, values)[0]


def _triton(query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]) -> torch.Tensor:
    return torch.ops.gi_triton.global_attention(query, keys, values)[0]


def _triton_limit(tensors: list[torch.Tensor]) -> str | None:
    width = tensors[0].shape[3]
    return (
        f"heads of at most {WIDEST_HEAD} numbers fit a block, these have {width}"
        if width > WIDEST_HEAD
        else None
    )


OPERATOR = dispatch.Operator(
    "global_attention",
    {"triton": _triton, "cpp": _cpp, "reference": reference.global_attention},
    limits={"triton": _triton_limit},
)


def _fake(query, keys, values):
    B, h, N, d = query.shape
    output, remainder = (query.new_empty(B, N, h, d).transpose(1, 2) for _ in range(2))
    accumulated = accumulation_dtype(query.dtype)
    if accumulated == query.dtype:
        remainder = query.new_empty(0)
    return output, remainder, query.new_empty(B, h, N, dtype=accumulated)


def _fake_backward(grad, query, keys, values, output, remainder, log_sum):
    return (
        query.new_empty(query.shape),
        [k.new_empty(k.shape) for k in keys],
        [v.new_empty(v.shape) for v in values],
    )


def _setup_context(ctx, inputs, output):
    query, keys, values = inputs
    ctx.segments = len(keys)
    ctx.save_for_backward(query, *keys, *values, *output)


def _backward(ops, ctx, grad, *_):
    query, *rest, output, remainder, log_sum = ctx.saved_tensors
    keys, values = rest[: ctx.segments], rest[ctx.segments :]
    return ops.global_attention_backward(grad, query, keys, values, output, remainder, log_sum)


native.register(
    "global_attention",
    _fake,
    _setup_context,
    _backward,
    triton="(Tensor query, Tensor[] keys, Tensor[] values) -> (Tensor, Tensor, Tensor)",
)
native.register(
    "global_attention_backward",
    _fake_backward,
    triton="(Tensor grad, Tensor query, Tensor[] keys, Tensor[] values, Tensor output, Tensor remainder, "
    "Tensor log_sum) -> (Tensor, Tensor[], Tensor[])",
)
