"""Reading a feature map into one vector per window and query."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gi_kernels import checks, dispatch, native
from gi_kernels.ops.pixel_projection.reference import pixel_projection
from gi_kernels.ops.window_pool import autograd, check_windows
from gi_kernels.ops.window_query import reference
from gi_kernels.precision import autocast


def window_query(features: torch.Tensor, queries: torch.Tensor, windows: tuple[int, int]) -> torch.Tensor:
    r"""Per window and query, attention over the window's pixels, which are keys and values at once.

    .. math:: out[b, w, h, c] = \sum_{p \in w} \mathrm{softmax}_{p \in w}(queries[h] \cdot features[b, :, p])
        \, features[b, c, p]

    The same as :func:`window_pool` with these products for logits. On the CPU the map is read once and
    there are no logits in memory; on a GPU that is what runs, with logits in the dtype of ``features``.

    Args:
        features: ``[B, C, H, W]``, float32, float64, bfloat16 or float16; channels-last is the fast path.
        queries: ``[h, C]``, the dtype of ``features``.
        windows: ``(r, s)``, the number of windows down and across; ``H`` must be a multiple of ``r``
            and ``W`` of ``s``.

    Returns:
        ``[B, r*s, h, C]``, windows in row-major order, in the dtype of ``features``. Logits, softmax and
        sums are float32 (float64 for float64). Under autocast both arguments are cast to its dtype.

    Differentiable once in both arguments; only these are kept for it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size, dtype or device.

    Source: the windowed read of Esser, Michael, Sengupta, 2022, pooled before the value projection.
    """
    features, queries = autocast(features=features, queries=queries)
    size = checks.shapes(("features", features, "B C H W"), ("queries", queries, "h C"))
    checks.same_dtype(("features", features), ("queries", queries))
    windows = check_windows(windows, size["H"], size["W"])
    return dispatch.run(OPERATOR, features, queries, windows)


def _cpp(features: torch.Tensor, queries: torch.Tensor, windows: tuple[int, int]) -> torch.Tensor:
    return torch.ops.gi.window_query(features, queries, *windows)


def _on_a_gpu(namespace: str) -> Callable[..., torch.Tensor]:
    """PyTorch's product for the logits, then the pooling of ``namespace``; both know their gradients."""

    def run(features: torch.Tensor, queries: torch.Tensor, windows: tuple[int, int]) -> torch.Tensor:
        logits = pixel_projection(features, queries)
        return getattr(torch.ops, namespace).window_pool(logits, features, *windows)

    return run


OPERATOR = dispatch.Operator(
    "window_query",
    {
        "cuda": _on_a_gpu("gi"),
        "triton": _on_a_gpu("gi_triton"),
        "cpp": _cpp,
        "reference": reference.window_query,
    },
)


def _fake(features, queries, rows, columns):
    return features.new_empty(features.shape[0], rows * columns, queries.shape[0], features.shape[1])


def _fake_backward(grad, features, queries, rows, columns, need_features, need_queries):
    return (
        torch.empty_like(features) if need_features else features.new_empty(0),
        queries.new_empty(queries.shape if need_queries else 0),
    )


native.register("window_query", _fake, *autograd("window_query_backward"))
native.register("window_query_backward", _fake_backward)
