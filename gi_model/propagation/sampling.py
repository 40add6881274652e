"""Sampling frames and maps along flows, only where a hole needs it."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from gi_kernels import flow_warp

Box = tuple[slice, slice]  # rows, columns


def bounding_box(mask: np.ndarray, margin: int = 0) -> Box:
    """The smallest box around the true pixels of ``mask`` [H,W], grown by ``margin`` within the frame."""
    sides = []
    for axis, length in zip((1, 0), mask.shape, strict=True):
        found = np.flatnonzero(mask.any(axis=axis))
        sides.append(slice(max(0, int(found[0]) - margin), min(length, int(found[-1]) + 1 + margin)))
    return sides[0], sides[1]


def sample_maps(maps: Sequence[torch.Tensor], flow: torch.Tensor, box: Box) -> torch.Tensor:
    """Bilinear samples of maps [1,C_i,H,W] at ``p + flow(p)`` for ``p`` in ``box`` -> [1,sum C_i,h,w].

    Zero outside the frame and where the flow [1,2,h,w] is not finite.
    """
    reach, moved = _reach(flow, box, maps[0].shape[2], maps[0].shape[3])
    cut = torch.cat([m[..., reach[0], reach[1]] for m in maps], dim=1)
    return _warp(cut, moved)


def sample_colour(image: np.ndarray, flow: torch.Tensor, box: Box) -> torch.Tensor:
    """Colours of ``image`` [H,W,3] uint8 at ``p + flow(p)`` for ``p`` in ``box`` -> [1,3,h,w], float32.

    Sharper than bilinear sampling: the image is first enlarged twice by a cubic, so that bilinear
    sampling spans half a pixel only.
    """
    reach, moved = _reach(flow, box, image.shape[0], image.shape[1], margin=2)
    return _warp(torch.from_numpy(_enlarge(image[reach]).transpose(2, 0, 1)[None]), moved, factor=2)


def _reach(
    flow: torch.Tensor, box: Box, height: int, width: int, margin: int = 0
) -> tuple[Box, torch.Tensor]:
    """The box that the samples touch, grown by ``margin``, and the flow as seen from its corner."""
    rows, top = _reach_along(flow[0, 1], box[0], height, margin, axis=0)
    columns, left = _reach_along(flow[0, 0], box[1], width, margin, axis=1)
    return (rows, columns), flow + torch.tensor([left, top], dtype=flow.dtype)[:, None, None]


def _reach_along(
    component: torch.Tensor, side: slice, length: int, margin: int, axis: int
) -> tuple[slice, int]:
    here = torch.arange(side.start, side.stop)
    position = component + (here[:, None] if axis == 0 else here)
    position = position[torch.isfinite(position)].clamp(0, length - 1)
    low, high = (int(position.min()), int(position.max())) if position.numel() else (0, 0)
    reach = slice(max(0, low - margin), min(length, high + 2 + margin))
    return reach, side.start - reach.start


def _warp(cut: torch.Tensor, flow: torch.Tensor, factor: int = 1) -> torch.Tensor:
    """Samples of ``cut`` [1,C,a,b] at ``factor * (p + flow(p))`` for the grid of ``flow`` [1,2,h,w].

    ``flow_warp`` has outputs of its input's size: both are padded until they fit each other. Its
    resizing of the flow keeps the corners, so with the factor every other output is one of ours.
    """
    a, b = cut.shape[2:]
    h, w = flow.shape[2:]
    height, width = max(h, (a - 1) // factor + 1), max(w, (b - 1) // factor + 1)  # of the padded flow
    size = factor * (height - 1) + 1, factor * (width - 1) + 1
    cut = F.pad(cut, (0, size[1] - b, 0, size[0] - a))
    # Positions grow by the factor, flow_warp scales them by the ratio of the sizes.
    scale = torch.tensor([factor * width / size[1], factor * height / size[0]])[:, None, None]
    flow = F.pad(flow * scale, (0, width - w, 0, height - h))
    return flow_warp(cut, flow)[..., : factor * h : factor, : factor * w : factor]


def _enlarge(image: np.ndarray) -> np.ndarray:
    """[h,w,3] uint8 -> [2h-1,2w-1,3] float32: the pixels, and between them Catmull-Rom midpoints."""
    taps = np.array([-1, 9, 9, -1], np.float32) / 16
    out = image.astype(np.float32)
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
    return np.clip(out, 0, 255)
