"""Writing one vector per window and head back to a feature map."""

from __future__ import annotations

from math import isqrt

import torch

from gi_kernels import checks, dispatch, native
from gi_kernels.ops.window_pool import autograd, check_windows
from gi_kernels.ops.window_spread import reference
from gi_kernels.precision import autocast


def window_spread(
    logits: torch.Tensor, latents: torch.Tensor, windows: tuple[int, int] | None = None
) -> torch.Tensor:
    r"""Per pixel, the sigmoid-gated sum over heads of its window's vectors.

    .. math:: out[b, c, p] = \sum_h \sigma(logits[b, h, p]) \, latents[b, w(p), h, c]

    Args:
        logits: ``[B, h, H, W]``, any floating dtype; the result takes its memory layout
            (channels-last is the fast path).
        latents: ``[B, r*s, h, C]``, windows in row-major order; float32, float64, bfloat16 or
            float16.
        windows: ``(r, s)``, the number of windows down and across; by default a square grid. ``H``
            must be a multiple of ``r`` and ``W`` of ``s``.

    Returns:
        ``[B, C, H, W]`` in the dtype of ``latents``. Sigmoid and sums are float32 (float64 for
        float64 latents). Under autocast both arguments are cast to its dtype.

    Differentiable once in both tensors.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size or device.

    Source: the windowed write of Esser, Michael, Sengupta, 2022, projected before it is spread.
    """
    latents, logits = autocast(latents=latents, logits=logits)
    size = checks.shapes(("logits", logits, "B h H W"), ("latents", latents, "B L h C"))
    if windows is None:
        side = isqrt(size["L"])
        if side * side != size["L"]:
            raise ValueError(f"windows: expected for {size['L']} latents, which are no square grid")
        windows = (side, side)
    windows = check_windows(windows, size["H"], size["W"])
    if windows[0] * windows[1] != size["L"]:
        raise ValueError(
            f"latents: expected {windows[0] * windows[1]} windows ({windows[0]} x {windows[1]}) in "
            f"dimension 1, got {size['L']}"
        )
    return dispatch.run(OPERATOR, logits.to(latents.dtype), latents, windows)


def _cpp(logits: torch.Tensor, latents: torch.Tensor, windows: tuple[int, int]) -> torch.Tensor:
    return torch.ops.gi.window_spread(logits, latents, *windows)


def _triton(logits: torch.Tensor, latents: torch.Tensor, windows: tuple[int, int]) -> torch.Tensor:
    return torch.ops.gi_triton.window_spread(logits, latents, *windows)


OPERATOR = dispatch.Operator(
    "window_spread", {"triton": _triton, "cpp": _cpp, "reference": reference.window_spread}
)


def _fake(logits, latents, rows, columns):
    (B, _, H, W), C = logits.shape, latents.shape[3]
    # The kernel's binding applies the same rule.
    channels_last = logits.is_contiguous(memory_format=torch.channels_last) and not logits.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((B, C, H, W), dtype=latents.dtype, device=latents.device, memory_format=memory_format)


def _fake_backward(grad, logits, latents, rows, columns, need_logits, need_latents):
    return (
        torch.empty_like(logits) if need_logits else logits.new_empty(0),
        latents.new_empty(latents.shape) if need_latents else latents.new_empty(0),
    )


native.register(
    "window_spread",
    _fake,
    *autograd("window_spread_backward"),
    triton="(Tensor logits, Tensor latents, int rows, int columns) -> Tensor",
)
native.register(
    "window_spread_backward",
    _fake_backward,
    triton="(Tensor grad, Tensor logits, Tensor latents, int rows, int columns, bool need_logits, "
    "bool need_latents) -> (Tensor, Tensor)",
)
