"""Convolutions ready to run: the weights that one run needs, in its dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels import FusedConvolution
from gi_kernels.ops.fused_convolution import Activation
from gi_kernels.products import narrow_convolution


def convolution(inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1) -> nn.Conv2d:
    """A biased convolution that keeps the size but for its stride, its weight channels-last."""
    height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    layer = nn.Conv2d(inputs, outputs, (height, width), stride, padding=(height // 2, width // 2))
    return layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Convolution:
    """A convolution with weight ``[O,I,h,w]``, bias ``[O]``; ``stride`` and ``padding`` as PyTorch's.

    Attributes:
        fused: the same by the kernel that is several times faster and knows no gradient, where that
            serves it.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, int]
    fused: FusedConvolution | None

    @classmethod
    def of(cls, layer: nn.Conv2d, dtype: torch.dtype, norm: nn.Module | None = None) -> Convolution:
        """``layer`` in ``dtype``, a batch norm behind it in eval mode folded in."""
        weight, bias = layer.weight, layer.bias
        assert bias is not None
        if isinstance(norm, nn.BatchNorm2d):
            weight, bias = _fold(weight, bias, norm)
        return cls._placed(weight, bias, layer, dtype)

    @classmethod
    def of_channels(
        cls, layers: Sequence[nn.Conv2d], channels: Sequence[slice], dtype: torch.dtype, bias: bool
    ) -> Convolution:
        """The share that some input channels have in the stacked outputs of ``layers``."""
        stacked = torch.cat([layer.weight for layer in layers])
        weight = torch.cat([stacked[:, part] for part in channels], dim=1)
        biases = torch.cat([layer.bias for layer in layers if layer.bias is not None]) if bias else None
        return cls._placed(weight, biases, layers[0], dtype)

    @classmethod
    def _placed(
        cls, weight: torch.Tensor, bias: torch.Tensor | None, like: nn.Conv2d, dtype: torch.dtype
    ) -> Convolution:
        weight = weight.to(dtype=dtype, memory_format=torch.channels_last)
        bias = None if bias is None else bias.to(dtype)
        assert not isinstance(like.padding, str)
        padding = (like.padding[0], like.padding[1])
        fuses = like.stride == (1, 1) and not torch.is_grad_enabled() and FusedConvolution.pays(weight)
        return cls(weight, bias, like.stride, padding, FusedConvolution(weight, bias) if fuses else None)

    def __call__(
        self, *inputs: torch.Tensor, addend: torch.Tensor | None = None, activation: Activation = "none"
    ) -> torch.Tensor:
        """``activation(convolution of the inputs' channels together + addend)``."""
        if self.fused is not None:
            return self.fused(*inputs, addend=addend, activation=activation)
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)
        if self.bias is not None and self.stride == (1, 1) and len(self.weight) <= 4:
            out = narrow_convolution(x, self.weight, self.bias, self.padding)
        else:
            out = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        if addend is not None:
            out = out.add_(addend)
        return out if activation == "none" else getattr(out, f"{activation}_")()


def _fold(
    weight: torch.Tensor, bias: torch.Tensor, norm: nn.BatchNorm2d
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution with ``norm``'s running statistics behind it; at least float32."""
    assert norm.running_mean is not None and norm.running_var is not None
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = norm.weight.to(wide) * (norm.running_var.to(wide) + norm.eps).rsqrt()
    shift = norm.bias.to(wide) - norm.running_mean.to(wide) * scale
    return weight.to(wide) * scale[:, None, None, None], bias.to(wide) * scale + shift
