"""Frames in tiles of the size that a generator was trained at."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gi_model.propagation.sampling import Box, bounding_box, regions
from gi_model.references import References


@dataclass(frozen=True)
class Tile:
    """A square of a frame: ``size`` pixels along each side from row ``top`` and column ``left``."""

    top: int
    left: int
    size: int

    @property
    def box(self) -> Box:
        return slice(self.top, self.top + self.size), slice(self.left, self.left + self.size)


@dataclass(frozen=True)
class Region:
    """A part of a mask that is filled by itself.

    Attributes:
        hole: ``[H,W]`` bool.
        tiles: that cover it, with their surroundings.
        whole: whether the one tile sees all of it.
    """

    hole: np.ndarray
    tiles: tuple[Tile, ...]

    @property
    def whole(self) -> bool:
        return len(self.tiles) == 1

    def outer(self, tile: Tile, context: int) -> np.ndarray:
        """Where the hole lies within ``context`` pixels of a side beyond which it goes on."""
        out = np.zeros((tile.size, tile.size), bool)
        rows, columns = bounding_box(self.hole)
        if rows.start < tile.top:
            out[:context] = True
        if rows.stop > tile.top + tile.size:
            out[-context:] = True
        if columns.start < tile.left:
            out[:, :context] = True
        if columns.stop > tile.left + tile.size:
            out[:, -context:] = True
        return out & self.hole[tile.box]


def plan(mask: np.ndarray, size: int, context: int) -> list[Region]:
    """Regions of ``mask`` [H,W] with their tiles; both sides of the frame are at least ``size``.

    What is nearer than ``context`` to each other is one region. If it fits into a tile with ``context``
    pixels on every side, it gets one, around its middle. If not, tiles cover it that overlap by twice as
    much. Positions are multiples of ``context``, so that tiles stay where they are while a mask moves a
    little, except along the frame's borders. Tiles that do not touch the region are left out.
    """
    found = []
    for box, part in regions(mask, context):
        hole = np.zeros_like(mask)
        hole[box] = part
        rows, columns = (
            _starts(side, length, size, context)
            for side, length in zip(bounding_box(hole), mask.shape, strict=True)
        )
        tiles = (Tile(top, left, size) for top in rows for left in columns)
        found.append(Region(hole, tuple(tile for tile in tiles if hole[tile.box].any())))
    return found


def _starts(side: slice, length: int, size: int, context: int) -> list[int]:
    """Where tiles start along one axis."""

    def near(start: int) -> int:
        return min(max(0, start // context * context), length - size)

    if side.stop - side.start <= size - 3 * context:  # the third is lost to rounding
        return [near((side.start + side.stop - size + context) // 2)]
    starts = [near(side.start - context)]
    while starts[-1] + size < min(length, side.stop + context):
        starts.append(min(starts[-1] + size - 2 * context, length - size))
    return starts


def windows_of(tiles: Sequence[Tile], overlap: int) -> list[np.ndarray]:
    """A weight ``[size,size]`` float32 for every pixel of every tile; at every pixel they sum up to 1.

    Weights fall smoothly over ``overlap`` pixels towards a tile's sides, where others go on.
    """
    rows = slice(min(t.top for t in tiles), max(t.top + t.size for t in tiles))
    columns = slice(min(t.left for t in tiles), max(t.left + t.size for t in tiles))
    total = np.zeros((rows.stop - rows.start, columns.stop - columns.start), np.float32)
    size = tiles[0].size
    distance = np.minimum(np.arange(size) + 0.5, size - np.arange(size) - 0.5)
    ramp = np.sin(np.minimum(distance / overlap, 1) * np.pi / 2).astype(np.float32) ** 2
    window = ramp[:, None] * ramp
    places = [
        (
            slice(t.top - rows.start, t.top - rows.start + size),
            slice(t.left - columns.start, t.left - columns.start + size),
        )
        for t in tiles
    ]
    for place in places:
        total[place] += window
    return [window / total[place] for place in places]


def crop_flow(flow: torch.Tensor, frame: tuple[int, int], tile: Tile) -> torch.Tensor:
    """Flow ``[B,T,C,h,w]`` of a whole frame on a tile of it: ``[B,T,C,size,size]`` in the frame's pixels.

    Bilinear; with two channels x and y are scaled, another number of channels by the mean of both scales.
    """
    height, width = flow.shape[-2:]
    if (height, width) == frame:
        return flow[..., tile.box[0], tile.box[1]]
    scale = torch.tensor([frame[1] / width, frame[0] / height])
    y = (torch.arange(tile.top, tile.top + tile.size) + 0.5) / frame[0] * 2 - 1
    x = (torch.arange(tile.left, tile.left + tile.size) + 0.5) / frame[1] * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    maps = flow.flatten(0, 1)
    cut = torch.nn.functional.grid_sample(
        maps, grid.expand(len(maps), -1, -1, -1), padding_mode="border", align_corners=False
    )
    factor = scale[:, None, None] if flow.shape[2] == 2 else scale.mean()
    return (cut * factor).unflatten(0, flow.shape[:2])


class ReferenceCache:
    """Encoded references by key, the least recently used of which are dropped beyond ``limit`` bytes.

    Attributes:
        nbytes: of all that is kept.
        hits, misses: of calls so far.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"limit: expected a number of bytes, got {limit}")
        self.limit = limit
        self.nbytes = self.hits = self.misses = 0
        self._kept: OrderedDict[Hashable, References] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], References]) -> References:
        """What is kept under ``key``, else what ``make`` returns, which is then kept if it fits."""
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key]
        self.misses += 1
        made = make()
        self._kept[key] = made
        self.nbytes += made.nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return made

    def clear(self) -> None:
        """Drop everything."""
        self._kept.clear()
        self.nbytes = 0
