"""RAFT without the work that need not be done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels import CorrelationPyramid, checks, convex_upsample
from gi_kernels.precision import accumulation_dtype
from gi_model.flow.encoder import Encoder
from gi_model.flow.update import Update
from gi_model.published import load_published

LEVELS = 4
#: Ratio of an image's size to its features'.
FACTOR = 8


@dataclass(frozen=True)
class ImageEncoding:
    """All that the network needs to know of images, in either role of a pair.

    Attributes:
        features: ``[B,F,h,w]``, matched with another image's.
        hidden: ``[B,D,h,w]``, the recurrent state before the first iteration.
        gates: ``[B,G,h,w]``, the context's share of the recurrent gates' sums.
        size: height and width of the images; h and w are an eighth of them, rounded up.

    At 256x256 pixels 4.5 MiB per image in float32 and half of it in bfloat16.
    """

    features: torch.Tensor
    hidden: torch.Tensor
    gates: torch.Tensor
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.features)

    @staticmethod
    def join(encodings: Sequence[ImageEncoding]) -> ImageEncoding:
        """One batch of several, of images of one size."""
        if len(encodings) == 1:
            return encodings[0]
        features, hidden, gates = (
            torch.cat([getattr(e, name) for e in encodings]) for name in ("features", "hidden", "gates")
        )
        return ImageEncoding(features, hidden, gates, encodings[0].size)


class RAFT(nn.Module):
    r"""Optical flow by recurrent updates from all-pairs correlations.

    ``RAFT()(image1, image2)`` is the published network's result; what is not done:

    - images are encoded once for both roles, and :meth:`encode` lets a caller keep what it found;
    - the context's share of the gates is computed once and not in every iteration;
    - the upsampling mask is computed after the last iteration only;
    - :meth:`match_both_ways` does not compute the backward correlations again;
    - batch norms are folded into convolutions.

    Images whose sides are not multiples of 8 are padded evenly with their outermost pixels, and the
    flow is cropped. Correlation levels of less than a pixel read as zero, those of a single row or
    column are sampled like any other: results are finite for every size, where the published code
    divides by zero below 128 pixels.

    Always in eval mode, whatever ``train`` says. Parameters may be moved to another dtype; under
    autocast the work is done in its dtype. Positions and flow are float32 (float64 in a float64
    network). Differentiable in images and parameters, through all iterations.

    Args:
        small: the small network: bottleneck encoders, radius 3, bilinear upsampling.

    Source: Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", 2020.
    """

    def __init__(self, small: bool = False) -> None:
        super().__init__()
        self.small = small
        self.radius = 3 if small else 4
        self.update = Update(LEVELS * (2 * self.radius + 1) ** 2, small)
        state = self.update.hidden + self.update.context
        if small:
            self.features = Encoder((32, 32, 64, 96), 128, "instance", bottleneck=True)
            self.context = Encoder((32, 32, 64, 96), state, "none", bottleneck=True)
        else:
            self.features = Encoder((64, 64, 96, 128), 256, "instance")
            self.context = Encoder((64, 64, 96, 128), state, "batch")
        self.eval()

    def train(self, mode: bool = True) -> RAFT:
        """Stay in eval mode: the published network is frozen, also while others train."""
        return super().train(False)

    @classmethod
    def of_published(cls, state: Mapping[str, torch.Tensor]) -> RAFT:
        """The network, small or not, whose published weights these are.

        Raises:
            InputError: they fit neither.
        """
        raft = cls(small="update_block.mask.0.weight" not in state)
        load_published(raft, state)
        return raft

    def forward(self, image1: torch.Tensor, image2: torch.Tensor, iterations: int = 20) -> torch.Tensor:
        """Flow from ``image1`` to ``image2``.

        Args:
            image1, image2: ``[B,3,H,W]`` in [-1, 1], any floating dtype, any size.
            iterations: number of updates.

        Returns:
            ``[B,2,H,W]`` in pixels, x first, float32: where a pixel of ``image1`` lies in ``image2``.

        Raises:
            TypeError, ValueError: an argument of the wrong type, rank, size or device.
        """
        self._check_images(image1=image1, image2=image2)
        checks.positive("iterations", iterations)
        return self.match(self.encode(image1), self.encode(image2), iterations)

    def encode(self, images: torch.Tensor) -> ImageEncoding:
        """Images ``[B,3,H,W]`` in [-1, 1] -> their encoding, which serves every pair they are part of.

        On the CPU each image is encoded alone, so that its encoding does not depend on the batch, to
        the bit.
        """
        self._check_images(images=images)
        parameter = self.features.stem.weight
        device = images.device.type
        dtype = parameter.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        size = (images.shape[2], images.shape[3])
        padded = F.pad(images, _padding(size), mode="replicate") if any(_padding(size)) else images
        padded = padded.to(dtype=dtype, memory_format=torch.channels_last)
        with torch.autocast(device, enabled=False):
            features, context = self.features.ready(dtype), self.context.ready(dtype)
            share = self.update.context_share(dtype)

            def encode(some: torch.Tensor) -> ImageEncoding:
                hidden, seen = context(some).split([self.update.hidden, self.update.context], dim=1)
                return ImageEncoding(features(some), hidden.tanh(), share(seen.relu()), size)

            at_once = 1 if device == "cpu" else max(1, len(padded))
            return ImageEncoding.join([encode(some) for some in padded.split(at_once)])

    def match(self, first: ImageEncoding, second: ImageEncoding, iterations: int = 20) -> torch.Tensor:
        """Flow ``[B,2,H,W]`` from the images of ``first`` to those of ``second``; see :meth:`forward`."""
        _check_pair(first, second)
        checks.positive("iterations", iterations)
        with torch.autocast(first.features.device.type, enabled=False):
            pyramid = CorrelationPyramid(first.features, second.features, LEVELS, self.radius)
            return self.upsample(*self.refine(pyramid, first, iterations), first.size)

    def match_both_ways(
        self, first: ImageEncoding, second: ImageEncoding, iterations: int = 20
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow from ``first`` to ``second`` and back, as one batch; see :meth:`match`."""
        _check_pair(first, second)
        checks.positive("iterations", iterations)
        with torch.autocast(first.features.device.type, enabled=False):
            pyramid = CorrelationPyramid.both_ways(first.features, second.features, LEVELS, self.radius)
            both = ImageEncoding.join([first, second])
            flow, backward = self.upsample(*self.refine(pyramid, both, iterations), first.size).chunk(2)
        return flow, backward

    def refine(
        self, pyramid: CorrelationPyramid, encoding: ImageEncoding, iterations: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow ``[B,2,h,w]`` in pixels of the feature grid, from zero, and the hidden state ``[B,D,h,w]``.

        Args:
            pyramid: correlations of the images with their counterparts.
            encoding: of the images.
            iterations: number of updates.
        """
        hidden = encoding.hidden
        B, _, h, w = hidden.shape
        iterate = self.update.ready(hidden.dtype)
        options = {"dtype": accumulation_dtype(hidden.dtype), "device": hidden.device}
        columns, rows = torch.arange(w, **options), torch.arange(h, **options)  # type: ignore[call-overload]
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
        flow = grid.new_zeros(B, 2, h, w)
        for _ in range(iterations):
            hidden, step = iterate(hidden, encoding.gates, pyramid.lookup(grid + flow), flow)
            flow = flow + step
        return flow, hidden

    def upsample(self, flow: torch.Tensor, hidden: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """What :meth:`refine` found -> flow ``[B,2,H,W]`` in pixels of images of ``size`` (H, W)."""
        if self.small:
            fine = F.interpolate(FACTOR * flow, scale_factor=FACTOR, mode="bilinear", align_corners=True)
        else:
            fine = convex_upsample(flow, self.update.mask(hidden))
        left, _, top, _ = _padding(size)
        return fine[..., top : top + size[0], left : left + size[1]]

    def _check_images(self, **images: torch.Tensor) -> None:
        checks.shapes(*((name, image, "B 3 H W") for name, image in images.items()))
        device = self.features.stem.weight.device
        for name, image in images.items():
            checks.nonempty(name, image, 2, 3)
            if image.device != device:
                raise ValueError(
                    f"{name}: expected a tensor on {device} like the network, got {image.device}"
                )

    def published_names(self) -> dict[str, tuple[str, ...]]:
        """Own state-dict keys -> the published keys, in ``raft-things.pth`` behind ``module.``."""
        parts = {"features": "fnet", "context": "cnet", "update": "update_block"}
        return {
            f"{own}.{key}": tuple(f"{published}.{name}" for name in names)
            for own, published in parts.items()
            for key, names in getattr(self, own).published_names().items()
        }


def _padding(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Pixels missing to multiples of 8: left, right, top, bottom."""
    down, across = (-length % FACTOR for length in size)
    return across // 2, across - across // 2, down // 2, down - down // 2


def _check_pair(first: ImageEncoding, second: ImageEncoding) -> None:
    for name, encoding in (("first", first), ("second", second)):
        if not isinstance(encoding, ImageEncoding):
            raise TypeError(f"{name}: expected an ImageEncoding, got {type(encoding).__name__}")
    if second.size != first.size:
        raise ValueError(f"second: expected images of size {first.size} like first, got {second.size}")
    if len(second) != len(first):
        raise ValueError(f"second: expected {len(first)} images like first, got {len(second)}")
    checks.same_dtype(("first", first.features), ("second", second.features))
    if second.features.device != first.features.device:
        raise ValueError(
            f"second: expected an encoding on {first.features.device} like first, "
            f"got {second.features.device}"
        )
