"""Filling a flow inside a mask."""

from __future__ import annotations

import torch

from gi_kernels import checks, dispatch, native
from gi_kernels.ops.complete_flow import reference


def complete_flow(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""Fill a flow inside a mask from 20 points on the mask's rim.

    .. math:: out = (1 - m) \, flow + m \, \frac{\sum_i w_i \, flow(p_i)}{\sum_i w_i},
        \quad w_i = |p - p_i|^{-6}

    The rim: pixels with mask above 0.5 that have a neighbour of the 3x3 cross at or below 0.5,
    without the frame's outermost rows and columns; the point (0, 0) where there is none. From the
    rim in row-major order, 20 points are drawn with replacement by
    ``numpy.random.default_rng(1).choice(count, 20)``, for each frame anew. A point's weight at its
    own position is 1e10.

    Args:
        flow: ``[B, 2, H, W]``, float32, float64, bfloat16 or float16.
        mask: ``[B, 1, H, W]`` of the same dtype, in [0, 1]; where it is exactly 0 or 1 only the flow
            or only the filling counts, even if the other is not finite.

    Returns:
        ``[B, 2, H, W]`` in the dtype of ``flow``, arithmetic in float32 (float64 for float64). No
        autocast cast.

    Not differentiable by the compiled kernel (a backward pass raises ``NotImplementedError``);
    ``gi_kernels.backend("reference")`` is, in the flow.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size, dtype or device.

    Source: the flow stage of Esser, Michael, Sengupta, 2022; inverse distance weighting after
    Shepard, "A two-dimensional interpolation function for irregularly-spaced data", 1968.
    """
    checks.shapes(("flow", flow, "B 2 H W"), ("mask", mask, "B 1 H W"))
    checks.same_dtype(("flow", flow), ("mask", mask))
    return dispatch.run(OPERATOR, flow, mask)


def _cpp(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.ops.gi.complete_flow(flow, mask)


def _triton(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.ops.gi_triton.complete_flow(flow, mask)


OPERATOR = dispatch.Operator(
    "complete_flow", {"triton": _triton, "cpp": _cpp, "reference": reference.complete_flow}
)


def _fake(flow, mask):
    return flow.new_empty(flow.shape)


native.register("complete_flow", _fake, triton="(Tensor flow, Tensor mask) -> Tensor")
