"""Layers on the operators, their parameters named as in the published checkpoints.

Each computes exactly what the published layer computes, with less work:

- the target's term of the aggregation's logits is the same for all references, so the softmax
  removes it: it is never computed and its parameters have zero gradients;
- a 1x1 convolution commutes with the warp, so references are projected once, before it;
- windows are pooled before they are projected, and projected before they are spread;
- batch statistics of a spread map follow from sums over its windows;
- statistics that are fixed are folded into the weights next to them.

Source of all layers: Esser, Michael, Sengupta, "Towards Unified Keyframe Propagation Models", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels import checks
from gi_kernels.layout import is_channels_last, relayout
from gi_kernels.norms import batch_norm, track
from gi_kernels.ops.deformable_aggregation import deformable_aggregation
from gi_kernels.ops.global_attention import global_attention
from gi_kernels.ops.pixel_projection import pixel_projection
from gi_kernels.ops.projected_aggregation import projected_aggregation
from gi_kernels.ops.window_pool.reference import join_windows, split_windows
from gi_kernels.ops.window_query import window_query
from gi_kernels.ops.window_spread import window_spread
from gi_kernels.precision import accumulation_dtype
from gi_kernels.products import Linear, Pointwise, add_mlp_, linear

KeysValues = tuple[torch.Tensor, torch.Tensor]


class DeformableAggregation(nn.Module):
    r"""Adds to a target's features what its references show where the flow points.

    .. math:: out = x + \sum_t \mathrm{softmax}_t(q([s_t, e_t, x])) \odot v([s_t, e_t])

    with ``s`` the references sampled along the flow, ``e`` the flow errors and ``q``, ``v`` 1x1
    convolutions. Parameters: ``q.weight [C, 2C+1, 1, 1]``, ``q.bias [C]``, ``v.weight
    [C, C+1, 1, 1]``, ``v.bias [C]``. ``q.bias`` and the part of ``q.weight`` that meets the target
    have no effect; their gradients are zero.

    Args:
        channels: ``C``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        checks.positive("channels", channels)
        self.channels = channels
        self.q = nn.Conv2d(2 * channels + 1, channels, 1)
        self.v = nn.Conv2d(channels + 1, channels, 1)

    def forward(
        self, features: torch.Tensor, references: torch.Tensor, flows: torch.Tensor, errors: torch.Tensor
    ) -> torch.Tensor:
        """``[B,C,H,W]``, ``[B,T,C,H,W]``, ``[B,T,2,h,w]`` (pixels), ``[B,T,1,h',w']`` -> ``[B,C,H,W]``."""
        self._check(features, flows, errors, references=references)
        key_weight, value_weight = self._projections()
        return projected_aggregation(
            features, references, key_weight, value_weight, flows, errors, *self._vectors()
        )

    def project(self, references: torch.Tensor) -> KeysValues:
        """Keys and values ``[B,T,C,H,W]`` of references, channels-last; they serve every target."""
        check_inputs(self.q.weight, ("references", references, f"B T {self.channels} H W"))
        B, T = references.shape[:2]
        both = pixel_projection(references.flatten(0, 1), torch.cat(self._projections()))
        keys, values = both.unflatten(0, (B, T)).split(self.channels, dim=2)
        return keys, values

    def aggregate(
        self,
        features: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        flows: torch.Tensor,
        errors: torch.Tensor,
    ) -> torch.Tensor:
        """The layer's result from what ``project`` returned."""
        self._check(features, flows, errors, keys=keys, values=values)
        return deformable_aggregation(features, keys, values, flows, errors, *self._vectors())

    def _projections(self) -> KeysValues:
        """Weights ``[C, C]`` from a reference to its keys and values."""
        return self.q.weight[:, : self.channels, 0, 0], self.v.weight[:, : self.channels, 0, 0]

    def _vectors(self) -> tuple[torch.Tensor, ...]:
        """Weights ``[C]`` of the flow error in keys and values, and the bias of values."""
        key_error_weight = self.q.weight[:, self.channels, 0, 0]
        # Ties q.bias to the graph: it gets a zero gradient, which data-parallel training waits for.
        chosen = torch.ones_like(key_error_weight, dtype=torch.bool)
        key_error_weight = torch.where(chosen, key_error_weight, self.q.bias)
        return key_error_weight, self.v.weight[:, self.channels, 0, 0], self.v.bias

    def _check(
        self, features: torch.Tensor, flows: torch.Tensor, errors: torch.Tensor, **frames: torch.Tensor
    ) -> None:
        named = [("features", features, f"B {self.channels} H W")]
        named += [(name, frame, f"B T {self.channels} H W") for name, frame in frames.items()]
        check_inputs(self.q.weight, *named)
        checks.shapes(*named, ("flows", flows, "B T 2 h w"), ("errors", errors, "B T 1 h' w'"))


class LatentAttention(nn.Module):
    r"""Self-attention of latents, over further keys and values where given, and an MLP.

    .. math:: y = x + P \, \mathrm{attention}(q(n), [k(n); k'], [v(n); v']), \; n = \mathrm{LN}_1(x),
        \qquad out = y + \mathrm{MLP}(\mathrm{LN}_2(y))

    Parameters: ``attn.{layernorm1,query,key,value}``, ``projection``, ``ln_premlp``,
    ``mlp.{dense1,dense2}``; the MLP has an exact GELU and does not widen.

    Args:
        dim: width of the latents.
        heads: number of heads; divides ``dim``.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.attn = _Projections(dim)
        self.projection = Linear(dim, dim)
        self.ln_premlp = nn.LayerNorm(dim)
        self.mlp = _MLP(Linear(dim, dim), Linear(dim, dim))

    def forward(
        self,
        x: torch.Tensor,
        extra: KeysValues | Sequence[KeysValues] | None = None,
        return_kv: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, KeysValues]:
        """Attend.

        Args:
            x: ``[B, N, dim]``.
            extra: a pair ``(keys, values)`` of ``[B, heads, M, dim/heads]``, or a sequence of pairs,
                to which ``x`` attends besides its own.
            return_kv: also return this layer's own ``(keys, values)``.
        """
        dim = self.projection.in_features
        pairs = _pairs(extra)
        segment = f"B {self.heads} {{}} {dim // self.heads}"
        check_inputs(
            self.projection.weight,
            ("x", x, f"B N {dim}"),
            *((f"extra[{i}] keys", keys, segment.format(f"M{i}")) for i, (keys, _) in enumerate(pairs)),
            *((f"extra[{i}] values", values, segment.format(f"M{i}")) for i, (_, values) in enumerate(pairs)),
        )
        h = self.attn.layernorm1(x)
        query, key, value = (
            layer(h).unflatten(2, (self.heads, dim // self.heads)).transpose(1, 2)
            for layer in (self.attn.query, self.attn.key, self.attn.value)
        )
        out = global_attention(query, [key, *(k for k, _ in pairs)], [value, *(v for _, v in pairs)])
        x = x + self.projection(out.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.ln_premlp(x))
        return (x, (key, value)) if return_kv else x


class WindowRead(nn.Module):
    r"""Reads a feature map into latents, one latent per window.

    .. math:: r_{w,h} = \sum_{p \in w} \mathrm{softmax}_{p \in w}(l_h)_p \, v_h(p), \quad
        z = x + P \, \mathrm{LN}_1(r), \quad out = z + \mathrm{MLP}(\mathrm{LN}_2(z))

    with logits ``l`` and values ``v`` 1x1 convolutions of the features. A map that does not divide
    into the grid is resized (bilinear, ``align_corners=True``) to the nearest multiple, at least one
    pixel per window. Parameters: ``ln1``, ``ln2``, ``mlp.{dense1,dense2}``, ``to_logits``,
    ``to_values``, ``projection``.

    Args:
        dim: channels of latents and features.
        heads: number of heads; divides ``dim``.
        num_latents: a square number, the windows.
    """

    def __init__(self, dim: int, heads: int, num_latents: int) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.side = grid_side(num_latents)
        self.ln1 = nn.LayerNorm(dim)
        self.ln2 = nn.LayerNorm(dim)
        self.mlp = _MLP(Linear(dim, dim), Linear(dim, dim))
        self.to_logits = Pointwise(dim, heads)
        self.to_values = Pointwise(dim, dim)
        self.projection = Linear(dim, dim)

    def forward(
        self, latents: torch.Tensor, features: torch.Tensor, return_attention: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Read.

        Args:
            latents: ``[B, num_latents, dim]``.
            features: ``[B, dim, H, W]``.
            return_attention: also return the softmax maps ``[B, heads, H', W']`` at the grid's size.
        """
        dim = self.projection.in_features
        check_inputs(
            self.projection.weight,
            ("latents", latents, f"B {self.side**2} {dim}"),
            ("features", features, f"B {dim} H W"),
        )
        checks.nonempty("features", features, 2, 3)
        pooled = self._pool(features)  # [B,L,h,C]
        # Values are projected per window: the softmax weights sum to one, so the bias is just added.
        weight, bias = self.to_values.weight.flatten(1), self.to_values.bias
        read = linear(pooled.flatten(2), weight, bias, groups=self.heads)
        latents = latents + self.projection(self.ln1(read))
        latents = latents + self.mlp(self.ln2(latents))
        if not return_attention:
            return latents
        return latents, self._attention(features)

    def _pool(self, features: torch.Tensor) -> torch.Tensor:
        """Features [B,C,H,W] -> [B,L,h,C], pooled by the softmax of logits, which commute with resizing."""
        size = grid_size(features, self.side)
        if features.shape[2:] != size:
            features = resize(_in_working_layout(features), size)
        queries = self.to_logits.weight.flatten(1)
        if torch.is_grad_enabled():
            # Ties the bias to the graph, which has no effect within a window: it gets a zero gradient,
            # which data-parallel training waits for.
            chosen = torch.ones_like(queries, dtype=torch.bool)
            queries = torch.where(chosen, queries, self.to_logits.bias[:, None])
        return window_query(features, queries, (self.side, self.side))

    def _attention(self, features: torch.Tensor) -> torch.Tensor:
        """The softmax maps."""
        logits = resize(self.to_logits(features), grid_size(features, self.side))
        windows = (self.side, self.side)
        attention = split_windows(logits, windows).to(accumulation_dtype(logits.dtype)).softmax(dim=3)
        return join_windows(attention.to(logits.dtype), windows, logits.shape[2:])


class WindowWrite(nn.Module):
    r"""Writes latents back to a feature map, each into its window.

    .. math:: r_h(p) = \sigma(l_h(p)) \, v_h(w(p)), \quad z = x + P \, \mathrm{BN}_1(r), \quad
        out = z + \mathrm{MLP}(\mathrm{BN}_2(z))

    with logits ``l`` a 1x1 convolution of the features and values ``v`` a linear map of the latents.
    Logits of a map that does not divide into the grid are resized to the nearest multiple, and
    ``r`` back. Parameters: ``ln1``, ``ln2`` (batch norms), ``mlp.{dense1,dense2}``, ``to_logits``,
    ``projection`` (1x1 convolutions), ``to_values`` (linear).

    Args:
        dim, heads, num_latents: as for :class:`WindowRead`.
    """

    def __init__(self, dim: int, heads: int, num_latents: int) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.side = grid_side(num_latents)
        self.ln1 = nn.BatchNorm2d(dim)
        self.ln2 = nn.BatchNorm2d(dim)
        self.mlp = _MLP(Pointwise(dim, dim), Pointwise(dim, dim))
        self.to_logits = Pointwise(dim, heads)
        self.to_values = Linear(dim, dim)
        self.projection = Pointwise(dim, dim)

    def forward(
        self, features: torch.Tensor, latents: torch.Tensor, return_attention: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Write.

        Args:
            features: ``[B, dim, H, W]``.
            latents: ``[B, num_latents, dim]``.
            return_attention: also return the sigmoid maps ``[B, heads, H', W']`` at the grid's size.
        """
        dim = self.to_values.in_features
        check_inputs(
            self.to_values.weight,
            ("features", features, f"B {dim} H W"),
            ("latents", latents, f"B {self.side**2} {dim}"),
        )
        checks.nonempty("features", features, 2, 3)
        size = grid_size(features, self.side)
        given = torch.channels_last if is_channels_last(features) else torch.contiguous_format
        features = _in_working_layout(features)
        logits = resize(self.to_logits(features), size)
        values = self.to_values(latents)
        original = (features.shape[2], features.shape[3])
        if _is_fixed(self.ln1) or (type(self.ln1) is nn.BatchNorm2d and size == original):
            written, constant = self._write_projected(logits, values, original)
        else:
            written, constant = self._write_explicitly(logits, values, original), None
        z = features + written if constant is None else _add_to(written, features)
        del features, written  # what follows can reuse their memory
        out = relayout(self._add_mlp(z, constant), given)
        return (out, logits.sigmoid()) if return_attention else out

    def _write_projected(
        self, logits: torch.Tensor, values: torch.Tensor, original: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """P BN(r) as a map and a constant per channel, without forming r.

        Norm and projection are folded into the latents.
        """
        if _is_fixed(self.ln1):
            mean, variance = self.ln1.running_mean, self.ln1.running_var
        else:
            mean, variance = self._batch_statistics(logits, values)
        scale, shift = _affine(self.ln1, mean, variance)
        weight = self.projection.weight.flatten(1)  # [O,D]
        per_head = weight.unflatten(1, (self.heads, -1)).transpose(0, 1).flatten(0, 1)  # [h*O,D/h]
        projected = linear(values * scale.to(values.dtype), per_head, groups=self.heads)
        projected = projected.unflatten(2, (self.heads, -1))  # [B,L,h,O]
        spread = resize(window_spread(logits, projected, (self.side, self.side)), original)
        constant = torch.mv(weight, shift.to(weight.dtype)) + self.projection.bias
        return spread, constant.to(spread.dtype)

    def _write_explicitly(
        self, logits: torch.Tensor, values: torch.Tensor, original: tuple[int, int]
    ) -> torch.Tensor:
        """P BN(r), forming r: where its statistics are not sums over windows, or are the norm's affair."""
        side = self.side
        gates = logits.sigmoid().permute(0, 2, 3, 1).unflatten(2, (side, -1)).unflatten(1, (side, -1))
        values = values.unflatten(2, (self.heads, -1)).unflatten(1, (side, 1, side, 1))
        read = gates[..., None] * values  # [B,window,y,window,x,h,j]: channels-last
        read = read.flatten(5).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        return self.projection(batch_norm(resize(read, original), self.ln1))

    def _add_mlp(self, z: torch.Tensor, constant: torch.Tensor | None) -> torch.Tensor:
        """z + MLP(BN(z)), the constant being added to z first; overwrites ``z``."""
        if constant is None or not _is_fixed(self.ln2) or not _is_exact(z):
            z = z if constant is None else z.add_(constant.to(z.dtype)[:, None, None])
            return z + self.mlp(batch_norm(z, self.ln2))
        # Norm and constant are folded into weights and biases: passes over the map cost more.
        dense1, dense2 = self.mlp.dense1, self.mlp.dense2
        scale, shift = _affine(self.ln2, self.ln2.running_mean, self.ln2.running_var)
        weight1, weight2 = dense1.weight.flatten(1) * scale, dense2.weight.flatten(1)
        bias1 = torch.mv(dense1.weight.flatten(1), shift + scale * constant) + dense1.bias
        bias2 = dense2.bias + constant
        rows = z.permute(0, 2, 3, 1)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_channels_last(z):
            return z + linear(F.gelu(linear(rows, weight1, bias1)), weight2, bias2).permute(0, 3, 1, 2)
        add_mlp_(rows.view(-1, len(bias2)), weight1, bias1, weight2, bias2)
        return z

    def _batch_statistics(self, logits: torch.Tensor, values: torch.Tensor) -> KeysValues:
        """Mean and variance of r over batch and pixels; updates the running statistics.

        Sums in float64: the variance is a difference of large numbers.
        """
        count = logits.shape[0] * logits.shape[2] * logits.shape[3]
        if count < 2:
            raise ValueError(
                f"features: expected more than one pixel in the batch when training, got {count}"
            )
        gates = split_windows(logits, (self.side, self.side)).double().sigmoid()  # [B,L,h,P]
        v = values.double().unflatten(2, (self.heads, -1))  # [B,L,h,j]
        mean = (gates.sum(3)[..., None] * v).sum((0, 1)).flatten() / count
        square = ((gates**2).sum(3)[..., None] * v**2).sum((0, 1)).flatten() / count
        variance = (square - mean**2).clamp(min=0)
        track(self.ln1, mean, variance, count)
        return mean, variance


def resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """``x`` [N,C,H,W] resized bilinearly with ``align_corners=True``; as it is where sizes agree."""
    if (x.shape[2], x.shape[3]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def scale_flow(flow: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """``flow`` [N,2,H,W] with its components times ``x`` and ``y``; no number is copied to a GPU."""
    factors = [flow.new_full((1, 1, 1), factor) for factor in (x, y)]
    return flow * torch.cat(factors)


def grid_size(features: torch.Tensor, side: int) -> tuple[int, int]:
    """The multiples of ``side`` nearest to a map's height and width (halves to even), at least ``side``."""
    H, W = (side * max(1, round(n / side)) for n in features.shape[2:])
    return H, W


def grid_side(num_latents: int) -> int:
    """Side of the square grid; raise unless ``num_latents`` is a square."""
    checks.positive("num_latents", num_latents)
    side = isqrt(num_latents)
    if side * side != num_latents:
        raise ValueError(f"num_latents: expected a square number, got {num_latents}")
    return side


def check_inputs(weight: torch.Tensor, *arguments: tuple[str, torch.Tensor, str]) -> None:
    """``checks.shapes``; and tensors must be where a layer's weights are, in their dtype but for autocast."""
    checks.shapes(*arguments)
    device = weight.device.type
    mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    for name, tensor, _ in arguments:
        if tensor.device != weight.device:
            raise ValueError(
                f"{name}: expected a tensor on {weight.device} like the layer, got {tensor.device}"
            )
        if tensor.dtype != weight.dtype and not mixed:
            raise TypeError(f"{name}: expected dtype {weight.dtype} like the layer's, got {tensor.dtype}")


def check_heads(dim: int, heads: int) -> None:
    """Raise unless ``heads`` divides ``dim``."""
    checks.positive("dim", dim)
    checks.positive("heads", heads)
    if dim % heads:
        raise ValueError(f"heads: expected a divisor of dim {dim}, got {heads}")


class _Projections(nn.Module):
    """The parameters named ``attn`` in a checkpoint."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layernorm1 = nn.LayerNorm(dim)
        self.query = Linear(dim, dim)
        self.key = Linear(dim, dim)
        self.value = Linear(dim, dim)


class _MLP(nn.Module):
    """The parameters named ``mlp``; its layers linear or 1x1 convolutions."""

    def __init__(self, dense1: Linear | Pointwise, dense2: Linear | Pointwise) -> None:
        super().__init__()
        self.dense1 = dense1
        self.dense2 = dense2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense2(self.dense1(x, activation="gelu"))


def _in_working_layout(features: torch.Tensor) -> torch.Tensor:
    """Channels-last on the CPU, where products of such maps are fastest."""
    return relayout(features, torch.channels_last) if features.device.type == "cpu" else features


def _add_to(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x + y, in the memory of y where dtypes agree: fresh memory costs more than the sum."""
    return y.add_(x) if x.dtype == y.dtype else x + y


def _is_exact(x: torch.Tensor) -> bool:
    """Whether products of x are computed in its dtype, without rounding to fewer digits."""
    device = x.device.type
    mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.dtype == accumulation_dtype(x.dtype) and not mixed


def _pairs(extra: KeysValues | Sequence[KeysValues] | None) -> list[KeysValues]:
    if extra is None:
        return []
    if not isinstance(extra, list | tuple):
        raise TypeError(
            f"extra: expected a pair (keys, values) or a sequence of pairs, got {type(extra).__name__}"
        )
    if len(extra) == 2 and isinstance(extra[0], torch.Tensor):
        return [(extra[0], extra[1])]  # type: ignore[list-item]
    for i, pair in enumerate(extra):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise TypeError(f"extra[{i}]: expected a pair (keys, values), got {type(pair).__name__}")
    return list(extra)  # type: ignore[arg-type]


def _is_fixed(norm: nn.Module) -> bool:
    """Whether it is a batch norm that applies its running statistics, whatever its input."""
    known = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
    return known and not norm.training and norm.running_mean is not None


def _affine(norm: nn.Module, mean: torch.Tensor, variance: torch.Tensor) -> KeysValues:
    """Scale and shift that a batch norm with these statistics applies."""
    scale = torch.rsqrt(variance + norm.eps)
    shift = -mean * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    return scale, shift
