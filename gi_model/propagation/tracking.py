"""Where the pixels of a frame lie in a keyframe, frame after frame away from it."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from gi_kernels import flow_consistency, flow_warp
from gi_model.flow import FlowEstimator
from gi_model.propagation import rims
from gi_model.propagation.likeness import agreement, closeness, difference, grey, shading
from gi_model.propagation.motion import (
    ENOUGH,
    astray,
    blurred,
    both_ways,
    continue_motion,
    coordinates,
    grid,
)
from gi_model.propagation.neighbours import affine_motion
from gi_model.propagation.sampling import Box, bounding_box, look_up, relative, sample_maps, shrink

# Colours are levels from 0 to 255, positions and their deviations pixels of the frame.

# What a step of the chain adds to a position's deviation: pixels, plus a share of the flow's error.
STEP, STEP_SHARE = 0.05, 0.3
# Deviation of a position measured against the keyframe, where that measurement is consistent.
MEASURED = 0.3
# What the comparison adds to it where the keyframe looks otherwise there.
DOUBT = 3.0
# Deviation of a position that was continued from its surroundings because the chain broke, and because
# the pixel has just come into the frame, where most often more of the same scene comes.
CONTINUED, ENTERED = 8.0, 3.0
# Deviation beyond which a position had better be continued from its surroundings too.
UNKNOWN = 6.0
# Deviation at which confidence has halved.
TOLERATED = 1.5
# Confidence below which a position says nothing about the next one, if others do.
HIDDEN = 0.1
# Forward-backward error beyond which a step of the chain is broken: pixels, plus a share of the flow.
BROKEN, BROKEN_SHARE = 1.0, 0.05
# Deviation of the windows in which corrections are averaged: share of the shorter side.
SMOOTH = 0.012
# Deviation of the windows that a position must go with: share of the shorter side.
WIDE = 0.05
# Shading, against that of the whole region, beyond which a pixel shows something else.
SHADED = 2.0
# Largest change of the whole region's brightness from one frame to the next.
BRIGHTENED = 1.25
# Reach around the tracked region that is compared with the keyframe: share of the shorter side, pixels.
MARGIN, MARGIN_AT_LEAST = 0.06, 16
# Shorter side at which the region is looked for first, and pixels that it has to have moved for that to
# count.
GLANCE, FAR = 120, 4
# Reach around it in which positions are followed from one frame to the next: the same.
REACH, REACH_AT_LEAST = 0.15, 40
# Distance, as a share of the same side, at which a pixel tells less of the region by a factor e.
NEARBY = 0.1
# A common motion that need not be exact is found from one pixel in so many along each side.
COARSE = 4
# Share of the region below which it counts as lost, and share that a fresh start must show.
LOST, FOUND = 0.05, 0.3
# A lost region is searched for in every so many frames.
SEARCH_EVERY = 5


class Tracker:
    """Follows a region of a keyframe through its neighbours, one by one, in either direction.

    Positions are composed: where pixel ``p`` of frame ``t`` lies in the keyframe is where the flow from
    ``t`` to the frame before leads, looked up in that frame's positions. Colours can so be sampled once,
    from the keyframe, whatever the distance. Each position has a deviation that grows with every step
    and with the forward-backward error of its flow.

    A composition drifts. So the keyframe, sampled at these positions, is compared with the frame: the
    flow between the two, which is short and does not grow with the distance, corrects positions in the
    measure of the two deviations, as a Kalman filter does. Where the chain breaks (something passed in
    front, or the pixel has just come into view), or where a position is far from what those around say,
    positions are continued from those of the region around, and count only once the comparison has
    confirmed them. Beside what passes in front, colours decide how far the region is seen
    (:mod:`~gi_model.propagation.rims`). When the whole region is lost, it is searched for by flow from
    the frame to the keyframe itself.

    Only a box around the region is followed; the whole frame while nothing of the region is in it.

    Args:
        image: the keyframe ``[H,W,3]`` uint8.
        region: ``[H,W]`` bool, what is to be followed.
        estimator: optical flow.

    Attributes:
        box: rows and columns of the present frame that are followed, ``h`` by ``w``.
        positions: ``[h,w,2]`` float32, x first: where each pixel of the box lies in the keyframe.
        flow: ``[1,2,h,w]`` float32: the same less the pixel's own position.
        confidence: ``[h,w]`` float32, from 0 to 1: that it lies there, and is seen there.
        shading: ``[h,w,3]`` float32: the present frame's colours over the keyframe's.
    """

    def __init__(self, image: np.ndarray, region: np.ndarray, estimator: FlowEstimator) -> None:
        height, width = region.shape
        self.image, self.estimator = image, estimator
        self.keyframe = image.astype(np.float32)
        self.region = region.astype(np.float32)
        # How much a pixel can tell of where a hidden part of the region is: the nearer the more.
        distance = cv2.distanceTransform((~region).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        self.surroundings = np.exp(-distance / (NEARBY * min(height, width))).astype(np.float32)
        self.area = float(self.region.sum())
        self.box: Box = slice(0, height), slice(0, width)
        self.flow = torch.zeros(1, 2, height, width)
        self.variance = torch.zeros(1, 1, height, width)
        self.brightness = np.ones(3, np.float32)
        self.shading = np.ones((height, width, 3), np.float32)
        self.confidence = np.ones((height, width), np.float32)
        self.lost_for = 0

    @property
    def positions(self) -> np.ndarray:
        return grid(self.box) + self.flow[0].numpy().transpose(1, 2, 0)

    def advance(self, before: np.ndarray, image: np.ndarray) -> None:
        """Go from the present frame, ``before``, on to its neighbour ``image``; both ``[H,W,3]`` uint8."""
        shift = self._shifted(before, image)
        box = self._around(REACH, REACH_AT_LEAST, self._whole, shift) or self._whole
        flow, backward = both_ways(self.estimator, image[box], _cut(before, box, shift))
        error = flow_consistency(flow, backward)
        flow = flow - torch.tensor(shift, dtype=flow.dtype)[:, None, None]
        self._compose(box, flow, error)
        self._compare(image, rims.Step.by(before, box, flow, error < _tolerated(flow)))
        shown = float((self.confidence * self.seen).sum())
        lost = shown < LOST * self.area
        if lost and self.lost_for % SEARCH_EVERY == 0:
            lost = not self._search(image)
        self.lost_for = self.lost_for + 1 if lost else 0

    def everywhere(self) -> np.ndarray:
        """Confidence ``[H,W]`` in all of the frame.

        Where nothing is compared it is 1 if the region's common motion leads into the keyframe, else 0.
        """
        if self.box == self._whole:
            return self.confidence
        flow = self.flow[0, :, ::COARSE, ::COARSE].numpy()
        motion = affine_motion(flow, self.confidence[::COARSE, ::COARSE] > 0.5)
        rows, columns = (
            (np.arange(length) - side.start) / COARSE
            for side, length in zip(self.box, self.region.shape, strict=True)
        )
        inside = np.ones(self.region.shape, bool)
        for axis, (component, length) in enumerate(zip(motion, self.region.shape[::-1], strict=True)):
            down, right = component[1, 0] - component[0, 0], component[0, 1] - component[0, 0]
            position = component[0, 0] + rows[:, None] * down + columns * right
            position += np.arange(length) if axis == 0 else np.arange(length)[:, None]
            inside &= (position > -1) & (position < length)
        confidence = inside.astype(np.float32)
        near = self._around(MARGIN, MARGIN_AT_LEAST, self.box)
        if near is not None:
            confidence[near] = self.confidence[relative(near, self.box)]
        return confidence

    def shown(self) -> Box | None:
        """The part of the frame that shows the region, with a pixel around it that is followed too."""
        shown = (self.seen > 0) & (self.confidence > 1 / 512)
        for side, length, axis in zip(self.box, self.region.shape, (0, 1), strict=True):
            # The rim of what is followed has no neighbours to be enlarged with.
            edge = np.moveaxis(shown, axis, 0)
            edge[: 3 if side.start > 0 else 0] = False
            edge[len(edge) - (3 if side.stop < length else 0) :] = False
        if not shown.any():
            return None
        rows, columns = bounding_box(shown, 1)
        top, left = self.box[0].start, self.box[1].start
        return slice(rows.start + top, rows.stop + top), slice(columns.start + left, columns.stop + left)

    def _compose(self, box: Box, flow: torch.Tensor, error: torch.Tensor) -> None:
        """Follow ``box`` by flow to the frame before; continue positions where that is broken."""
        # Outside what was followed samples are zero: what has a share of it is not known.
        ones = torch.ones_like(self.variance)
        seen = torch.from_numpy(self.confidence)[None, None]
        sampled = sample_maps([self.flow, self.variance, seen, ones], flow, relative(box, self.box))
        composed, variance = flow + sampled[:, :2], sampled[:, 2:3] + (STEP + STEP_SHARE * error) ** 2
        inside, consistent = sampled[:, 4:] > 0.999, error < _tolerated(flow)
        belongs = sample_maps([torch.from_numpy(self.surroundings)[None, None]], composed, box)
        known = inside & consistent & (variance < UNKNOWN**2)
        known &= ~astray(composed, known * sampled[:, 3:4] * belongs, WIDE * min(self.region.shape))
        # What was hidden went along with what hides it.
        shown = known & (sampled[:, 3:4] > HIDDEN)
        if shown.float().mean() > ENOUGH:
            known = shown
        if not known.all():
            if known.float().mean() < ENOUGH:
                known = inside & consistent
            composed = torch.where(
                known, composed, continue_motion(composed, known, sampled[:, 3:4], belongs)
            )
            entered = torch.where(inside, CONTINUED**2, ENTERED**2)
            variance = torch.where(known, variance, entered).clamp(max=CONTINUED**2)
        self.box, self.flow, self.variance = box, composed, variance
        self.confidence = self._certainty()
        self.shading = np.array(np.broadcast_to(self.brightness, (*self.confidence.shape, 3)))

    @property
    def seen(self) -> np.ndarray:
        """How much of the region each pixel of the box shows, by its position: ``[h,w]``, 0 to 1."""
        return self._sampled(self.region)

    @property
    def _whole(self) -> Box:
        return slice(0, self.region.shape[0]), slice(0, self.region.shape[1])

    def _shifted(self, before: np.ndarray, image: np.ndarray) -> tuple[int, int]:
        """How far the region has moved, x and y, if that is far: then flow in its box would not find it."""
        near = (self.confidence > 0.5) & (self._sampled(self.surroundings) > 0.5)
        y, x = np.nonzero(near)
        if len(x) < 64:
            return 0, 0
        small = [shrink(i, GLANCE) for i in (before, image)]
        scale = len(before) / len(small[0])
        pair = [torch.from_numpy(np.ascontiguousarray(i.transpose(2, 0, 1)))[None] for i in small]
        y, x = (((k + side.start) / scale).astype(int) for k, side in zip((y, x), self.box, strict=True))
        motion = self.estimator(*pair)[0, :, y.clip(0, pair[0].shape[2] - 1), x.clip(0, pair[0].shape[3] - 1)]
        across, down = (round(scale * float(component.median())) for component in motion)
        return (across, down) if max(abs(across), abs(down)) >= FAR else (0, 0)

    def _around(self, margin: float, least: int, within: Box, shift: tuple[int, int] = (0, 0)) -> Box | None:
        """The part of the frame that may show the region, with a margin; None where nothing does."""
        shown = self.seen > 0.01
        if not shown.any():
            return None
        reach = max(least, round(margin * min(self.region.shape)))
        sides = []
        for box, side, most, moved in zip(self.box, bounding_box(shown), within, shift[::-1], strict=True):
            start, stop = box.start + side.start + moved - reach, box.start + side.stop + moved + reach
            sides.append(slice(max(most.start, start), min(most.stop, stop)))
        rows, columns = sides
        return (rows, columns) if rows.start < rows.stop and columns.start < columns.stop else None

    def _compare(self, image: np.ndarray, step: rims.Step | None = None) -> None:
        """Correct positions near the region by flow to the keyframe as it should look, and judge them."""
        near = self._around(MARGIN, MARGIN_AT_LEAST, self.box)
        if near is None:
            return
        box = rows, columns = relative(near, self.box)
        image = image[near]
        frame = image.astype(np.float32)
        trusted = self._certainty()[box]
        expected = self._keyframe_at(self.positions[box])
        self._brighten(frame, expected, trusted * self._sampled(self.surroundings)[box])
        apart = self._difference(frame, expected, trusted)[0]
        rim = self._rim(frame, near, expected, trusted * closeness(apart, expected), step)
        if rim is not None:
            trusted = np.where(rim.where, 0, trusted)
            expected = self._keyframe_at(self.positions[box])
            apart = self._difference(frame, expected, trusted)[0]
        prior = self.variance[..., rows, columns]

        lit = (expected * self.brightness).round().clip(0, 255).astype(np.uint8)
        flow, backward = both_ways(self.estimator, image, lit)
        error = flow_consistency(flow, backward)
        sampled = flow_warp(torch.cat([self.flow[..., rows, columns], torch.ones_like(error)], dim=1), flow)
        change = flow + sampled[:, :2] - self.flow[..., rows, columns]
        usable = sampled[:, 2:] > 0.999
        if rim is not None:
            usable &= ~torch.from_numpy(rim.where)
        measured = self._measured(frame, box, change, error, trusted)[0]
        # What the chain lost is smooth: neighbours that agree better know better.
        weight = torch.where(usable, 1 / measured, torch.zeros(()))
        sigma = SMOOTH * min(self.region.shape)
        change = blurred(change * weight, sigma) / blurred(weight, sigma).clamp(min=1e-6)
        measured, after = self._measured(frame, box, change, error, trusted)
        usable &= torch.from_numpy(after <= 1.1 * apart + 0.5)[None, None]
        gain = torch.where(usable, prior / (prior + measured), torch.zeros(()))
        self.flow[..., rows, columns] += gain * change
        self.variance[..., rows, columns] = (1 - gain) * prior
        self._judge(frame, box, trusted, rim)

    def _rim(
        self,
        frame: np.ndarray,
        near: Box,
        expected: np.ndarray,
        agrees: np.ndarray,
        step: rims.Step | None,
    ) -> rims.Rim | None:
        """Continue the positions in ``near`` up to what passes in front of the region."""
        known = rims.certain(agrees)
        if known is None:
            return None
        box = rows, columns = relative(near, self.box)
        seen, belongs = self.confidence[box], self._sampled(self.surroundings)[box]
        flow = self.flow[..., rows, columns]
        continued = continue_motion(flow, *(torch.from_numpy(m)[None, None] for m in (known, seen, belongs)))
        instead = self._keyframe_at(grid(near) + continued[0].numpy().transpose(1, 2, 0))
        part = None if step is None else step.part(box)
        rim = rims.rim(frame, expected * self.brightness, instead * self.brightness, known, agrees, part)
        where = torch.from_numpy(rim.where)[None, None]
        variance = torch.from_numpy((MEASURED + rims.PER_PIXEL * rim.away) ** 2)[None, None]
        self.flow[..., rows, columns] = torch.where(where, continued, flow)
        self.variance[..., rows, columns] = torch.where(where, variance, self.variance[..., rows, columns])
        return rim

    def _judge(self, frame: np.ndarray, box: Box, trusted: np.ndarray, rim: rims.Rim | None) -> None:
        """Set confidence and shading in ``box`` by how the frame looks there."""
        rows, columns = box
        expected = self._keyframe_at(self.positions[box])
        apart, light = self._difference(frame, expected, trusted)
        seen = agreement(apart, frame, expected, trusted)
        doubt = 1 - agreement(apart, frame, expected, np.zeros_like(trusted))
        if rim is not None:
            seen, doubt = np.where(rim.where, rim.seen, seen), np.where(rim.where, 0, doubt)
            light = np.where(rim.where[..., None], rim.shading * self.brightness, light)
        self.variance[..., rows, columns] += torch.from_numpy((DOUBT * doubt) ** 2)[None, None]
        self.shading[box] = light
        lighter = grey(light) / self.brightness.mean()
        seen /= 1 + (np.log(np.maximum(lighter, 1e-3)) / np.log(SHADED)) ** 8
        self.confidence = self._certainty()
        self.confidence[box] *= np.minimum(seen, cv2.GaussianBlur(seen, (0, 0), 1))

    def _measured(
        self, frame: np.ndarray, box: Box, change: torch.Tensor, error: torch.Tensor, trusted: np.ndarray
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Variance of positions in ``box`` after a ``change``, and the difference of colours [h,w] there."""
        positions = self.positions[box] + change[0].numpy().transpose(1, 2, 0)
        expected = self._keyframe_at(positions)
        apart, _ = self._difference(frame, expected, trusted)
        agrees = torch.from_numpy(agreement(apart, frame, expected, trusted))[None, None]
        return (MEASURED + error) ** 2 / agrees.clamp(min=1e-4), apart

    def _search(self, image: np.ndarray) -> bool:
        """Whether flow from the frame to the keyframe finds the region; then it is followed from there."""
        flow, backward = both_ways(self.estimator, image, self.image)
        error = flow_consistency(flow, backward)
        positions = grid(self._whole) + flow[0].numpy().transpose(1, 2, 0)
        expected = self._keyframe_at(positions)
        frame, nowhere = image.astype(np.float32), np.zeros(image.shape[:2], np.float32)
        apart, _ = self._difference(frame, expected, nowhere)
        seen = agreement(apart, frame, expected, nowhere) * (error[0, 0].numpy() < BROKEN)
        region = cv2.remap(self.region, *coordinates(positions), cv2.INTER_LINEAR)
        if float((region * (seen > 0.5)).sum()) < FOUND * self.area:
            return False
        self._compose(self._whole, torch.zeros_like(flow), torch.zeros_like(error))
        variance = (MEASURED + error) ** 2
        better = torch.from_numpy(seen > 0.5)[None, None] & (variance < self.variance)
        self.flow = torch.where(better, flow, self.flow)
        self.variance = torch.where(better, variance, self.variance)
        self.confidence = self._certainty()
        self._compare(image)
        return True

    def _brighten(self, frame: np.ndarray, expected: np.ndarray, weight: np.ndarray) -> None:
        """Follow the brightness of the region and its surroundings, channel by channel."""
        chosen = (weight > 0.25) & (expected.min(axis=2) > 16) & (frame.min(axis=2) > 4)
        if chosen.sum() < 64:
            return
        ratio = np.median(frame[chosen] / expected[chosen], axis=0)
        low, high = self.brightness / BRIGHTENED, self.brightness * BRIGHTENED
        self.brightness = np.clip(ratio, low, high).astype(np.float32)

    def _difference(
        self, frame: np.ndarray, expected: np.ndarray, trusted: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Difference of colours [h,w] that shading does not explain, and the shading [h,w,3].

        Shading is smooth and the same in all channels. Where positions are not ``trusted`` [h,w] none
        but the whole region's is granted: there it might be something else in front.
        """
        lit = expected * self.brightness
        granted = (1 + trusted * (shading(frame, lit, trusted) - 1))[..., None]
        return difference(frame, granted * lit), granted * self.brightness

    def _keyframe_at(self, positions: np.ndarray) -> np.ndarray:
        return look_up(self.keyframe, *coordinates(positions))

    def _sampled(self, plane: np.ndarray) -> np.ndarray:
        """A map [H,W] of the keyframe on the present frame's grid."""
        return cv2.remap(plane, *coordinates(self.positions), cv2.INTER_LINEAR)

    def _certainty(self) -> np.ndarray:
        """Confidence in positions alone, [H,W]."""
        return (1 / (1 + (self.variance[0, 0] / TOLERATED**2) ** 2)).numpy()


def _tolerated(flow: torch.Tensor) -> torch.Tensor:
    """Forward-backward error up to which a step along that flow [1,2,h,w] holds."""
    return BROKEN + BROKEN_SHARE * flow.norm(dim=1, keepdim=True)


def _cut(image: np.ndarray, box: Box, shift: tuple[int, int]) -> np.ndarray:
    """What lies in ``box`` once it has moved back by ``shift``; beyond the frame its nearest pixels."""
    rows, columns = (
        np.arange(side.start - moved, side.stop - moved).clip(0, length - 1)
        for side, moved, length in zip(box, shift[::-1], image.shape, strict=False)
    )
    return image[rows[:, None], columns]
