"""The network whose features of video clips PVCS and VFID compare."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels.nn import check_inputs
from gi_model.evaluation.networks import with_weights
from gi_model.published import Names, identical

FEATURES = 1024
CLIP = 10  # frames that PVCS compares at once
TINY = 1e-10  # what is added to the length of a feature vector before it is divided by it

#: Of each mixed block, the channels of its convolutions: 1x1; 1x1 then 3x3; 1x1 then 3x3; 1x1 behind a pool.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
#: Pools before a block: window and stride over frames, rows and columns.
POOLS = {
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}
TAPS = ("Conv3d_2c_3x3", "Mixed_3c", "Mixed_4f", "Mixed_5c")


def i3d(weights: str | os.PathLike[str]) -> I3D:
    """The network with trained weights, in eval mode.

    Args:
        weights: a file in the layout of ``rgb_imagenet.pt``, as pytorch-i3d publishes it: names such as
            ``Mixed_3b.b1a.conv3d.weight``; ``logits`` is not used. Any format that ``load_checkpoint`` reads.

    Raises:
        InputError: the file cannot be read or does not fit.
    """
    return with_weights(I3D(), weights, unused="logits.")


class I3D(nn.Module):
    """Inception-v1 inflated to three dimensions: clips -> feature maps; fresh weights.

    Source: Carreira, Zisserman, "Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset", 2017.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        channels = 192
        for name, widths in MIXED.items():
            self.add_module(name, Mixed(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.requires_grad_(False).eval()

    def forward(self, clips: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps ``[B,C,t,h,w]`` of four layers, from fine to coarse; C is 192, 480, 832, 1024.

        Args:
            clips: ``[B,3,T,H,W]`` in [0, 1], of the dtype and on the device of the weights.

        Raises:
            TypeError, ValueError: clips of the wrong type, rank, size, dtype or device.
        """
        check_inputs(self.Conv3d_2b_1x1.conv3d.weight, ("clips", clips, "B 3 T H W"))
        x, tapped = clips, []
        for name, block in self.named_children():
            if name in POOLS:
                window, stride = POOLS[name]
                x = F.max_pool3d(_padded(x, window, stride), window, stride)
            x = block(x)
            if name in TAPS:
                tapped.append(x)
        return tapped

    def published_names(self) -> Names:
        """As published, without the last layer."""
        return identical(self)


def clip_distance(features: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    """Perceptual distance ``[B]`` of clips, from their feature maps: PVCS of one pair of clips.

    The squared difference of unit features, summed over channels and layers, averaged over positions.
    """
    total = torch.zeros(len(features[0]), device=features[0].device)
    for one, other in zip(features, others, strict=True):
        total = total + (_unit(one) - _unit(other)).square().sum(dim=1).mean(dim=(1, 2, 3))
    return total


class Unit(nn.Module):
    """Convolution that makes ``ceil(n / stride)`` of n, norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _padded(x, self.conv3d.kernel_size, self.conv3d.stride)
        return F.relu(self.bn(self.conv3d(x)), inplace=True)


class Mixed(nn.Module):
    """Four branches that see the same input, joined."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = Unit(channels, widths[0], 1)
        self.b1a, self.b1b = Unit(channels, widths[1], 1), Unit(widths[1], widths[2], 3)
        self.b2a, self.b2b = Unit(channels, widths[3], 1), Unit(widths[3], widths[4], 3)
        self.b3b = Unit(channels, widths[5], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.max_pool3d(x, 3, 1, padding=1)
        parts = [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)]
        return torch.cat(parts, dim=1)


def _padded(x: torch.Tensor, window: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """``x`` with zeros around it, one more behind if odd, for ``ceil(n / stride)`` places of the window."""
    pads: list[int] = []
    for n, k, s in zip(x.shape[2:], window, stride, strict=True):
        missing = max((-(-n // s) - 1) * s + k - n, 0)
        pads = [missing // 2, missing - missing // 2, *pads]
    return F.pad(x, pads) if any(pads) else x


def _unit(features: torch.Tensor) -> torch.Tensor:
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + TINY)
