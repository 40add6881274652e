"""What lies behind everything that moves, where the camera stands."""

from __future__ import annotations

from itertools import combinations

import cv2
import numpy as np
import torch

from gi_model.flow import DISFlow
from gi_model.propagation.fusion import APART
from gi_model.propagation.neighbours import camera_motion
from gi_model.propagation.sampling import shrink, to_bytes
from gi_model.propagation.stream import Frame, Stream

# Every so many frames one is looked at, and so many of the last visible colours of a pixel are kept: what
# stands at a place for less than half of them is no background. Fewer than the least tell nothing.
EVERY, KEPT, LEAST = 4, 12, 3
# Motion of the camera, in pixels of the flow's grid at its corners, below which it stands, and the shorter
# side at which it is measured.
RESTING, SIDE = 0.3, 80


class Background:
    """The last colours that each pixel has shown, as long as the camera stands.

    A colour counts however long ago it was seen, so a hole that stays long at one place is filled from
    frames far away, at a constant cost of memory: that of ``KEPT`` frames. It depends on the frames and
    masks alone, in their order.
    """

    def __init__(self) -> None:
        self._estimator = DISFlow()  # of its own: another one may be at work in another thread
        self._scene = -1
        self._next = 0  # the frame that is to be looked at next
        self._since = 0  # when the camera began to stand
        self._first: Frame | None = None  # the frame then
        self._colours: np.ndarray | None = None  # [KEPT,H,W,3]
        self._count: np.ndarray | None = None  # [H,W]: how often a pixel was visible

    def watch(self, stream: Stream, start: int, stop: int) -> None:
        """Look at the frames before ``stop`` that are of the scene of ``start``, and were not yet seen."""
        if stream[start].scene != self._scene:
            self._scene, self._next, self._first = stream[start].scene, start, None
            self._colours = self._count = None
        while self._next < stop and stream.same_scene(start, self._next):
            self._see(self._next, stream[self._next])
            self._next += EVERY

    def picture(self, start: int, where: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The colours ``[H,W,3]`` that prevail, and whether enough were seen to tell ``[H,W]`` bool.

        Zeros but ``where`` ``[H,W]``; None if the camera does not stand since frame ``start`` or longer.
        """
        if self._colours is None or self._count is None or self._since > start:
            return None
        image, known = np.zeros_like(self._colours[0]), np.zeros(where.shape, bool)
        number = np.minimum(self._count[where], KEPT)
        image[where] = prevailing(self._colours[:, where], number)
        known[where] = number >= LEAST
        return image, known

    def _see(self, index: int, frame: Frame) -> None:
        if self._first is not None and rests(self._estimator, self._first, frame):
            if self._colours is None:
                self._begin(self._first)
            self._keep(frame)
        else:
            self._since, self._first, self._colours, self._count = index, frame, None, None

    def _begin(self, frame: Frame) -> None:
        self._colours = np.empty((KEPT, *frame.image.shape), frame.image.dtype)
        self._count = np.zeros(frame.mask.shape, np.uint32)
        self._keep(frame)

    def _keep(self, frame: Frame) -> None:
        assert self._colours is not None and self._count is not None
        visible = frame.visible > 0
        turn = self._count % KEPT
        for place in np.flatnonzero(np.bincount(turn.ravel(), minlength=KEPT)):
            np.copyto(self._colours[place], frame.image, where=(visible & (turn == place))[..., None])
        self._count += visible


def prevailing(colours: np.ndarray, number: np.ndarray) -> np.ndarray:
    """What most of the first ``number`` ``[N]`` of colours ``[K,N,3]`` uint8 or uint16 are like, ``[N,3]``.

    The mean of those that differ by less than ``APART`` from the one that has the least sum of differences
    from the others, none counted for more than that. So of two things that were seen equally often, the one
    that rests is taken.
    """
    planes = np.ascontiguousarray(colours.transpose(0, 2, 1))  # [K,3,N]
    levels, most = to_bytes(planes), np.uint8(APART)
    given = np.arange(len(planes))[:, None] < number  # [K,N]
    unlike = np.zeros(given.shape, np.uint16)
    for i, j in combinations(range(len(planes)), 2):
        difference = np.minimum(cv2.absdiff(levels[i], levels[j]).max(axis=0), most)
        unlike[i] += difference * given[j]
        unlike[j] += difference * given[i]
    best = np.where(given, unlike, np.iinfo(np.uint16).max).argmin(axis=0)
    centre = np.take_along_axis(levels, best[None, None], axis=0)[0]
    total, count = np.zeros(centre.shape, np.float32), np.zeros(number.shape, np.float32)
    for plane, level, one in zip(planes, levels, given, strict=True):
        like = one & (cv2.absdiff(level, centre).max(axis=0) < most)
        total += np.where(like, plane, 0)
        count += like
    return (total / np.maximum(count, 1)).round().astype(colours.dtype).T


def rests(estimator: DISFlow, first: Frame, second: Frame) -> bool:
    """Whether the camera stands the same in two frames, apart from their masks, however much has moved."""
    small = torch.from_numpy(np.stack([shrink(frame.small, SIDE) for frame in (first, second)]))
    pair = small.permute(0, 3, 1, 2).contiguous()
    hidden = shrink((first.small_mask | second.small_mask).astype(np.float32), SIDE) > 0
    flow = estimator(pair[:1], pair[1:])[0].numpy()
    return camera_motion(flow, ~hidden) * first.small_mask.shape[0] / len(hidden) < RESTING
