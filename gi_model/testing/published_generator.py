"""The published generator in eager PyTorch, from a ``gi_model`` generator's weights: the baseline.

Layers by the published formulation, contiguous memory, convolutions one by one, everything of the
references recomputed in each call. Only the arrangement of the parts is ours.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels.nn import DeformableAggregation
from gi_kernels.testing.published import (
    PublishedDeformableAggregation,
    PublishedLatentAttention,
    PublishedWindowRead,
    PublishedWindowWrite,
)
from gi_model.generator import TwoStreamGenerator
from gi_model.streams import (
    ConvNormRelu,
    FourierConv,
    FourierUnit,
    PositionCode,
    ReflectConv,
    SpectralTransform,
    TwoStreamBlock,
    UpNormRelu,
)


def published_generator(generator: TwoStreamGenerator) -> TwoStreamGenerator:
    """A copy of ``generator`` that computes as published."""
    baseline = copy.deepcopy(generator)
    baseline.channels_last = False
    for module in baseline.modules():
        module.__class__ = _STYLES.get(type(module), type(module))
    for block in baseline.blocks:
        assert isinstance(block, TwoStreamBlock)
        dim, heads = block.self_attention.projection.in_features, block.self_attention.heads
        for name in ("cross_attention", "self_attention"):
            _exchange(block, name, PublishedLatentAttention(dim, heads))
        side = block.read.side
        _exchange(block, "read", PublishedWindowRead(dim, block.read.heads, side * side))
        _exchange(block, "write", PublishedWindowWrite(dim, block.write.heads, side * side))
    baseline.train(generator.training)
    return baseline


def _exchange(parent: nn.Module, name: str, module: nn.Module) -> None:
    module.load_state_dict(getattr(parent, name).state_dict())
    setattr(parent, name, module)


class _Aggregation(DeformableAggregation):
    def forward(self, features: Any, references: Any, flows: Any, errors: Any) -> torch.Tensor:
        return PublishedDeformableAggregation.forward(self, features, references, flows, errors)  # type: ignore

    def project(self, references: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return references, references  # projected after the warp, for each target

    def aggregate(self, features: Any, keys: Any, values: Any, flows: Any, errors: Any) -> torch.Tensor:
        return self(features, keys, flows, errors)


class _ConvNormRelu(ConvNormRelu):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)


class _UpNormRelu(UpNormRelu):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)


class _SpectralTransform(SpectralTransform):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm(self.reduce(x)), inplace=True)
        return self.expand(y + self.fourier(y))


class _FourierConv(FourierConv):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        local, whole = x[:, : self.split[0]], x[:, self.split[0] :]
        out = self.local_norm(self.local_to_local(local) + self.global_to_local(whole))
        rest = self.global_norm(self.local_to_global(local) + self.spectral(whole))
        return torch.cat([F.relu(out), F.relu(rest)], dim=1)


class _FourierUnit(FourierUnit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfftn(x, dim=(-2, -1), norm="ortho")
        parts = torch.stack([spectrum.real, spectrum.imag], dim=2).flatten(1, 2)
        parts = F.relu(self.norm(self.conv(parts))).unflatten(1, (-1, 2))
        return torch.fft.irfftn(
            torch.complex(parts[:, :, 0], parts[:, :, 1]), x.shape[-2:], (-2, -1), "ortho"
        )


class _PositionCode(PositionCode):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        B, _, h, w = features.shape
        rows, columns, frequency = (
            torch.linspace(*ends, device=features.device) for ends in ((-1, 1, h), (-1, 1, w), (1, 16, 64))
        )
        position = torch.meshgrid(rows, columns, indexing="ij")
        angles = torch.pi * frequency[:, None, None] * torch.stack(position)[:, None]
        code = torch.cat([torch.stack(position), angles.sin().flatten(0, 1), angles.cos().flatten(0, 1)])
        code = code.to(features).expand(B, -1, -1, -1)
        return self.project(torch.cat([features, code], dim=1))


_STYLES: dict[type, type] = {
    ConvNormRelu: _ConvNormRelu,
    DeformableAggregation: _Aggregation,
    FourierConv: _FourierConv,
    FourierUnit: _FourierUnit,
    PositionCode: _PositionCode,
    ReflectConv: nn.Conv2d,
    SpectralTransform: _SpectralTransform,
    UpNormRelu: _UpNormRelu,
}
