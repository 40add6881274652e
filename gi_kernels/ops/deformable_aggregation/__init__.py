"""Aggregation of references along optical flow."""

from __future__ import annotations

import torch

from gi_kernels import checks, dispatch, native
from gi_kernels.ops.deformable_aggregation import reference
from gi_kernels.precision import accumulation_dtype, autocast


def deformable_aggregation(
    features: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    flows: torch.Tensor,
    errors: torch.Tensor,
    key_error_weight: torch.Tensor,
    value_error_weight: torch.Tensor,
    value_bias: torch.Tensor,
) -> torch.Tensor:
    r"""Add to ``features`` what references show at the positions the flow points to.

    .. math:: out = features + value\_bias + \sum_t a_t \odot (\mathrm{warp}(values_t, flow_t)
        + e_t \, value\_error\_weight), \quad
        a = \mathrm{softmax}_t(\mathrm{warp}(keys_t, flow_t) + e_t \, key\_error\_weight)

    The softmax is per pixel and channel over the references; ``warp`` is :func:`flow_warp`, ``e``
    the error map resized bilinearly (``align_corners=True``, values not rescaled).

    Args:
        features: ``[B, C, H, W]``, float32, float64, bfloat16 or float16.
        keys, values: ``[B, T, C, H, W]``, the dtype of ``features``, T at least 1. Fastest where the
            channels are contiguous in memory.
        flows: ``[B, T, 2, h, w]`` in pixels of their own grid, x first; any floating dtype.
        errors: ``[B, T, 1, h', w']``; any floating dtype.
        key_error_weight, value_error_weight, value_bias: ``[C]``; any floating dtype.

    Returns:
        ``[B, C, H, W]`` in the dtype and layout of ``features``. Flows, errors, weights, softmax and
        sums are float32 (float64 for float64 features). Under autocast features, keys and values
        are cast to its dtype, the others are not.

    Differentiable once in all arguments.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size, dtype or device.

    Source: the deformable feature aggregation of Esser, Michael, Sengupta, "Towards Unified
    Keyframe Propagation Models", 2022, after projection (a 1x1 convolution commutes with the warp).
    """
    features, keys, values = autocast(features=features, keys=keys, values=values)
    size = checks.shapes(
        ("features", features, "B C H W"),
        ("keys", keys, "B T C H W"),
        ("values", values, "B T C H W"),
        ("flows", flows, "B T 2 h w"),
        ("errors", errors, "B T 1 h' w'"),
        ("key_error_weight", key_error_weight, "C"),
        ("value_error_weight", value_error_weight, "C"),
        ("value_bias", value_bias, "C"),
    )
    checks.same_dtype(("features", features), ("keys", keys), ("values", values))
    checks.nonempty("keys", keys, 1)
    if size["H"] * size["W"] > 0:
        checks.nonempty("flows", flows, 3, 4)
        checks.nonempty("errors", errors, 3, 4)
    dtype = accumulation_dtype(features.dtype)
    rest = (flows, errors, key_error_weight, value_error_weight, value_bias)
    return dispatch.run(OPERATOR, features, keys, values, *(t.to(dtype) for t in rest))


def _cpp(*args: torch.Tensor) -> torch.Tensor:
    return torch.ops.gi.deformable_aggregation(*args)


def _triton(*args: torch.Tensor) -> torch.Tensor:
    return torch.ops.gi_triton.deformable_aggregation(*args)


OPERATOR = dispatch.Operator(
    "deformable_aggregation", {"triton": _triton, "cpp": _cpp, "reference": reference.deformable_aggregation}
)


def _fake(features, *_):
    return torch.empty_like(features)


def _fake_backward(grad, features, keys, values, flows, errors, *rest):
    *weights, need_sources, need_maps = rest
    return (
        torch.empty_like(keys) if need_sources else keys.new_empty(0),
        torch.empty_like(values) if need_sources else keys.new_empty(0),
        flows.new_empty(flows.shape) if need_maps else flows.new_empty(0),
        errors.new_empty(errors.shape) if need_maps else flows.new_empty(0),
        flows.new_empty(3, keys.shape[2]),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ops, ctx, grad):
    need = ctx.needs_input_grad
    sources, maps = need[1] or need[2], need[3] or need[4]
    gradients = [None] * 7
    if any(need[1:]):
        *parts, weights = ops.deformable_aggregation_backward(grad, *ctx.saved_tensors, sources, maps)
        gradients = [*parts, *weights]
    return grad, *(g if n else None for g, n in zip(gradients, need[1:], strict=True))


_TENSORS = (
    "Tensor features, Tensor keys, Tensor values, Tensor flows, Tensor errors, Tensor key_error_weight, "
    "Tensor value_error_weight, Tensor value_bias"
)
native.register("deformable_aggregation", _fake, _setup_context, _backward, triton=f"({_TENSORS}) -> Tensor")
native.register(
    "deformable_aggregation_backward",
    _fake_backward,
    triton=f"(Tensor grad, {_TENSORS}, bool need_sources, bool need_maps) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
