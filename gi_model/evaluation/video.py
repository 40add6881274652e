"""How steady and how natural a repaired video is inside its masks.

Frames are ``[H,W,3]`` uint8, masks ``[H,W]`` bool; a sequence holds those of a whole clip, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from gi_kernels import flow_warp
from gi_model.evaluation.lpips import LPIPS
from gi_model.flow import DISFlow, FlowEstimator
from gi_model.propagation.sampling import bounding_box

# Of LPIPS: the features of a pixel in the mask see this many pixels around it, for the most part.
MARGIN = 32


@dataclass
class Step:
    """The motion from a frame to the next.

    Attributes:
        flow: ``[1,2,H,W]`` float32 in pixels, x first.
        steady: ``[H,W]`` bool, where the next frame shows the same thing.
    """

    flow: torch.Tensor
    steady: np.ndarray


def motion(truth: Sequence[np.ndarray], estimator: FlowEstimator | None = None) -> list[Step]:
    """The steps of the true clip, one fewer than frames, by DIS if nothing else is given.

    A pixel is occluded where forward and backward flow do not undo each other,
    ``|f + b(p + f)|^2 > 0.01 (|f|^2 + |b(p + f)|^2) + 0.5``, the rule of Sundaram, Brox, Keutzer, 2010,
    that warp errors are commonly measured with, or where the flow leaves the frame.
    """
    estimator = estimator or DISFlow()
    steps = []
    for frame, following in pairwise(truth):
        pair = torch.from_numpy(np.stack([frame, following]).transpose(0, 3, 1, 2))
        flows = estimator(pair, pair.flip(0))
        forward, backward = flows[:1], flows[1:]
        back = flow_warp(torch.cat([backward, torch.ones_like(backward[:, :1])], dim=1), forward)
        returned = (forward + back[:, :2]).square().sum(dim=1)
        length = forward.square().sum(dim=1) + back[:, :2].square().sum(dim=1)
        steady = (returned <= 0.01 * length + 0.5) & (back[:, 2] > 0.999)
        steps.append(Step(forward, steady[0].numpy()))
    return steps


def warp_error(result: Sequence[np.ndarray], masks: Sequence[np.ndarray], steps: Sequence[Step]) -> float:
    r"""Mean squared difference between a frame and the next one, warped back along the true motion.

    .. math:: \frac{1}{|S|} \sum_{t, p \in S}
        \tfrac{1}{3} \lVert r_t(p) - \mathrm{warp}(r_{t+1}, f_t)(p) \rVert^2

    with colours in [0, 1], over the masked pixels ``S`` that the next frame shows too. The truth has an
    error as well, of sampling, noise and flow; compare with it. NaN where there is nothing to compare.

    Args:
        result: the repaired clip; masks: where it was repaired; steps: ``motion`` of the truth.

    Source: Lai et al., "Learning blind video temporal consistency", 2018, there over whole frames.
    """
    total, numbers = 0.0, 0
    for (frame, following), mask, step in zip(pairwise(result), masks, steps, strict=False):
        counted = mask & step.steady
        image = torch.from_numpy(following).permute(2, 0, 1)[None].float()
        warped = flow_warp(image, step.flow)[0].permute(1, 2, 0).numpy()
        difference = (frame[counted] - warped[counted].astype(np.float64)) / 255
        total += float((difference**2).sum())
        numbers += difference.size
    return total / numbers if numbers else float("nan")


def flicker(result: Sequence[np.ndarray], truth: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    r"""Mean change of the error from frame to frame, in levels of 8 bits.

    .. math:: \mathrm{mean}_{t, p} \tfrac{1}{3} \lVert (r_t - g_t)(p) - (r_{t-1} - g_{t-1})(p) \rVert_1

    over the pixels that are masked in both frames. An error that stays where it is in the frame does
    not flicker; one that moves with the scene does. NaN where there is nothing to compare.
    """
    total, numbers = 0.0, 0
    frames = list(zip(result, truth, masks, strict=True))
    for (r0, g0, m0), (r1, g1, m1) in pairwise(frames):
        both = m0 & m1
        before = r0[both].astype(np.int16) - g0[both]
        after = r1[both].astype(np.int16) - g1[both]
        total += float(np.abs(after - before).sum())
        numbers += before.size
    return total / numbers if numbers else float("nan")


def masked_lpips(
    metric: LPIPS, results: Sequence[np.ndarray], truth: np.ndarray, mask: np.ndarray
) -> list[float]:
    """LPIPS of several repaired versions of one frame: the spatial map, averaged over the mask.

    The network sees the mask's box and 32 pixels around it, within the frame. NaN for an empty mask.
    """
    if not mask.any():
        return [float("nan")] * len(results)
    box = bounding_box(mask, MARGIN)
    cut = np.stack([truth[box], *(r[box] for r in results)])
    images = torch.from_numpy(cut).permute(0, 3, 1, 2).contiguous().float() / 255
    with torch.no_grad():
        maps = metric(images[1:], images[:1].expand_as(images[1:]), spatial=True)
    inside = torch.from_numpy(mask[box])
    return [float(m[0][inside].double().mean()) for m in maps]
