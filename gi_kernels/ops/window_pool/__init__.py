"""Reading a feature map into one vector per window and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gi_kernels import checks, dispatch, native
from gi_kernels.ops.window_pool import reference
from gi_kernels.precision import autocast


def window_pool(logits: torch.Tensor, features: torch.Tensor, windows: tuple[int, int]) -> torch.Tensor:
    r"""Per window and head, the softmax-weighted mean of the features.

    .. math:: out[b, w, h, c] = \sum_{p \in w} \mathrm{softmax}_{p \in w}(logits[b, h])_p \,
        features[b, c, p]

    Args:
        logits: ``[B, h, H, W]``, any floating dtype.
        features: ``[B, C, H, W]``, float32, float64, bfloat16 or float16; channels-last is the fast
            path.
        windows: ``(r, s)``, the number of windows down and across; ``H`` must be a multiple of ``r``
            and ``W`` of ``s``.

    Returns:
        ``[B, r*s, h, C]``, windows in row-major order, in the dtype of ``features``. Softmax and sums
        are float32 (float64 for float64 features). Under autocast both are cast to its dtype.

    Differentiable once in both arguments.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size or device.

    Source: the windowed read of Esser, Michael, Sengupta, 2022, pooled before the value projection.
    """
    features, logits = autocast(features=features, logits=logits)
    size = checks.shapes(("logits", logits, "B h H W"), ("features", features, "B C H W"))
    windows = check_windows(windows, size["H"], size["W"])
    return dispatch.run(OPERATOR, logits.to(features.dtype), features, windows)


def check_windows(windows: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """``windows`` as a pair; raise unless a map of ``height`` times ``width`` splits into them."""
    if not isinstance(windows, list | tuple) or len(windows) != 2:
        raise TypeError(f"windows: expected a pair of ints (down, across), got {windows!r}")
    for count, length, axis in zip(windows, (height, width), ("height", "width"), strict=True):
        checks.positive("windows", count)
        if length < count or length % count != 0:
            raise ValueError(f"windows: expected to divide the map's {axis} {length}, got {count}")
    return windows[0], windows[1]


def _cpp(logits: torch.Tensor, features: torch.Tensor, windows: tuple[int, int]) -> torch.Tensor:
    return torch.ops.gi.window_pool(logits, features, *windows)


def _triton(logits: torch.Tensor, features: torch.Tensor, windows: tuple[int, int]) -> torch.Tensor:
    return torch.ops.gi_triton.window_pool(logits, features, *windows)


OPERATOR = dispatch.Operator(
    "window_pool", {"triton": _triton, "cpp": _cpp, "reference": reference.window_pool}
)


def _fake(logits, features, rows, columns):
    return features.new_empty(features.shape[0], rows * columns, logits.shape[1], features.shape[1])


def _fake_backward(grad, logits, features, rows, columns, need_logits, need_features):
    return (
        torch.empty_like(logits) if need_logits else logits.new_empty(0),
        torch.empty_like(features) if need_features else features.new_empty(0),
    )


def autograd(backward_name: str) -> tuple[Callable[..., None], Callable[..., Any]]:
    """``setup_context`` and ``backward`` of an operator on two tensors and a number of windows each way."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.windows = inputs[2:]

    def backward(ops, ctx, grad):
        need = ctx.needs_input_grad[:2]
        gradients = getattr(ops, backward_name)(grad, *ctx.saved_tensors, *ctx.windows, *need)
        return *(g if wanted else None for g, wanted in zip(gradients, need, strict=True)), None, None

    return setup_context, backward


native.register(
    "window_pool",
    _fake,
    *autograd("window_pool_backward"),
    triton="(Tensor logits, Tensor features, int rows, int columns) -> Tensor",
)
native.register(
    "window_pool_backward",
    _fake_backward,
    triton="(Tensor grad, Tensor logits, Tensor features, int rows, int columns, bool need_logits, "
    "bool need_features) -> (Tensor, Tensor)",
)
