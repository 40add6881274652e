"""Matrix products of the layers, and convolutions with few outputs.

On the CPU, large float32 products go to oneDNN as 1x1 convolutions of channels-last maps: on AMD
processors PyTorch's other way, MKL, reaches less than half the speed, forward and backward; on Intel's
both are as fast. Where oneDNN serves matrix products anyway, in low precision, they stay products.
Where no gradient is taken, an MLP's GELU and sum are done in its convolutions, by the operators that
``torch.compile`` fuses with.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels.layout import is_channels_last, relayout

# Products of numbers from which on the speed outweighs the 20 us that a convolution takes to start.
_LEAST = 1 << 23

_ONEDNN = torch.backends.mkldnn.is_available()  # here, since compilers do not follow the call

# Whether PyTorch has oneDNN's fused convolutions and products, which it keeps for its compiler.
_FUSES = _ONEDNN and all(
    hasattr(torch.ops.mkldnn, name)
    for name in (
        "_convolution_pointwise",
        "_convolution_pointwise_",
        "_convolution_transpose_pointwise",
        "_linear_pointwise",
        "_reorder_convolution_weight",
    )
)

# Rows that pass through an MLP at a time where no gradient is taken: few enough for what lies between
# its products to stay in the caches, enough for products to be fast.
_ROWS = 1024


Activation = Literal["none", "relu", "gelu"]


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    groups: int = 1,
    activation: Activation = "none",
) -> torch.Tensor:
    """``activation`` of ``x`` [..., g*I] times ``weight`` [g*O, I] plus ``bias`` [g*O] -> [..., g*O].

    Channels and outputs are split into ``g`` groups; each sees its own channels.
    """
    if groups == 1 and _in_one(x, weight, bias) and _is_large(x, weight, groups):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    out = _linear(x, weight, bias, groups)
    return out if activation == "none" else getattr(F, activation)(out)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int) -> torch.Tensor:
    if _by_convolution(x, weight, groups):
        rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
        kernel = weight[:, None, None].permute(0, 3, 1, 2)  # channels-last as well
        out = F.conv2d(rows, kernel, bias, groups=groups)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))
    if groups == 1:
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2).unflatten(1, (groups, -1)).transpose(0, 1)  # [g,N,I]
    out = torch.bmm(rows, weight.unflatten(0, (groups, -1)).transpose(1, 2).to(x.dtype))  # [g,N,O]
    out = out.transpose(0, 1).flatten(1).unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


def pointwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: Activation = "none",
) -> torch.Tensor:
    """``activation`` of the 1x1 convolution of ``x`` [N,C,H,W] with ``weight`` [O,C,1,1] -> [N,O,H,W].

    The result is channels-last where ``x`` is, or is part of the channels of such a map, contiguous where
    that is.
    """
    weight = weight.flatten(1)
    if is_channels_last(x) or (x.stride(1) == 1 and not x.is_contiguous()):
        return linear(x.permute(0, 2, 3, 1), weight, bias, activation=activation).permute(0, 3, 1, 2)
    pixels, kernels = x.flatten(2), weight.expand(x.shape[0], -1, -1)
    out = torch.bmm(kernels, pixels) if bias is None else torch.baddbmm(bias[:, None], kernels, pixels)
    out = out.unflatten(2, x.shape[2:])
    return out if activation == "none" else getattr(F, activation)(out)


def add_mlp_(
    x: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    """``x`` [N,C] + ``weight2`` [C,D] GELU(``weight1`` [D,C] x + ``bias1``) + ``bias2``, in the memory of x.

    Rows of x are dense; no gradient is taken.
    """
    parts = x.split(_ROWS)
    if not _FUSES or not _by_convolution(parts[0], weight1, 1):
        for part in parts:
            part += linear(torch.ops.aten.gelu_(linear(part, weight1, bias1)), weight2, bias2)
        return x
    once = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups
    kernel1, kernel2 = (
        torch.ops.mkldnn._reorder_convolution_weight(
            w[:, :, None, None], *once, [1, w.shape[1], 1, len(parts[0])]
        )
        for w in (weight1, weight2)
    )
    for part in parts:
        pixels = part[None, None].permute(0, 3, 1, 2)
        hidden = torch.ops.mkldnn._convolution_pointwise(pixels, kernel1, bias1, *once, "gelu", [], "none")
        torch.ops.mkldnn._convolution_pointwise_.binary(
            pixels, hidden, kernel2, bias2, *once, "add", 1.0, None, [], None
        )
    return x


def convolution_relu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int = 1
) -> torch.Tensor:
    """``ReLU(F.conv2d(x, weight, bias, stride))``, without gradients by one pass over the result."""
    if not _in_one(x, weight, bias) or x.stride(1) != 1:
        return F.relu(F.conv2d(x, weight, bias, stride), inplace=True)
    pixels = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise(
        pixels, weight, bias, [0, 0], [stride, stride], [1, 1], 1, "relu", [], "none"
    )


def transposed_convolution_relu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: int = 0,
    output_padding: int = 0,
) -> torch.Tensor:
    """``ReLU(F.conv_transpose2d(x, weight, bias, stride, padding, output_padding))``.

    Without gradients by one pass over the result.
    """
    if not _in_one(x, weight, bias) or x.stride(1) != 1:
        return F.relu(F.conv_transpose2d(x, weight, bias, stride, padding, output_padding), inplace=True)
    pixels = x.contiguous(memory_format=torch.channels_last)
    sizes = ([padding] * 2, [output_padding] * 2, [stride] * 2, [1, 1])
    return torch.ops.mkldnn._convolution_transpose_pointwise(
        pixels, weight, bias, *sizes, 1, "relu", [], "none"
    )


def strided_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    padding: int = 0,
    output_padding: int | None = None,
) -> torch.Tensor:
    """``F.conv2d(x, weight, bias, stride, padding)``; transposed where an output padding is given.

    The weight's gradient is computed of contiguous maps: with the channels last oneDNN takes up to twice as
    long for it, which outweighs the copies.
    """
    options = _Options(stride, padding, output_padding)
    served = x.device.type == "cpu" and _ONEDNN and x.dtype == weight.dtype == torch.float32
    plain = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not weight.requires_grad
    if not served or plain or not torch.is_grad_enabled() or not is_channels_last(x):
        if output_padding is None:
            return F.conv2d(x, weight, bias, stride, padding)
        return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding)
    return _StridedConvolution.apply(x, weight, bias, options)  # type: ignore[no-any-return]


class _Options(NamedTuple):
    stride: int
    padding: int
    output_padding: int | None  # None: not a transposed convolution

    def arguments(self) -> tuple[Any, ...]:
        """As ``torch.convolution`` takes them: dilation and groups are one."""
        outside = self.output_padding or 0
        transposed = self.output_padding is not None
        return [self.stride] * 2, [self.padding] * 2, [1, 1], transposed, [outside] * 2, 1


class _StridedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, options: _Options
    ) -> torch.Tensor:
        return torch.convolution(x, weight, bias, *options.arguments())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, bias, ctx.options = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes = None if bias is None else list(bias.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        differentiate = torch.ops.aten.convolution_backward
        rest = (ctx.bias_sizes, *ctx.options.arguments())
        grad_x, _, grad_bias = differentiate(grad, x, weight, *rest, [of_x, False, of_bias])
        if not of_weight:
            return grad_x, None, grad_bias, None
        maps = (relayout(t, torch.contiguous_format) for t in (grad, x))
        _, grad_weight, _ = differentiate(*maps, weight.contiguous(), *rest, [False, True, False])
        return grad_x, grad_weight, grad_bias, None


def narrow_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """``F.conv2d(x, weight, bias, padding=padding)``, without gradients twice as fast for few outputs.

    oneDNN computes multiples of 16 outputs. Of up to four, those of 2x2 pixels become the outputs of one
    convolution of stride 2: its kernel is larger by a row and a column, its outputs are the same numbers.
    """
    outputs, channels, h, w = weight.shape
    sizes = [n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], padding, (h, w), strict=True)]
    plain = x.device.type != "cpu" or outputs > 4 or sizes[0] % 2 or sizes[1] % 2
    if plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.conv2d(x, weight, bias, padding=padding)
    wide = weight.new_zeros(outputs, 2, 2, channels, h + 1, w + 1)
    for down in range(2):
        for across in range(2):
            wide[:, down, across, :, down : down + h, across : across + w] = weight
    wide = wide.flatten(0, 2).contiguous(memory_format=torch.channels_last)
    return F.pixel_shuffle(F.conv2d(x, wide, bias.repeat_interleave(4), 2, padding), 2)


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, input: torch.Tensor, activation: Activation = "none") -> torch.Tensor:
        return linear(input, self.weight, self.bias, activation=activation)


class Pointwise(nn.Conv2d):
    """``nn.Conv2d`` of kernel size one by :func:`pointwise`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: torch.Tensor, activation: Activation = "none") -> torch.Tensor:
        return pointwise(input, self.weight, self.bias, activation)


def _by_convolution(x: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    """Whether a product is large, float32 and on the CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and _is_large(x, weight, groups)
        and _ONEDNN
        and not torch.is_autocast_enabled("cpu")
    )


def _is_large(x: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
    return x.numel() * weight.shape[0] >= groups * _LEAST


def _in_one(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether oneDNN may do what follows a product of these with it: where no gradient is taken."""
    return (
        _FUSES
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not (
            torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        )
    )
