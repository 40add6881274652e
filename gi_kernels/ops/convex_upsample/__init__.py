"""RAFT's learned upsampling of flow."""

from __future__ import annotations

import torch

from gi_kernels import checks, dispatch, native
from gi_kernels.ops.convex_upsample import reference
from gi_kernels.precision import accumulation_dtype


def convex_upsample(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""Upsample a flow eightfold; each fine pixel is a convex combination of 3x3 coarse ones.

    .. math:: out[b, i, 8y + s_y, 8x + s_x] = \sum_{k=0}^{8} \mathrm{softmax}_k(
        mask[b, 64 k + 8 s_y + s_x, y, x]) \cdot 8 \, flow[b, i, y + \lfloor k/3 \rfloor - 1,
        x + k \bmod 3 - 1]

    with zeros outside the map.

    Args:
        flow: ``[B, 2, h, w]`` in pixels of the coarse grid, x first; any floating dtype.
        mask: ``[B, 576, h, w]``, logits; float32, float64, bfloat16 or float16, any strides;
            channels-last is the fast path.

    Returns:
        ``[B, 2, 8h, 8w]``, contiguous, in pixels of the fine grid, float32 (float64 where ``mask``
        is): a flow keeps its precision whatever the mask's dtype. No autocast cast.

    Differentiable once in both arguments.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size or device.

    Source: Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", 2020.
    """
    checks.shapes(("mask", mask, "B 576 h w"), ("flow", flow, "B 2 h w"))
    return dispatch.run(OPERATOR, flow.to(accumulation_dtype(mask.dtype)), mask)


def _cpp(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.ops.gi.convex_upsample(flow, mask)


def _triton(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.ops.gi_triton.convex_upsample(flow, mask)


OPERATOR = dispatch.Operator(
    "convex_upsample", {"triton": _triton, "cpp": _cpp, "reference": reference.convex_upsample}
)


def _fake(flow, mask):
    B, _, h, w = mask.shape
    return flow.new_empty(B, 2, reference.FACTOR * h, reference.FACTOR * w)


def _fake_backward(grad, flow, mask, need_flow, need_mask):
    return (
        flow.new_empty(flow.shape) if need_flow else flow.new_empty(0),
        torch.empty_like(mask) if need_mask else mask.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ops, ctx, grad):
    need_flow, need_mask = ctx.needs_input_grad
    grad_flow, grad_mask = ops.convex_upsample_backward(grad, *ctx.saved_tensors, need_flow, need_mask)
    return grad_flow if need_flow else None, grad_mask if need_mask else None


native.register(
    "convex_upsample", _fake, _setup_context, _backward, triton="(Tensor flow, Tensor mask) -> Tensor"
)
native.register(
    "convex_upsample_backward",
    _fake_backward,
    triton="(Tensor grad, Tensor flow, Tensor mask, bool need_flow, bool need_mask) -> (Tensor, Tensor)",
)
