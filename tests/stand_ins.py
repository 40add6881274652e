"""Classes with the names, parameters and call protocols of the published ones, in plain PyTorch.

Written from the model's specification, for tests of what replaces them. ``acceleration`` finds modules
by name and shapes, so these are all it needs.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# Sampling along a flow


def resize_flow(flow, size):
    """Resized with its vectors."""
    h, w = flow.shape[2:]
    if (h, w) == size:
        return flow
    scale = flow.new_tensor([size[1] / w, size[0] / h])[:, None, None]
    return F.interpolate(flow, size=size, mode="bilinear", align_corners=True) * scale


def warp(x, flow):
    """Sampled at pixel + flow, zeros outside."""
    H, W = x.shape[2:]
    flow = resize_flow(flow, (H, W))
    rows, columns = torch.arange(H, dtype=flow.dtype)[:, None], torch.arange(W, dtype=flow.dtype)
    across = 2 * (columns + flow[:, 0]) / max(W - 1, 1) - 1
    down = 2 * (rows + flow[:, 1]) / max(H - 1, 1) - 1
    return F.grid_sample(x, torch.stack([across, down], dim=-1), align_corners=True)


# The two-stream generator's layers


class DeformableWriteLayer(nn.Module):
    """Selects among warped references per channel."""

    def __init__(self, in_chn):
        super().__init__()
        self.q = nn.Conv2d(2 * in_chn + 1, in_chn, 1)
        self.v = nn.Conv2d(in_chn + 1, in_chn, 1)

    def forward(self, x, srcs, flows, flow_errs):
        B, T, C, H, W = srcs.shape
        sampled = warp(srcs.flatten(0, 1), flows.flatten(0, 1))
        error = F.interpolate(flow_errs.flatten(0, 1), size=(H, W), mode="bilinear", align_corners=True)
        target = x[:, None].expand(B, T, C, H, W).flatten(0, 1)
        logits = self.q(torch.cat([sampled, error, target], dim=1)).unflatten(0, (B, T))
        content = self.v(torch.cat([sampled, error], dim=1)).unflatten(0, (B, T))
        return x + (logits.softmax(dim=1) * content).sum(dim=1)


class MLP(nn.Module):
    """Two layers that do not widen, linear or 1x1 convolutions."""

    def __init__(self, dim, convolutional=False, activation=None):
        super().__init__()
        self.dense1, self.dense2 = (
            nn.Conv2d(dim, dim, 1) if convolutional else nn.Linear(dim, dim) for _ in range(2)
        )
        self.activation = nn.GELU() if activation is None else activation

    def forward(self, x):
        return self.dense2(self.activation(self.dense1(x)))


def to_windows(maps, heads, side):
    """[B,heads*c,H,W] -> [B,heads,windows,pixels,c], resized to a multiple of the windows."""
    H, W = (side * round(n / side) for n in maps.shape[2:])
    if maps.shape[2:] != (H, W):
        maps = F.interpolate(maps, size=(H, W), mode="bilinear", align_corners=True)
    parts = maps.reshape(len(maps), heads, -1, side, H // side, side, W // side)
    return parts.permute(0, 1, 3, 5, 4, 6, 2).flatten(4, 5).flatten(2, 3), (H, W)


def from_windows(parts, side, size):
    """The inverse of ``to_windows`` for a map of ``size``."""
    H, W = size
    maps = parts.unflatten(3, (H // side, W // side)).unflatten(2, (side, side))
    return maps.permute(0, 1, 6, 2, 4, 3, 5).reshape(len(parts), -1, H, W)


class LocalReadLayer(nn.Module):
    """Latents read the pixels of their windows."""

    def __init__(self, q_dim, kv_dim, num_heads, num_latents, read_heads=8):
        super().__init__()
        self.num_latents_sqrt = math.isqrt(num_latents)
        self.ln1, self.ln2 = nn.LayerNorm(q_dim), nn.LayerNorm(q_dim)
        self.mlp = MLP(q_dim)
        self.to_logits = nn.Conv2d(kv_dim, read_heads, 1)
        self.to_values = nn.Conv2d(kv_dim, q_dim, 1)
        self.projection = nn.Linear(q_dim, q_dim)

    def forward(self, xlr, xhr, return_attn=False):
        heads, side = self.to_logits.out_channels, self.num_latents_sqrt
        logits, size = to_windows(self.to_logits(xhr), heads, side)
        values, _ = to_windows(self.to_values(xhr), heads, side)
        weights = logits.softmax(dim=3)
        read = (weights * values).sum(dim=3).transpose(1, 2).flatten(2)
        xlr = xlr + self.projection(self.ln1(read))
        xlr = xlr + self.mlp(self.ln2(xlr))
        return (xlr, from_windows(weights, side, size)) if return_attn else xlr


class LocalWriteLayer(nn.Module):
    """Latents are written into their windows."""

    def __init__(self, q_dim, kv_dim, num_heads, num_latents, write_heads=8):
        super().__init__()
        self.num_latents_sqrt = math.isqrt(num_latents)
        self.ln1, self.ln2 = nn.BatchNorm2d(q_dim), nn.BatchNorm2d(q_dim)
        self.mlp = MLP(q_dim, convolutional=True)
        self.to_logits = nn.Conv2d(kv_dim, write_heads, 1)
        self.to_values = nn.Linear(kv_dim, q_dim)
        self.projection = nn.Conv2d(q_dim, q_dim, 1)

    def forward(self, xhr, xlr, return_attn=False):
        heads, side = self.to_logits.out_channels, self.num_latents_sqrt
        logits, size = to_windows(self.to_logits(xhr), heads, side)
        gates = logits.sigmoid()
        values = self.to_values(xlr).unflatten(2, (heads, -1)).transpose(1, 2)[:, :, :, None]
        read = from_windows(gates * values, side, size)
        if read.shape != xhr.shape:
            read = F.interpolate(read, size=xhr.shape[2:], mode="bilinear", align_corners=True)
        xhr = xhr + self.projection(self.ln1(read))
        xhr = xhr + self.mlp(self.ln2(xhr))
        return (xhr, from_windows(gates, side, size)) if return_attn else xhr


class SelfAttention(nn.Module):
    """Attention with a norm before it."""

    def __init__(self, dim, num_heads, dropout=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.layernorm1 = nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, kv=None, return_kv=False):
        x = self.layernorm1(x)
        query, key, value = (
            layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        own = [key, value]
        if kv is not None:
            key, value = torch.cat([key, kv[0]], dim=2), torch.cat([value, kv[1]], dim=2)
        weights = (query @ key.transpose(2, 3) / math.sqrt(query.shape[3])).softmax(dim=3)
        out = (self.dropout(weights) @ value).transpose(1, 2).flatten(2)
        return (out, own) if return_kv else out


class AttentionLayer(nn.Module):
    """Self-attention over latents, and over keys and values from elsewhere."""

    def __init__(self, q_dim, num_heads, dropout=0.0):
        super().__init__()
        self.attn = SelfAttention(q_dim, num_heads, dropout)
        self.projection = nn.Linear(q_dim, q_dim)
        self.ln_premlp = nn.LayerNorm(q_dim)
        self.mlp = MLP(q_dim)

    def forward(self, x, kv=None, return_kv=False):
        out = self.attn(x, kv=kv, return_kv=return_kv)
        out, own = out if return_kv else (out, None)
        x = x + self.projection(out)
        x = x + self.mlp(self.ln_premlp(x))
        return (x, own) if return_kv else x


class PositionCode(nn.Module):
    """Rows and columns and their sines and cosines."""

    def __init__(self, bands=64):
        super().__init__()
        self.bands = bands

    def forward(self, index_dims, batch_size, device, pos=None):
        rows, columns = (torch.linspace(-1, 1, n) for n in index_dims)
        position = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=2).flatten(0, 1)  # [HW,2]
        phase = (math.pi * position[..., None] * torch.linspace(1, 16, self.bands)).flatten(1)
        code = torch.cat([position, phase.sin(), phase.cos()], dim=1)
        return code.expand(batch_size, -1, -1).to(device)


class LatentInitLayer(nn.Module):
    """Adds the position code, and the latents."""

    def __init__(self, in_channels, num_latents_sqrt, d_latents):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents_sqrt**2, d_latents))
        self.pos_embeddings = PositionCode()
        self.project = nn.Conv2d(in_channels + 258, in_channels, 1)

    def forward(self, x):
        B, _, H, W = x.shape
        code = self.pos_embeddings((H, W), batch_size=B, device=x.device).transpose(1, 2).unflatten(2, (H, W))
        return self.project(torch.cat([x, code], dim=1)), self.latents.expand(B, -1, -1)


class GIBlock(nn.Module):
    """One block of both streams."""

    def __init__(self, dim, num_heads, num_latents, read_write_heads):
        super().__init__()
        self.read = LocalReadLayer(dim, dim, num_heads, num_latents, read_heads=read_write_heads)
        self.write = LocalWriteLayer(dim, dim, num_heads, num_latents, write_heads=read_write_heads)
        self.attn1, self.attn2 = AttentionLayer(dim, num_heads), AttentionLayer(dim, num_heads)
        self.block1, self.block2 = (nn.Conv2d(dim, dim, 3, padding=1, groups=4) for _ in range(2))

    def forward(self, x, return_attn=False, kv=None, return_kv=False):
        features, latents = x
        latents = self.read(latents, features)
        latents = self.attn1(latents, kv=kv, return_kv=return_kv)
        if return_kv:
            latents, kv = latents
        latents = self.attn2(latents)
        for block in (self.block1, self.block2):
            features = features + block(features).relu()
        x = self.write(features, latents), latents
        return (x, kv) if return_kv else x


class Generator(nn.Module):
    """Two streams; references cross into the target in each block."""

    def __init__(self, dim=32, num_heads=4, side=4, blocks=2):
        super().__init__()
        self.encoder = nn.Conv2d(4, dim, 8, stride=8)
        self.start = LatentInitLayer(dim, side, dim)
        self.blocks = nn.ModuleList(GIBlock(dim, num_heads, side**2, num_heads) for _ in range(blocks))
        self.deformable_writes = nn.ModuleList(DeformableWriteLayer(dim) for _ in range(blocks))
        self.decoder = nn.ConvTranspose2d(dim, 3, 8, stride=8)

    def forward(self, input, srcs, return_attn=False, flows=None, flow_errs=None):
        B, T = srcs.shape[:2]
        features, latents = self.start(self.encoder(torch.cat([input[:, None], srcs], dim=1).flatten(0, 1)))
        features, latents = features.unflatten(0, (B, T + 1)), latents.unflatten(0, (B, T + 1))
        target = features[:, 0], latents[:, 0]
        references = features[:, 1:].flatten(0, 1), latents[:, 1:].flatten(0, 1)
        for block, write in zip(self.blocks, self.deformable_writes, strict=True):
            references, kv = block(references, return_kv=True)
            kv = [p.unflatten(0, (B, T)).transpose(1, 2).flatten(2, 3) for p in kv]
            features, latents = block(target, kv=kv)
            shown = references[0].unflatten(0, (B, T))
            target = write(features, shown, flows, flow_errs), latents
        return self.decoder(target[0]).sigmoid()


# The flow network. Its class and that of its wrapper have the same name.


class Encoder(nn.Module):
    """To an eighth of the size."""

    def __init__(self, channels, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 7, stride=4, padding=3), norm(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, stride=2, padding=1), norm(32)
        self.conv3 = nn.Conv2d(32, channels, 1)

    def forward(self, x):
        joined = torch.cat(x) if isinstance(x, list | tuple) else x
        out = self.norm1(self.conv1(joined)).relu()
        out = self.conv3(self.norm2(self.conv2(out)).relu())
        return out.chunk(2) if isinstance(x, list | tuple) else out


class MotionEncoder(nn.Module):
    """Of correlations and the flow."""

    def __init__(self, correlations, channels):
        super().__init__()
        self.convc1 = nn.Conv2d(correlations, 48, 1)
        self.convf1 = nn.Conv2d(2, 16, 7, padding=3)
        self.conv = nn.Conv2d(64, channels - 2, 3, padding=1)

    def forward(self, flow, corr):
        motion = torch.cat([self.convc1(corr).relu(), self.convf1(flow).relu()], dim=1)
        return torch.cat([self.conv(motion).relu(), flow], dim=1)


class ConvGRU(nn.Module):
    """Gated update by 3x3 convolutions."""

    def __init__(self, hidden, inputs):
        super().__init__()
        self.convz, self.convr, self.convq = (
            nn.Conv2d(hidden + inputs, hidden, 3, padding=1) for _ in range(3)
        )

    def forward(self, h, x):
        joined = torch.cat([h, x], dim=1)
        z, r = self.convz(joined).sigmoid(), self.convr(joined).sigmoid()
        return (1 - z) * h + z * self.convq(torch.cat([r * h, x], dim=1)).tanh()


class FlowHead(nn.Module):
    """Small steps."""

    def __init__(self, hidden):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(hidden, 32, 3, padding=1), nn.Conv2d(32, 2, 3, padding=1)

    def forward(self, x):
        return self.conv2(self.conv1(x).relu())


class UpdateBlock(nn.Module):
    """One iteration; without ``mask`` in the small network."""

    def __init__(self, hidden, context, correlations, masked):
        super().__init__()
        self.encoder = MotionEncoder(correlations, 64)
        self.gru = ConvGRU(hidden, context + 64)
        self.flow_head = FlowHead(hidden)
        if masked:
            self.mask = nn.Sequential(
                nn.Conv2d(hidden, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(32, 576, 1)
            )

    def forward(self, net, inp, corr, flow):
        net = self.gru(net, torch.cat([inp, self.encoder(flow, corr)], dim=1))
        return net, 0.25 * self.mask(net) if hasattr(self, "mask") else None, self.flow_head(net)


class RAFTNetwork(nn.Module):
    """RAFT, thin: correlation, lookup and upsampling as specified."""

    def __init__(self, small=False):
        super().__init__()
        self.args = argparse.Namespace(small=small, mixed_precision=True, alternate_corr=False)
        self.hidden_dim, self.context_dim, self.radius = (96, 64, 3) if small else (128, 128, 4)
        self.fnet = Encoder(64, nn.InstanceNorm2d)
        self.cnet = Encoder(self.hidden_dim + self.context_dim, nn.Identity if small else nn.BatchNorm2d)
        windows = 4 * (2 * self.radius + 1) ** 2
        self.update_block = UpdateBlock(self.hidden_dim, self.context_dim, windows, not small)

    def forward(
        self,
        image1,
        image2,
        iters=20,
        flow_init=None,
        upsample=True,
        test_mode=True,
        is_normalized=False,
    ):
        if not is_normalized:
            image1, image2 = 2 * (image1 / 255) - 1, 2 * (image2 / 255) - 1
        features1, features2 = self.fnet([image1, image2])
        B, C, H, W = features1.shape
        volume = torch.einsum("bcyx,bcvu->byxvu", features1, features2).reshape(-1, 1, H, W) / math.sqrt(C)
        pyramid = [volume]
        for _ in range(3):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        hidden, context = self.cnet(image1).split([self.hidden_dim, self.context_dim], dim=1)
        hidden, context = hidden.tanh(), context.relu()
        rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
        start = torch.stack([columns, rows]).float().expand(B, -1, -1, -1)
        coords = start if flow_init is None else start + flow_init
        flows = []
        for _ in range(iters):
            coords = coords.detach()
            found = self.lookup(pyramid, coords)
            hidden, mask, delta = self.update_block(hidden, context, found, coords - start)
            coords = coords + delta
            flows.append(self.upsampled(coords - start, mask))
        return (coords - start, flows[-1]) if test_mode else flows

    def lookup(self, pyramid, coords):
        """The outer offset moves x."""
        B, _, H, W = coords.shape
        offsets = torch.arange(-self.radius, self.radius + 1).float()
        window = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), dim=-1)
        centres = coords.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
        found = []
        for level, volume in enumerate(pyramid):
            x, y = (centres / 2**level + window).unbind(-1)
            h, w = volume.shape[2:]
            grid = torch.stack([2 * x / (w - 1) - 1, 2 * y / (h - 1) - 1], dim=-1)
            found.append(F.grid_sample(volume, grid, align_corners=True).view(B, H, W, -1))
        return torch.cat(found, dim=-1).permute(0, 3, 1, 2)

    def upsampled(self, flow, mask):
        """By eight."""
        B, _, H, W = flow.shape
        if mask is None:
            return 8 * F.interpolate(flow, size=(8 * H, 8 * W), mode="bilinear", align_corners=True)
        weights = mask.view(B, 1, 9, 8, 8, H, W).softmax(dim=2)
        around = F.unfold(8 * flow, 3, padding=1).view(B, 2, 9, 1, 1, H, W)
        return (weights * around).sum(dim=2).permute(0, 1, 4, 2, 5, 3).reshape(B, 2, 8 * H, 8 * W)


def complete(flow, mask):
    """Filled inside the mask from 20 points on its rim."""
    H, W = flow.shape[2:]
    rows, columns = torch.arange(H)[:, None].float(), torch.arange(W).float()
    filled = []
    for f, m in zip(flow, mask[:, 0], strict=True):
        around = F.pad(m, (1, 1, 1, 1), value=1.0)
        neighbours = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
        rim = (m > 0.5) & (torch.stack(neighbours).amin(dim=0) <= 0.5)
        rim[[0, -1]] = False
        rim[:, [0, -1]] = False
        points = rim.nonzero() if rim.any() else torch.zeros(1, 2, dtype=torch.long)
        points = points[np.random.default_rng(1).choice(len(points), 20)]
        power = ((rows - points[:, 0, None, None]) ** 2 + (columns - points[:, 1, None, None]) ** 2) ** 3
        weight = 1 / torch.where(power == 0, 1e-10, power)  # [20,H,W]
        values = f[:, points[:, 0], points[:, 1]][..., None, None]
        inside = (weight * values).sum(dim=1) / weight.sum(dim=0)
        filled.append((1 - m) * f + m * inside)
    return torch.stack(filled)


class RAFTWrapper(nn.Module):
    """Resizes, estimates both ways, completes, and measures how well the two agree."""

    def __init__(self, raft, resolution, input_range="-11", return_err=False, return_backward=False):
        super().__init__()
        self.raft = raft
        self.resolution = tuple(resolution)
        self.input_range = input_range
        self.return_err, self.return_backward = return_err, return_backward
        self.calls = 0

    def forward(self, image1, image2, iters=20, flow_init=None, upsample=True, test_mode=True):
        self.calls += 1
        _, C, H, W = image1.shape
        if self.input_range == "01":
            image1, image2 = 2 * image1 - 1, 2 * image2 - 1
        mask = (image1[:, 3:] + 1) / 2
        images = [
            F.interpolate(image[:, :3], size=self.resolution, mode="bilinear", align_corners=True)
            for image in (image1, image2)
        ]

        def estimate(first, second):
            _, flow = self.raft(first, second, iters=iters, flow_init=flow_init, is_normalized=True)
            flow = resize_flow(flow, (H, W))
            return complete(flow, mask) if C == 4 else flow

        scale = torch.tensor([W / self.resolution[1], H / self.resolution[0]])[:, None, None]

        def error(flow, backward):
            return ((flow + warp(backward, flow)).abs() * scale).mean(dim=1, keepdim=True)

        flow = estimate(*images)
        if not (self.return_err or self.return_backward):
            return flow
        backward = estimate(*images[::-1])
        results = [flow]
        if self.return_err:
            results.append(error(flow, backward))
        if self.return_backward:
            results.append(backward)
            if self.return_err:
                results.append(error(backward, flow))
        return results


RAFTNetwork.__name__ = RAFTWrapper.__name__ = "RAFT"


# Training


class DefaultInpaintingTrainingModule(nn.Module):
    """Estimates flows reference by reference unless the batch has them, then runs the generator."""

    def __init__(self, generator, flow):
        super().__init__()
        self.generator = generator
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Conv2d(8, 1, 4, stride=4)
        )
        self.flow = flow
        if flow is not None:
            flow.eval()
            flow.train = stay

    def forward(self, batch):
        image, mask, srcs, srcs_masks = (batch[k] for k in ("image", "mask", "srcs", "srcs_masks"))
        if self.flow is not None and "flows" not in batch:
            with torch.no_grad():
                target, sources = torch.cat([image, mask], dim=1), torch.cat([srcs, srcs_masks], dim=2)
                found = []
                for source in sources.unbind(1):
                    flow, error = self.flow(target, source)
                    found.append((flow, error, warp(source, flow)))
                names = ("flows", "flow_errs", "aligned_srcs")
                batch |= {
                    n: torch.stack(f, dim=1) for n, f in zip(names, zip(*found, strict=True), strict=True)
                }
        shown = torch.cat([image * (1 - mask), mask], dim=1)
        references = torch.cat([srcs * (1 - srcs_masks), srcs_masks], dim=2)
        batch["predicted_image"] = self.generator(
            shown, srcs=references, flows=batch.get("flows"), flow_errs=batch.get("flow_errs")
        )
        batch["inpainted"] = mask * batch["predicted_image"] + (1 - mask) * image
        return batch

    def training_step(self, batch, optimizer_idx):
        """The loss of the generator (0) or of the discriminator (1)."""
        image, mask = batch["image"], batch["mask"]
        predicted = self(dict(batch))["predicted_image"]
        if optimizer_idx == 0:
            error = (predicted - image).abs() * (1 + 9 * mask)
            return error.mean() + 0.1 * F.softplus(-self.discriminator(predicted)).mean()
        fake, real = self.discriminator(predicted.detach()), self.discriminator(image)
        return (F.softplus(fake) + F.softplus(-real)).mean()


def stay(self=None, mode=True):
    """In place of ``train``: the flow network stays in evaluation mode."""
    return self
