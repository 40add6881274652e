"""Propagation without weights: real pixels are carried along optical flow into the mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gi_model.flow import DISFlow, FlowEstimator
from gi_model.propagation.background import Background
from gi_model.propagation.chains import Chains, Link
from gi_model.propagation.finished import Finished
from gi_model.propagation.fusion import Fusion, Sample, fill_along_edges
from gi_model.propagation.neighbours import dilate
from gi_model.propagation.policy import Policy, VisibilityPolicy
from gi_model.propagation.rivals import Rival, settle
from gi_model.propagation.sampling import (
    Box,
    Enlarger,
    bands,
    bounding_box,
    from_levels,
    look_up,
    regions,
    sample_colour,
    to_levels,
)
from gi_model.propagation.stages import Stages
from gi_model.propagation.stream import Stream

# Width of the ring around a hole by which candidates are judged, as a share of the shorter side.
RING = 0.04
# Candidates in one direction after which a pixel is followed no further.
ENOUGH = 4
# Pixels of a hole by which the policy chooses.
SAMPLED = 1000
# Frames at once for which others are searched, each by a thread: as much memory again each.
DRAFTED = 2
# Share of a hole that broken chains must lose before flow is estimated directly.
LOST = 0.1

# The background ``[H,W,3]`` and where it is known ``[H,W]``.
Scenery = tuple[np.ndarray, np.ndarray]


@dataclass
class Draft:
    """A frame with what others show of its hole.

    Attributes:
        image: ``[H,W,3]``.
        missing: ``[H,W]`` bool, what no other frame shows, nor is known to last.
        uncovered: how many pixels no other frame shows.
        undecided: where the camera stands, parts that are shown and yet to be blended, each with its box.
    """

    image: np.ndarray
    missing: np.ndarray
    uncovered: int
    undecided: list[tuple[Box, Fusion]]


class Propagator:
    """Repairs the frames of a clip, each from at most ``radius`` frames before and after it.

    For each masked pixel the flow is followed from frame to frame, as a composition, so that a colour
    is sampled once, from an original frame. Frames that show it are weighed by how well the flow agrees
    with itself on the way and by how well they match the picture around the hole, and blended. Where
    something moves beside the hole otherwise than the scene, both motions are followed. What no frame
    shows is continued from around it in one frame of a block, where most is missing, and carried to the
    others. Pixels outside the mask are returned as they came; those inside are never looked at. Scene
    cuts are found and not crossed.

    Where the camera stands, a background of the whole scene takes part. What is shown before, after and
    lastingly is then not averaged where it differs: one is chosen, as in the nearest finished frames.

    Memory is that of ``2 * radius + policy.block`` frames, and of 12 more where the camera stands, whatever
    the length of the clip. A result depends on the frames and masks alone.

    Example:
        >>> import numpy as np
        >>> clip = [np.full((48, 64, 3), 90, np.uint8) for _ in range(3)]
        >>> masks = [np.zeros((48, 64), bool) for _ in clip]
        >>> masks[1][10:20, 10:20] = True
        >>> clip[1][10:20, 10:20] = 255
        >>> for frame in Propagator(radius=2).run(clip, masks):
        ...     print(frame.shape, frame.max())
        (48, 64, 3) 90
        (48, 64, 3) 90
        (48, 64, 3) 90

    Args:
        estimator: optical flow; OpenCV's DIS by default.
        policy: the choice of keyframes and references; see :class:`VisibilityPolicy`.
        radius: how many frames to look back and ahead.
        flow_side: pixels of the shorter side at which flow is estimated, at most. More is slower, and
            more exact on frames that are larger.

    Attributes:
        masked, unseen: masked pixels so far, and those of them that no frame showed; frames that were
            already finished are not counted.
        stages: seconds spent so far, by stage.
        on_flow: None, or a function that is given the index of a frame and its flow to the next one,
            completed inside the mask, once it is no longer needed: ``[h,w,2]`` float32, in pixels of the
            grid at which flow is estimated. Frames beside which nothing is masked have none.
    """

    def __init__(
        self,
        estimator: FlowEstimator | None = None,
        *,
        policy: Policy | None = None,
        radius: int = 15,
        flow_side: int = 320,
    ) -> None:
        for name, value, least in (("radius", radius, 1), ("flow_side", flow_side, 16)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.estimator = estimator or DISFlow()
        self.policy = policy or VisibilityPolicy()
        self.radius = radius
        self.flow_side = flow_side
        self.masked = self.unseen = 0
        self.stages = Stages()
        self.on_flow: Callable[[int, np.ndarray], None] | None = None

    def run(
        self,
        frames: Iterable[np.ndarray],
        masks: Iterable[np.ndarray],
        *,
        finished: Finished | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield repaired frames in order.

        At most ``radius + policy.block`` frames beyond the one that is yielded are read, and a few more
        where a scene seems to end.

        Args:
            frames: ``[H,W,3]`` uint8 or uint16 RGB images of one size.
            masks: ``[H,W]`` bool, true where a pixel is to be repaired; at least one per frame.
            finished: asked for every frame before it is made, and given it afterwards.

        Raises:
            TypeError: frames of another type.
            ValueError: a mask is missing or of another size than its frame.
        """
        stream = Stream(self.stages.iterate("read", with_masks(frames, masks)), self.flow_side)
        results: dict[int, np.ndarray] = {}  # of the block, and the last one before it
        background = Background()
        with Chains(stream, self.estimator, self.stages) as chains, ThreadPoolExecutor(DRAFTED) as pool:
            for block in self._blocks(stream):
                with self.stages.timed("background"):
                    background.watch(stream, block.start, block.stop + self.radius)
                self._repair(chains, pool, background, block, results, finished)
                for index in block:
                    yield results[index]
                results = {block[-1]: results[block[-1]]}
                self._forget(stream, block.stop - self.radius)
            self._forget(stream)

    def _forget(self, stream: Stream, start: int | None = None) -> None:
        """Drop the frames before ``start``, or all, and tell of their flows."""
        for index, frame in stream.forget(start).items():
            if self.on_flow is not None and frame.flows is not None:
                self.on_flow(index, frame.flows.result().forward[0, :2].permute(1, 2, 0).float().numpy())

    def _blocks(self, stream: Stream) -> Iterator[range]:
        """Frames that are finished together, of one scene, when all that they may need has been read."""
        start = 0
        while True:
            with self.stages.timed("prepare"):
                stream.read(start + self.policy.block)
                if start not in stream:
                    return
                stop = start + 1
                while stop < start + self.policy.block and stream.same_scene(stop - 1, stop):
                    stop += 1
                stream.read(stop + self.radius)
            yield range(start, stop)
            start = stop

    def _repair(
        self,
        chains: Chains,
        pool: ThreadPoolExecutor,
        background: Background,
        block: range,
        results: dict[int, np.ndarray],
        finished: Finished | None,
    ) -> None:
        """Add the frames of a block to ``results``."""
        known: dict[int, np.ndarray] = {}
        if finished is not None:
            known = {i: image for i in block if (image := finished.get(i)) is not None}
        if len(known) == len(block):
            results.update(known)
            return
        chains.prepare(range(block.start - 1, block.stop + self.radius))
        # Those that are known as well: what is missing in them decides which is the keyframe.
        with self.stages.timed("background"):
            holes = np.any([chains.stream[index].mask for index in block], axis=0)
            scenery = background.picture(block.start, dilate(holes, _ring(holes))) if holes.any() else None
        drafts = list(pool.map(lambda index: self._draft(chains, index, scenery), block))
        for place in self.policy.order([draft.uncovered for draft in drafts]):
            index, draft = block[place], drafts[place]
            if index in known:
                results[index] = known[index]
                continue
            self.masked += int(chains.stream[index].mask.sum())
            self.unseen += int(draft.missing.sum())
            with self.stages.timed("fusion"):
                self._decide(chains, index, draft, results)
            results[index] = self._complete(chains, index, draft.image, draft.missing, results)
            if finished is not None:
                finished.put(index, results[index])

    def _draft(self, chains: Chains, index: int, scenery: Scenery | None) -> Draft:
        """What others show of the hole of a frame."""
        frame = chains.stream[index]
        if not frame.mask.any():
            return Draft(frame.image, frame.mask, 0, [])
        draft = Draft(frame.image.copy(), frame.mask.copy(), 0, [])
        ring = _ring(frame.mask)
        for box, hole in regions(frame.mask, ring):
            around = dilate(hole, ring) & (frame.visible[box] > 0)
            enlarger = Enlarger(box, frame.mask.shape, frame.small_mask.shape)
            with self.stages.timed("chains"):
                ways = self._choose(chains, index, enlarger.small_box, enlarger.shrink(hole))
            with self.stages.timed("fusion"):
                if scenery is None and len(ways) > 1:
                    rivals = [Rival(to_levels(frame.image[box]), hole, around, ring) for _ in ways]
                    for rival, links in zip(rivals, ways, strict=True):
                        _collect(chains, index, rival, links, enlarger)
                    colour, seen = settle(rivals, ~hole & (frame.visible[box] > 0))
                    draft.image[box][seen] = from_levels(colour[seen], frame.image.dtype)
                    draft.missing[box] &= ~seen
                    draft.uncovered += int((hole & ~seen).sum())
                    continue
                fusion = Fusion(to_levels(frame.image[box]), hole, around, ring)
                if scenery is not None:
                    fusion.add_lasting(to_levels(scenery[0][box]), scenery[1][box])
                    draft.undecided.append((box, fusion))
                _collect(chains, index, fusion, ways[0], enlarger)
                if scenery is None:
                    _put(fusion, draft.image[box])
                draft.missing[box] &= ~fusion.seen
                draft.uncovered += int((hole & ~fusion.covered).sum())
        return draft

    def _decide(self, chains: Chains, index: int, draft: Draft, results: Mapping[int, np.ndarray]) -> None:
        """Blend what is undecided, like the nearest finished frames before and after."""
        scene = sorted(other for other in results if chains.stream.same_scene(index, other))
        near = [o for o in scene if o < index][-1:] + [o for o in scene if o > index][:1]
        for box, fusion in draft.undecided:
            finished = [(results[other][box], abs(other - index)) for other in near]
            _put(fusion, draft.image[box], finished)
        draft.undecided.clear()

    def _choose(self, chains: Chains, index: int, box: Box, hole: np.ndarray) -> list[list[Link]]:
        """Links to the frames from which ``hole`` is filled, on a box of the flow's grid.

        One list for what moves with the scene, and where something else moves beside the hole, one for that.
        """
        links = self._follow(chains, index, box, hole)
        lost = hole & ~np.any([link.trusted for link in links], axis=0) if links else hole
        others = _recoverable(index, links, lost, LOST * hole.sum())
        ways = [self._referred(index, links, hole) + [chains.direct(index, box, other) for other in others]]
        if chains.passed(index, box, hole):
            ways.append(self._referred(index, self._follow(chains, index, box, hole, beside=True), hole))
        return ways

    def _follow(
        self, chains: Chains, index: int, box: Box, hole: np.ndarray, beside: bool = False
    ) -> list[Link]:
        """Links ahead and back."""
        return [
            link
            for step in (1, -1)
            for link in chains.follow(index, box, hole, step, self.radius, ENOUGH, beside)
        ]

    def _referred(self, index: int, links: list[Link], hole: np.ndarray) -> list[Link]:
        """Those links that the policy chooses."""
        every = 1 + int(hole.sum()) // SAMPLED
        chosen = set(
            self.policy.references(index, {link.index: link.weight[hole][::every] for link in links})
        )
        return [link for link in links if link.index in chosen]

    def _complete(
        self,
        chains: Chains,
        index: int,
        image: np.ndarray,
        missing: np.ndarray,
        results: dict[int, np.ndarray],
    ) -> np.ndarray:
        """``image`` with what is missing carried from finished frames, and the rest filled from itself."""
        near = sorted(
            (abs(other - index), other) for other in results if chains.stream.same_scene(index, other)
        )
        for _, other in near:
            if missing.any():
                image, missing = self._carry(chains, index, image, missing, other, results[other])
        with self.stages.timed("fill"):
            return fill_along_edges(image, missing)

    def _carry(
        self,
        chains: Chains,
        index: int,
        image: np.ndarray,
        missing: np.ndarray,
        other: int,
        source: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """``image`` with what is missing taken from the finished frame ``other``, and what that lacks."""
        ring = _ring(missing)
        box = bounding_box(missing, ring)
        enlarger = Enlarger(box, missing.shape, chains.stream[index].small_mask.shape)
        step, reach = (1 if other > index else -1), abs(other - index)
        with self.stages.timed("chains"):
            hole = enlarger.shrink(missing[box])
            links = chains.follow(index, enlarger.small_box, hole, step, reach, reach + 1)
        if len(links) < reach:
            return image, missing
        with self.stages.timed("fusion"):
            hole = missing[box]
            fusion = Fusion(to_levels(image[box]), hole, dilate(hole, ring) & ~hole, ring)
            everywhere = np.full(missing.shape, 255, np.uint8)
            _add(fusion, source, everywhere, links[-1], links[-1].whole.astype(np.float32), enlarger)
            colour, taken = fusion.blend()
            image, missing = image.copy(), missing.copy()
            image[box][taken] = from_levels(colour[taken], image.dtype)
            missing[box] &= ~taken
        return image, missing


def _ring(mask: np.ndarray) -> int:
    """Width in pixels of the ring around a hole."""
    return max(4, round(RING * min(mask.shape)))


def _collect(chains: Chains, index: int, fusion: Fusion, links: Iterable[Link], enlarger: Enlarger) -> None:
    """Add what the frames of ``links`` show of the hole of a frame."""
    for link in links:
        other = chains.stream[link.index]
        _add(fusion, other.image, other.visible, link, link.weight, enlarger, link.index - index)


def _add(
    fusion: Fusion,
    image: np.ndarray,
    visible: np.ndarray,
    link: Link,
    weight: np.ndarray,
    enlarger: Enlarger,
    distance: int = 0,
) -> None:
    """Add what an image shows of the hole where it is visible; the weight lies on the grid of the flow."""
    flow = link.flow.contiguous(memory_format=torch.channels_last)  # as it is looked up, more than once

    def look(where: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x, y = enlarger.positions(flow, where)
        return x, y, (look_up(visible, x, y, sharp=False) == 255) & enlarger.inside(x, y)

    weight = np.where(fusion.hole, enlarger.map(weight), 0)
    if not (weight > 0).any():
        return
    x, y, shown = look(fusion.points)
    gain, error = fusion.judge(to_levels(look_up(image, x, y)), shown)
    share = fusion.share(weight, error)
    for part in bands(share > 0):
        x, y, shown = look(part)
        shown &= share[part] > 0
        if shown.any():
            x, y = (np.where(shown, position, position[shown][0]) for position in (x, y))
            colour = sample_colour(image, x, y) * gain
            fusion.add(Sample(part, colour, weight[part], share[part], shown, distance))


def _put(fusion: Fusion, image: np.ndarray, finished: Sequence[tuple[np.ndarray, int]] = ()) -> None:
    """Blend into ``image``, a box of the frame."""
    colour, seen = fusion.blend(finished)
    image[seen] = from_levels(colour[seen], image.dtype)


def _recoverable(index: int, links: list[Link], lost: np.ndarray, least: float) -> list[int]:
    """On either side the frame that shows most of what broken chains lost, if it is enough."""
    found = []
    for side in (1, -1):
        distant = [link for link in links if (link.index - index) * side > 1]
        shows = [int((link.shown & lost).sum()) for link in distant]
        if shows and max(shows) > least:
            found.append(distant[int(np.argmax(shows))].index)
    return found


def with_masks(
    frames: Iterable[np.ndarray], masks: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Frames with their masks; raise ``ValueError`` where one is missing or of another size."""
    remaining = iter(masks)
    for index, image in enumerate(frames):
        if image.dtype not in (np.uint8, np.uint16):
            raise TypeError(f"frames: expected uint8 or uint16, got {image.dtype} at frame {index}")
        mask = next(remaining, None)
        if mask is None:
            raise ValueError(f"masks: expected one for every frame, got {index}")
        if mask.shape != image.shape[:2]:
            raise ValueError(
                f"masks: expected {image.shape[1]}x{image.shape[0]} pixels like the frames, "
                f"got {mask.shape[1]}x{mask.shape[0]} at frame {index}"
            )
        yield image, mask
