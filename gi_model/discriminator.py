"""The discriminator that the published generators were trained against."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels import checks
from gi_kernels.nn import check_inputs
from gi_model.published import Names, renamed

WIDEST = 512  # channels double from block to block up to this


class Discriminator(nn.Module):
    """Tells patches of real images from filled ones: ``[B,3,H,W]`` in [0, 1] -> logits and features.

    Blocks of a 4x4 convolution with bias, padding 2, a batch norm (not in the first block) and a leaky
    ReLU of slope 0.2; all but the last halve the size. A convolution to one channel gives the logits.
    Differentiable twice, for penalties on its gradient.

    Args:
        in_channels: of the images.
        width: channels of the first block.
        layers: blocks behind the first one.

    Source: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017, in the
    form of Wang et al., "High-Resolution Image Synthesis and Semantic Manipulation with Conditional
    GANs", 2018.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("width", width), ("layers", layers)):
            checks.positive(name, value)
        self.in_channels = in_channels
        widths = [width]
        for _ in range(layers):
            widths.append(min(2 * widths[-1], WIDEST))
        self.blocks = nn.ModuleList([_Block(in_channels, width, stride=2, normed=False)])
        for i, (channels, out) in enumerate(pairwise(widths), start=1):
            self.blocks.append(_Block(channels, out, stride=2 if i < layers else 1, normed=True))
        self.head = _convolution(widths[-1], 1, stride=1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits and features.

        Args:
            images: ``[B,in_channels,H,W]``, any size of at least one pixel.

        Returns:
            Logits ``[B,1,h,w]``, positive for real patches, and the result of each block, for feature
            matching. A stride of 2 makes ``n // 2 + 1`` of ``n`` rows or columns, one of 1 ``n + 1``.

        Raises:
            TypeError, ValueError: ``images`` of the wrong type, rank, size, dtype or device.
        """
        check_inputs(self.head.weight, ("images", images, f"B {self.in_channels} H W"))
        checks.nonempty("images", images, 2, 3)
        features = []
        for block in self.blocks:
            images = block(images)
            features.append(images)
        return self.head(images), features

    def published_names(self) -> Names:
        """Published names, in a training checkpoint behind ``discriminator.``."""
        parts = {}
        for i, block in enumerate(self.blocks):
            parts[f"blocks.{i}.conv"] = f"model{i}.0"
            if block.norm is not None:
                parts[f"blocks.{i}.norm"] = f"model{i}.1"
        return renamed(self, parts | {"head": f"model{len(self.blocks)}.0"})


class _Block(nn.Module):
    """Convolution, batch norm if ``normed``, leaky ReLU."""

    def __init__(self, channels: int, out: int, stride: int, normed: bool) -> None:
        super().__init__()
        self.conv = _convolution(channels, out, stride)
        self.norm = nn.BatchNorm2d(out) if normed else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return F.leaky_relu(x if self.norm is None else self.norm(x), 0.2, inplace=True)


def _convolution(channels: int, out: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 4, stride, padding=2)
