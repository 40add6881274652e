"""Where the pixels of a frame lie in a keyframe, frame after frame away from it."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from gi_kernels import flow_consistency, flow_warp
from gi_model.flow import FlowEstimator
from gi_model.propagation.neighbours import affine_motion
from gi_model.propagation.sampling import Box, bounding_box, look_up

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
# Forward-backward error beyond which a step of the chain is broken: pixels, plus a share of the flow.
BROKEN, BROKEN_SHARE = 1.0, 0.05
# Difference of colour at which visibility has halved: levels, plus a share of the contrast around.
NOISE, CONTRAST = 7.0, 0.25
# Deviation of the windows that colours are compared in, of those that find the shading, and of those in
# which texture is compared.
BLUR, SHADING, TEXTURE = 1.2, 5.0, 3.0
# Deviation of the windows in which corrections are averaged: share of the shorter side.
SMOOTH = 0.012
# Deviation of the windows that a position must go with: share of the shorter side.
WIDE = 0.05
# Correlation of textures at which it counts half that they are the same.
ALIKE = 0.6
# Shading, against that of the whole region, beyond which a pixel shows something else.
SHADED = 2.0
# Largest change of the whole region's brightness from one frame to the next.
BRIGHTENED = 1.25
# Reach around the tracked region that is compared with the keyframe: share of the shorter side, pixels.
MARGIN, MARGIN_AT_LEAST = 0.06, 16
# Distance, as a share of the same side, at which a pixel tells less of the region by a factor e.
NEARBY = 0.1
# Share of the frame that a common motion is found from, if there is as much.
ENOUGH = 0.02
# Deviation from the surroundings' common motion, in pixels, at which it is that of something else.
APART = 3.0
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
    confirmed them. When the whole region is lost, it is searched for by flow from the frame to the
    keyframe itself.

    Args:
        image: the keyframe ``[H,W,3]`` uint8.
        region: ``[H,W]`` bool, what is to be followed.
        estimator: optical flow.

    Attributes:
        positions: ``[H,W,2]`` float32, x first: where each pixel of the present frame lies in the keyframe.
        flow: ``[1,2,H,W]`` float32: the same less the pixel's own position.
        confidence: ``[H,W]`` float32, from 0 to 1: that it lies there, and is seen there.
        shading: ``[H,W,3]`` float32: the present frame's colours over the keyframe's.
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
        self.grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)
        self.flow = torch.zeros(1, 2, height, width)
        self.variance = torch.zeros(1, 1, height, width)
        self.brightness = np.ones(3, np.float32)
        self.shading = np.ones((height, width, 3), np.float32)
        self.confidence = np.ones((height, width), np.float32)
        self.lost_for = 0

    @property
    def positions(self) -> np.ndarray:
        return self.grid + self.flow[0].numpy().transpose(1, 2, 0)

    def advance(self, before: np.ndarray, image: np.ndarray) -> None:
        """Go from the present frame, ``before``, on to its neighbour ``image``; both ``[H,W,3]`` uint8."""
        self._step(before, image)
        self.confidence = self._certainty()
        self.shading = np.broadcast_to(self.brightness, image.shape)
        box = self._box()
        if box is not None:
            self._compare(image, box)
        shown = 0.0 if box is None else float((self.confidence[box] * self.seen[box]).sum())
        lost = shown < LOST * self.area
        if lost and self.lost_for % SEARCH_EVERY == 0:
            lost = not self._search(image)
        self.lost_for = self.lost_for + 1 if lost else 0

    def _step(self, before: np.ndarray, image: np.ndarray) -> None:
        """Compose with the flow to the frame before; continue positions where that is broken."""
        flow, backward = both_ways(self.estimator, image, before)
        error = flow_consistency(flow, backward)
        tolerated = BROKEN + BROKEN_SHARE * flow.norm(dim=1, keepdim=True)
        # Outside the frame samples are zero: what has a share of it is not known.
        ones = torch.ones_like(error)
        seen = torch.from_numpy(self.confidence)[None, None]
        sampled = flow_warp(torch.cat([self.flow, self.variance, seen, ones], dim=1), flow)
        composed, variance = flow + sampled[:, :2], sampled[:, 2:3] + (STEP + STEP_SHARE * error) ** 2
        inside, consistent = sampled[:, 4:] > 0.999, error < tolerated
        belongs = flow_warp(torch.from_numpy(self.surroundings)[None, None], composed)
        known = inside & consistent & (variance < UNKNOWN**2)
        known &= ~_astray(composed, known * sampled[:, 3:4] * belongs, WIDE * min(self.region.shape))
        if not known.all():
            if known.float().mean() < ENOUGH:
                known = inside & consistent
            composed = torch.where(known, composed, _continue(composed, known, sampled[:, 3:4], belongs))
            entered = torch.where(inside, CONTINUED**2, ENTERED**2)
            variance = torch.where(known, variance, entered).clamp(max=CONTINUED**2)
        self.flow, self.variance = composed, variance

    @property
    def seen(self) -> np.ndarray:
        """How much of the region each pixel of the frame shows, by its position: ``[H,W]``, 0 to 1."""
        return self._sampled(self.region)

    def _box(self) -> Box | None:
        """The part of the frame that may show the region, with a margin."""
        shown = self.seen > 0.01
        if not shown.any():
            return None
        return bounding_box(shown, max(MARGIN_AT_LEAST, round(MARGIN * min(shown.shape))))

    def _compare(self, image: np.ndarray, box: Box) -> None:
        """Correct the positions in ``box`` by flow to the keyframe as it should look, and judge them."""
        rows, columns = box
        frame = image[box].astype(np.float32)
        trusted = self._certainty()[box]
        belongs = self._sampled(self.surroundings)[box]
        expected = self._keyframe_at(self.positions[box])
        self._brighten(frame, expected, trusted * belongs)
        difference = self._difference(frame, expected, trusted)[0]
        prior = self.variance[..., rows, columns]

        lit = (expected * self.brightness).round().clip(0, 255).astype(np.uint8)
        flow, backward = both_ways(self.estimator, image[box], lit)
        error = flow_consistency(flow, backward)
        sampled = flow_warp(torch.cat([self.flow[..., rows, columns], torch.ones_like(error)], dim=1), flow)
        change = flow + sampled[:, :2] - self.flow[..., rows, columns]
        usable = sampled[:, 2:] > 0.999
        measured = self._measured(frame, box, change, error, trusted)[0]
        # What the chain lost is smooth: neighbours that agree better know better.
        weight = torch.where(usable, 1 / measured, torch.zeros(()))
        sigma = SMOOTH * min(self.region.shape)
        change = _blurred(change * weight, sigma) / _blurred(weight, sigma).clamp(min=1e-6)
        measured, after = self._measured(frame, box, change, error, trusted)
        usable &= torch.from_numpy(after <= 1.1 * difference + 0.5)[None, None]
        gain = torch.where(usable, prior / (prior + measured), torch.zeros(()))
        self.flow[..., rows, columns] += gain * change
        self.variance[..., rows, columns] = (1 - gain) * prior

        expected = self._keyframe_at(self.positions[box])
        difference, shading = self._difference(frame, expected, trusted)
        self.shading = np.array(np.broadcast_to(self.brightness, image.shape))
        self.shading[box] = shading
        doubt = 1 - agreement(difference, frame, expected, np.zeros_like(trusted))
        self.variance[..., rows, columns] += torch.from_numpy((DOUBT * doubt) ** 2)[None, None]
        seen = agreement(difference, frame, expected, trusted)
        relative = shading.mean(axis=2) / self.brightness.mean()
        seen *= 1 / (1 + (np.log(np.maximum(relative, 1e-3)) / np.log(SHADED)) ** 8)
        confidence = self._certainty()
        confidence[box] *= cv2.GaussianBlur(seen, (0, 0), 1)
        self.confidence = confidence

    def _measured(
        self, frame: np.ndarray, box: Box, change: torch.Tensor, error: torch.Tensor, trusted: np.ndarray
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Variance of positions in ``box`` after a ``change``, and the difference of colours [h,w] there."""
        positions = self.positions[box] + change[0].numpy().transpose(1, 2, 0)
        expected = self._keyframe_at(positions)
        difference, _ = self._difference(frame, expected, trusted)
        agrees = torch.from_numpy(agreement(difference, frame, expected, trusted))[None, None]
        return (MEASURED + error) ** 2 / agrees.clamp(min=1e-4), difference

    def _search(self, image: np.ndarray) -> bool:
        """Whether flow from the frame to the keyframe finds the region; then it is followed from there."""
        flow, backward = both_ways(self.estimator, image, self.image)
        error = flow_consistency(flow, backward)
        positions = self.grid + flow[0].numpy().transpose(1, 2, 0)
        expected = self._keyframe_at(positions)
        frame, nowhere = image.astype(np.float32), np.zeros(image.shape[:2], np.float32)
        difference, _ = self._difference(frame, expected, nowhere)
        seen = agreement(difference, frame, expected, nowhere) * (error[0, 0].numpy() < BROKEN)
        region = cv2.remap(self.region, *coordinates(positions), cv2.INTER_LINEAR)
        if float((region * (seen > 0.5)).sum()) < FOUND * self.area:
            return False
        variance = (MEASURED + error) ** 2
        better = torch.from_numpy(seen > 0.5)[None, None] & (variance < self.variance)
        self.flow = torch.where(better, flow, self.flow)
        self.variance = torch.where(better, variance, self.variance)
        self.confidence = self._certainty()
        box = self._box()
        if box is not None:
            self._compare(image, box)
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
        weight = (0.05 + trusted)[..., None]
        both = np.concatenate([frame * weight, lit * weight], axis=2).reshape(*frame.shape[:2], 2, 3).sum(3)
        means = cv2.GaussianBlur(both, (0, 0), SHADING)
        steady = 12.0 * cv2.GaussianBlur(weight[..., 0], (0, 0), SHADING)  # dark regions have no ratio
        local = (means[..., 0] + steady) / (means[..., 1] + steady)
        granted = (1 + trusted * (local - 1))[..., None]
        difference = np.abs(frame - granted * lit).mean(axis=2)
        return cv2.GaussianBlur(difference, (0, 0), BLUR), granted * self.brightness

    def _keyframe_at(self, positions: np.ndarray) -> np.ndarray:
        return look_up(self.keyframe, *coordinates(positions))

    def _sampled(self, plane: np.ndarray) -> np.ndarray:
        """A map [H,W] of the keyframe on the present frame's grid."""
        return cv2.remap(plane, *coordinates(self.positions), cv2.INTER_LINEAR)

    def _certainty(self) -> np.ndarray:
        """Confidence in positions alone, [H,W]."""
        return (1 / (1 + (self.variance[0, 0] / TOLERATED**2) ** 2)).numpy()


def agreement(
    difference: np.ndarray, frame: np.ndarray, expected: np.ndarray, trusted: np.ndarray
) -> np.ndarray:
    """From 1, where the frame shows what is expected of it, to 0; images ``[h,w,3]``, the others ``[h,w]``.

    A difference of colours says less where the expected image has contrast: a small displacement makes a
    large one. Where positions are not ``trusted``, textures must correlate too.
    """
    grey, other = expected.mean(axis=2), frame.mean(axis=2)
    kernel = np.ones((3, 3), np.uint8)
    contrast = cv2.GaussianBlur(cv2.dilate(grey, kernel) - cv2.erode(grey, kernel), (0, 0), BLUR)
    close = 1 / (1 + (difference / (NOISE + CONTRAST * contrast)) ** 4)
    alike = 1 / (1 + (((1 - _correlation(grey, other)) / (1 - ALIKE)) ** 4))
    return close * (1 - (1 - trusted) * (1 - alike))


def _correlation(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of two images [h,w] in small windows; 1 where both are flat."""

    def mean(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, (0, 0), TEXTURE)

    middle, middle_other = mean(image), mean(other)
    flat = NOISE**2 / 4
    variance = (mean(image**2) - middle**2).clip(0) + flat
    variance_other = (mean(other**2) - middle_other**2).clip(0) + flat
    return (mean(image * other) - middle * middle_other + flat) / np.sqrt(variance * variance_other)


def both_ways(
    estimator: FlowEstimator, first: np.ndarray, second: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow [1,2,H,W] between two images [H,W,3] uint8, there and back."""
    pair = torch.from_numpy(np.ascontiguousarray(np.stack([first, second]).transpose(0, 3, 1, 2)))
    flows = estimator(pair, pair.flip(0))
    return flows[:1], flows[1:]


def _continue(
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
    weight = np.where(valid, together * (1e-3 + near) + 1e-8, 0).astype(np.float32)
    return torch.from_numpy(_spread(rest, weight).transpose(2, 0, 1) + motion)[None]


def _astray(flow: torch.Tensor, weight: torch.Tensor, sigma: float) -> torch.Tensor:
    """Where a flow [1,2,H,W] is not that of its surroundings, though they weigh more than the pixel."""
    around = _blurred(weight, sigma)
    apart = flow - _blurred(flow * weight, sigma) / around.clamp(min=1e-6)
    return (apart.norm(dim=1, keepdim=True) > 2 * APART) & (around > 0.3)


def _blurred(maps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian means of ``[1,C,H,W]``."""
    planes = [cv2.GaussianBlur(plane.numpy(), (0, 0), sigma) for plane in maps[0].contiguous()]
    return torch.from_numpy(np.stack(planes))[None]


def _spread(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Values [H,W,C] where they have weight [H,W], elsewhere means over the nearest that have."""
    total = np.dstack([values * weight[..., None], weight])
    levels = [total]
    while min(levels[-1].shape[:2]) > 2:
        levels.append(cv2.pyrDown(levels[-1]))
    spread = levels[-1]
    for finer in reversed(levels[:-1]):
        coarse = cv2.pyrUp(spread, dstsize=(finer.shape[1], finer.shape[0]))
        # Little: heard only where the finer level says nothing.
        spread = finer + 1e-2 * coarse
    return spread[..., :-1] / np.maximum(spread[..., -1:], 1e-30)


def coordinates(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[h,w,2]`` as x and y ``[h,w]``."""
    return np.ascontiguousarray(positions[..., 0]), np.ascontiguousarray(positions[..., 1])
