"""Propagation with weights: the two-stream generator fills the mask from frames around it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch

from gi_kernels import flow_consistency
from gi_model.errors import InputError
from gi_model.flow import DISFlow, FlowEstimator, Stage
from gi_model.generator import CrossingGenerator
from gi_model.inpainting import inpaint_frame
from gi_model.propagation.cuts import Thumbnail, same_scene, thumbnail
from gi_model.propagation.engine import with_masks
from gi_model.propagation.finished import Finished
from gi_model.propagation.fusion import RIM, rim_correction
from gi_model.propagation.membrane import membrane
from gi_model.propagation.neighbours import dilate
from gi_model.propagation.policy import Policy, VisibilityPolicy
from gi_model.propagation.sampling import Box, bounding_box, from_levels, look_up, shrink, to_bytes, to_levels
from gi_model.propagation.stages import Stages
from gi_model.propagation.tiles import ReferenceCache, Region, Tile, crop_flow, plan, windows_of
from gi_model.references import References

# Shorter side, in pixels, at which it is looked up where other frames show a hole.
OVERVIEW = 96
# Forward-backward error, in pixels of that size, at which a frame counts half as showing a place.
LOOSE = 1.0


class LearnedPropagator:
    """Fills masked frames in order by a generator, with the frames around each as references.

    **References.** Of at most ``radius`` frames back and ahead in the same scene, ``policy`` chooses by
    how well each shows what is to be filled. That is looked up along flow between neighbours, estimated
    at a small size and composed. Where no frame shows anything, the nearest serve.

    **Tiles.** A frame with sides of at least ``size`` pixels is filled in squares of that size at full
    resolution, where the generator sees what it was trained on. A part of the mask that fits into a tile
    with ``context`` pixels around it gets one tile. A larger part is first filled at reduced scale, the
    whole frame at once, then in overlapping tiles, blended smoothly: where the hole goes on beyond a
    tile, the tile's outer ``context`` pixels are given from that first pass instead of being masked, so
    that neighbouring tiles continue the same content. Tiles that do not touch the mask are not computed.
    A reference's tile is the one to which the flow leads, rounded to ``context``. Flow is estimated once
    for the whole frame, at the stage's resolution, and cut out. Smaller frames are filled as a whole: the
    shorter side is scaled to at most ``size``, both sides to multiples of the generator's step.

    **Composite.** Only masked pixels change. The step that remains to the frame at the mask's rim is
    spread smoothly into it (a membrane), so nothing of what the mask hides is needed for a soft border.

    Memory is that of ``2 * radius + 1`` frames, what the flow stage keeps of each, and ``cache`` bytes of
    encoded references, whatever the length of the clip. A frame is encoded once per place of a tile while
    it is in the cache; the result does not depend on what is kept.

    Args:
        generator: in eval mode, or a copy ``for_inference``.
        stage: flow and error from a target to its references.
        radius: how many frames to look back and ahead.
        references: how many of them serve as references, at most.
        size: pixels of the shorter side, at most, and of tiles; generators were trained at 256.
        policy: chooses references; :class:`VisibilityPolicy` by default. Its ``order`` is not asked for:
            references are frames as they came, never finished ones, so frames may be filled in any order,
            and are in that in which they are yielded.
        tiled: whether large frames are filled in tiles; otherwise all are scaled.
        context: pixels around a hole that a tile shows at least; an eighth of a tile by default.
        cache: bytes of encoded references to keep, at most.
        estimator: flow for the choice of references; OpenCV's DIS by default.

    Attributes:
        masked, unseen: masked pixels so far, and those of them in frames without any reference, which
            are inpainted.
        stages: seconds spent so far, by stage.
        encoded: the cache of references, with its bytes, hits and misses.
    """

    def __init__(
        self,
        generator: CrossingGenerator,
        stage: Stage,
        radius: int = 15,
        references: int = 4,
        size: int = 256,
        *,
        policy: Policy | None = None,
        tiled: bool = True,
        context: int | None = None,
        cache: int = 512 << 20,
        estimator: FlowEstimator | None = None,
    ) -> None:
        for name, value in (("radius", radius), ("references", references), ("cache", cache)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.step = 2**generator.downsamplings
        if size < 2 * self.step:
            raise ValueError(f"size: expected at least {2 * self.step}, got {size}")
        self.tile = size // self.step * self.step
        self.context = max(1, self.tile // 8) if context is None else context
        if not 1 <= self.context <= self.tile // 4:
            raise ValueError(f"context: expected 1 to {self.tile // 4}, got {context}")
        if generator.training:
            raise ValueError("generator: expected eval mode, got training mode")
        self.generator, self.stage = generator, stage
        self.radius, self.references, self.size = radius, references, size
        self.policy = policy or VisibilityPolicy(limit=references)
        self.tiled = tiled
        self.encoded = ReferenceCache(cache)
        self.estimator = estimator or DISFlow()
        self.masked = self.unseen = 0
        self.stages = Stages()

    @torch.no_grad()
    def run(
        self,
        frames: Iterable[np.ndarray],
        masks: Iterable[np.ndarray],
        *,
        finished: Finished | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield repaired frames in order.

        Args:
            frames: ``[H,W,3]`` RGB images of one size, uint8 or uint16.
            masks: ``[H,W]`` bool, true where a pixel is to be repaired; at least one per frame.
            finished: asked for every frame before it is made, and given it afterwards.

        Raises:
            ValueError: a mask is missing or of another size than its frame.
            TypeError: frames of another dtype.
        """
        self.encoded.clear()
        read = self.stages.iterate("read", with_masks(frames, masks))
        prepared = (_Frame(index, image, mask) for index, (image, mask) in enumerate(read))
        for window, centre in _windows(prepared, self.radius):
            index = window[centre].index
            result = finished.get(index) if finished is not None else None
            if result is None:
                result = self._repair(window, centre)
                if finished is not None:
                    finished.put(index, result)
            yield result

    def _repair(self, window: deque[_Frame], centre: int) -> np.ndarray:
        frame = window[centre]
        if not frame.mask.any():
            return frame.image
        self.masked += int(frame.mask.sum())
        with self.stages.timed("choose"):
            chosen = self._choose(window, centre)
        if not chosen:
            self.unseen += int(frame.mask.sum())
            return inpaint_frame(frame.image, frame.mask)
        with self.stages.timed("flow"):
            flows, errors = self.stage(self._for_flow(frame), [self._for_flow(f) for f in chosen])
        filling = _Filling(self, frame, chosen, flows, errors)
        if self.tiled and min(frame.mask.shape) >= self.tile:
            return filling.in_tiles()
        return filling.at_once()

    def _choose(self, window: deque[_Frame], centre: int) -> list[_Frame]:
        """The references of a frame, the best first."""
        shown = self._shown(window, centre)
        chosen = self.policy.references(window[centre].index, shown)
        if not chosen:
            target = window[centre].index
            chosen = sorted(shown, key=lambda index: abs(index - target))
        first = window[0].index
        return [window[index - first] for index in chosen[: self.references]]

    def _shown(self, window: deque[_Frame], centre: int) -> dict[int, np.ndarray]:
        """For every frame of the scene, how well it shows each pixel ``[N]`` of the hole."""
        hole = window[centre].overview_mask
        height, width = hole.shape
        x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
        shown = {}
        for step in (1, -1):
            at_x, at_y = x, y
            trust: np.ndarray = np.ones_like(x)
            reach = min(self.radius, len(window) - 1 - centre if step > 0 else centre)
            for place in range(centre, centre + step * reach, step):
                frame, other = window[place], window[place + step]
                if not same_scene(frame.seen, other.seen):
                    break
                flow = look_up(self._onward(frame, other), at_x, at_y, sharp=False)
                at_x, at_y = at_x + flow[..., 0], at_y + flow[..., 1]
                trust = trust / (1 + (flow[..., 2] / LOOSE) ** 2)
                inside = (at_x >= 0) & (at_x <= width - 1) & (at_y >= 0) & (at_y <= height - 1)
                hidden = look_up(other.overview_mask.astype(np.float32), at_x, at_y, sharp=False)
                shown[other.index] = np.where(inside, trust * (1 - hidden), 0)[hole].astype(np.float32)
        return shown

    def _onward(self, frame: _Frame, other: _Frame) -> np.ndarray:
        """Flow and its error ``[h,w,3]`` to a neighbour, at the overview's size."""
        if other.index not in frame.onward:
            pair = torch.from_numpy(np.stack([frame.overview, other.overview]).transpose(0, 3, 1, 2).copy())
            flows = self.estimator(pair, pair.flip(0))
            error = flow_consistency(flows, flows.flip(0))
            both = torch.cat([flows, error], dim=1).permute(0, 2, 3, 1).contiguous().numpy()
            frame.onward[other.index], other.onward[frame.index] = both
        return frame.onward[other.index]

    def _for_flow(self, frame: _Frame) -> Any:
        """What the flow stage makes of a frame; the hole is inpainted, its content must not matter."""
        if frame.for_flow is None:
            colours = self._small(inpaint_frame(to_bytes(frame.image), frame.mask))
            frame.for_flow = self.stage.encode(_rgba(colours, self._small_mask(frame), blank=False))
        return frame.for_flow

    def _blanked(self, frame: _Frame) -> torch.Tensor:
        """The whole frame at the generator's size; what the hole has a share in is blanked."""
        return _rgba(self._small(frame.image), self._small_mask(frame))

    def _small(self, image: np.ndarray) -> np.ndarray:
        height, width = self._size(image)
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)

    def _small_mask(self, frame: _Frame) -> np.ndarray:
        """Everything that a masked pixel has a share in."""
        if frame.small_mask is None:
            frame.small_mask = self._small(frame.mask.astype(np.float32)) > 0
        return frame.small_mask

    def _size(self, image: np.ndarray) -> tuple[int, int]:
        scale = min(1.0, self.size / min(image.shape[:2]))
        height, width = (max(2, round(n * scale / self.step)) * self.step for n in image.shape[:2])
        return height, width


class _Frame:
    """A frame in the window, and what has been made of it."""

    def __init__(self, index: int, image: np.ndarray, mask: np.ndarray) -> None:
        self.index, self.image, self.mask = index, image, mask
        colours = to_bytes(image)
        self.seen: Thumbnail = thumbnail(colours, mask)
        self.overview_mask = shrink(mask.astype(np.float32), OVERVIEW) > 0
        filled = membrane(shrink(colours, OVERVIEW).astype(np.float32), ~self.overview_mask)
        self.overview = filled.round().clip(0, 255).astype(np.uint8)
        self.onward: dict[int, np.ndarray] = {}  # by the index of a neighbour
        # Made when they are first needed.
        self.small_mask: np.ndarray | None = None
        self.for_flow: Any = None


@dataclass
class _Filling:
    """A frame that is being filled from chosen references, with flows to them ``[1,T,C,h,w]``."""

    owner: LearnedPropagator
    frame: _Frame
    chosen: list[_Frame]
    flows: torch.Tensor
    errors: torch.Tensor

    def at_once(self) -> np.ndarray:
        """The frame, filled as a whole at the generator's size."""
        filled = self._scaled()
        box = bounding_box(self.frame.mask, self.owner.context)
        image = self.frame.image.copy()
        self._put(image, self.frame.mask, box, filled[box], np.ones(filled[box].shape[:2], bool))
        return image

    def in_tiles(self) -> np.ndarray:
        """The frame, filled region by region in tiles at full resolution."""
        owner, mask = self.owner, self.frame.mask
        image = self.frame.image.copy()
        guide = None
        for region in plan(mask, owner.tile, owner.context):
            if guide is None and not region.whole:
                guide = self._scaled()
            box = bounding_box(region.hole, owner.context)
            filled = np.zeros((*region.hole[box].shape, 3), np.float32)
            known = np.zeros(filled.shape[:2], bool)
            for tile, window in zip(region.tiles, windows_of(region.tiles, 2 * owner.context), strict=True):
                out = self._tile(region, tile, guide)
                here, there = _shared(box, tile)
                filled[here] += (window[..., None] * out)[there]
                known[here] = True
            self._put(image, region.hole, box, filled, known)
        return image

    def _tile(self, region: Region, tile: Tile, guide: np.ndarray | None) -> np.ndarray:
        """What the generator makes of a tile: ``[size,size,3]`` float32, in levels of 255."""
        owner, frame = self.owner, self.frame
        colours, mask = frame.image[tile.box], frame.mask[tile.box]
        given = region.outer(tile, owner.context)
        if given.any():
            assert guide is not None
            colours = np.where(given[..., None], from_levels(guide[tile.box], frame.image.dtype), colours)
            mask = mask & ~given
        size = frame.mask.shape
        with owner.stages.timed("flow"):
            flows = crop_flow(self.flows, size, tile).clone()
            errors = crop_flow(self.errors, size, tile)
        parts = []
        hole = torch.from_numpy(frame.mask[tile.box])
        for t, reference in enumerate(self.chosen):
            seen, moved = self._reference_tile(tile, flows[0, t][:, hole])
            flows[0, t] -= torch.tensor(moved, dtype=flows.dtype)[:, None, None]
            parts.append(self._encoded(reference, seen))
        return self._generate(_rgba(colours, mask), References.join(parts), flows, errors)

    def _reference_tile(self, tile: Tile, flow: torch.Tensor) -> tuple[Tile, tuple[int, int]]:
        """The tile to which most of the hole's flow ``[2,N]`` leads, and its offset, x first."""
        offsets = []
        for start, along, length in zip(
            (tile.left, tile.top), flow, reversed(self.frame.mask.shape), strict=True
        ):
            finite = along[torch.isfinite(along)]
            median = float(finite.median()) if len(finite) else 0.0
            step = self.owner.context
            offsets.append(min(max(0, start + step * round(median / step)), length - tile.size) - start)
        return Tile(tile.top + offsets[1], tile.left + offsets[0], tile.size), (offsets[0], offsets[1])

    def _encoded(self, reference: _Frame, tile: Tile | None) -> References:
        """A reference's tile, or the whole frame at the generator's size."""

        def encode() -> References:
            if tile is None:
                rgba = self.owner._blanked(reference)
            else:
                rgba = _rgba(reference.image[tile.box], reference.mask[tile.box])
            return self.owner.generator.encode_references(rgba[:, None])

        with self.owner.stages.timed("references"):
            return self.owner.encoded.get((reference.index, tile), encode)

    def _scaled(self) -> np.ndarray:
        """What the generator makes of the whole frame, ``[H,W,3]`` float32 in levels of 255."""
        references = References.join([self._encoded(reference, None) for reference in self.chosen])
        out = self._generate(self.owner._blanked(self.frame), references, self.flows, self.errors)
        height, width = self.frame.mask.shape
        return cv2.resize(out, (width, height), interpolation=cv2.INTER_CUBIC)

    def _generate(
        self, rgba: torch.Tensor, references: References, flows: torch.Tensor, errors: torch.Tensor
    ) -> np.ndarray:
        with self.owner.stages.timed("generate"):
            out = self.owner.generator(rgba, references=references, flows=flows, flow_errs=errors)
        return np.ascontiguousarray(255 * out[0].float().permute(1, 2, 0).cpu().numpy())

    def _put(
        self, image: np.ndarray, hole: np.ndarray, box: Box, filled: np.ndarray, known: np.ndarray
    ) -> None:
        """Put what was ``filled`` [h,w,3] in ``box`` into the hole [H,W], without a step at its rim."""
        with self.owner.stages.timed("composite"):
            inside = hole[box]
            rim = ~self.frame.mask[box] & known & dilate(inside, RIM)
            smooth = filled + rim_correction(to_levels(self.frame.image[box]), filled, rim, inside)
            image[box][inside] = from_levels(smooth, image.dtype)[inside]


def _rgba(colours: np.ndarray, mask: np.ndarray, blank: bool = True) -> torch.Tensor:
    """``[1,4,h,w]`` in [0, 1]: colours ``[h,w,3]``, black inside the mask ``[h,w]`` if so, and the mask."""
    levels = to_levels(colours)
    if blank:
        levels = np.where(mask[..., None], np.float32(0), levels)
    rgba = np.dstack([levels / np.float32(255), mask.astype(np.float32)])
    return torch.from_numpy(np.ascontiguousarray(rgba.transpose(2, 0, 1)))[None]


def _shared(box: Box, tile: Tile) -> tuple[Box, Box]:
    """What a box and a tile share, as seen from the box and from the tile."""
    common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, tile.box, strict=True)]
    here, there = (
        tuple(slice(c.start - o.start, c.stop - o.start) for c, o in zip(common, origin, strict=True))
        for origin in (box, tile.box)
    )
    return (here[0], here[1]), (there[0], there[1])


def _windows(frames: Iterable[_Frame], radius: int) -> Iterator[tuple[deque[_Frame], int]]:
    """For each frame in order, a window that reaches ``radius`` frames back and ahead, and its place in it.

    The window is the same one all the time: it lasts until the next is asked for.
    """
    window: deque[_Frame] = deque()
    centre = 0
    for frame in frames:
        window.append(frame)
        if len(window) - centre > radius:
            yield window, centre
            centre += 1
        if centre > radius:
            window.popleft()
            centre -= 1
    for index in range(centre, len(window)):
        yield window, index


def load_propagator(
    checkpoint: str, flow_checkpoint: str | None, config: str, radius: int
) -> LearnedPropagator:
    """The generator of a checkpoint, with RAFT of another or, without one, with DIS.

    Raises:
        InputError: a checkpoint cannot be read or does not fit, or the configuration is unknown or one
            that sees no references.
    """
    from gi_model import build_generator, load_checkpoint, load_published
    from gi_model.flow import RAFT, DISStage, FlowStage

    generator = build_generator(config)
    if not isinstance(generator, CrossingGenerator):
        raise InputError(f"--config: expected a generator that looks at references, got {config}")
    load_published(generator, load_checkpoint(checkpoint, part="generator"))
    stage: Stage = DISStage()
    if flow_checkpoint is not None:
        stage = FlowStage(RAFT.of_published(load_checkpoint(flow_checkpoint)))
    fast = generator.eval().for_inference()
    assert isinstance(fast, CrossingGenerator)
    return LearnedPropagator(fast, stage, radius)
