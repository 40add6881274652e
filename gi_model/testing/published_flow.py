"""The published flow stage in eager PyTorch, written anew: what the flow stage is compared with.

One pair and one direction at a time, both images encoded for each, the context inside the gates'
convolutions, mask and upsampling in every iteration, contiguous memory, float32 throughout. Parameters
are named as published; :func:`published_flow_stage` takes them from a ``gi_model.flow.RAFT``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels.testing.published import (
    published_complete_flow,
    published_convex_upsample,
    published_correlation_lookup,
    published_flow_warp,
    published_volume_pyramid,
)
from gi_model.flow import RAFT


def published_flow_stage(
    raft: RAFT, resolution: tuple[int, int] = (256, 256), iterations: int = 20
) -> PublishedFlowStage:
    """The published stage with a copy of the weights of ``raft``."""
    network = PublishedRAFT(raft.small)
    own = raft.state_dict()
    named = {name: own[key] for key, names in raft.published_names().items() for name in names}
    network.load_state_dict(named)
    return PublishedFlowStage(network.eval(), resolution, iterations)


class PublishedFlowStage(nn.Module):
    """Flow from the target to each reference, and its error: pair by pair."""

    def __init__(self, raft: PublishedRAFT, resolution: tuple[int, int], iterations: int) -> None:
        super().__init__()
        self.raft, self.resolution, self.iterations = raft, resolution, iterations

    @torch.no_grad()
    def forward(self, target: torch.Tensor, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Target [B,4,H,W], sources [B,T,4,H,W] -> flow [B,T,2,H,W], error [B,T,1,H,W]."""
        flows, errors = [], []
        for source in sources.unbind(1):
            flow = self.pair(target, source, target[:, 3:])
            backward = self.pair(source, target, target[:, 3:])
            deviation = (flow + published_flow_warp(backward, flow)).abs() * self.scale(target)
            flows.append(flow)
            errors.append(deviation.mean(dim=1, keepdim=True))
        return torch.stack(flows, dim=1), torch.stack(errors, dim=1)

    def pair(self, first: torch.Tensor, second: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Completed flow from ``first`` to ``second``."""
        images = [
            2 * F.interpolate(x[:, :3], self.resolution, mode="bilinear", align_corners=True) - 1
            for x in (first, second)
        ]
        flow = self.raft(*images, self.iterations)
        flow = F.interpolate(flow, first.shape[2:], mode="bilinear", align_corners=True)
        return published_complete_flow(flow * self.scale(first), mask)

    def scale(self, frame: torch.Tensor) -> torch.Tensor:
        height, width = frame.shape[2:]
        factors = [width / self.resolution[1], height / self.resolution[0]]
        return torch.tensor(factors, device=frame.device)[:, None, None]


class PublishedRAFT(nn.Module):
    """RAFT, large or small; images in [-1, 1] with sides that are multiples of 8."""

    def __init__(self, small: bool = False) -> None:
        super().__init__()
        self.small = small
        self.hidden, context, self.radius = (96, 64, 3) if small else (128, 128, 4)
        encoder = _SmallEncoder if small else _Encoder
        self.fnet = encoder(128 if small else 256, nn.InstanceNorm2d)
        self.cnet = encoder(self.hidden + context, nn.Identity if small else nn.BatchNorm2d)
        self.update_block = _SmallUpdate() if small else _Update()

    def forward(self, image1: torch.Tensor, image2: torch.Tensor, iterations: int = 20) -> torch.Tensor:
        """Images [B,3,H,W] -> flow [B,2,H,W] from the first to the second."""
        features1, features2 = self.fnet(torch.cat([image1, image2])).chunk(2)
        volumes = published_volume_pyramid(features1, features2, 4)
        context = self.cnet(image1)
        hidden, context = torch.tanh(context[:, : self.hidden]), torch.relu(context[:, self.hidden :])
        B, _, h, w = hidden.shape
        rows, columns = torch.meshgrid(
            torch.arange(h, device=hidden.device), torch.arange(w, device=hidden.device), indexing="ij"
        )
        start = torch.stack([columns, rows]).float().expand(B, 2, h, w)
        coords = start
        for _ in range(iterations):
            correlation = published_correlation_lookup(volumes, coords, self.radius)
            hidden, mask, step = self.update_block(hidden, context, correlation, coords - start)
            coords = coords + step
            if mask is None:
                flow = 8 * F.interpolate(coords - start, scale_factor=8, mode="bilinear", align_corners=True)
            else:
                flow = published_convex_upsample(coords - start, mask)
        return flow


class _Encoder(nn.Module):
    """Image [B,3,H,W] -> [B,outputs,H/8,W/8]."""

    WIDTHS = (64, 64, 96, 128)

    def __init__(self, outputs: int, norm: type[nn.Module]) -> None:
        super().__init__()
        first, *widths = self.WIDTHS
        self.norm1 = norm(first)
        self.conv1 = nn.Conv2d(3, first, 7, stride=2, padding=3)
        layers = []
        for i, (inputs, width) in enumerate(zip((first, *widths[:-1]), widths, strict=True)):
            layers.append(
                nn.Sequential(
                    self.block(inputs, width, norm, 1 if i == 0 else 2), self.block(width, width, norm, 1)
                )
            )
        self.layer1, self.layer2, self.layer3 = layers
        self.conv2 = nn.Conv2d(widths[-1], outputs, 1)

    def block(self, inputs: int, width: int, norm: type[nn.Module], stride: int) -> nn.Module:
        return _Residual(inputs, width, norm, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class _Residual(nn.Module):
    def __init__(self, inputs: int, width: int, norm: type[nn.Module], stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm1, self.norm2 = norm(width), norm(width)
        self.downsample = None
        if stride > 1:
            self.norm3 = norm(width)
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride), self.norm3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(y)))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class _SmallEncoder(_Encoder):
    WIDTHS = (32, 32, 64, 96)

    def block(self, inputs: int, width: int, norm: type[nn.Module], stride: int) -> nn.Module:
        return _Bottleneck(inputs, width, norm, stride)


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, norm: type[nn.Module], stride: int) -> None:
        super().__init__()
        narrow = width // 4
        self.conv1 = nn.Conv2d(inputs, narrow, 1)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, padding=1)
        self.conv3 = nn.Conv2d(narrow, width, 1)
        self.norm1, self.norm2, self.norm3 = norm(narrow), norm(narrow), norm(width)
        self.downsample = None
        if stride > 1:
            self.norm4 = norm(width)
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride), self.norm4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.conv2(y)))
        y = torch.relu(self.norm3(self.conv3(y)))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class _Update(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = _Motion()
        self.gru = _SeparableGRU(128, 128 + 128)
        self.flow_head = _FlowHead(128, 256)
        self.mask = nn.Sequential(
            nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(256, 9 * 64, 1)
        )

    def forward(self, hidden, context, correlation, flow):
        hidden = self.gru(hidden, torch.cat([context, self.encoder(flow, correlation)], dim=1))
        return hidden, 0.25 * self.mask(hidden), self.flow_head(hidden)


class _SmallUpdate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = _SmallMotion()
        self.gru = _GRU(96, 64 + 82)
        self.flow_head = _FlowHead(96, 128)

    def forward(self, hidden, context, correlation, flow):
        hidden = self.gru(hidden, torch.cat([context, self.encoder(flow, correlation)], dim=1))
        return hidden, None, self.flow_head(hidden)


class _Motion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convc1, self.convc2 = nn.Conv2d(324, 256, 1), nn.Conv2d(256, 192, 3, padding=1)
        self.convf1, self.convf2 = nn.Conv2d(2, 128, 7, padding=3), nn.Conv2d(128, 64, 3, padding=1)
        self.conv = nn.Conv2d(64 + 192, 126, 3, padding=1)

    def forward(self, flow: torch.Tensor, correlation: torch.Tensor) -> torch.Tensor:
        seen = torch.relu(self.convc2(torch.relu(self.convc1(correlation))))
        moved = torch.relu(self.convf2(torch.relu(self.convf1(flow))))
        return torch.cat([torch.relu(self.conv(torch.cat([seen, moved], dim=1))), flow], dim=1)


class _SmallMotion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(196, 96, 1)
        self.convf1, self.convf2 = nn.Conv2d(2, 64, 7, padding=3), nn.Conv2d(64, 32, 3, padding=1)
        self.conv = nn.Conv2d(128, 80, 3, padding=1)

    def forward(self, flow: torch.Tensor, correlation: torch.Tensor) -> torch.Tensor:
        seen = torch.relu(self.convc1(correlation))
        moved = torch.relu(self.convf2(torch.relu(self.convf1(flow))))
        return torch.cat([torch.relu(self.conv(torch.cat([seen, moved], dim=1))), flow], dim=1)


class _GRU(nn.Module):
    def __init__(self, hidden: int, inputs: int) -> None:
        super().__init__()
        self.convz, self.convr, self.convq = (
            nn.Conv2d(hidden + inputs, hidden, 3, padding=1) for _ in range(3)
        )

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return gated(h, x, self.convz, self.convr, self.convq)


class _SeparableGRU(nn.Module):
    def __init__(self, hidden: int, inputs: int) -> None:
        super().__init__()

        def across() -> nn.Conv2d:
            return nn.Conv2d(hidden + inputs, hidden, (1, 5), padding=(0, 2))

        def down() -> nn.Conv2d:
            return nn.Conv2d(hidden + inputs, hidden, (5, 1), padding=(2, 0))

        self.convz1, self.convr1, self.convq1 = across(), across(), across()
        self.convz2, self.convr2, self.convq2 = down(), down(), down()

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        h = gated(h, x, self.convz1, self.convr1, self.convq1)
        return gated(h, x, self.convz2, self.convr2, self.convq2)


def gated(
    h: torch.Tensor, x: torch.Tensor, update: nn.Module, reset: nn.Module, candidate: nn.Module
) -> torch.Tensor:
    """One pass of the gated recurrent unit."""
    both = torch.cat([h, x], dim=1)
    z, r = torch.sigmoid(update(both)), torch.sigmoid(reset(both))
    q = torch.tanh(candidate(torch.cat([r * h, x], dim=1)))
    return (1 - z) * h + z * q


class _FlowHead(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.conv2(torch.relu(self.conv1(h)))
