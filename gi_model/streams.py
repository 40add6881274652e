"""The parts of the two-stream model: convolutions, Fourier convolutions, position code, block, decoder.

All convolutions before the decoder pad by reflection and have no bias, a batch norm follows each.
Parts that do less work in eval mode have ``folded()``, which returns a stand-in for inference.

Sources: Esser, Michael, Sengupta, "Towards Unified Keyframe Propagation Models", 2022; the Fourier
convolutions are those of Chi, Jiang, Mu, "Fast Fourier Convolution", 2020, as used by Suvorov et al.,
"Resolution-robust Large Mask Inpainting with Fourier Convolutions", 2022.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels import FusedConvolution, checks
from gi_kernels.fourier import fourier, fourier_inverse
from gi_kernels.layout import reflect_pad
from gi_kernels.nn import KeysValues, LatentAttention, WindowRead, WindowWrite
from gi_kernels.norms import batch_norm
from gi_kernels.ops.fused_convolution import Activation
from gi_kernels.precision import accumulation_dtype
from gi_kernels.products import (
    convolution_relu,
    narrow_convolution,
    pointwise,
    strided_convolution,
    transposed_convolution_relu,
)
from gi_model.graphs import hold
from gi_model.published import Names, renamed

BANDS = 64  # of the position code, per axis
HIGHEST = 16.0  # its highest frequency, half of the 32 pixels a feature map has at 256 x 256
KEPT_SIZES = 4  # position codes that a generator for inference keeps

Conv = TypeVar("Conv", nn.Conv2d, nn.ConvTranspose2d)


@runtime_checkable
class Foldable(Protocol):
    """A part that has a stand-in for inference."""

    def folded(self) -> nn.Module:
        """A module that computes in eval mode what this one does, with less work."""
        ...


class ReflectConv(nn.Conv2d):
    """``nn.Conv2d`` of an odd ``size``, padded by reflection; keeps the padded map alone for the gradient."""

    def __init__(
        self, channels: int, out: int, size: int, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(
            channels, out, size, stride, size // 2, groups=groups, bias=bias, padding_mode="reflect"
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        padded = reflect(input, self.kernel_size[0] // 2)
        if self.stride[0] > 1 and self.groups == 1:
            return strided_convolution(padded, self.weight, self.bias, self.stride[0])
        return F.conv2d(padded, self.weight, self.bias, self.stride, groups=self.groups)


class ConvNormRelu(nn.Module):
    """``ReLU(BN(conv(x)))``: ``[B,C,H,W]`` -> ``[B,O,ceil(H/stride),ceil(W/stride)]``."""

    def __init__(self, channels: int, out: int, size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = ReflectConv(channels, out, size, stride, groups, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return batch_norm(self.conv(x), self.norm, relu=True)

    def folded(self) -> nn.Module:
        return FoldedConvRelu(self)


class FoldedConvRelu(nn.Module):
    """:class:`ConvNormRelu` in eval mode."""

    def __init__(self, source: ConvNormRelu) -> None:
        super().__init__()
        self.conv = fold_norm(source.conv, source.norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv = self.conv
        if conv.groups > 1:
            return F.relu(conv(x), inplace=True)
        padded = reflect(x, conv.kernel_size[0] // 2)
        return convolution_relu(padded, conv.weight, conv.bias, conv.stride[0])


class ResidualConv(nn.Module):
    """``x + ReLU(BN(conv(x)))``, 3x3 in groups: ``[B,C,H,W]`` -> the same."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.branch = ConvNormRelu(channels, channels, 3, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)

    def published_names(self) -> Names:
        return renamed(self, {"branch.conv": "conv", "branch.norm": "norm"})


class FourierUnit(nn.Module):
    """A 1x1 convolution, norm and ReLU of a map's spectrum: ``[B,C,H,W]`` -> the same.

    The spectrum is that of the orthonormal real transform, its real and imaginary parts interleaved
    as channels: 2c and 2c+1 are those of channel c.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(2 * channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fourier_inverse(batch_norm(self.conv(fourier(x)), self.norm, relu=True), x.shape[3])

    def published_names(self) -> Names:
        return renamed(self, {"conv": "conv_layer", "norm": "bn"})


class FoldedFourierUnit(nn.Module):
    """``x + FourierUnit(x)`` in eval mode, without norm."""

    def __init__(self, source: FourierUnit) -> None:
        super().__init__()
        self.conv = fold_norm(source.conv, source.norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = pointwise(fourier(x), self.conv.weight, self.conv.bias, activation="relu")
        return fourier_inverse(parts, x.shape[3], addend=x)


class SpectralTransform(nn.Module):
    """``expand(y + FourierUnit(y))``, ``y = ReLU(BN(reduce(x)))`` of half the channels: ``[B,C,H,W]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels // 2)
        self.fourier = FourierUnit(channels // 2)
        self.expand = nn.Conv2d(channels // 2, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = batch_norm(self.reduce(x), self.norm, relu=True)
        return self.expand(y + self.fourier(y))

    def published_names(self) -> Names:
        return renamed(self, {"reduce": "conv1.0", "norm": "conv1.1", "fourier": "fu", "expand": "conv2"})


class FourierConv(nn.Module):
    """Fast Fourier convolution, norm and ReLU: ``[B,C,H,W]`` -> the same.

    The first channels are local, the last ``global_channels`` global:
    ``local' = ReLU(BN(conv(local) + conv(global)))``,
    ``global' = ReLU(BN(conv(local) + SpectralTransform(global)))``, 3x3 convolutions.
    """

    def __init__(self, channels: int, global_channels: int) -> None:
        super().__init__()
        local = channels - global_channels
        self.split = (local, global_channels)
        self.local_to_local = _reflecting(local, local)
        self.local_to_global = _reflecting(local, global_channels)
        self.global_to_local = _reflecting(global_channels, local)
        self.spectral = SpectralTransform(global_channels)
        self.local_norm = nn.BatchNorm2d(local)
        self.global_norm = nn.BatchNorm2d(global_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        L = self.split[0]
        padded = reflect(x, 1)  # once, for all three
        local = reflecting_convolution(x, padded, self.weight_to_local())
        spatial = reflecting_convolution(x[:, :L], crop(padded, 0, L), self.local_to_global.weight)
        # Not of x, which need not be kept for the gradient then.
        whole = spatial + self.spectral(crop(padded, L, x.shape[1], margin=1))
        norms = ((local, self.local_norm), (whole, self.global_norm))
        return torch.cat([batch_norm(y, norm, relu=True) for y, norm in norms], dim=1)

    def weight_to_local(self) -> torch.Tensor:
        """``[L,C,3,3]``: the sum of two convolutions is one of all channels."""
        return torch.cat([self.local_to_local.weight, self.global_to_local.weight], dim=1)

    def published_names(self) -> Names:
        return renamed(
            self,
            {
                "local_to_local": "ffc.convl2l",
                "local_to_global": "ffc.convl2g",
                "global_to_local": "ffc.convg2l",
                "spectral": "ffc.convg2g",
                "local_norm": "bn_l",
                "global_norm": "bn_g",
            },
        )


def reflecting_convolution(x: torch.Tensor, padded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``F.conv2d(padded, weight)``, 3x3, ``padded`` being ``x`` padded by reflection.

    Computed from ``x`` where that is faster; gradients are always of ``padded``.
    """
    plain = not x.is_cpu or x.stride(1) != 1 or not FusedConvolution.pays(weight)
    if plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.conv2d(padded, weight)
    return _ReflectingConvolution.apply(x, padded, weight)  # type: ignore[no-any-return]


class _ReflectingConvolution(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, padded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return FusedConvolution(weight, None, "reflect")(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        once = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, groups
        wanted = [*ctx.needs_input_grad[1:], False]
        gradients = torch.ops.aten.convolution_backward(grad, *ctx.saved_tensors, None, *once, wanted)
        return None, *gradients[:2]


class FoldedReflectConv(ReflectConv):
    """``activation(conv(inputs) + addend)``, 3x3, the inputs side by side; keeps what it makes of its weight.

    For inference: the weight's numbers must not change any more.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, bias=False)
        self.kept: FusedConvolution | None = None

    def forward(
        self, *inputs: torch.Tensor, addend: torch.Tensor | None = None, activation: Activation = "none"
    ) -> torch.Tensor:
        last = all(x.stride(1) == 1 for x in inputs)
        fused = self._fused(*inputs, addend) if last else None
        if fused is not None:
            return fused(*inputs, addend=addend, activation=activation)
        out = super().forward(torch.cat(inputs, dim=1))
        out = out if addend is None else out + addend
        return out if activation == "none" else getattr(torch, activation)(out)

    def _fused(self, *tensors: torch.Tensor | None) -> FusedConvolution | None:
        """The kernel, where it serves the call and no gradient is asked for."""
        tracked = any(t is not None and t.requires_grad for t in (*tensors, self.weight))
        if (torch.is_grad_enabled() and tracked) or torch.compiler.is_compiling():
            return None
        if torch.is_autocast_enabled("cpu") or not FusedConvolution.pays(self.weight):
            return None
        if self.kept is None or self.kept.weight.dtype != self.weight.dtype:
            bias = None if self.bias is None else self.bias.detach()
            self.kept = FusedConvolution(self.weight.detach(), bias, "reflect")
        return self.kept


class FoldedFourierConv(nn.Module):
    """:class:`FourierConv` in eval mode: two spatial convolutions instead of three, and no norms."""

    def __init__(self, source: FourierConv) -> None:
        super().__init__()
        local, whole = source.split
        to_local, to_global = FoldedReflectConv(local + whole, local), FoldedReflectConv(local, whole)
        to_local.weight = nn.Parameter(source.weight_to_local().detach())
        to_global.weight = source.local_to_global.weight
        self.to_local = fold_norm(to_local, source.local_norm)
        self.to_global = fold_norm(to_global, source.global_norm)
        spectral = source.spectral
        self.reduce = fold_norm(spectral.reduce, spectral.norm)
        self.fourier = FoldedFourierUnit(spectral.fourier)
        # The norm of the sum: its shift is in to_global already.
        self.expand = fold_norm(spectral.expand, source.global_norm)
        self.expand.bias = None

    def forward(self, local: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Local and global channels, apart: what follows reads both where they are."""
        reduced = pointwise(whole, self.reduce.weight, self.reduce.bias, activation="relu")
        spectral = pointwise(self.fourier(reduced), self.expand.weight)
        return (
            self.to_local(local, whole, activation="relu"),
            self.to_global(local, addend=spectral, activation="relu"),
        )


class FourierBlock(nn.Module):
    """``x + FourierConv(FourierConv(x))``: ``[B,C,H,W]`` -> the same."""

    def __init__(self, channels: int, global_ratio: float) -> None:
        super().__init__()
        global_channels = split_channels(channels, global_ratio)
        self.first = FourierConv(channels, global_channels)
        self.second = FourierConv(channels, global_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.first(x))

    def folded(self) -> nn.Module:
        return FoldedFourierBlock(self)

    def published_names(self) -> Names:
        return renamed(self, {"first": "conv1", "second": "conv2"})


class FoldedFourierBlock(nn.Module):
    """:class:`FourierBlock` in eval mode; joins local and global channels only at its end."""

    def __init__(self, source: FourierBlock) -> None:
        super().__init__()
        self.split = source.first.split
        self.first, self.second = FoldedFourierConv(source.first), FoldedFourierConv(source.second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        local, whole = x.split(self.split, dim=1)
        return torch.cat(self.second(*self.first(local, whole)), dim=1).add_(x)


class PositionCode(nn.Module):
    """Mixes a position code into features by a 1x1 convolution: ``[B,C,H,W]`` -> the same.

    Computes ``project([features, code])``. Each channel of the code depends on the row or on the
    column alone, so the code is projected per row and per column, and once for the whole batch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.project = nn.Conv2d(channels + 2 + 4 * BANDS, channels, 1)
        self.kept: OrderedDict[tuple[int, int], torch.Tensor] | None = None  # by size, for inference

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        mixed = F.conv2d(features, self.project.weight[:, : self.channels])
        return mixed + self._projected_code((features.shape[2], features.shape[3])).to(mixed.dtype)

    def keep_codes(self) -> None:
        """From now on keep the last few sizes' codes; the weights must not change any more."""
        self.kept = OrderedDict()

    def _projected_code(self, size: tuple[int, int]) -> torch.Tensor:
        """``[C,H,W]``, the bias included."""
        if self.kept is None:
            return self._project_code(size)
        code = self.kept.pop(size, None)
        if code is None or code.device != self.project.weight.device:
            code = self._project_code(size)
        self.kept[size] = code
        while len(self.kept) > KEPT_SIZES:
            self.kept.popitem(last=False)
        return hold(code)

    def _project_code(self, size: tuple[int, int]) -> torch.Tensor:
        dtype, bias = self.project.weight.dtype, self.project.bias
        assert bias is not None
        weight = self.project.weight[:, self.channels :, 0, 0].to(accumulation_dtype(dtype))
        position, sine, cosine = weight.split([2, 2 * BANDS, 2 * BANDS], dim=1)
        axes = []  # [C,H] and [C,W]
        for axis, n in enumerate(size):
            part = [position[:, axis, None], sine.chunk(2, dim=1)[axis], cosine.chunk(2, dim=1)[axis]]
            code = axis_code(n, weight.device, weight.dtype)
            # Not a matrix product: under autocast that would round the code, and what is kept of it.
            axes.append((torch.cat(part, dim=1)[:, :, None] * code).sum(1))
        # Channels-last like the features: a sum of maps in different layouts takes many times as long.
        code = axes[0].t()[:, None] + axes[1].t() + bias  # [H,W,C]
        return code.to(dtype).contiguous().permute(2, 0, 1)


def axis_code(n: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Code ``[1 + 2·BANDS, n]`` of the positions on one axis: themselves, from -1 to 1, sines, cosines."""
    position = torch.linspace(-1, 1, n, device=device, dtype=dtype)
    frequency = torch.linspace(1, HIGHEST, BANDS, device=device, dtype=dtype)
    angle = math.pi * (frequency[:, None] * position)
    return torch.cat([position[None], angle.sin(), angle.cos()])


def position_code(height: int, width: int) -> torch.Tensor:
    """The position code ``[2 + 4·BANDS, height, width]`` in the published order of channels.

    Row, column, then the sines of the row, of the column, the cosines of the row, of the column.
    """
    rows, columns = axis_code(height)[:, :, None], axis_code(width)[:, None, :]
    parts = [
        part.expand(-1, height, width)
        for pair in zip(*(a.split([1, BANDS, BANDS]) for a in (rows, columns)), strict=True)
        for part in pair
    ]
    return torch.cat(parts)


class Attention(NamedTuple):
    """Where one block looked: softmax maps of the read, sigmoid maps of the write, ``[B,heads,h,w]``."""

    read: torch.Tensor
    write: torch.Tensor


class TwoStreamBlock(nn.Module):
    """Local features and global latents inform each other.

    Latents read from the features and attend, the first time to the references' latents too;
    convolutions refine the features; the latents are written back.

    Args:
        channels: ``C`` of both streams.
        heads: of the attention between latents.
        window_heads: of read and write.
        num_latents: ``N``, a square number.
        refine: the two convolution blocks.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        window_heads: int,
        num_latents: int,
        refine: tuple[nn.Module, nn.Module],
    ) -> None:
        super().__init__()
        self.read = WindowRead(channels, window_heads, num_latents)
        self.cross_attention = LatentAttention(channels, heads)
        self.self_attention = LatentAttention(channels, heads)
        self.refine1, self.refine2 = refine
        self.write = WindowWrite(channels, window_heads, num_latents)

    def forward(
        self,
        state: tuple[torch.Tensor, ...],
        extra: Sequence[KeysValues] | None = None,
        return_attention: bool = False,
    ) -> tuple[tuple[torch.Tensor, ...], KeysValues, Attention | None]:
        """One step.

        Args:
            state: features ``[B,C,h,w]``, latents ``[B,N,C]``.
            extra: keys and values of the references' latents, pairs of ``[B,heads,M,C/heads]``.
            return_attention: whether to return where the block looked.

        Returns:
            The new state; the keys and values of the own latents; where the block looked, or None.
        """
        features, latents = state
        latents, read = _with_map(self.read(latents, features, return_attention=return_attention))
        latents, emitted = self.cross_attention(latents, extra, return_kv=True)
        latents = self.self_attention(latents)
        features = self.refine2(self.refine1(features))
        features, write = _with_map(self.write(features, latents, return_attention=return_attention))
        looked = None if read is None or write is None else Attention(read, write)
        return (features, latents), emitted, looked

    def published_names(self) -> Names:
        return renamed(
            self,
            {
                "read": "read",
                "write": "write",
                "cross_attention": "attn1",
                "self_attention": "attn2",
                "refine1": "block1",
                "refine2": "block2",
            },
        )


class UpNormRelu(nn.Module):
    """``ReLU(BN(transposed conv(x)))``: ``[B,C,H,W]`` -> ``[B,O,2H,2W]``."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, out, 3, stride=2, padding=1, output_padding=1)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = strided_convolution(x, self.conv.weight, self.conv.bias, 2, padding=1, output_padding=1)
        return batch_norm(up, self.norm, relu=True)

    def folded(self) -> nn.Module:
        return FoldedUpRelu(self)


class FoldedUpRelu(nn.Module):
    """:class:`UpNormRelu` in eval mode."""

    def __init__(self, source: UpNormRelu) -> None:
        super().__init__()
        self.conv = fold_norm(source.conv, source.norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return transposed_convolution_relu(x, self.conv.weight, self.conv.bias, 2, 1, 1)


class Decoder(nn.Module):
    """Features ``[B,widths[-1],h,w]`` -> ``[B,out,H,W]``; widths from fine to coarse.

    ``bounded``: an image in (0, 1); otherwise any numbers.
    """

    def __init__(self, widths: list[int], out: int, bounded: bool = True) -> None:
        super().__init__()
        self.bounded = bounded
        coarse_to_fine = widths[::-1]
        self.up = nn.Sequential(*(UpNormRelu(*pair) for pair in pairwise(coarse_to_fine)))
        self.out = ReflectConv(widths[0], out, 7)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        padded = reflect(self.up(features), 3)
        bias = self.out.bias
        assert bias is not None
        out = narrow_convolution(padded, self.out.weight, bias)
        return out.sigmoid() if self.bounded else out

    def published_parts(self, start: int) -> dict[str, str]:
        """Published names by own part, the first transposed convolution being ``model.<start>``."""
        parts: dict[str, str] = {}
        for i in range(len(self.up)):
            parts |= {f"decoder.up.{i}.conv": f"model.{start + 3 * i}"}
            parts |= {f"decoder.up.{i}.norm": f"model.{start + 3 * i + 1}"}
        return parts | {"decoder.out": f"model.{start + 3 * len(self.up) + 1}"}


def reflect(x: torch.Tensor, margin: int) -> torch.Tensor:
    """``x`` [B,C,H,W] padded by reflection; does not keep ``x`` for the gradient, as ``F.pad`` does."""
    return _Reflect.apply(x, margin)  # type: ignore[no-any-return]


class _Reflect(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, margin: int) -> torch.Tensor:
        return reflect_pad(x, margin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, int], output: torch.Tensor) -> None:
        ctx.margin = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        m, (H, W) = ctx.margin, grad.shape[2:]
        like = grad[:, :, m : H - m, m : W - m]  # the input's shape is all that is wanted of it
        return torch.ops.aten.reflection_pad2d_backward(grad, like, (m,) * 4), None


def crop(x: torch.Tensor, begin: int, end: int, margin: int = 0) -> torch.Tensor:
    """Channels ``[begin, end)`` of ``x`` [B,C,H,W] without ``margin`` pixels on each side.

    A view; its gradient has the layout of the incoming one, which indexing would not keep.
    """
    return _Crop.apply(x, begin, end, margin)  # type: ignore[no-any-return]


class _Crop(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, begin: int, end: int, margin: int) -> torch.Tensor:
        H, W = x.shape[2:]
        return x[:, begin:end, margin : H - margin, margin : W - margin]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, int, int, int], output: torch.Tensor) -> None:
        x, begin, end, margin = inputs
        ctx.pads = (margin, margin, margin, margin, begin, x.shape[1] - end)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return F.pad(grad, ctx.pads), None, None, None


def split_channels(channels: int, global_ratio: float) -> int:
    """How many of ``channels`` are global."""
    global_channels = int(channels * global_ratio)
    if not 2 <= global_channels < channels:
        raise ValueError(
            f"global_ratio: expected at least 2 of {channels} channels to be global, and not all, "
            f"got {global_ratio}"
        )
    return global_channels


def flag(name: str, value: object) -> bool:
    """``value``, a bool; raise ``TypeError`` if it is none."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def widths(first: int, downsamplings: int, limit: int) -> list[int]:
    """Channels after the first convolution and after each downsampling."""
    for name, value in (("width", first), ("downsamplings", downsamplings), ("max_width", limit)):
        checks.positive(name, value)
    return [min(limit, first * 2**i) for i in range(downsamplings + 1)]


def encoder(channels: int, widths: list[int]) -> nn.Sequential:
    """``[B,channels,H,W]`` -> ``[B,widths[-1],H/2^n,W/2^n]``."""
    down = (ConvNormRelu(*pair, 3, stride=2) for pair in pairwise(widths))
    return nn.Sequential(ConvNormRelu(channels, widths[0], 7), *down)


def initialise(module: nn.Module) -> None:
    """Draw weights for training: normal with deviation 0.02, zero bias.

    Transposed convolutions and norms keep the initial values that PyTorch gave them.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def fold(module: nn.Module) -> None:
    """Replace the parts of ``module`` by their stand-ins for inference."""
    for name, child in module.named_children():
        if isinstance(child, PositionCode):
            child.keep_codes()
        elif isinstance(child, Foldable):
            setattr(module, name, child.folded())
        else:
            fold(child)


@torch.no_grad()
def fold_norm(conv: Conv, norm: nn.Module) -> Conv:
    """A convolution that computes ``norm(conv(x))`` in eval mode; in float64, rounded once."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)  # synchronised ones too
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    channels = (-1, 1, 1, 1) if isinstance(conv, nn.Conv2d) else (1, -1, 1, 1)
    folded = copy.deepcopy(conv)
    folded.weight = nn.Parameter((conv.weight.double() * scale.view(channels)).to(conv.weight.dtype))
    folded.bias = nn.Parameter(shift.to(conv.weight.dtype))
    return folded


def _with_map(
    result: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A layer's result and its attention map, None if that was not asked for."""
    return result if isinstance(result, tuple) else (result, None)


def _reflecting(channels: int, out: int) -> nn.Conv2d:
    return ReflectConv(channels, out, 3, bias=False)
