"""The motion of a region, continued from where it is known to where it is not."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from gi_model.flow import FlowEstimator
from gi_model.propagation.neighbours import affine_motion
from gi_model.propagation.sampling import Box

# Share of the frame that a common motion is found from, if there is as much.
ENOUGH = 0.02
# Deviation from the surroundings' common motion, in pixels, at which it is that of something else.
APART = 3.0


def both_ways(
    estimator: FlowEstimator, first: np.ndarray, second: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow [1,2,H,W] between two images [H,W,3] uint8, there and back."""
    pair = torch.from_numpy(np.ascontiguousarray(np.stack([first, second]).transpose(0, 3, 1, 2)))
    flows = estimator(pair, pair.flip(0))
    return flows[:1], flows[1:]


def continue_motion(
    flow: torch.Tensor, known: torch.Tensor, seen: torch.Tensor, belongs: torch.Tensor
) -> torch.Tensor:
    """Flow [1,2,H,W] continued to where it is not ``known`` [1,1,H,W].

    Above all from what was ``seen`` with confidence and ``belongs`` to the region or near it: an affine
    motion that most of it agrees on, and the nearest deviations from it. What moves otherwise, like
    something that passes in front, has no say.
    """
    plane, valid = flow[0].numpy(), known[0, 0].numpy()
    near = (seen * belongs)[0, 0].numpy()
    enough = ENOUGH * valid.size
    chosen = next((c for least in (0.5, 0.2, 0.05) if (c := valid & (near > least)).sum() > enough), valid)
    motion = affine_motion(plane, chosen)
    rest = np.where(valid[..., None], (plane - motion).transpose(1, 2, 0), 0).astype(np.float32)
    together = 1 / (1 + ((rest / APART) ** 2).sum(axis=2) ** 2)
    weight = np.where(valid, together * (1e-4 + near) + 1e-8, 0).astype(np.float32)
    return torch.from_numpy(spread(rest, weight).transpose(2, 0, 1) + motion)[None]


def astray(flow: torch.Tensor, weight: torch.Tensor, sigma: float) -> torch.Tensor:
    """Where a flow [1,2,H,W] is not that of its surroundings, though they weigh more than the pixel."""
    around = blurred(weight, sigma)
    apart = flow - blurred(flow * weight, sigma) / around.clamp(min=1e-6)
    return (apart.norm(dim=1, keepdim=True) > 2 * APART) & (around > 0.3)


def blurred(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian means of ``[1,C,H,W]``."""
    planes = [cv2.GaussianBlur(plane.numpy(), (0, 0), sigma) for plane in maps[0].contiguous()]
    return torch.from_numpy(np.stack(planes))[None]


def spread(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Values [H,W,C] where they have weight [H,W], elsewhere means over the nearest that have."""
    total = np.dstack([values * weight[..., None], weight])
    levels = [total]
    while min(levels[-1].shape[:2]) > 2:
        levels.append(cv2.pyrDown(levels[-1]))
    found = levels[-1]
    for finer in reversed(levels[:-1]):
        coarse = cv2.pyrUp(found, dstsize=(finer.shape[1], finer.shape[0]))
        # Little: heard only where the finer level says nothing.
        found = finer + 1e-1 * coarse
    return found[..., :-1] / np.maximum(found[..., -1:], 1e-30)


def coordinates(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[h,w,2]`` as x and y ``[h,w]``."""
    return np.ascontiguousarray(positions[..., 0]), np.ascontiguousarray(positions[..., 1])


def grid(box: Box) -> np.ndarray:
    """The pixels ``[h,w,2]`` of a box, x first."""
    rows, columns = (np.arange(side.start, side.stop, dtype=np.float32) for side in box)
    return np.stack(np.meshgrid(columns, rows), axis=-1)
