"""A linear map of the channels at every pixel."""

from __future__ import annotations

import torch

from gi_kernels import checks, dispatch, native
from gi_kernels.ops.pixel_projection import reference
from gi_kernels.precision import autocast


def pixel_projection(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    r"""Project the channels of every pixel: a 1x1 convolution without bias.

    .. math:: out_{n,o}(p) = \sum_c weight_{o,c} \, input_{n,c}(p)

    Args:
        input: ``[N, C, H, W]``, float32, float64, bfloat16 or float16; any layout, read where it is.
        weight: ``[O, C]``, the dtype of ``input``.

    Returns:
        ``[N, O, H, W]`` in the dtype of ``input``, channels-last, what gathering along a flow reads
        best. Sums are float32 (float64 for float64 arguments). Under
        autocast both arguments are cast to its dtype. The numbers are the same to the bit as those
        that :func:`projected_aggregation` makes on the way.

    Differentiable once in both arguments.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size, dtype or device.

    Source: the 1x1 convolutions of Esser, Michael, Sengupta, "Towards Unified Keyframe Propagation
    Models", 2022, applied to references before they are warped.
    """
    input, weight = autocast(input=input, weight=weight)
    checks.shapes(("input", input, "N C H W"), ("weight", weight, "O C"))
    checks.same_dtype(("input", input), ("weight", weight))
    return dispatch.run(OPERATOR, input, weight)


def _cpp(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.gi.pixel_projection(input, weight)


# On the GPU it is PyTorch's own product, in the storage type: nothing to fuse, and no faster one there.
OPERATOR = dispatch.Operator(
    "pixel_projection",
    {
        "triton": reference.pixel_projection,
        "cpp": _cpp,
        "reference": reference.pixel_projection,
    },
)


def _fake(input, weight):
    N, _, H, W = input.shape
    return input.new_empty(N, H, W, weight.shape[0]).permute(0, 3, 1, 2)


def _fake_backward(grad, input, weight, need_input, need_weight):
    N, C, H, W = input.shape
    if not need_input:
        grad_input = input.new_empty(0)
    elif input.stride(1) == 1:
        grad_input = input.new_empty(N, H, W, C).permute(0, 3, 1, 2)
    else:
        grad_input = input.new_empty(N, C, H, W)
    return grad_input, weight.new_empty(weight.shape if need_weight else 0)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ops, ctx, grad):
    need = ctx.needs_input_grad
    gradients = ops.pixel_projection_backward(grad, *ctx.saved_tensors, *need)
    return tuple(g if n else None for g, n in zip(gradients, need, strict=True))


native.register("pixel_projection", _fake, _setup_context, _backward)
native.register("pixel_projection_backward", _fake_backward)
