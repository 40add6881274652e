"""Propagation without weights: real pixels are carried along optical flow into the mask."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np
import torch

from gi_model.flow import DISFlow, FlowEstimator
from gi_model.propagation.neighbours import connect, dilate
from gi_model.propagation.sampling import Box, bounding_box, sample_colour, sample_maps

F = TypeVar("F")

# Accumulated forward-backward error, in pixels, at which a candidate's weight has halved.
ERROR_SCALE = 0.5
# Accumulated error, in pixels, beyond which a candidate is rejected.
ERROR_LIMIT = 10.0
# Pixels beside a mask that are not copied elsewhere: blurred or compressed together with what it hides.
RIM = 1


@dataclass
class _Frame:
    image: np.ndarray  # [H,W,3] uint8; the hole is filled by inpainting
    mask: np.ndarray  # [H,W] bool
    visible: torch.Tensor  # [1,1,H,W]: 1 where pixels may be taken from, else 0
    # [1,3,H,W]: flow to the next and the previous frame and its error, once they were needed.
    forward: torch.Tensor | None = None
    backward: torch.Tensor | None = None


class Propagator:
    """Repairs frames in order, looking at most ``radius`` frames back and ahead.

    For each masked pixel the flow is followed from frame to frame, as a composition, so that a colour
    is sampled once, from an original frame: the nearest one that sees it, in either direction. The two
    are weighted by the forward-backward error gathered on the way. What no frame sees is inpainted.
    Pixels outside the mask are returned as they came; those inside are never looked at.

    Memory is that of ``2 * radius + 1`` frames, whatever the length of the clip.

    Args:
        estimator: optical flow; OpenCV's DIS by default.
        radius: how many frames to look back and ahead.

    Attributes:
        masked, unseen: masked pixels so far, and those of them that no frame showed.
    """

    def __init__(self, estimator: FlowEstimator | None = None, radius: int = 15) -> None:
        if radius < 1:
            raise ValueError(f"radius: expected at least 1, got {radius}")
        self.estimator = estimator or DISFlow()
        self.radius = radius
        self.masked = self.unseen = 0

    def run(self, frames: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield repaired frames in order.

        Args:
            frames: ``[H,W,3]`` uint8 RGB images of one size.
            masks: ``[H,W]`` bool, true where a pixel is to be repaired; at least one per frame.

        Raises:
            ValueError: a mask is missing or of another size than its frame.
        """
        prepared = (_prepared(image, mask) for image, mask in with_masks(frames, masks))
        for window, centre in windows(prepared, self.radius):
            yield self._repair(window, centre)

    def _repair(self, window: deque[_Frame], centre: int) -> np.ndarray:
        frame = window[centre]
        if not frame.mask.any():
            return frame.image
        box = bounding_box(frame.mask)
        hole = torch.from_numpy(frame.mask[box])[None, None]
        total = torch.zeros(1, 3, *hole.shape[2:])
        weight = torch.zeros(1, 1, *hole.shape[2:])
        for step in (1, -1):
            self._follow(window, centre, step, box, hole, total, weight)
        seen = hole & (weight > 0)
        colour = (total / weight.clamp(min=1e-12)).round().clamp(0, 255).byte()
        image = frame.image.copy()
        np.copyto(image[box], colour[0].permute(1, 2, 0).numpy(), where=seen[0, 0].numpy()[..., None])
        unseen = frame.mask.copy()
        unseen[box] &= ~seen[0, 0].numpy()
        self.masked += int(frame.mask.sum())
        self.unseen += int(unseen.sum())
        return inpaint_frame(image, unseen)

    def _follow(
        self,
        window: deque[_Frame],
        centre: int,
        step: int,
        box: Box,
        hole: torch.Tensor,
        total: torch.Tensor,
        weight: torch.Tensor,
    ) -> None:
        """Add to ``total`` and ``weight`` what the frames in one direction show of the hole.

        Everything lies on the box's grid: ``flow`` leads to the frame that has been reached.
        """
        reach = min(self.radius, len(window) - 1 - centre if step > 0 else centre)
        height, width = window[centre].mask.shape
        rows = torch.arange(box[0].start, box[0].stop)[:, None]
        columns = torch.arange(box[1].start, box[1].stop)
        flow = torch.zeros(1, 2, *hole.shape[2:])
        error = torch.zeros(1, 1, *hole.shape[2:])
        wanted = hole
        for index in range(centre, centre + step * reach, step):
            if not wanted.any():
                return
            onward = sample_maps([self._onward(window, index, step)], flow, box)
            flow, error = flow + onward[:, :2], error + onward[:, 2:]
            x, y = columns + flow[:, :1], rows + flow[:, 1:]
            inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
            wanted = wanted & inside & (error < ERROR_LIMIT)  # NaN is neither
            frame = window[index + step]
            # No mixtures of visible and hidden pixels.
            found = wanted & (sample_maps([frame.visible], flow, box) > 0.999)
            if found.any():
                share = torch.where(found, 1 / (1 + (error / ERROR_SCALE) ** 2), 0)
                total += share * sample_colour(frame.image, flow, box)
                weight += share
                wanted = wanted & ~found

    def _onward(self, window: deque[_Frame], index: int, step: int) -> torch.Tensor:
        """Flow and error from frame ``index`` of the window to its neighbour."""
        first, second = (window[index], window[index + 1]) if step > 0 else (window[index - 1], window[index])
        if first.forward is None or second.backward is None:
            flows = connect(self.estimator, (first.image, second.image), (first.mask, second.mask))
            first.forward, second.backward = flows.forward, flows.backward
        return first.forward if step > 0 else second.backward


def _prepared(image: np.ndarray, mask: np.ndarray) -> _Frame:
    visible = torch.from_numpy(~dilate(mask, RIM)).float()[None, None]
    return _Frame(inpaint_frame(image, mask), mask, visible)


def windows(frames: Iterable[F], radius: int) -> Iterator[tuple[deque[F], int]]:
    """For each frame in order, a window that reaches ``radius`` frames back and ahead, and its place in it.

    The window is the same one all the time: it lasts until the next is asked for.
    """
    window: deque[F] = deque()
    centre = 0
    for frame in frames:
        window.append(frame)
        if len(window) - centre > radius:
            yield window, centre
            centre += 1
        if centre > radius:
            window.popleft()
            centre -= 1
    for index in range(centre, len(window)):
        yield window, index


def with_masks(
    frames: Iterable[np.ndarray], masks: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Frames with their masks; raise ``ValueError`` where one is missing or of another size."""
    remaining = iter(masks)
    for index, image in enumerate(frames):
        mask = next(remaining, None)
        if mask is None:
            raise ValueError(f"masks: expected one for every frame, got {index}")
        if mask.shape != image.shape[:2]:
            raise ValueError(
                f"masks: expected {image.shape[1]}x{image.shape[0]} pixels like the frames, "
                f"got {mask.shape[1]}x{mask.shape[0]} at frame {index}"
            )
        yield image, mask


def inpaint_frame(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fill ``mask`` from the frame itself (Telea, 2004): ``[H,W,3]`` uint8, ``[H,W]`` bool.

    What is inside the mask has no influence. Grey where there is nothing outside.
    """
    if not mask.any():
        return image
    if mask.all():
        return np.full_like(image, 127)
    blank = np.where(mask[..., None], np.uint8(0), image)
    return cv2.inpaint(blank, mask.astype(np.uint8), 3, cv2.INPAINT_TELEA)
