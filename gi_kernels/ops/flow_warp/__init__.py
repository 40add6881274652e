"""Warping along optical flow."""

from __future__ import annotations

import torch

from gi_kernels import checks, dispatch, native
from gi_kernels.ops.flow_warp import reference
from gi_kernels.precision import accumulation_dtype


def flow_warp(input: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    r"""Sample ``input`` bilinearly along ``flow``.

    .. math:: out[b, c, p] = \mathrm{bilinear}(input[b, c], p + flow[b](p))

    Pixel centres lie at integers; samples outside the frame are zero, and so is a sample whose
    position is not finite. A flow of another size is first resized bilinearly with
    ``align_corners=True`` and its components multiplied by ``W/w`` and ``H/h``.

    Args:
        input: ``[B, C, H, W]``, float32, float64, bfloat16 or float16, any strides; channels-last
            is the fast path.
        flow: ``[B, 2, h, w]`` in pixels of its own grid, x first, pointing from the output frame to
            where the input is sampled. Any floating dtype; used in float32 (float64 for float64
            input), also under autocast.

    Returns:
        ``[B, C, H, W]`` in the dtype and memory layout of ``input``. Under autocast the input keeps
        its dtype.

    Differentiable once in both arguments. At integer positions the derivative along the flow is the
    one towards the next pixel; a position outside the frame or not finite has zero gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size or device.

    Source: feature sampling in Esser, Michael, Sengupta, "Towards Unified Keyframe Propagation
    Models", 2022; sampling as in Jaderberg et al., "Spatial Transformer Networks", 2015.
    """
    size = checks.shapes(("input", input, "B C H W"), ("flow", flow, "B 2 h w"))
    if size["H"] * size["W"] > 0:
        checks.nonempty("flow", flow, 2, 3)
    return dispatch.run(OPERATOR, input, flow.to(accumulation_dtype(input.dtype)))


def _cpp(input: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    return torch.ops.gi.flow_warp(input, flow)


def _triton(input: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    return torch.ops.gi_triton.flow_warp(input, flow)


OPERATOR = dispatch.Operator("flow_warp", {"triton": _triton, "cpp": _cpp, "reference": reference.flow_warp})


def _fake(input, flow):
    return torch.empty_like(input)


def _fake_backward(grad, input, flow, need_input, need_flow):
    return (
        torch.empty_like(input) if need_input else input.new_empty(0),
        flow.new_empty(flow.shape) if need_flow else flow.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ops, ctx, grad):
    need_input, need_flow = ctx.needs_input_grad
    grad_input, grad_flow = ops.flow_warp_backward(grad, *ctx.saved_tensors, need_input, need_flow)
    return grad_input if need_input else None, grad_flow if need_flow else None


native.register("flow_warp", _fake, _setup_context, _backward, triton="(Tensor input, Tensor flow) -> Tensor")
native.register(
    "flow_warp_backward",
    _fake_backward,
    triton="(Tensor grad, Tensor input, Tensor flow, bool need_input, bool need_flow) -> (Tensor, Tensor)",
)
