"""The published formulations in eager PyTorch, written anew: what ours are compared with.

Each function and layer computes what its counterpart in ``gi_kernels`` does, by the steps that the
published system takes: flows resized by ``F.interpolate`` and turned into a normalised grid for
``F.grid_sample``, references and target concatenated before the 1x1 convolutions, windows moved
into the batch, keys and values of all references concatenated. Parameters are named as published,
so that a ``state_dict`` fits both sides. Sampling is float32 whatever the storage dtype, as
published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

Pair = tuple[torch.Tensor, torch.Tensor]


def published_flow_warp(input: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Input [B,C,H,W], flow [B,2,h,w] -> [B,C,H,W]."""
    return grid_sample(input, warp_grid(flow, input.shape[2], input.shape[3]))


def warp_grid(flow: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Flow [B,2,h,w] -> the normalised grid [B,height,width,2] in float32."""
    if flow.shape[2:] != (height, width):
        h, w = flow.shape[2:]
        flow = F.interpolate(flow, size=(height, width), mode="bilinear", align_corners=True)
        flow = torch.stack([flow[:, 0] * (width / w), flow[:, 1] * (height / h)], dim=1)
    flow = flow.float()
    columns = torch.arange(width, dtype=torch.float32, device=flow.device).expand(height, width)
    rows = torch.arange(height, dtype=torch.float32, device=flow.device)[:, None].expand(height, width)
    extent = flow.new_tensor([2 / max(width - 1, 1), 2 / max(height - 1, 1)])[:, None, None]
    position = extent * (torch.stack([columns, rows]) + flow) - 1
    return position.permute(0, 2, 3, 1)


def grid_sample(input: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Bilinear samples in float32, zeros outside, in the dtype of ``input``."""
    sampled = F.grid_sample(input.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return sampled.to(input.dtype)


def published_flow_consistency(flow: torch.Tensor, flow_backward: torch.Tensor) -> torch.Tensor:
    """Flows [B,2,H,W] -> their mean absolute forward-backward error [B,1,H,W]."""
    return (flow + published_flow_warp(flow_backward, flow)).abs().mean(dim=1, keepdim=True)


def published_deformable_aggregation(
    features: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    flows: torch.Tensor,
    errors: torch.Tensor,
    key_error_weight: torch.Tensor,
    value_error_weight: torch.Tensor,
    value_bias: torch.Tensor,
) -> torch.Tensor:
    """The operator's arguments -> [B,C,H,W]: sample both, add the error terms, softmax, sum.

    The published layer samples before it projects; :class:`PublishedDeformableAggregation` is it.
    """
    B, T, C, H, W = keys.shape
    grid = warp_grid(flows.flatten(0, 1), H, W)
    error = F.interpolate(errors.flatten(0, 1), size=(H, W), mode="bilinear", align_corners=True)
    error = error.to(keys.dtype)
    key_weight, value_weight, bias = (
        w.to(keys.dtype)[:, None, None] for w in (key_error_weight, value_error_weight, value_bias)
    )
    logits = grid_sample(keys.flatten(0, 1), grid) + error * key_weight
    content = grid_sample(values.flatten(0, 1), grid) + error * value_weight + bias
    logits, content = logits.view(B, T, C, H, W), content.view(B, T, C, H, W)
    return features + (torch.softmax(logits, dim=1) * content).sum(dim=1)


def published_pixel_projection(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Input [N,C,H,W], weight [O,C] -> [N,O,H,W]: a 1x1 convolution."""
    return F.conv2d(input, weight[..., None, None])


def published_convolution(
    inputs: list[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    activation: str,
    padding: str,
) -> torch.Tensor:
    """Maps [N,C_i,H,W] -> [N,O,H,W]: joined, convolved, summed, activated."""
    down, across = weight.shape[2] // 2, weight.shape[3] // 2
    x = torch.cat(inputs, dim=1)
    if padding == "reflect":
        out = F.conv2d(F.pad(x, (across, across, down, down), mode="reflect"), weight, bias)
    else:
        out = F.conv2d(x, weight, bias, padding=(down, across))
    out = out if addend is None else out + addend
    return out if activation == "none" else getattr(torch, activation)(out)


def published_projected_aggregation(
    features: torch.Tensor,
    references: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    flows: torch.Tensor,
    errors: torch.Tensor,
    key_error_weight: torch.Tensor,
    value_error_weight: torch.Tensor,
    value_bias: torch.Tensor,
) -> torch.Tensor:
    """The operator's arguments -> [B,C,H,W]: sample, join with the error, project, softmax, sum.

    The layer without the target's part of the logits, which its softmax removes.
    """
    B, T, _, H, W = references.shape
    source = published_flow_warp(references.flatten(0, 1), flows.flatten(0, 1))
    error = F.interpolate(errors.flatten(0, 1), size=(H, W), mode="bilinear", align_corners=True)
    joined = torch.cat([source, error.to(source.dtype)], dim=1)

    def project(weight: torch.Tensor, error_weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        whole = torch.cat([weight, error_weight.to(weight.dtype)[:, None]], dim=1)[..., None, None]
        bias = None if bias is None else bias.to(weight.dtype)
        return F.conv2d(joined, whole, bias).view(B, T, -1, H, W)

    logits = project(key_weight, key_error_weight, None)
    content = project(value_weight, value_error_weight, value_bias)
    return features + (torch.softmax(logits, dim=1) * content).sum(dim=1)


def published_global_attention(
    query: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Query [B,h,N,d], segments [B,h,M_i,d] -> [B,h,N,d]: join, multiply, softmax, multiply."""
    key, value = torch.cat(list(keys), dim=2), torch.cat(list(values), dim=2)
    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
    return torch.matmul(torch.softmax(scores, dim=-1), value)


def published_window_pool(
    logits: torch.Tensor, features: torch.Tensor, windows: tuple[int, int]
) -> torch.Tensor:
    """Logits [B,h,H,W], features [B,C,H,W] -> [B,r*s,h,C], windows moved into the batch."""
    B, h = logits.shape[:2]
    weights = torch.softmax(to_windows(logits, windows).transpose(1, 2), dim=-1)  # [Brs,h,P]
    return torch.matmul(weights, to_windows(features, windows)).view(B, -1, h, features.shape[1])


def published_window_query(
    features: torch.Tensor, queries: torch.Tensor, windows: tuple[int, int]
) -> torch.Tensor:
    """Features [B,C,H,W], queries [h,C] -> [B,r*s,h,C]: a convolution makes the logits."""
    return published_window_pool(F.conv2d(features, queries[..., None, None]), features, windows)


def published_window_spread(
    logits: torch.Tensor, latents: torch.Tensor, windows: tuple[int, int]
) -> torch.Tensor:
    """Logits [B,h,H,W], latents [B,r*s,h,C] -> [B,C,H,W], windows moved into the batch."""
    gates = torch.sigmoid(to_windows(logits, windows))  # [Brs,P,h]
    return from_windows(torch.matmul(gates, latents.flatten(0, 1)), windows, logits.shape)


def to_windows(maps: torch.Tensor, windows: tuple[int, int]) -> torch.Tensor:
    """Maps [B,C,H,W] -> [B*r*s,P,C] for ``windows`` r down and s across, P pixels each."""
    B, C, H, W = maps.shape
    r, s = windows
    maps = maps.reshape(B, C, r, H // r, s, W // s).permute(0, 2, 4, 3, 5, 1)
    return maps.reshape(B * r * s, (H // r) * (W // s), C)


def from_windows(parts: torch.Tensor, windows: tuple[int, int], like: Sequence[int]) -> torch.Tensor:
    """[B*r*s,P,C] -> [B,C,H,W] of the batch and size of the shape ``like``."""
    (B, _, H, W), (r, s) = like, windows
    parts = parts.reshape(B, r, s, H // r, W // s, -1).permute(0, 5, 1, 3, 2, 4)
    return parts.reshape(B, -1, H, W)


def published_volume_pyramid(
    features1: torch.Tensor, features2: torch.Tensor, levels: int
) -> list[torch.Tensor]:
    """Features [B,C,H,W] -> per level the correlation volumes [B,H1*W1,H2/2^l,W2/2^l], float32."""
    B, C = features1.shape[:2]
    H2, W2 = features2.shape[2:]
    features1, features2 = features1.float().flatten(2), features2.float().flatten(2)
    volume = torch.matmul(features1.transpose(1, 2), features2).view(B, -1, H2, W2) / math.sqrt(C)
    pyramid = [volume]
    for _ in range(levels - 1):
        pyramid.append(F.avg_pool2d(pyramid[-1], 2, stride=2))
    return pyramid


def published_correlation_lookup(
    volumes: Sequence[torch.Tensor], coords: torch.Tensor, radius: int
) -> torch.Tensor:
    """Volumes [B,H1*W1,H,W], coords [B,2,H1,W1] -> [B,levels*(2r+1)^2,H1,W1] in float32.

    As published, a level of a single row or column divides by zero.
    """
    B, _, H1, W1 = coords.shape
    side = 2 * radius + 1
    offset = torch.linspace(-radius, radius, side, device=coords.device)
    window = torch.stack(torch.meshgrid(offset, offset, indexing="ij"), dim=-1)  # outer moves x
    centres = coords.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
    found = []
    for level, volume in enumerate(volumes):
        H, W = volume.shape[2:]
        x, y = (centres / 2**level + window).split([1, 1], dim=-1)
        grid = torch.cat([2 * x / (W - 1) - 1, 2 * y / (H - 1) - 1], dim=-1)
        read = F.grid_sample(volume.reshape(-1, 1, H, W), grid, align_corners=True)
        found.append(read.view(B, H1, W1, side * side))
    return torch.cat(found, dim=-1).permute(0, 3, 1, 2).contiguous().float()


def published_correlation(
    features1: torch.Tensor,
    features2: torch.Tensor,
    coords: torch.Tensor,
    levels: int,
    radius: int,
    mode: str = "dense",
) -> torch.Tensor:
    """Volumes and one lookup in them, whatever the ``mode``: the published CPU path stores them."""
    volumes = published_volume_pyramid(features1, features2, levels)
    return published_correlation_lookup(volumes, coords, radius).to(features1.dtype)


def published_convex_upsample(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Flow [B,2,h,w], mask [B,576,h,w] -> [B,2,8h,8w] by ``F.unfold``."""
    B, _, h, w = flow.shape
    weights = torch.softmax(mask.reshape(B, 1, 9, 8, 8, h, w), dim=2)
    neighbours = F.unfold(8 * flow, (3, 3), padding=1).view(B, 2, 9, 1, 1, h, w)
    fine = torch.sum(weights * neighbours, dim=2)
    return fine.permute(0, 1, 4, 2, 5, 3).reshape(B, 2, 8 * h, 8 * w)


def published_complete_flow(flow: torch.Tensor, mask: torch.Tensor, points: int = 20) -> torch.Tensor:
    """Flow [B,2,H,W], mask [B,1,H,W] -> [B,2,H,W]: distances of every pixel to every point at once."""
    H, W = flow.shape[2:]
    storage, mask = flow.dtype, mask.float()
    surrounded = F.pad(mask, (1, 1, 1, 1), value=1e4)
    eroded = torch.stack(
        [
            surrounded[:, :, 1 + dy : 1 + dy + H, 1 + dx : 1 + dx + W]
            for dy, dx in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
        ]
    ).amin(dim=0)
    rim = (mask > 0.5) & (eroded <= 0.5)
    rim[:, :, [0, -1], :] = False
    rim[:, :, :, [0, -1]] = False
    drawn, values = [], []
    for i in range(flow.shape[0]):
        found = rim[i, 0].nonzero()
        if len(found) == 0:
            found = found.new_zeros(1, 2)
        found = found[np.random.default_rng(1).choice(len(found), points)]
        drawn.append(found)
        values.append(flow[i, :, found[:, 0], found[:, 1]].float())
    position = torch.stack(drawn)[..., None, None]  # [B,20,2,1,1], row first
    rows = torch.arange(H, dtype=torch.float32, device=flow.device)[:, None]
    columns = torch.arange(W, dtype=torch.float32, device=flow.device)[None, :]
    distance = (rows - position[:, :, 0]) ** 2 + (columns - position[:, :, 1]) ** 2  # [B,20,H,W]
    power = distance**3
    power = torch.where(power == 0, 1e-10, power)
    weight = 1 / power
    total = (weight[:, None] * torch.stack(values)[..., None, None]).sum(dim=2)  # [B,2,H,W]
    filled = total / weight.sum(dim=1, keepdim=True)
    return ((1 - mask) * flow + mask * filled).to(storage)


class PublishedDeformableAggregation(nn.Module):
    """Sample, concatenate ``[source, error, target]``, project, softmax over references, sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.q = nn.Conv2d(2 * channels + 1, channels, 1)
        self.v = nn.Conv2d(channels + 1, channels, 1)

    def forward(
        self, features: torch.Tensor, references: torch.Tensor, flows: torch.Tensor, errors: torch.Tensor
    ) -> torch.Tensor:
        """Features [B,C,H,W], references [B,T,C,H,W], flows [B,T,2,h,w], errors [B,T,1,h,w]."""
        B, T, C, H, W = references.shape
        source = published_flow_warp(references.flatten(0, 1), flows.flatten(0, 1))
        target = features[:, None].expand(B, T, C, H, W).reshape(B * T, C, H, W)
        error = F.interpolate(errors.flatten(0, 1), size=(H, W), mode="bilinear", align_corners=True)
        joined = torch.cat([source, error.to(source.dtype), target], dim=1)
        logits = self.q(joined).view(B, T, C, H, W)
        content = self.v(joined[:, : C + 1]).view(B, T, C, H, W)
        return features + torch.sum(torch.softmax(logits, dim=1) * content, dim=1)


class PublishedLatentAttention(nn.Module):
    """Self-attention over a frame's latents and those of references, and its MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = _Attention(dim, heads)
        self.projection = nn.Linear(dim, dim)
        self.ln_premlp = nn.LayerNorm(dim)
        self.mlp = _Mlp(dim)

    def forward(
        self, x: torch.Tensor, extra: Pair | Sequence[Pair] | None = None, return_kv: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, Pair]:
        """Latents [B,N,dim]; ``extra`` pairs of [B,heads,M,dim/heads], appended to the own ones."""
        pairs: list[Pair] = []
        if extra is not None:
            pairs = [extra] if isinstance(extra[0], torch.Tensor) else list(extra)  # type: ignore
        attended, own = self.attn(x, pairs)
        x = x + self.projection(attended)
        x = x + self.mlp(self.ln_premlp(x))
        return (x, own) if return_kv else x


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.layernorm1 = nn.LayerNorm(dim)
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, pairs: Sequence[Pair]) -> tuple[torch.Tensor, Pair]:
        B, N, dim = x.shape

        def split(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(B, N, self.heads, dim // self.heads).permute(0, 2, 1, 3)

        x = self.layernorm1(x)
        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        keys, values = [key, *(k for k, _ in pairs)], [value, *(v for _, v in pairs)]
        attended = published_global_attention(query, keys, values)
        return attended.permute(0, 2, 1, 3).contiguous().view(B, N, dim), (key, value)


class PublishedWindowRead(nn.Module):
    """Latents read the features of their window: values projected at every pixel, then pooled."""

    def __init__(self, dim: int, heads: int, num_latents: int) -> None:
        super().__init__()
        self.side = math.isqrt(num_latents)
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = _Mlp(dim)
        self.to_logits, self.to_values = nn.Conv2d(dim, heads, 1), nn.Conv2d(dim, dim, 1)
        self.projection = nn.Linear(dim, dim)

    def forward(
        self, latents: torch.Tensor, features: torch.Tensor, return_attention: bool = False
    ) -> torch.Tensor | Pair:
        """Latents [B,N,dim], features [B,dim,H,W] -> latents (and the weights [B,heads,H,W])."""
        logits = resize_to_windows(self.to_logits(features), self.side)
        values = resize_to_windows(self.to_values(features), self.side)
        weights = torch.softmax(to_head_windows(logits, logits.shape[1], self.side).transpose(1, 2), dim=-1)
        read = torch.matmul(weights, to_head_windows(values, logits.shape[1], self.side))
        read = read.view(len(latents), logits.shape[1], -1, read.shape[-1]).transpose(1, 2)
        latents = latents + self.projection(self.ln1(read.reshape(latents.shape)))
        latents = latents + self.mlp(self.ln2(latents))
        if not return_attention:
            return latents
        return latents, from_head_windows(weights.transpose(1, 2), self.side, logits.shape)


class PublishedWindowWrite(nn.Module):
    """Features receive their window's latents, gated per head and pixel; then a convolutional MLP."""

    def __init__(self, dim: int, heads: int, num_latents: int) -> None:
        super().__init__()
        self.side = math.isqrt(num_latents)
        self.ln1, self.ln2 = nn.BatchNorm2d(dim), nn.BatchNorm2d(dim)
        self.mlp = _Mlp(dim, convolutional=True)
        self.to_logits, self.to_values = nn.Conv2d(dim, heads, 1), nn.Linear(dim, dim)
        self.projection = nn.Conv2d(dim, dim, 1)

    def forward(
        self, features: torch.Tensor, latents: torch.Tensor, return_attention: bool = False
    ) -> torch.Tensor | Pair:
        """Features [B,dim,H,W], latents [B,N,dim] -> features (and the gates [B,heads,H,W])."""
        logits = resize_to_windows(self.to_logits(features), self.side)
        B, heads = logits.shape[:2]
        gates = torch.sigmoid(to_head_windows(logits, heads, self.side))  # [B*heads*N,P,1]
        values = self.to_values(latents).view(B, self.side**2, heads, -1).transpose(1, 2)
        spread = torch.matmul(gates, values.reshape(len(gates), 1, -1))
        spread = from_head_windows(spread, self.side, logits.shape)
        if spread.shape != features.shape:
            spread = F.interpolate(spread, size=features.shape[2:], mode="bilinear", align_corners=True)
        features = features + self.projection(self.ln1(spread))
        features = features + self.mlp(self.ln2(features))
        if not return_attention:
            return features
        return features, from_head_windows(gates, self.side, logits.shape)


def resize_to_windows(maps: torch.Tensor, side: int) -> torch.Tensor:
    """Maps resized, if need be, to the nearest multiples of ``side`` windows."""
    H, W = maps.shape[2:]
    if H % side == 0 and W % side == 0:
        return maps
    size = (side * round(H / side), side * round(W / side))
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def to_head_windows(maps: torch.Tensor, heads: int, side: int) -> torch.Tensor:
    """Maps [B,heads*c,H,W] -> [B*heads*side*side,P,c]: heads and windows in the batch."""
    B, C, H, W = maps.shape
    return to_windows(maps.reshape(B * heads, C // heads, H, W), (side, side))


def from_head_windows(parts: torch.Tensor, side: int, like: Sequence[int]) -> torch.Tensor:
    """The inverse of ``to_head_windows`` -> [B,heads*c,H,W] for the shape ``like`` [B,heads,H,W]."""
    B, heads, H, W = like
    return from_windows(parts, (side, side), (B * heads, 1, H, W)).reshape(B, -1, H, W)


class _Mlp(nn.Module):
    def __init__(self, dim: int, convolutional: bool = False) -> None:
        super().__init__()
        self.dense1 = nn.Conv2d(dim, dim, 1) if convolutional else nn.Linear(dim, dim)
        self.dense2 = nn.Conv2d(dim, dim, 1) if convolutional else nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense2(F.gelu(self.dense1(x)))
