"""Sampling frames and maps along flows, only where a hole needs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch

from gi_kernels import flow_warp

# Positions between two pixels that OpenCV tells apart.
STEPS = 32
# Rows of a band: few enough that what is sampled for it stays in the processor's caches.
BAND = 32

Box = tuple[slice, slice]  # rows, columns


def bounding_box(mask: np.ndarray, margin: int = 0) -> Box:
    """The smallest box around the true pixels of ``mask`` [H,W], grown by ``margin`` within the frame."""
    sides = []
    for axis, length in zip((1, 0), mask.shape, strict=True):
        found = np.flatnonzero(mask.any(axis=axis))
        sides.append(slice(max(0, int(found[0]) - margin), min(length, int(found[-1]) + 1 + margin)))
    return sides[0], sides[1]


def relative(box: Box, origin: Box) -> Box:
    """A box as seen from the corner of another."""
    rows, columns = (slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, origin, strict=True))
    return rows, columns


def regions(mask: np.ndarray, margin: int) -> list[tuple[Box, np.ndarray]]:
    """The parts of ``mask`` [H,W], further than ``margin`` from each other, each with its box.

    Boxes are grown by ``margin``; they may overlap, but every true pixel belongs to one part ``[h,w]``.
    """
    near = cv2.dilate(mask.astype(np.uint8), np.ones((margin + 1, margin + 1), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(near)
    found: list[tuple[Box, np.ndarray]] = []
    for label in range(1, count):
        left, top, width, height = stats[label, :4]
        around = slice(top, top + height), slice(left, left + width)
        part = mask[around] & (labels[around] == label)
        tight = bounding_box(part)
        rows, columns = (
            slice(max(0, int(start + side.start - margin)), min(length, int(start + side.stop + margin)))
            for start, side, length in zip((top, left), tight, mask.shape, strict=True)
        )
        box = rows, columns
        found.append((box, mask[box] & (labels[box] == label)))
    return found


def bands(mask: np.ndarray) -> Iterator[Box]:
    """Boxes that cover the true pixels of ``mask`` [H,W], each of a few rows, as narrow as these allow.

    Together they are little larger than what is true, also where it is long, thin and slanting.
    """
    for top in range(0, len(mask), BAND):
        part = mask[top : top + BAND]
        if part.any():
            rows, columns = bounding_box(part)
            yield slice(top + rows.start, top + rows.stop), columns


def sample_maps(maps: Sequence[torch.Tensor], flow: torch.Tensor, box: Box) -> torch.Tensor:
    """Bilinear samples of maps [1,C_i,H,W] at ``p + flow(p)`` for ``p`` in ``box`` -> [1,sum C_i,h,w].

    Zero outside the frame and where the flow [1,2,h,w] is not finite.
    """
    (rows, columns), shift = _reach(flow, box, maps[0].shape[2], maps[0].shape[3])
    a, b = rows.stop - rows.start, columns.stop - columns.start
    h, w = flow.shape[2:]
    # The operator has outputs of its input's size: both are padded to the larger one.
    height, width = max(a, h), max(b, w)
    channels = [m.shape[1] for m in maps]
    cut = torch.zeros(1, sum(channels), height, width)
    for target, m in zip(cut.split(channels, dim=1), maps, strict=True):
        target[..., :a, :b] = m[..., rows, columns]
    moved = torch.zeros(1, 2, height, width)
    np.add(flow[0].numpy(), shift, out=moved[0, :, :h, :w].numpy())
    return flow_warp(cut, moved)[..., :h, :w]


def sample_colour(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colours of ``image`` [H,W,3] uint8 or uint16 at positions ``[h,w]`` float32 -> [h,w,3] float32.

    In grey levels of 8 bits. Sharper than bilinear sampling: the part of the image is first enlarged twice
    by a cubic, so that bilinear sampling spans half a pixel only.
    """
    reach = []
    for position, length in ((y, image.shape[0]), (x, image.shape[1])):
        low, high = (int(v) for v in np.clip((position.min(), position.max()), 0, length - 1))
        reach.append(slice(max(0, low - 2), min(length, high + 4)))
    enlarged = _enlarge(to_levels(image[reach[0], reach[1]]))
    x, y = 2 * (x - reach[1].start), 2 * (y - reach[0].start)
    return cv2.remap(enlarged, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _reach(flow: torch.Tensor, box: Box, height: int, width: int) -> tuple[Box, np.ndarray]:
    """The box that the samples touch, and what to add to the flow ``[2,1,1]`` as seen from its corner."""
    rows, top = _reach_along(flow[0, 1].numpy(), box[0], height, axis=0)
    columns, left = _reach_along(flow[0, 0].numpy(), box[1], width, axis=1)
    return (rows, columns), np.array([left, top], np.float32)[:, None, None]


def _reach_along(component: np.ndarray, side: slice, length: int, axis: int) -> tuple[slice, int]:
    here = np.arange(side.start, side.stop, dtype=np.float32)
    position = component + (here[:, None] if axis == 0 else here)
    ends = position.min(), position.max()  # one of them is not finite where any position is not
    if not np.isfinite(ends).all():
        position = position[np.isfinite(position)]
        ends = (position.min(), position.max()) if position.size else (0, 0)
    low, high = (int(end) for end in np.clip(ends, 0, length - 1))
    reach = slice(low, min(length, high + 2))
    return reach, side.start - reach.start


def _enlarge(image: np.ndarray) -> np.ndarray:
    """[h,w,3] float32 -> [2h-1,2w-1,3]: the pixels, and between them Catmull-Rom midpoints."""
    taps = np.array([-1, 9, 9, -1], np.float32) / 16
    out = image
    for axis in (0, 1):
        kernel = taps[:, None] if axis == 0 else taps[None]
        anchor = (0, 1) if axis == 0 else (1, 0)
        between = cv2.filter2D(out, -1, kernel, anchor=anchor, borderType=cv2.BORDER_REPLICATE)
        shape = list(out.shape)
        shape[axis] = 2 * shape[axis] - 1
        grown = np.empty(shape, np.float32)
        even, odd = (slice(None, None, 2), slice(1, None, 2))
        if axis == 0:
            grown[even], grown[odd] = out, between[:-1]
        else:
            grown[:, even], grown[:, odd] = out, between[:, :-1]
        out = grown
    return np.clip(out, 0, 255, out=out)


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """``image`` [H,W] or [H,W,3] with a shorter side of at most ``side`` pixels, as area means."""
    height, width = image.shape[:2]
    scale = side / min(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


class Enlarger:
    """Between a box of the frame's grid and the box that covers it on the smaller grid of the flow.

    Args:
        box: rows and columns of the frame.
        shape, small: height and width of the frame and of the smaller grid.

    Attributes:
        small_box: rows and columns of the smaller grid.
    """

    def __init__(self, box: Box, shape: Sequence[int], small: Sequence[int]) -> None:
        self.shape = shape
        self.same = tuple(shape) == tuple(small)
        rows, columns = (
            slice(max(0, side.start * few // full - 1), min(few, -(-side.stop * few // full) + 1))
            for side, full, few in zip(box, shape, small, strict=True)
        )
        self.small_box: Box = box if self.same else (rows, columns)
        self.scale = np.array([shape[1] / small[1], shape[0] / small[0]], np.float32)
        y, x = (np.arange(side.start, side.stop, dtype=np.float32) for side in box)
        self.x, self.y = np.meshgrid(x, y)
        self.small_x = (self.x + 0.5) / self.scale[0] - 0.5 - self.small_box[1].start
        self.small_y = (self.y + 0.5) / self.scale[1] - 0.5 - self.small_box[0].start

    def shrink(self, mask: np.ndarray) -> np.ndarray:
        """``[H,W]`` bool on the box -> ``[h,w]`` on the small one: all pixels that have a share in it."""
        if self.same:
            return mask
        out = np.zeros([side.stop - side.start for side in self.small_box], bool)
        y, x = np.nonzero(mask)
        top, left = self.small_y[:, 0], self.small_x[0]
        for rows in (np.floor(top).astype(int), np.ceil(top).astype(int)):
            for columns in (np.floor(left).astype(int), np.ceil(left).astype(int)):
                out[rows[y].clip(0, len(out) - 1), columns[x].clip(0, out.shape[1] - 1)] = True
        return out

    def map(self, values: np.ndarray) -> np.ndarray:
        """``[h,w]`` or ``[h,w,C]`` float32 on the small box -> the same on the full one, bilinear."""
        if self.same:
            return values
        return cv2.remap(
            values, self.small_x, self.small_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )

    def positions(self, flow: torch.Tensor, where: Any = ...) -> tuple[np.ndarray, np.ndarray]:
        """Where pixels of the frame's box lie, x and y, for a flow [1,2,h,w] on the small one.

        Args:
            where: an index into the box: all of it, rows and columns, or the positions of pixels [N].

        In steps of 1/32 pixel, as OpenCV samples: so what is tested for a position holds where it is used.
        """
        x, y = self.x[where], self.y[where]
        moved = flow[0].permute(1, 2, 0).numpy()
        if self.same:
            moved = moved[where]
        else:
            moved = look_up(
                np.ascontiguousarray(moved), self.small_x[where], self.small_y[where], sharp=False
            )
        x, y = x + moved[..., 0] * self.scale[0], y + moved[..., 1] * self.scale[1]
        return np.round(x * STEPS) / STEPS, np.round(y * STEPS) / STEPS

    def inside(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Whether positions lie in the frame; NaN does not."""
        return (x >= 0) & (x <= self.shape[1] - 1) & (y >= 0) & (y <= self.shape[0] - 1)


def look_up(image: np.ndarray, x: np.ndarray, y: np.ndarray, sharp: bool = True) -> np.ndarray:
    """Values of ``image`` [H,W] or [H,W,C] at positions ``[h,w]`` or ``[N]`` float32, in its dtype.

    By a cubic, or bilinear if not ``sharp``; positions are rounded to 1/32 pixel. Outside the frame the
    nearest pixel of it.
    """
    kind = cv2.INTER_CUBIC if sharp else cv2.INTER_LINEAR
    shape = (*x.shape, *image.shape[2:])
    if not x.size:
        return np.empty(shape, image.dtype)
    found = cv2.remap(image, np.atleast_2d(x), np.atleast_2d(y), kind, borderMode=cv2.BORDER_REPLICATE)
    return found.reshape(shape)


def to_bytes(image: np.ndarray) -> np.ndarray:
    """uint8 or uint16 -> uint8."""
    return image if image.dtype == np.uint8 else (image // 257).astype(np.uint8)


def to_levels(image: np.ndarray) -> np.ndarray:
    """uint8 or uint16 -> float32 in grey levels of 8 bits, 0 to 255."""
    return image.astype(np.float32) if image.dtype == np.uint8 else image.astype(np.float32) / 257


def from_levels(levels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The inverse of :func:`to_levels`, rounded and clipped."""
    scale = 1 if dtype == np.uint8 else 257
    return (levels * scale).round().clip(0, 255 * scale).astype(dtype)
