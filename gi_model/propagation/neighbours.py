"""Flow between neighbouring frames whose holes nobody may look into."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch

from gi_kernels import complete_flow, flow_consistency
from gi_model.flow import FlowEstimator
from gi_model.propagation.sampling import bounding_box

# Around a hole the flow is not trusted either, because the estimator's coarse patches reach into it:
# this share of the frame's shorter side, at least so many pixels.
MARGIN, LEAST_MARGIN = 0.08, 6
# Width, as a share of the same side, of the ring around it that the motion model is fitted to.
RING = 0.06
# Pixels of the ring used for the fit.
FITTED = 4000


@dataclass
class Flows:
    """Flow between two frames, both ways.

    Attributes:
        forward, backward: ``[1,3,H,W]`` float32: flow in pixels, x first, then its forward-backward
            error in pixels. ``forward`` lies on the first frame's grid, ``backward`` on the second's.
    """

    forward: torch.Tensor
    backward: torch.Tensor


def connect(
    estimator: FlowEstimator, images: tuple[np.ndarray, np.ndarray], masks: tuple[np.ndarray, np.ndarray]
) -> Flows:
    """Flow between two images [H,W,3] whose masked regions [H,W] were filled by a guess.

    In and around the masks the estimate is replaced by one that continues the motion around them.
    """
    forward, backward = (
        continue_flow(torch.from_numpy(estimator(images[i], images[1 - i]))[None], masks[i]) for i in (0, 1)
    )
    return Flows(
        torch.cat([forward, flow_consistency(forward, backward)], dim=1),
        torch.cat([backward, flow_consistency(backward, forward)], dim=1),
    )


def continue_flow(flow: torch.Tensor, mask: np.ndarray) -> torch.Tensor:
    """Flow [1,2,H,W] with the region of ``mask`` [H,W] and its surroundings continued from outside.

    Per connected region: an affine motion fitted to a ring around it, plus what ``complete_flow``
    makes of the remainder. The affine part carries pans, zooms and turns across the hole, where an
    average of its rim would flatten them.
    """
    if not mask.any():
        return flow
    side = min(mask.shape)
    distrusted = dilate(mask, max(LEAST_MARGIN, round(MARGIN * side)))
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


def affine_motion(flow: np.ndarray, around: np.ndarray, rounds: int = 8) -> np.ndarray:
    """The affine flow [2,H,W] that most of the pixels ``around`` [H,W] agree on; zero if there are few.

    Least absolute deviations, by reweighted least squares.
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
        weight = 1 / np.sqrt(np.maximum(deviation, 0.1))  # pixels
    rows, columns = np.mgrid[:height, :width]
    return (terms(columns, rows) @ solution).transpose(2, 0, 1).astype(np.float32)


def dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    """``mask`` [H,W] grown by a disc of that radius."""
    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance <= pixels


def _smooth(flow: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur: completion from single points leaves steps between them."""
    blurred = cv2.GaussianBlur(flow[0].permute(1, 2, 0).numpy(), (0, 0), sigma)
    return torch.from_numpy(blurred.transpose(2, 0, 1).copy())[None]
