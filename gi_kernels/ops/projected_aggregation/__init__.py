"""Projection of references and their aggregation along optical flow, in one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gi_kernels import checks, dispatch, native
from gi_kernels.ops.pixel_projection.reference import pixel_projection
from gi_kernels.ops.projected_aggregation import reference
from gi_kernels.precision import accumulation_dtype, autocast


def projected_aggregation(
    features: torch.Tensor,
    references: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    flows: torch.Tensor,
    errors: torch.Tensor,
    key_error_weight: torch.Tensor,
    value_error_weight: torch.Tensor,
    value_bias: torch.Tensor,
) -> torch.Tensor:
    r"""Project references to keys and values, and aggregate these along flow.

    .. math:: out = \mathrm{deformable\_aggregation}(features, W_k s, W_v s, flows, errors, \dots)

    with ``s`` the references and ``W s`` a product at every pixel, a 1x1 convolution without bias. On the
    CPU in float32 and float64, keys and values exist for a block of channels at a time only: the result needs
    a fraction of their memory, and so do its gradients, which make them again. Where keys and values
    serve several targets, project once and call :func:`deformable_aggregation` for each.

    Args:
        features: ``[B, C, H, W]``, float32, float64, bfloat16 or float16.
        references: ``[B, T, R, H, W]``, the dtype of ``features``, T at least 1; any layout,
            channels-last is fastest.
        key_weight, value_weight: ``[C, R]``, the dtype of ``features``.
        flows, errors, key_error_weight, value_error_weight, value_bias: as for
            :func:`deformable_aggregation`.

    Returns:
        ``[B, C, H, W]`` in the dtype and layout of ``features``. Low precision rounds keys and values
        to the dtype of ``features``. Under autocast features, references and the two projections'
        weights are cast to its dtype, the others are not.

    Differentiable once in all arguments.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size, dtype or device.

    Source: the deformable feature aggregation of Esser, Michael, Sengupta, "Towards Unified
    Keyframe Propagation Models", 2022; its 1x1 convolutions commute with the warp.
    """
    features, references, key_weight, value_weight = autocast(
        features=features, references=references, key_weight=key_weight, value_weight=value_weight
    )
    size = checks.shapes(
        ("features", features, "B C H W"),
        ("references", references, "B T R H W"),
        ("key_weight", key_weight, "C R"),
        ("value_weight", value_weight, "C R"),
        ("flows", flows, "B T 2 h w"),
        ("errors", errors, "B T 1 h' w'"),
        ("key_error_weight", key_error_weight, "C"),
        ("value_error_weight", value_error_weight, "C"),
        ("value_bias", value_bias, "C"),
    )
    checks.same_dtype(
        ("features", features),
        ("references", references),
        ("key_weight", key_weight),
        ("value_weight", value_weight),
    )
    checks.nonempty("references", references, 1)
    if size["H"] * size["W"] > 0:
        checks.nonempty("flows", flows, 3, 4)
        checks.nonempty("errors", errors, 3, 4)
    dtype = accumulation_dtype(features.dtype)
    rest = (flows, errors, key_error_weight, value_error_weight, value_bias)
    return dispatch.run(
        OPERATOR, features, references, key_weight, value_weight, *(t.to(dtype) for t in rest)
    )


def _cpp(*args: torch.Tensor) -> torch.Tensor:
    return torch.ops.gi.projected_aggregation(*args)


def _on_a_gpu(namespace: str) -> Callable[..., torch.Tensor]:
    """PyTorch's product, then the aggregation of ``namespace``.

    Keys and values exist whole there: one large product per reference is what a GPU does best, and
    its memory is not short of them. The operators know their gradients.
    """

    def run(
        features: torch.Tensor,
        references: torch.Tensor,
        key_weight: torch.Tensor,
        value_weight: torch.Tensor,
        *rest: torch.Tensor,
    ) -> torch.Tensor:
        maps = references.flatten(0, 1)
        keys, values = (
            pixel_projection(maps, weight).unflatten(0, references.shape[:2])
            for weight in (key_weight, value_weight)
        )
        return getattr(torch.ops, namespace).deformable_aggregation(features, keys, values, *rest)

    return run


OPERATOR = dispatch.Operator(
    "projected_aggregation",
    {
        "cuda": _on_a_gpu("gi"),
        "triton": _on_a_gpu("gi_triton"),
        "cpp": _cpp,
        "reference": reference.projected_aggregation,
    },
)


def _fake(features, *_):
    return torch.empty_like(features)


def _fake_backward(grad, features, references, key_weight, value_weight, flows, errors, *rest):
    *_, need_references, need_weights, need_maps = rest
    B, T, R, H, W = references.shape
    if not need_references:
        grad_references = references.new_empty(0)
    elif references.stride(2) == 1:
        grad_references = references.new_empty(B, T, H, W, R).permute(0, 1, 4, 2, 3)
    else:
        grad_references = references.new_empty(B, T, R, H, W)
    return (
        grad_references,
        *(w.new_empty(w.shape if need_weights else 0) for w in (key_weight, value_weight)),
        *(m.new_empty(m.shape if need_maps else 0) for m in (flows, errors)),
        flows.new_empty(3, features.shape[1]),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ops, ctx, grad):
    need = ctx.needs_input_grad
    gradients = [None] * 8
    if any(need[1:]):
        wanted = (need[1], need[2] or need[3], need[4] or need[5])
        *parts, vectors = ops.projected_aggregation_backward(grad, *ctx.saved_tensors, *wanted)
        gradients = [*parts, *vectors]
    return grad, *(g if n else None for g, n in zip(gradients, need[1:], strict=True))


native.register("projected_aggregation", _fake, _setup_context, _backward)
native.register("projected_aggregation_backward", _fake_backward)
