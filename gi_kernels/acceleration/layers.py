"""Replacements of the published layers by those of ``gi_kernels.nn``.

They are found by the names of their classes, the published package is never imported; that the
parameters are those of the published layer is checked before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels import nn as layers
from gi_kernels.acceleration.swapping import MEMORY, Replacement


class DeformableWrite(Replacement, layers.DeformableAggregation):
    """Projects references before the warp, without the target's term, which the softmax removes."""

    operator = "deformable_write"
    replaces = "DeformableWriteLayer"
    channels = property(lambda self: self.v.out_channels)  # type: ignore[assignment]

    @classmethod
    def refuse(cls, module: Any) -> str | None:
        C = _size(module, "v.bias")
        shapes = {
            "q.weight": (C, 2 * C + 1, 1, 1),
            "q.bias": (C,),
            "v.weight": (C, C + 1, 1, 1),
            "v.bias": (C,),
        }
        return differing_parameters(module, shapes)

    def forward(self, x, srcs, flows, flow_errs):  # type: ignore[override]
        return layers.DeformableAggregation.forward(self, x, srcs, flows, flow_errs)


class WindowRead(Replacement, layers.WindowRead):
    """Pools windows before it projects them."""

    operator = "windowed_read"
    replaces = "LocalReadLayer"
    multiplies = True
    heads = property(lambda self: self.to_logits.out_channels)  # type: ignore[assignment]
    side = property(lambda self: self.num_latents_sqrt)  # type: ignore[assignment]

    @classmethod
    def refuse(cls, module: Any) -> str | None:
        D, h = _size(module, "ln1.weight"), _size(module, "to_logits.bias")
        shapes = {**_norm("ln1", D), **_norm("ln2", D), **_pointwise("to_logits", D, h)}
        for name in ("mlp.dense1", "mlp.dense2", "projection"):
            shapes |= _linear(name, D)
        shapes |= _pointwise("to_values", D, D)
        return differing_parameters(module, shapes) or _heads(D, h) or _windows(module) or _gelu(module)

    def forward(self, xlr, xhr, return_attn=False):  # type: ignore[override]
        return layers.WindowRead.forward(self, xlr, xhr, return_attention=return_attn)


class WindowWrite(Replacement, layers.WindowWrite):
    """Projects latents before it spreads them; batch statistics from sums over windows."""

    operator = "windowed_write"
    replaces = "LocalWriteLayer"
    multiplies = True
    heads = property(lambda self: self.to_logits.out_channels)  # type: ignore[assignment]
    side = property(lambda self: self.num_latents_sqrt)  # type: ignore[assignment]

    @classmethod
    def refuse(cls, module: Any) -> str | None:
        D, h = _size(module, "ln1.weight"), _size(module, "to_logits.bias")
        shapes = {**_norm("ln1", D), **_norm("ln2", D), **_pointwise("to_logits", D, h)}
        for name in ("mlp.dense1", "mlp.dense2", "projection"):
            shapes |= _pointwise(name, D, D)
        shapes |= _linear("to_values", D)
        return differing_parameters(module, shapes) or _heads(D, h) or _windows(module) or _gelu(module)

    def forward(self, xhr, xlr, return_attn=False):  # type: ignore[override]
        return layers.WindowWrite.forward(self, xhr, xlr, return_attention=return_attn)


class LatentAttention(Replacement, layers.LatentAttention):
    """Attends without joining keys and values, and without a matrix of scores."""

    operator = "attention"
    replaces = "AttentionLayer"
    multiplies = True
    heads = property(lambda self: self.attn.num_heads)  # type: ignore[assignment]

    @classmethod
    def refuse(cls, module: Any) -> str | None:
        D = _size(module, "attn.layernorm1.weight")
        shapes = {**_norm("attn.layernorm1", D), **_norm("ln_premlp", D)}
        for name in ("attn.query", "attn.key", "attn.value", "projection", "mlp.dense1", "mlp.dense2"):
            shapes |= _linear(name, D)
        different = differing_parameters(module, shapes) or _heads(D, getattr(module.attn, "num_heads", 0))
        if different:
            return different
        dropout = getattr(module.attn, "dropout", None)
        if dropout is not None and getattr(dropout, "p", 0) != 0:
            return f"its attention has dropout {dropout.p}"
        return _gelu(module)

    def forward(self, x, kv=None, return_kv=False):  # type: ignore[override]
        extra = None if kv is None else tuple(kv)
        out = layers.LatentAttention.forward(self, x, extra=extra, return_kv=return_kv)
        return (out[0], list(out[1])) if return_kv else out


class PositionCode(Replacement):
    """Makes the position code once per size, and projects it once and not for every item."""

    operator = "position_code"
    replaces = "LatentInitLayer"

    #: Sizes whose code is remembered.
    _MOST = 8

    @classmethod
    def refuse(cls, module: Any) -> str | None:
        code = getattr(module, "pos_embeddings", None)
        if not isinstance(code, nn.Module):
            return "it has no module pos_embeddings"
        C, inputs = _size(module, "project.bias"), _size(module, "project.weight", 1)
        shapes = {"project.weight": (C, inputs, 1, 1), "project.bias": (C,)}
        shapes["latents"] = tuple(module.latents.shape) if hasattr(module, "latents") else ()
        if next(code.parameters(), None) is not None:
            return "its position code is trained"
        return differing_parameters(module, shapes)

    def forward(self, x):
        channels = x.shape[1]
        code = self._code(tuple(x.shape[-2:]), x.device)
        weight, bias = self.project.weight, self.project.bias
        shift = F.conv2d(code.to(weight.dtype), weight[:, channels:], bias)
        return F.conv2d(x, weight[:, :channels]).add_(shift), self.latents.expand(len(x), -1, -1)

    def _code(self, size: tuple[int, int], device: torch.device) -> torch.Tensor:
        """``[1, channels, H, W]``."""
        known = {} if torch.compiler.is_compiling() else self.__dict__.setdefault(f"{MEMORY}codes", {})
        if (size, device) not in known:
            while len(known) >= self._MOST:
                known.pop(next(iter(known)))
            with torch.inference_mode(False), torch.no_grad():  # what is remembered may serve training
                rows = self.pos_embeddings(size, batch_size=1, device=device)  # [1,HW,channels]
                known[size, device] = rows.transpose(1, 2).unflatten(2, size).contiguous()
        return known[size, device]


LAYERS: tuple[type[Replacement], ...] = (
    DeformableWrite,
    WindowRead,
    WindowWrite,
    LatentAttention,
    PositionCode,
)


def differing_parameters(module: nn.Module, expected: Mapping[str, Sequence[int]]) -> str | None:
    """Say why a module is not the published layer with these parameters; None if it is.

    A replacement does not call the children one by one, so nothing may hang on their being called.
    """
    actual = {name: tuple(p.shape) for name, p in module.named_parameters()}
    missing, unexpected = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    if missing:
        return f"it has no parameter {missing[0]}"
    if unexpected:
        return f"it has a parameter {unexpected[0]} more than the published layer"
    for name, shape in expected.items():
        if actual[name] != tuple(shape):
            return f"parameter {name} has shape {list(actual[name])}, expected {list(shape)}"
    for name, child in module.named_modules():
        hooks = (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks)
        if child is not module and any(hooks):
            return f"{name} has hooks, which would not be called"
    return None


def _size(module: nn.Module, name: str, dimension: int = 0) -> int:
    """Size of a parameter that has the others' shapes follow from it; 0 where it is missing."""
    parameter = dict(module.named_parameters()).get(name)
    return 0 if parameter is None or parameter.dim() <= dimension else parameter.shape[dimension]


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _linear(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size, size), f"{name}.bias": (size,)}


def _pointwise(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs, 1, 1), f"{name}.bias": (outputs,)}


def _heads(dim: int, heads: int) -> str | None:
    return None if heads > 0 and dim % heads == 0 else f"{heads} heads do not divide {dim} channels"


def _windows(module: nn.Module) -> str | None:
    side = getattr(module, "num_latents_sqrt", None)
    return None if isinstance(side, int) and side > 0 else "it has no attribute num_latents_sqrt"


def _gelu(module: nn.Module) -> str | None:
    """The replacements apply the exact GELU between the MLP's layers."""
    others = [m for m in module.mlp.children() if not isinstance(m, nn.Linear | nn.Conv2d)]
    if not others:
        return "its MLP has no activation that is a module"
    for other in others:
        if not isinstance(other, nn.GELU) or other.approximate != "none":
            return f"its MLP has a {other}"
    return None
