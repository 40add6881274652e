"""Flow between neighbouring frames whose holes nobody may look into."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from gi_kernels import complete_flow, flow_consistency, flow_warp
from gi_model.flow import FlowEstimator
from gi_model.propagation.sampling import bounding_box

# Around a hole the flow is not trusted either, because the estimator's patches reach into it: shares of
# the frame's shorter side. Far at first, where filled holes move with the mask instead of the scene;
# nearer when they have been filled with what moves with the scene.
FAR, NEAR = 0.15, 0.03
# Width, as a share of the same side, of the ring around it that the motion model is fitted to.
RING = 0.06
# Size of the coarse flows: one over that.
COARSE = 4
# Motion of the camera, in pixels at the corners of the frame, below which it stands; and what the flow of
# a resting pixel reaches all the same, by the estimator's noise.
STILL, UNREST = 0.03, 0.3
# Pixels of the ring used for the fit.
FITTED = 4000


@dataclass
class Flows:
    """Flow between two frames, both ways.

    Attributes:
        forward, backward: ``[1,3,H,W]`` float16: flow in pixels, x first, then its forward-backward
            error in pixels. ``forward`` lies on the first frame's grid, ``backward`` on the second's.
    """

    forward: torch.Tensor
    backward: torch.Tensor


def connect(
    estimator: FlowEstimator, images: tuple[np.ndarray, np.ndarray], masks: tuple[np.ndarray, np.ndarray]
) -> Flows:
    """Flow between two images [H,W,3] whose masked regions [H,W] were filled by a guess.

    In and around the masks the estimate is replaced by one that continues the motion around them.
    Before that, a coarse flow fills the holes with what the other image shows there, so that their
    contents move with the scene, and not with the masks, when the flow is estimated. Where the camera
    stands, what is hidden is taken to rest.
    """
    pair = torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2))  # [2,3,H,W]
    still = False
    if any(mask.any() for mask in masks):
        coarse = _coarse_flow(estimator, pair)
        still = all(_stands(flow, mask) for flow, mask in zip(coarse, masks, strict=True))
        inside = _stilled(coarse, masks) if still else _continued(coarse, masks, FAR)
        pair = _fill_from_each_other(pair, masks, inside)
    flows = estimator(pair, pair.flip(0))
    forward, backward = _stilled(flows, masks) if still else _continued(flows, masks, NEAR)
    return Flows(
        torch.cat([forward, flow_consistency(forward, backward)], dim=1).half(),
        torch.cat([backward, flow_consistency(backward, forward)], dim=1).half(),
    )


def _stands(flow: torch.Tensor, mask: np.ndarray) -> bool:
    """Whether the affine motion of what is visible of a flow [2,H,W] is none."""
    motion = affine_motion(flow.numpy(), ~mask, floor=STILL)
    return bool(np.abs(motion[:, [0, 0, -1, -1], [0, -1, 0, -1]]).max() < STILL)


def _stilled(flows: torch.Tensor, masks: tuple[np.ndarray, np.ndarray]) -> list[torch.Tensor]:
    """Both flows [2,2,H,W] without the estimator's noise, which adds up over frames: two of [1,2,H,W]."""
    hidden = np.stack([dilate(mask, _distrust(mask, NEAR)) for mask in masks])
    moving = (flows.norm(dim=1) > UNREST) & ~torch.from_numpy(hidden)
    return list(torch.where(moving[:, None], flows, 0).split(1))


def _distrust(mask: np.ndarray, margin: float) -> int:
    """Pixels around a mask where the flow is not trusted, for a share of the shorter side."""
    return max(2, round(margin * min(mask.shape)))


def _coarse_flow(estimator: FlowEstimator, pair: torch.Tensor) -> torch.Tensor:
    """Flow [2,2,H,W] of a pair [2,3,H,W] and back, estimated at a part of the size."""
    height, width = pair.shape[2:]
    size = -(-height // COARSE), -(-width // COARSE)
    small = F.interpolate(pair.float(), size, mode="bilinear", antialias=True).round().byte()
    flow = F.interpolate(estimator(small, small.flip(0)), (height, width), mode="bilinear")
    return flow * torch.tensor([width / size[1], height / size[0]])[:, None, None]


def _continued(
    flows: torch.Tensor, masks: tuple[np.ndarray, np.ndarray], margin: float
) -> list[torch.Tensor]:
    """Both flows [2,2,H,W] continued into the masks: two of [1,2,H,W]."""
    return [continue_flow(flows[i : i + 1], mask, margin) for i, mask in enumerate(masks)]


def _fill_from_each_other(
    pair: torch.Tensor, masks: tuple[np.ndarray, np.ndarray], flows: list[torch.Tensor]
) -> torch.Tensor:
    """The images [2,3,H,W] with the same contents in both holes.

    The first hole takes what the second image shows, and keeps its guess where that is hidden too.
    The second hole then takes everything from the first image.
    """
    first, second = pair[:1].float(), pair[1:].float()
    holes = [torch.from_numpy(mask)[None, None] for mask in masks]
    shown = (~holes[1]).float()
    first = _replace(first, holes[0], flow_warp(torch.cat([second, shown], dim=1), flows[0]))
    everything = torch.ones_like(shown)
    second = _replace(second, holes[1], flow_warp(torch.cat([first, everything], dim=1), flows[1]))
    return torch.cat([first, second]).round().byte()


def _replace(image: torch.Tensor, hole: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """``image`` with the hole taken from ``sample`` [1,4,H,W] where its last channel says it is known."""
    return torch.where(hole & (sample[:, 3:] > 0.999), sample[:, :3], image)


def continue_flow(flow: torch.Tensor, mask: np.ndarray, margin: float = NEAR) -> torch.Tensor:
    """Flow [1,2,H,W] with the region of ``mask`` [H,W] and its surroundings continued from outside.

    The surroundings reach ``margin`` times the frame's shorter side.

    Per connected region: an affine motion fitted to a ring around it, plus what ``complete_flow``
    makes of the remainder. The affine part carries pans, zooms and turns across the hole, where an
    average of its rim would flatten them.
    """
    if not mask.any():
        return flow
    side = min(mask.shape)
    distrusted = dilate(mask, _distrust(mask, margin))
    ring = max(4, round(RING * side))
    flow = flow.clone()
    estimated = flow[0].numpy().copy()
    count, labels = cv2.connectedComponents(distrusted.astype(np.uint8))
    for label in range(1, count):
        region = labels == label
        box = bounding_box(region, ring + 1)
        region = region[box]
        around = dilate(region, ring) & ~distrusted[box]
        cut = estimated[:, box[0], box[1]]
        motion = affine_motion(cut, around)
        remainder = torch.from_numpy(cut - motion)[None]
        inside = torch.from_numpy(region)[None, None]
        filled = _smooth(complete_flow(remainder, inside.float()), ring / 4) + torch.from_numpy(motion)[None]
        target = flow[..., box[0], box[1]]
        target.copy_(torch.where(inside, filled, target))
    return flow


def affine_motion(flow: np.ndarray, around: np.ndarray, rounds: int = 8, floor: float = 0.1) -> np.ndarray:
    """The affine flow [2,H,W] that most of the pixels ``around`` [H,W] agree on; zero if there are few.

    Least absolute deviations, by reweighted least squares; those below ``floor`` pixels count alike.
    """
    height, width = around.shape
    y, x = np.nonzero(around & np.isfinite(flow).all(axis=0))
    step = 1 + len(x) // FITTED
    y, x = y[::step], x[::step]
    if len(x) < 16:
        return np.zeros_like(flow)

    def terms(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.stack([(x - width / 2) / width, (y - height / 2) / height, np.ones(x.shape)], axis=-1)

    design, values = terms(x, y), flow[:, y, x].T.astype(np.float64)
    weight = np.ones(len(x))
    for _ in range(rounds):
        solution = np.linalg.lstsq(design * weight[:, None], values * weight[:, None], rcond=None)[0]
        deviation = np.linalg.norm(design @ solution - values, axis=1)
        weight = 1 / np.sqrt(np.maximum(deviation, floor))
    rows, columns = np.mgrid[:height, :width]
    return (terms(columns, rows) @ solution).transpose(2, 0, 1).astype(np.float32)


def dilate(mask: np.ndarray, pixels: float) -> np.ndarray:
    """``mask`` [H,W] grown by a disc of that radius."""
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance <= pixels


def _smooth(flow: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur: completion from single points leaves steps between them."""
    blurred = cv2.GaussianBlur(flow[0].permute(1, 2, 0).numpy(), (0, 0), sigma)
    return torch.from_numpy(blurred.transpose(2, 0, 1).copy())[None]
