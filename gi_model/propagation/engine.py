"""Propagation without weights: real pixels are carried along optical flow into the mask."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from gi_kernels import complete_flow, flow_consistency, flow_warp
from gi_model.errors import InputError
from gi_model.flow import DISFlow, FlowEstimator

# Pixels around the mask whose flow is not trusted: the estimator's coarse patches reach into the hole.
FLOW_MARGIN = 28
# Spread, in pixels of accumulated forward-backward error, at which a candidate's weight has halved.
ERROR_SCALE = 0.5
# Accumulated error, in pixels, beyond which a candidate is not used at all. Generous: inside the mask
# the flow is a guess, whose error alone says little, and a wrong guess mostly beats inpainting.
ERROR_LIMIT = 30.0


@dataclass
class _Frame:
    image: np.ndarray  # [H,W,3] uint8, the hole blanked
    mask: np.ndarray  # [H,W] bool
    sampled: torch.Tensor  # [1,4,H,W]: RGB where visible, else zero; then 1 where visible
    # Flow to the next frame and back, [1,2,H,W], completed inside the masks, and the forward-backward
    # error of each, [1,1,H,W]. None at the end of the clip.
    forward: torch.Tensor | None = None
    forward_error: torch.Tensor | None = None
    backward: torch.Tensor | None = None
    backward_error: torch.Tensor | None = None


class Propagator:
    """Repairs frames in order, looking at most ``radius`` frames back and ahead.

    For each masked pixel the flow is followed from frame to frame, as a composition, so that every
    candidate is sampled once from an original frame. Candidates are weighted by the forward-backward
    error gathered on the way; the nearest ``candidates`` in each direction are averaged. What no frame
    sees is filled by inpainting within the frame. Pixels outside the mask are returned as they came.

    Memory is that of ``2 * radius + 1`` frames, whatever the length of the clip.

    Args:
        estimator: optical flow; OpenCV's DIS by default.
        radius: how many frames to look back and ahead.
        candidates: how many frames that see a pixel are averaged, per direction.
    """

    def __init__(self, estimator: FlowEstimator | None = None, radius: int = 15, candidates: int = 1) -> None:
        if radius < 1 or candidates < 1:
            raise ValueError(f"radius, candidates: expected at least 1, got {radius} and {candidates}")
        self.estimator = estimator or DISFlow()
        self.radius = radius
        self.candidates = candidates

    def run(self, frames: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield repaired frames in order.

        Args:
            frames: ``[H,W,3]`` uint8 RGB images of one size.
            masks: ``[H,W]`` bool, true where a pixel is to be repaired; at least one per frame.

        Raises:
            InputError: a mask is missing or of another size than its frame.
        """
        window: deque[_Frame] = deque()
        centre = 0
        for frame in self._read(frames, masks):
            if window:
                self._connect(window[-1], frame)
            window.append(frame)
            if len(window) - centre > self.radius:
                yield self._repair(window, centre)
                centre += 1
            if centre > self.radius:
                window.popleft()
                centre -= 1
        while centre < len(window):
            yield self._repair(window, centre)
            centre += 1
            if centre > self.radius:
                window.popleft()
                centre -= 1

    def _read(self, frames: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> Iterator[_Frame]:
        remaining = iter(masks)
        for index, image in enumerate(frames):
            mask = next(remaining, None)
            if mask is None:
                raise InputError(f"--masks: expected a mask for every frame, got {index} masks")
            if mask.shape != image.shape[:2]:
                raise InputError(
                    f"--masks: expected masks of {image.shape[1]}x{image.shape[0]} pixels like the frames, "
                    f"got {mask.shape[1]}x{mask.shape[0]} at frame {index}"
                )
            visible = (~mask).astype(np.float32)[..., None]
            sampled = np.concatenate([image * visible, visible], axis=2)
            yield _Frame(np.where(mask[..., None], 0, image).astype(np.uint8), mask, _to_tensor(sampled))

    def _connect(self, first: _Frame, second: _Frame) -> None:
        """Estimate the flow between neighbours in both directions and complete it inside the masks."""
        images = [inpaint_frame(f.image, f.mask) for f in (first, second)]
        masks = [
            _to_tensor(_dilate(f.mask, FLOW_MARGIN).astype(np.float32)[..., None]) for f in (first, second)
        ]
        flows = []
        for source, target, mask in ((0, 1, masks[0]), (1, 0, masks[1])):
            flow = torch.from_numpy(self.estimator(images[source], images[target]))[None]
            flows.append(_smooth(complete_flow(flow, mask), mask) if mask.any() else flow)
        first.forward, second.backward = flows
        first.forward_error = flow_consistency(flows[0], flows[1])
        second.backward_error = flow_consistency(flows[1], flows[0])

    def _repair(self, window: deque[_Frame], centre: int) -> np.ndarray:
        frame = window[centre]
        if not frame.mask.any():
            return frame.image
        hole = torch.from_numpy(frame.mask)[None, None]
        total = torch.zeros_like(frame.sampled[:, :3])
        weight = torch.zeros_like(frame.sampled[:, :1])
        for step in (1, -1):
            self._follow(window, centre, step, hole, total, weight)
        seen = hole & (weight > 1e-6)
        colour = torch.where(seen, total / weight.clamp(min=1e-6), frame.sampled[:, :3])
        image = colour[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
        return inpaint_frame(np.ascontiguousarray(image), (hole & ~seen)[0, 0].numpy())

    def _follow(
        self,
        window: deque[_Frame],
        centre: int,
        step: int,
        hole: torch.Tensor,
        total: torch.Tensor,
        weight: torch.Tensor,
    ) -> None:
        """Add to ``total`` and ``weight`` what frames in one direction show of the hole."""
        flow = torch.zeros_like(total[:, :2])
        error = torch.zeros_like(weight)
        count = torch.zeros_like(weight)
        index = centre
        while 0 <= index + step < len(window):
            here = window[index]
            onward = here.forward if step > 0 else here.backward
            onward_error = here.forward_error if step > 0 else here.backward_error
            assert onward is not None and onward_error is not None
            if index == centre:
                flow, error = onward.clone(), onward_error.clone()
            else:
                further = flow_warp(torch.cat([onward, onward_error], 1), flow)
                error = error + further[:, 2:]
                flow = flow + further[:, :2]
            index += step
            sample = flow_warp(window[index].sampled, flow)
            visible = sample[:, 3:]
            # A pixel that mixes visible and hidden ones is not used: its colour is darkened by zeros.
            usable = hole & (visible > 0.999) & (error < ERROR_LIMIT) & (count < self.candidates)
            share = torch.where(usable, 1 / (1 + (error / ERROR_SCALE) ** 2), 0)
            total += share * sample[:, :3]
            weight += share
            count += usable
            if not (hole & (count < self.candidates) & (error < ERROR_LIMIT)).any():
                break


def inpaint_frame(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fill ``mask`` from the frame itself (Telea, 2004): ``[H,W,3]`` uint8, ``[H,W]`` bool."""
    if not mask.any():
        return image
    if mask.all():
        return np.full_like(image, 127)
    return cv2.inpaint(image, mask.astype(np.uint8), 3, cv2.INPAINT_TELEA)


def _to_tensor(image: np.ndarray) -> torch.Tensor:
    """``[H,W,C]`` float32 -> ``[1,C,H,W]``."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))[None]


def _dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pixels + 1, 2 * pixels + 1))
    return cv2.dilate(mask.astype(np.uint8), kernel) > 0


def _smooth(flow: torch.Tensor, mask: torch.Tensor, sigma: float = 4.0) -> torch.Tensor:
    """Blur the flow inside the mask: completion from single points leaves steps between them."""
    blurred = cv2.GaussianBlur(flow[0].permute(1, 2, 0).numpy(), (0, 0), sigma)
    return torch.where(mask > 0.5, _to_tensor(blurred), flow)
