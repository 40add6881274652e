"""The rim of a tracked region, beside what passes in front of it."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch

from gi_model.propagation.likeness import closeness, difference, shading
from gi_model.propagation.motion import ENOUGH, coordinates, grid, spread
from gi_model.propagation.sampling import Box, look_up

# Pixels to which the flow of something else reaches beyond it: DIS has patches of 8.
SMEARED = 7.0
# Deviation of the windows that colours are compared in here. Narrow: what passes in front is in them.
BLUR = 1.0
# Levels that one difference may well be larger than another by chance (on flat ground both are what
# compression left), and multiple of the other up to which it is believed: more likely than not, a pixel
# near the region shows the region.
CHANCE, BELIEVED = 6.0, 1.6
# Pixels per frame by which what passes moves otherwise than the region.
OTHER = 1.5
# What a pixel's distance from known motion adds to the deviation of its position.
PER_PIXEL = 0.05


@dataclass
class Rim:
    """Where the motion of the region goes on though the flow says otherwise, and what it shows there.

    Attributes:
        where: ``[h,w]`` bool.
        away: ``[h,w]`` float32, pixels to where the motion is known.
        seen: ``[h,w]`` float32, from 0 to 1: that the region is seen there.
        shading: ``[h,w,1]`` float32: how bright it is as a multiple of what was expected.
    """

    where: np.ndarray
    away: np.ndarray
    seen: np.ndarray
    shading: np.ndarray


@dataclass
class Step:
    """How a part of the frame has moved since the frame before.

    Attributes:
        before: the frame before, ``[H,W,3]`` uint8.
        start: ``[h,w,2]`` float32, x first: the pixels of that part.
        flow: ``[h,w,2]`` float32: how far from there they lie in the frame before.
        consistent: ``[h,w]`` bool: that the flow agrees with its inverse.
    """

    before: np.ndarray
    start: np.ndarray
    flow: np.ndarray
    consistent: np.ndarray

    @staticmethod
    def by(before: np.ndarray, box: Box, flow: torch.Tensor, consistent: torch.Tensor) -> Step:
        """That of a box by its flow [1,2,h,w]; ``consistent`` is [1,1,h,w]."""
        return Step(before, grid(box), flow[0].numpy().transpose(1, 2, 0), consistent[0, 0].numpy())

    def part(self, box: Box) -> Step:
        """That of a box within the box."""
        return Step(self.before, self.start[box], self.flow[box], self.consistent[box])


def certain(agrees: np.ndarray) -> np.ndarray | None:
    """Pixels [h,w] out of the reach of all that does not look as expected; None where there is no rim.

    ``agrees`` [h,w], from 0 to 1, is how far positions are known and colours as expected there.
    """
    agree = (agrees > 0.5).astype(np.uint8)
    if agree.all():
        return None
    known = _distance(agree) > SMEARED
    return known if known.mean() > ENOUGH else None


def rim(
    frame: np.ndarray,
    expected: np.ndarray,
    instead: np.ndarray,
    known: np.ndarray,
    agrees: np.ndarray,
    step: Step | None,
) -> Rim:
    """Where a frame shows what the motion of the region, continued up to it, lets expect.

    Flow is no sharper than its patches: beside something that moves otherwise it goes along with that,
    and its inverse agrees. So all that is near a place where colours do not agree is asked whether it
    looks more as it should if the motion from further away goes on. A pixel that does shows the region
    if it looks so, and if it does not look still more like the frame before along the motion of what passes.

    Args:
        frame: ``[h,w,3]`` float32.
        expected, instead: the same as it should look by the flow, and by the continued motion.
        known: :func:`certain` pixels, from which the motion was continued.
        agrees: ``[h,w]``, as there.
        step: the motion since the frame before; None if that is not known.
    """
    away = _distance(~known)
    light = shading(frame, expected, known.astype(np.float32))[..., None]
    by_flow, continued = (difference(frame, light * image, BLUR) for image in (expected, instead))
    where = ~known & (away < 2 * SMEARED) & (continued < by_flow + 0.5)
    seen = closeness(continued, instead)
    passing = None if step is None else _passing(frame, known, agrees, step)
    if passing is not None:
        seen = seen / (1 + ((continued + CHANCE) / (BELIEVED * (passing + CHANCE))) ** 6)
    return Rim(where, away, seen, light)


def _passing(frame: np.ndarray, known: np.ndarray, agrees: np.ndarray, step: Step) -> np.ndarray | None:
    """Difference [h,w] from the frame before along the motion of what passes; None if nothing does.

    What moves with the region is nothing that passes, but noise or a change of light.
    """
    own = spread(step.flow, known.astype(np.float32))
    strange = ((agrees < 0.2) & step.consistent & _differs(step.flow, own)).astype(np.uint8)
    strange = cv2.erode(strange, np.ones((3, 3), np.uint8))
    if strange.sum() < 16:
        return None
    motion = spread(step.flow, strange.astype(np.float32))
    before = look_up(step.before, *coordinates(step.start + motion)).astype(np.float32)
    return np.where(_differs(motion, own), difference(frame, before, BLUR), np.inf)


def _differs(motion: np.ndarray, own: np.ndarray) -> np.ndarray:
    return np.linalg.norm(motion - own, axis=2) > OTHER


def _distance(inside: np.ndarray) -> np.ndarray:
    """Of each pixel of ``inside`` [h,w] to the nearest one outside, in pixels."""
    return cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
