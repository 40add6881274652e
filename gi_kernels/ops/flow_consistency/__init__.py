"""Forward-backward consistency of optical flow."""

from __future__ import annotations

import torch

from gi_kernels import checks, dispatch, native
from gi_kernels.ops.flow_consistency import reference


def flow_consistency(flow: torch.Tensor, flow_backward: torch.Tensor) -> torch.Tensor:
    r"""How far a flow and its counterpart are from undoing each other, in pixels.

    .. math:: out[b, 0, p] = \tfrac{1}{2} \sum_{i \in \{x, y\}}
        |flow_i(p) + \mathrm{warp}(flow\_backward, flow)_i(p)|

    Args:
        flow: ``[B, 2, H, W]`` in pixels, x first; float32, float64, bfloat16 or float16.
        flow_backward: the same shape and dtype, from the other frame back.

    Returns:
        ``[B, 1, H, W]`` in the dtype of ``flow``. A position outside the frame or not finite samples
        a backward flow of zero. Arithmetic in float32 (float64 for float64); no autocast cast.

    Not differentiable by the compiled kernel (a backward pass raises ``NotImplementedError``);
    ``gi_kernels.backend("reference")`` is.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size, dtype or device.

    Source: the flow error of Esser, Michael, Sengupta, 2022; Sundaram, Brox, Keutzer, "Dense point
    trajectories by GPU-accelerated large displacement optical flow", 2010.
    """
    checks.shapes(("flow", flow, "B 2 H W"), ("flow_backward", flow_backward, "B 2 H W"))
    checks.same_dtype(("flow", flow), ("flow_backward", flow_backward))
    return dispatch.run(OPERATOR, flow, flow_backward)


def _cpp(flow: torch.Tensor, flow_backward: torch.Tensor) -> torch.Tensor:
    return torch.ops.gi.flow_consistency(flow, flow_backward)


def _triton(flow: torch.Tensor, flow_backward: torch.Tensor) -> torch.Tensor:
    return torch.ops.gi_triton.flow_consistency(flow, flow_backward)


OPERATOR = dispatch.Operator(
    "flow_consistency", {"triton": _triton, "cpp": _cpp, "reference": reference.flow_consistency}
)


def _fake(flow, flow_backward):
    return flow.new_empty(flow.shape[0], 1, *flow.shape[2:])


native.register("flow_consistency", _fake, triton="(Tensor flow, Tensor flow_backward) -> Tensor")
