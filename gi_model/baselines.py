"""The baselines: LaMa, which inpaints a single frame, and a transformer over all features."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from gi_kernels import checks
from gi_kernels.nn import KeysValues, LatentAttention, check_heads
from gi_model.generator import CrossingGenerator, Generator
from gi_model.published import Names, identical, renamed
from gi_model.references import References
from gi_model.streams import (
    ConvNormRelu,
    FourierBlock,
    encoder,
    fold_norm,
    split_channels,
)


class LamaGenerator(Generator):
    """Inpaints each target alone by Fourier convolutions; references and flow are ignored.

    Args:
        in_channels, out_channels, width, downsamplings, max_width: as for
            :class:`~gi_model.generator.TwoStreamGenerator`.
        blocks: Fourier convolution blocks.
        global_ratio: share of the channels that are global.

    Source: Suvorov et al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions", 2022.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        out_channels: int = 3,
        width: int = 64,
        downsamplings: int = 3,
        max_width: int = 1024,
        blocks: int = 6,
        global_ratio: float = 0.75,
    ) -> None:
        super().__init__(in_channels, width, downsamplings, max_width)
        checks.positive("blocks", blocks)
        sizes = self.widths
        self.encoder = encoder(in_channels, sizes[:-1])
        self.split = SplitConv(sizes[-2], sizes[-1], global_ratio)
        self.blocks = nn.Sequential(*(FourierBlock(sizes[-1], global_ratio) for _ in range(blocks)))
        self._finish(out_channels)

    def forward(
        self,
        input: torch.Tensor,
        srcs: torch.Tensor | None = None,
        flows: torch.Tensor | None = None,
        flow_errs: torch.Tensor | None = None,
        *,
        references: References | None = None,
        return_attention: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, list]:
        """Fill the target frames ``input [B,4,H,W]``; all else but ``return_attention`` is ignored.

        Raises:
            TypeError, ValueError: ``input`` of the wrong type, rank, size, dtype or device.
        """
        self._check_frames(("input", input, f"B {self.channels} H W"))
        out = self._launch(self._fill, input)
        return (out, []) if return_attention else out

    def _fill(self, input: torch.Tensor) -> torch.Tensor:
        """:meth:`forward` of checked frames."""
        return self.decoder(self.blocks(self.split(self.encoder(self._frames(input))))).to(input.dtype)

    def encode_references(self, srcs: torch.Tensor) -> References:
        """References ``[B,T,4,H,W]`` of which nothing is kept."""
        self._check_frames(("srcs", srcs, f"B T {self.channels} H W"))
        B, T, _, H, W = srcs.shape
        return References(B, T, (H, W), ())

    def published_names(self) -> Names:
        """Published names: those of one long sequence, of which layers without weights count too."""
        self._check_names()
        names: dict[str, str] = {}
        for i in range(self.downsamplings):
            names |= {f"encoder.{i}.conv": f"model.{i + 1}.ffc.convl2l"}
            names |= {f"encoder.{i}.norm": f"model.{i + 1}.bn_l"}
        start = self.downsamplings + 1
        names |= {"split": f"model.{start}"}
        names |= {f"blocks.{i}": f"model.{start + 1 + i}" for i in range(len(self.blocks))}
        names |= self.decoder.published_parts(start + len(self.blocks) + 2)
        return renamed(self, names)


class SplitConv(nn.Module):
    """The downsampling that makes local and global channels: ``[B,C,H,W]`` -> ``[B,O,H/2,W/2]``."""

    def __init__(self, channels: int, out: int, global_ratio: float) -> None:
        super().__init__()
        global_channels = split_channels(out, global_ratio)
        self.to_local = ConvNormRelu(channels, out - global_channels, 3, stride=2)
        self.to_global = ConvNormRelu(channels, global_channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.to_local(x), self.to_global(x)], dim=1)

    def folded(self) -> nn.Module:
        parts = [fold_norm(part.conv, part.norm) for part in (self.to_local, self.to_global)]
        merged = copy.deepcopy(parts[0])
        merged.out_channels = sum(part.out_channels for part in parts)
        merged.weight = nn.Parameter(torch.cat([part.weight for part in parts]))
        merged.bias = nn.Parameter(torch.cat([part.bias for part in parts if part.bias is not None]))
        return nn.Sequential(merged, nn.ReLU(inplace=True))

    def published_names(self) -> Names:
        return renamed(
            self,
            {
                "to_local.conv": "ffc.convl2l",
                "to_local.norm": "bn_l",
                "to_global.conv": "ffc.convl2g",
                "to_global.norm": "bn_g",
            },
        )


class TransformerBlock(nn.Module):
    """Every position attends to all, and to those of the references."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.attention = LatentAttention(channels, heads)

    def forward(
        self,
        state: tuple[torch.Tensor, ...],
        extra: Sequence[KeysValues] | None = None,
        return_attention: bool = False,
    ) -> tuple[tuple[torch.Tensor, ...], KeysValues, None]:
        """State: features ``[B,C,h,w]``; ``extra`` as for :class:`~gi_model.streams.TwoStreamBlock`."""
        (features,) = state  # nothing to see of return_attention: its maps are never formed
        tokens, emitted = self.attention(features.flatten(2).transpose(1, 2), extra, return_kv=True)
        return (tokens.transpose(1, 2).unflatten(2, features.shape[2:]),), emitted, None


class TransformerGenerator(CrossingGenerator):
    """Global attention over the positions of a coarser feature map; no flow, no Fourier convolutions.

    Its code and weights were never published: this follows the published configuration.

    Args:
        in_channels, out_channels, width, downsamplings, max_width, blocks, crossed, heads, attends: as
            for :class:`~gi_model.generator.TwoStreamGenerator`.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        out_channels: int = 3,
        width: int = 64,
        downsamplings: int = 4,
        max_width: int = 1024,
        blocks: int = 6,
        crossed: int = 2,
        heads: int = 8,
        attends: bool = True,
    ) -> None:
        super().__init__(in_channels, width, downsamplings, max_width, blocks, crossed, attends)
        C = self.widths[-1]
        check_heads(C, heads)
        self.blocks = nn.ModuleList(TransformerBlock(C, heads) for _ in range(blocks))
        self.aggregations = nn.ModuleList()
        self._finish(out_channels)

    def published_names(self) -> Names:
        """Its own: there are no others."""
        return identical(self)
