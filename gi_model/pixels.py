"""Pixels of references, moved along flow to where they are missing: a guess for a network to correct."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels import flow_warp
from gi_kernels.nn import resize, scale_flow
from gi_kernels.precision import accumulation_dtype
from gi_model.streams import ConvNormRelu, ReflectConv, UpNormRelu, widths

#: A moved pixel is seen where more than this share of its interpolation's weight is on what is not masked.
SEEN = 0.5
#: Differences of colours are small numbers; times this they are as large as the other features.
CONTRAST = 8.0
#: Channels of the features that the network sees of each reference.
FEATURES = 17


class Guess(NamedTuple):
    """What is known and guessed of targets, and what share of it comes from no reference.

    Attributes:
        colours: ``[B,3,H,W]``, the targets' own where they are not masked.
        unseen: ``[B,1,H,W]`` from 0 to 1, 0 where nothing is masked.
    """

    colours: torch.Tensor
    unseen: torch.Tensor


class PixelPropagation(nn.Module):
    r"""Guesses targets as mixtures of what references show and of what surrounds the holes.

    Each of the T references is aligned along flow, :math:`a_t`. Where both it and the target :math:`x` show
    something, they are compared; the difference :math:`x - a_t`, spread smoothly from there into the hole, is
    :math:`d_t`, which takes up changes of colour. The surroundings :math:`s` are :math:`x` spread likewise.
    In the hole the guess is

    .. math:: \sum_t \left(p_t\, a_t + q_t\, (a_t + d_t)\right) + r\, s, \quad \sum_t (p_t + q_t) + r = 1,

    with shares per pixel, a softmax; those of a reference are zero where it shows nothing. They are what
    is learnt: a small U-shaped network sees the colours above and how far apart they are, for one reference
    at a time, and where it is coarsest the mean of all references. At the beginning of training all that is
    seen counts the same, and the surroundings little.

    What is masked has no influence.

    Args:
        width: channels of the network at full size; they double with each downsampling.
        downsamplings: of the network; height and width must be multiples of 2 to their power.

    Source of the order, pixels before features: Zhou et al., "ProPainter: Improving propagation and
    transformer for video inpainting", 2023.
    """

    def __init__(self, width: int, downsamplings: int) -> None:
        super().__init__()
        sizes = list(pairwise(widths(width, downsamplings, limit=width * 2**downsamplings)))
        coarsest = width * 2**downsamplings
        self.enter = ConvNormRelu(FEATURES, width, 3)
        self.down = nn.ModuleList(ConvNormRelu(fine, coarse, 3, stride=2) for fine, coarse in sizes)
        self.join = ConvNormRelu(2 * coarsest, coarsest, 3)
        self.up = nn.ModuleList(UpNormRelu(coarse, fine) for fine, coarse in reversed(sizes))
        self.shares = ReflectConv(width, 3, 3)

    def initialise(self) -> None:
        """Begin with equal shares of all that is seen, and e^-4 of one for the surroundings."""
        nn.init.zeros_(self.shares.weight)
        with torch.no_grad():
            assert self.shares.bias is not None
            self.shares.bias.copy_(self.shares.bias.new_tensor([0.0, 0.0, -4.0]))

    def forward(
        self,
        input: torch.Tensor,
        srcs: torch.Tensor,
        flows: torch.Tensor,
        arranged: Callable[[torch.Tensor], torch.Tensor] = lambda maps: maps,
    ) -> Guess:
        """Guess targets ``[B,4,H,W]`` from references ``[B,T,4,H,W]`` and flows ``[B,T,2,h,w]``.

        Args:
            input, srcs, flows: as of :class:`~gi_model.generator.Generator`.
            arranged: brings features to the layout and dtype in which the network is to compute.

        Returns:
            The guess in float32, or float64 for float64 frames.
        """
        B, T = srcs.shape[:2]
        dtype = accumulation_dtype(input.dtype)
        with torch.autocast(input.device.type, enabled=False):  # small differences of colours count
            known, image = 1 - input[:, 3:].to(dtype), input[:, :3].to(dtype)
            image = known * image
            aligned, seen = align(srcs.to(dtype), flows)
            around = spread(image, known)
            both = seen * known[:, None]
            differences = both * (image[:, None] - aligned)
            distances = differences.abs().mean(dim=2, keepdim=True)
            apart = torch.cat([differences, distances], dim=2).flatten(0, 1)
            changes, nearby = spread(apart, both.flatten(0, 1)).unflatten(0, (B, T)).split([3, 1], dim=2)
            overall = distances.sum((3, 4), keepdim=True) / both.sum((3, 4), keepdim=True).clamp(min=1)
            matched = aligned + seen * changes
            features = [
                around[:, None].expand_as(aligned),
                known[:, None].expand_as(seen),
                torch.where(seen > 0, matched, around[:, None]),
                seen,
                CONTRAST * differences,
                CONTRAST * changes,
                CONTRAST * nearby,
                CONTRAST * overall.expand_as(seen),
                both.mean((3, 4), keepdim=True).expand_as(seen),
            ]
            joined = torch.cat(features, dim=2).flatten(0, 1).to(input.dtype)
        logits = self._logits(arranged(joined), T).to(dtype).unflatten(0, (B, T))
        with torch.autocast(input.device.type, enabled=False):
            of_references = logits[:, :, :2].masked_fill(seen == 0, float("-inf")).flatten(1, 2)
            of_surroundings = logits[:, :, 2:].mean(dim=1)
            shares = torch.cat([of_references, of_surroundings], dim=1).softmax(dim=1)
            colours = torch.cat(
                [torch.stack([aligned, matched], dim=2).flatten(1, 2), around[:, None]], dim=1
            )
            mixed = (shares[:, :, None] * colours).sum(dim=1)
            return Guess(image + (1 - known) * mixed, (1 - known) * shares[:, -1:])

    def _logits(self, features: torch.Tensor, count: int) -> torch.Tensor:
        """``[B*T,17,H,W]`` -> ``[B*T,3,H,W]``: reference as it is, matched, and surroundings."""
        maps = [self.enter(features)]
        for down in self.down:
            maps.append(down(maps[-1]))
        own = maps.pop().unflatten(0, (-1, count))
        both = torch.cat([own, own.mean(dim=1, keepdim=True).expand_as(own)], dim=2)
        x = own.flatten(0, 1) + self.join(both.flatten(0, 1))
        for up in self.up:
            x = maps.pop() + up(x)
        return self.shares(x)


def align(srcs: torch.Tensor, flows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """References as a target sees them: sampled along flow, from what they show alone.

    Args:
        srcs: ``[B,T,4,H,W]``, colours and the mask, 1 where missing; colours there have no influence.
        flows: ``[B,T,2,h,w]`` in pixels of their own grid, x first.

    Returns:
        Colours ``[B,T,3,H,W]``, zero where nothing is seen, and ``[B,T,1,H,W]``, 1 where something is:
        where most of the weight of the interpolation is on what is not masked, and inside the frame.
    """
    (B, T, _, H, W), (h, w) = srcs.shape, flows.shape[3:]
    flow = flows.flatten(0, 1).to(srcs.dtype)
    if (h, w) != (H, W):
        flow = scale_flow(resize(flow, (H, W)), W / w, H / h)
    colours, mask = srcs.flatten(0, 1).split([3, 1], dim=1)
    shown = torch.cat([colours * (1 - mask), 1 - mask], dim=1)
    colours, weights = flow_warp(shown, flow).split([3, 1], dim=1)
    seen = (weights > SEEN).to(colours.dtype)
    colours = seen * colours / weights.clamp(min=SEEN)
    return colours.unflatten(0, (B, T)), seen.unflatten(0, (B, T))


def spread(values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """``values [N,C,H,W]`` where ``known [N,1,H,W]`` is 1; where it is 0, smoothly what is around.

    Maps are halved until something is known everywhere, then gaps are filled from coarse to fine. Zero
    where nothing is known at all.

    Source: Gortler et al., "The Lumigraph", 1996.
    """
    H, W = values.shape[2:]
    values = known * values
    if max(H, W) == 1:
        return values
    weights = _halved(known)
    coarse = spread(_halved(values) / weights.clamp(min=0.25), (weights > 0).to(known.dtype))
    return values + (1 - known) * F.interpolate(coarse, (H, W), mode="bilinear", align_corners=False)


def _halved(maps: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(maps, 2, ceil_mode=True, count_include_pad=False)
