"""The network whose features the Fréchet inception distance compares."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels.nn import check_inputs
from gi_model.evaluation.networks import with_weights
from gi_model.published import Names, identical

SIZE = 299  # pixels of a side that the network sees
FEATURES = 2048

Kernel = int | tuple[int, int]
#: A branch: its name; (channels, kernel) or (channels, kernel, stride) of its convolutions; two kernels that
#: see the same input, whose results are joined, may stand at its end.
Branch = tuple[str, list[tuple]]


def inception(weights: str | os.PathLike[str]) -> Inception:
    """The network with trained weights, in eval mode.

    Args:
        weights: a file in the layout of ``pt_inception-2015-12-05-6726825d.pth``, torchvision's names with
            a last layer of 1008 classes, which is not used. Any format that ``load_checkpoint`` reads.

    Raises:
        InputError: the file cannot be read or does not fit.
    """
    return with_weights(Inception(), weights, unused="fc.")


class Inception(nn.Module):
    """Inception-v3 in the variant of the original FID: images -> 2048 features; fresh weights.

    Differs from torchvision's: averages of pooling branches leave out the padding, and the last pooling
    branch takes the maximum.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, as in the
    network that Heusel et al. 2017 measured with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, padding=0)
        self.Mixed_5b = Mixed(192, _block_a(), 32)
        self.Mixed_5c = Mixed(256, _block_a(), 64)
        self.Mixed_5d = Mixed(288, _block_a(), 64)
        self.Mixed_6a = Mixed(
            288, [("branch3x3", [(384, 3, 2)]), ("branch3x3dbl", [(64, 1), (96, 3), (96, 3, 2)])]
        )
        self.Mixed_6b = Mixed(768, _block_c(128), 192)
        self.Mixed_6c = Mixed(768, _block_c(160), 192)
        self.Mixed_6d = Mixed(768, _block_c(160), 192)
        self.Mixed_6e = Mixed(768, _block_c(192), 192)
        sevens = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]
        self.Mixed_7a = Mixed(768, [("branch3x3", [(192, 1), (320, 3, 2)]), ("branch7x7x3", sevens)])
        self.Mixed_7b = Mixed(1280, _block_e(), 192)
        self.Mixed_7c = Mixed(2048, _block_e(), 192, pool="max")
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features ``[B,2048]`` of images ``[B,3,H,W]`` in [0, 1] of any size.

        Raises:
            TypeError, ValueError: images of the wrong type, rank, size, dtype or device.
        """
        check_inputs(self.Conv2d_1a_3x3.conv.weight, ("images", images, "B 3 H W"))
        if images.shape[2:] != (SIZE, SIZE):
            images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        x = 2 * images - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))

    def published_names(self) -> Names:
        """As published, without the last layer."""
        return identical(self)


class Convolution(nn.Module):
    """A convolution that keeps the size unless ``stride`` or ``padding`` say otherwise, norm, ReLU."""

    def __init__(
        self, channels: int, out: int, kernel: Kernel, stride: int = 1, padding: Kernel | None = None
    ) -> None:
        super().__init__()
        if padding is None:
            high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
            padding = (high // 2, wide // 2) if stride == 1 else 0
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches that see the same input, joined, and a pooling branch behind them.

    Args:
        channels: of the input.
        branches: see ``Branch``.
        pooled: channels that a convolution makes of the pooled input; ``None``: the block halves the size,
            and the pooled input itself is joined.
        pool: ``mean`` or ``max``.
    """

    def __init__(
        self, channels: int, branches: Sequence[Branch], pooled: int | None = None, pool: str = "mean"
    ) -> None:
        super().__init__()
        self.pool = pool if pooled else "halve"
        self.chains: list[list[list[str]]] = []  # per branch, per step: names of the convolutions
        for name, convolutions in branches:
            self.chains.append(self._add_branch(channels, name, convolutions))
        if pooled:
            self.branch_pool = Convolution(channels, pooled, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = []
        for chain in self.chains:
            seen = [x]
            for names in chain:
                seen = [self.get_submodule(name)(seen[0]) for name in names]
            joined += seen
        if self.pool == "halve":
            joined.append(F.max_pool2d(x, 3, 2))
        else:
            if self.pool == "max":
                x = F.max_pool2d(x, 3, 1, padding=1)
            else:
                x = F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
            joined.append(self.branch_pool(x))
        return torch.cat(joined, dim=1)

    def _add_branch(self, channels: int, name: str, convolutions: list[tuple]) -> list[list[str]]:
        chain = []
        for i, (out, kernel, *stride) in enumerate(convolutions, start=1):
            step = f"{name}_{i}" if len(convolutions) > 1 else name
            forked = isinstance(kernel, list)
            names = [step + letter for letter in "ab"] if forked else [step]
            for part, size in zip(names, kernel if forked else [kernel], strict=True):
                self.add_module(part, Convolution(channels, out, size, *stride))
            channels = out
            chain.append(names)
        return chain


def _block_a() -> list[Branch]:
    doubled = [(64, 1), (96, 3), (96, 3)]
    return [("branch1x1", [(64, 1)]), ("branch5x5", [(48, 1), (64, 5)]), ("branch3x3dbl", doubled)]


def _block_c(width: int) -> list[Branch]:
    once = [(width, 1), (width, (1, 7)), (192, (7, 1))]
    twice = [(width, 1), (width, (7, 1)), (width, (1, 7)), (width, (7, 1)), (192, (1, 7))]
    return [("branch1x1", [(192, 1)]), ("branch7x7", once), ("branch7x7dbl", twice)]


def _block_e() -> list[Branch]:
    fork = (384, [(1, 3), (3, 1)])
    doubled = [(448, 1), (384, 3), fork]
    return [("branch1x1", [(320, 1)]), ("branch3x3", [(384, 1), fork]), ("branch3x3dbl", doubled)]
