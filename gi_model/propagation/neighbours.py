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
# And nearer still where something else passes that this would reach into.
BESIDE = 0.015
# Width, as a share of the same side, of the ring around it that the motion beside it is fitted to; and
# deviation, in the same share, of the window over which the motion of the scene is averaged.
RING, WINDOW = 0.06, 0.06
# Rows of the grid on which the motion of the scene is found, about.
GRID = 80
# What moves otherwise than the scene: deviation from its affine motion, in pixels, at least, and as a
# multiple of the median.
OTHER, TYPICAL = 0.5, 5.0
# That median in a scene of such depth that what passes cannot be told from what stands near.
RIGID = 0.2
# Share of the ring around a hole that must do so.
PASSED = 0.05
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
            What is hidden moves with the scene.
        beside: the same, but what is hidden moves like what is beside it; None where nothing beside it
            moves otherwise than the scene.
    """

    forward: torch.Tensor
    backward: torch.Tensor
    beside: Flows | None = None


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
    if not any(mask.any() for mask in masks):
        return _both(*estimator(pair, pair.flip(0)).split(1))
    coarse = _coarse_flow(estimator, pair)
    if all(_stands(flow, mask) for flow, mask in zip(coarse, masks, strict=True)):
        pair = _fill_from_each_other(pair, masks, _stilled(coarse, masks))
        return _both(*_stilled(estimator(pair, pair.flip(0)), masks))
    inside = [_continued(flow, mask, FAR, FAR)[0] for flow, mask in zip(coarse, masks, strict=True)]
    pair = _fill_from_each_other(pair, masks, inside)
    flows = estimator(pair, pair.flip(0))
    forward, backward = (_continued(f, m, NEAR, BESIDE) for f, m in zip(flows, masks, strict=True))
    found = _both(forward[0], backward[0])
    if any(scene is not beside for scene, beside in (forward, backward)):
        found.beside = _both(forward[1], backward[1])
    return found


def _both(forward: torch.Tensor, backward: torch.Tensor) -> Flows:
    """Flows [1,2,H,W] with their errors."""
    return Flows(
        torch.cat([forward, flow_consistency(forward, backward)], dim=1).half(),
        torch.cat([backward, flow_consistency(backward, forward)], dim=1).half(),
    )


def _stands(flow: torch.Tensor, mask: np.ndarray) -> bool:
    """Whether the affine motion of what is visible of a flow [2,H,W] is none."""
    return camera_motion(flow.numpy(), ~mask) < STILL


def camera_motion(flow: np.ndarray, visible: np.ndarray) -> float:
    """By how many pixels the affine motion of what is ``visible`` [H,W] of a flow [2,H,W] moves a corner.

    At most, along either axis.
    """
    motion = affine_motion(flow, visible, floor=STILL)
    return float(np.abs(motion[:, [0, 0, -1, -1], [0, -1, 0, -1]]).max())


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


def _continued(
    flow: torch.Tensor, mask: np.ndarray, margin: float, narrow: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow [2,H,W] continued into a mask [H,W] with the scene, and with what is beside it: [1,2,H,W] each.

    They are the same where nothing beside a hole moves otherwise than the scene. Where something does, the
    flow is trusted up to the ``narrow`` margin.
    """
    if not mask.any():
        whole = flow[None]
        return whole, whole
    hidden = dilate(mask, _distrust(mask, margin))
    passed, motion = _passed(flow.numpy(), hidden)
    if not passed.any():
        beside = _with_rings(flow[None], hidden)
        return beside, beside
    hidden &= ~passed | dilate(mask, _distrust(mask, narrow))
    beside = _with_rings(flow[None], hidden)
    return torch.where(torch.from_numpy(passed & hidden), torch.from_numpy(motion), beside), beside


def _passed(flow: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Regions of ``hidden`` [H,W] that something passes, and the motion of the scene [2,H,W] behind it.

    The scene moves by an affine motion that most of what is visible agrees on, plus an average of what the
    pixels nearby have beside it. Those that deviate from it by far are something else. Of a scene that does
    not move so nothing is said.
    """
    side, ring = min(hidden.shape), _ring(hidden)
    every = max(1, side // GRID)
    sparse = flow[:, ::every, ::every]
    count, labels = cv2.connectedComponents(hidden.astype(np.uint8))
    near = labels[::every, ::every].astype(np.float32)
    visible = (near == 0) & np.isfinite(sparse).all(axis=0)
    motion = affine_motion(sparse, visible, floor=STILL)
    rest = sparse - motion
    deviation = np.sqrt((rest**2).sum(axis=0))
    typical = float(np.median(deviation[visible])) if visible.any() else 0.0
    if typical > RIGID:
        return np.zeros_like(hidden), flow
    scene = visible & (deviation < max(OTHER, TYPICAL * typical))
    near = cv2.dilate(near, np.ones((1 + 2 * ring // every,) * 2, np.uint8)).astype(int)
    total, other = (np.bincount(near[where], minlength=count) for where in (visible, visible & ~scene))
    motion = motion + _average(rest, scene, WINDOW * side / every)
    return (other > PASSED * total)[labels] & hidden, _enlarge(motion, every, hidden.shape)


def _average(values: np.ndarray, where: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian averages [2,H,W] of values [2,H,W] ``where`` [H,W] they count; zero where that is far."""
    sums = cv2.GaussianBlur(np.dstack([*np.where(where, values, 0), where]).astype(np.float32), (0, 0), sigma)
    return (sums[..., :2] / (sums[..., 2:] + 0.01)).transpose(2, 0, 1)


def _enlarge(values: np.ndarray, every: int, shape: tuple[int, int]) -> np.ndarray:
    """``[2,H,W]`` from the values at each ``every``-th row and column."""
    matrix = np.array([[1 / every, 0, 0], [0, 1 / every, 0]])
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = shape[1], shape[0]
    large = cv2.warpAffine(
        values.transpose(1, 2, 0), matrix, size, flags=how, borderMode=cv2.BORDER_REPLICATE
    )
    return large.transpose(2, 0, 1)


def continue_flow(flow: torch.Tensor, mask: np.ndarray, margin: float = NEAR) -> torch.Tensor:
    """Flow [1,2,H,W] with the region of ``mask`` [H,W] and its surroundings continued from beside it.

    The surroundings reach ``margin`` times the frame's shorter side.

    Per connected region: an affine motion fitted to a ring around it, plus what ``complete_flow``
    makes of the remainder. The affine part carries pans, zooms and turns across the hole, where an
    average of its rim would flatten them.
    """
    return _with_rings(flow, dilate(mask, _distrust(mask, margin))) if mask.any() else flow


def _with_rings(flow: torch.Tensor, hidden: np.ndarray) -> torch.Tensor:
    """Flow [1,2,H,W] with what the ring around each region of ``hidden`` [H,W] continues to."""
    ring = _ring(hidden)
    count, labels = cv2.connectedComponents(hidden.astype(np.uint8))
    result = flow.clone()
    for label in range(1, count):
        region = labels == label
        box = bounding_box(region, ring + 1)
        region = region[box]
        around = dilate(region, ring) & (labels[box] == 0)
        cut = flow[0, :, box[0], box[1]].numpy()
        motion = affine_motion(cut, around)
        remainder = torch.from_numpy(cut - motion)[None]
        inside = torch.from_numpy(region)[None, None]
        filled = _smooth(complete_flow(remainder, inside.float()), ring / 4) + torch.from_numpy(motion)[None]
        target = result[..., box[0], box[1]]
        target.copy_(torch.where(inside, filled, target))
    return result


def _ring(mask: np.ndarray) -> int:
    """Width in pixels of the ring that the motion beside a hole is fitted to."""
    return max(4, round(RING * min(mask.shape)))


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
