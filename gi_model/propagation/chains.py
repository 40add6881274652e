"""Following flow from frame to frame: where others show the pixels of a hole."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from gi_model.flow import FlowEstimator
from gi_model.propagation.neighbours import Flows, connect
from gi_model.propagation.sampling import Box, sample_maps
from gi_model.propagation.stages import Stages
from gi_model.propagation.stream import Frame, Stream

# Accumulated forward-backward error, in pixels of the flow's grid, at which trust has halved.
ERROR_SCALE = 0.5
# Accumulated error, in the same pixels, from which on flow is sought that avoids the way, and from which on
# what is found on it is not used at all.
ERROR_DOUBT, ERROR_LIMIT = 1.5, 10.0
# Difference in the same pixels between two motions of what is hidden, from which on both are followed.
RIVALS = 0.5
# Frames behind the first one that shows a pixel at which another one's weight has halved.
NEARNESS = 1.0


@dataclass
class Link:
    """Where the pixels of a box lie in another frame, on the grid of the flow.

    Attributes:
        index: the other frame.
        flow: ``[1,2,h,w]`` float32, in pixels of that grid.
        error: ``[h,w]`` float32, in the same pixels; infinite where the way left the frame.
        shown: ``[h,w]`` bool: inside the frame and not hidden by its mask.
        nearness: ``[h,w]`` float32: 1 in the first frame on the way that shows a pixel, then falling.
    """

    index: int
    flow: torch.Tensor
    error: np.ndarray
    shown: np.ndarray
    nearness: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        """``[h,w]`` bool: where the chain is not broken."""
        return self.error < ERROR_LIMIT

    @property
    def trusted(self) -> np.ndarray:
        """``[h,w]`` bool: shown, and certain to be the same point."""
        return self.shown & (self.error < ERROR_DOUBT)

    @property
    def weight(self) -> np.ndarray:
        """``[h,w]`` float32: 1 where flows agree and nothing nearer shows the pixel, 0 if this does not."""
        weight = self.nearness / (1 + (self.error / ERROR_SCALE) ** 2)
        return np.where(self.shown & self.whole, weight, 0).astype(np.float32)


class Chains:
    """Flows between the frames of a stream, and their compositions.

    Flows are estimated by a thread of their own, one after the other, while others are made use of. Several
    threads may follow chains. To be used in a ``with`` block, which ends the thread.
    """

    def __init__(self, stream: Stream, estimator: FlowEstimator, stages: Stages) -> None:
        self.stream = stream
        self._estimator = estimator
        self._stages = stages
        self._thread = ThreadPoolExecutor(1)
        self._lock = threading.Lock()  # flows between neighbours are asked for once

    def __enter__(self) -> Chains:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def prepare(self, indices: Iterable[int]) -> None:
        """Begin to estimate the flows between neighbours that will be needed: those beside a hole."""
        for index in indices:
            if self.stream.same_scene(index, index + 1):
                first, second = self.stream[index], self.stream[index + 1]
                if first.mask.any() or second.mask.any():
                    self._neighbours(first, second)

    def passed(self, target: int, box: Box, hole: np.ndarray) -> bool:
        """Whether what is beside ``hole`` ``[h,w]`` and may reach into it moves otherwise than the scene."""
        for other in (target + 1, target - 1):
            if self.stream.same_scene(target, other):
                scene, beside = (self._between(target, other, which) for which in (False, True))
                if scene is not beside:
                    apart = (beside - scene)[0, :2, box[0], box[1]].abs().amax(dim=0)
                    if (apart.numpy()[hole] > RIVALS).any():
                        return True
        return False

    def follow(
        self,
        target: int,
        box: Box,
        hole: np.ndarray,
        step: int,
        reach: int,
        enough: int,
        beside: bool = False,
    ) -> list[Link]:
        """Links from ``target`` to the frames before it (``step`` -1) or after it (1), the nearest first.

        Flows are composed, so that a colour is sampled once, from an original frame. It goes on for
        ``reach`` frames of the scene, or until every pixel of ``hole`` ``[h,w]``, on ``box``, has left
        the frame or was seen ``enough`` times. What is hidden moves with the scene, or like what is
        ``beside`` it.
        """
        flow = torch.zeros(1, 2, *hole.shape)
        error = torch.zeros(1, 1, *hole.shape)
        seen = np.zeros(hole.shape, np.int32)
        since = np.full(hole.shape, -1, np.int32)  # frames since a pixel was seen first
        nearness = 1 / (1 + (np.arange(reach + 1) / NEARNESS) ** 2)
        links: list[Link] = []
        onward: torch.Tensor | None = None
        last = target + step * (reach - 1)
        for index in range(target, target + step * reach, step):
            here = hole & np.isfinite(error[0, 0].numpy())
            if not (here & (seen < enough)).any() or not self.stream.same_scene(index, index + step):
                break
            if onward is None:
                onward = sample_maps([self._between(index, index + step, beside)], flow, box)
            flow, error = (
                torch.from_numpy(total.numpy() + more.numpy())
                for total, more in ((flow, onward[:, :2]), (error, onward[:, 2:]))
            )
            ahead = None if index == last else self._at_hand(index + step, index + 2 * step, beside)
            link, onward = self._link(index + step, flow, error, box, ahead)
            error = torch.from_numpy(link.error)[None, None]
            shows = link.shown & link.whole
            since += since >= 0
            since += (since < 0) & shows
            link.nearness = nearness.take(since, mode="clip")  # 1 where none has shown it
            seen += shows
            links.append(link)
        return links

    def direct(self, target: int, box: Box, other: int) -> Link:
        """A link to ``other`` by flow between the two frames alone."""
        flow, error = self._between(target, other)[..., box[0], box[1]].float().split([2, 1], dim=1)
        return self._link(other, flow, error, box)[0]

    def _link(
        self, index: int, flow: torch.Tensor, error: torch.Tensor, box: Box, ahead: torch.Tensor | None = None
    ) -> tuple[Link, torch.Tensor | None]:
        """A link to the frame ``index``, and samples of the maps ``ahead`` that lie on its grid, if any."""
        height, width = self.stream[index].small_mask.shape
        columns, rows = (np.arange(side.start, side.stop, dtype=np.float32) for side in box[::-1])
        x, y = columns + flow[0, 0].numpy(), rows[:, None] + flow[0, 1].numpy()
        inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)  # NaN is not
        # No mixtures of visible and hidden pixels.
        maps = [self.stream[index].small_visible] + ([] if ahead is None else [ahead])
        sampled = sample_maps(maps, flow, box)
        shown = inside & (sampled[0, 0].numpy() > 0.999)
        missed = error[0, 0].numpy()
        missed = np.where(inside & ~np.isnan(missed), missed, np.float32(np.inf))
        link = Link(index, flow, missed, shown, np.ones(shown.shape, np.float32))
        return link, None if ahead is None else sampled[:, 1:]

    def _between(self, index: int, other: int, beside: bool = False) -> torch.Tensor:
        """Flow and error ``[1,3,h,w]`` from a frame to another; those between neighbours are kept."""
        first, second = self.stream[min(index, other)], self.stream[max(index, other)]
        if abs(index - other) > 1:
            flows = self._submit("direct flow", first, second)
        else:
            flows = self._neighbours(first, second)
        with self._stages.timed("wait for flow"):
            found = flows.result()
        if beside:
            found = found.beside or found
        return found.forward if other > index else found.backward

    def _at_hand(self, index: int, other: int, beside: bool) -> torch.Tensor | None:
        """Flow and error between neighbours if they have been estimated: none are asked for or waited for."""
        flows = self.stream[min(index, other)].flows if self.stream.same_scene(index, other) else None
        return self._between(index, other, beside) if flows is not None and flows.done() else None

    def _neighbours(self, first: Frame, second: Frame) -> Future[Flows]:
        with self._lock:
            if first.flows is None:
                first.flows = self._submit("flow", first, second)
            return first.flows

    def _submit(self, stage: str, first: Frame, second: Frame) -> Future[Flows]:
        images, masks = (first.small, second.small), (first.small_mask, second.small_mask)

        def estimate() -> Flows:
            started = time.perf_counter()
            flows = connect(self._estimator, images, masks)
            self._stages.add(stage, time.perf_counter() - started)
            return flows

        return self._thread.submit(estimate)
