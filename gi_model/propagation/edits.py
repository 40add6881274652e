"""Carrying the edits of keyframes to the frames around them."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import cv2
import numpy as np

from gi_model.errors import InputError
from gi_model.flow import DISFlow, FlowEstimator
from gi_model.propagation.cuts import FLASH, Thumbnail, same_scene, thumbnail
from gi_model.propagation.finished import Finished
from gi_model.propagation.sampling import (
    Box,
    Enlarger,
    from_levels,
    look_up,
    relative,
    shrink,
    to_bytes,
    to_levels,
)
from gi_model.propagation.stages import Stages
from gi_model.propagation.tracking import Tracker

# Colours are levels from 0 to 255, also those of 16 bits.

# An edit starts where it differs, averaged over GRAIN, by more than this many times what is left of the
# frame's median difference without that average; within limits. It is certain where it differs by CERTAIN
# times as much.
NOISE_FACTOR, NOISE_LEAST, NOISE_MOST, CERTAIN = 2.2, 2.0, 16.0, 2.0
# Deviation of the windows that differences are averaged in.
GRAIN = 2.0
# Pixels beside it that belong to it too: its soft rim is fainter than the noise.
RIM = 2
# Deviation of the windows in which an edit is asked whether it lets the frame's texture through.
TEXTURE = 2.5
# Pixels of the shorter side at which edits are tracked, at most; they are composited at full size.
SIDE = 480
# Frames that are read at once to go backwards.
BLOCK = 8


class EditError(InputError, ValueError):
    """An edited keyframe that does not go with the frames; the message names it by its index."""


class ReadableFrames(Protocol):
    """Frames ``[H,W,3]`` of a clip, which can be read again from anywhere."""

    def __iter__(self) -> Iterator[np.ndarray]: ...

    def read(self, start: int, stop: int) -> Iterable[np.ndarray]:
        """Frames ``start`` to ``stop - 1``, fewer where the clip ends before."""
        ...


class EditPropagator:
    r"""Carries what was changed in keyframes to the frames around them.

    **The edit.** Where an edited keyframe ``E`` differs from its frame ``K`` by more than noise does:
    differences are averaged with their signs over a few pixels, and compared with what noise of the
    frame's strength would leave, between 2 and 16 levels of 255. What differs twice as much somewhere
    belongs to the edit with all that is connected to it, and fades out in a soft rim ``a``. It is the same
    for painting and for recolouring: ``m`` in [0, 1] is the share of ``K``'s texture that ``E`` still has,
    by regression in small windows (1 for a new colour, 0 for opaque paint).

    **Tracking.** At a shorter side of at most 480 pixels, see
    :class:`~gi_model.propagation.tracking.Tracker`: flow is composed frame by frame outward from the
    keyframe and corrected against the keyframe's own colours, in a box around the edit; confidence ``c``
    falls with the forward-backward error that has gathered, and where the frame shows something else than
    the keyframe. So an edit goes behind what passes in front of it, up to its contour, and comes back.

    **Compositing.** At pixel ``p``, which lies at ``q`` in the keyframe, the frame ``I`` becomes

    .. math:: I + c \left( s (E - K)(q) + a(q) (1 - m(q)) (s K(q) - I) \right)

    ``s`` is the shading: the frame's light over the keyframe's, smooth in space. The first term is the
    difference, as bright as the scene is now: a *ratio* at large, so that shadows fall on the edit too, a
    *difference* in the small, so that the frame keeps its own texture and grain. The second term takes
    away what the paint hides, which would show as a ghost where tracking is off by part of a pixel. The
    keyframe is sampled once, by a cubic. At the keyframe itself this is ``E``, inside ``a``.

    **Several keyframes.** The nearest on either side count, weighted by confidence and by nearness in
    time. Where one of them shows a place without an edit, an edit of the other fades out on the way. Scene
    cuts are never crossed.

    **Memory** is that of a few frames and of the keyframes on either side, whatever the length of the
    clip. Frames before a keyframe are reached backwards, in blocks that are read again, before the first
    of them is yielded. What the keyframe makes of them waits on disk, compressed, in a temporary file
    that works as a stack: the frame that was reached last is needed first, and what has been used is cut
    off. The file holds the frames between two keyframes at most.

    Args:
        edits: edited keyframes ``[H,W,3]``, uint8 or uint16, by the index of their frame. Looked up when
            needed, so a mapping that reads them from files saves memory.
        estimator: optical flow; OpenCV's DIS by default.
        folder: where the temporary file goes; the system's place by default.

    Attributes:
        masked, unseen: pixels so far that should show an edit, and those of them at which confidence
            was below one half.
        stages: seconds spent so far, by stage.

    Raises:
        ValueError: no edits, or a negative index.
    """

    def __init__(
        self,
        edits: Mapping[int, np.ndarray],
        estimator: FlowEstimator | None = None,
        *,
        folder: str | Path | None = None,
    ) -> None:
        if not edits:
            raise EditError("edits: expected at least one edited keyframe, got none")
        for index in edits:
            if index < 0:
                raise EditError(f"edits: expected indices of frames, got {index}")
        self.edits = edits
        self.estimator = estimator or DISFlow()
        self.folder = folder
        self.masked = self.unseen = 0
        self.stages = Stages()

    def run(
        self,
        frames: ReadableFrames | Sequence[np.ndarray],
        masks: Iterable[np.ndarray] | None = None,
        *,
        finished: Finished | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield edited frames in order.

        Args:
            frames: ``[H,W,3]`` RGB, uint8 or uint16, of one size; a sequence, or a source that can be
                read again from anywhere.
            masks: ``[H,W]`` bool, one per frame: true where the edit may appear; everywhere by default.
            finished: results of an earlier run that was stopped; where all frames of a stretch between
                two keyframes are finished, nothing of it is computed again.

        Raises:
            EditError: an edit of an index beyond the last frame, of another size than the frames, of
                another type than uint8 and uint16, or without a difference; before the first frame.
            ValueError: a mask is missing or of another size than its frame.
        """
        source = _Source(frames)
        for index in sorted(self.edits):
            self._edit(source, index)
        return self._results(source, masks, finished)

    def _results(
        self, source: _Source, masks: Iterable[np.ndarray] | None, finished: Finished | None
    ) -> Iterator[np.ndarray]:
        keys = sorted(self.edits)
        allowed = None if masks is None else iter(masks)
        stretch: _Stretch | None = None
        try:
            for t, image in enumerate(self.stages.iterate("read", source)):
                mask = _next_mask(allowed, t, image)
                if stretch is None or t >= stretch.stop:
                    if stretch is not None:
                        stretch.close()
                    stretch = self._stretch(source, keys, t)
                result = finished.get(t) if finished is not None else None
                if result is None:
                    result = self._composed(image, mask, stretch.layers(t, image))
                    if finished is not None:
                        finished.put(t, result)
                yield result
        finally:
            if stretch is not None:
                stretch.close()

    def _stretch(self, source: _Source, keys: Sequence[int], t: int) -> _Stretch:
        """The frames from ``t``, a keyframe or the first frame, to the one before the next keyframe."""
        before = t if t in self.edits else None
        after = next((k for k in keys if k > t), None)
        return _Stretch(self, source, before, after)

    def _composed(
        self, image: np.ndarray, mask: np.ndarray | None, layers: list[tuple[float, _Layer]]
    ) -> np.ndarray:
        """The frame with its layers, each with a weight of time."""
        if not layers:
            return image
        with self.stages.timed("composite"):
            return self._blended(image, mask, layers)

    def _blended(
        self, image: np.ndarray, mask: np.ndarray | None, layers: list[tuple[float, _Layer]]
    ) -> np.ndarray:
        seen = [layer.box for _, layer in layers if layer.rim.size]
        if not seen:
            return image
        rows, columns = (
            slice(min(side.start for side in sides), max(side.stop for side in sides))
            for sides in zip(*seen, strict=True)
        )
        box = rows, columns
        enlarger = Enlarger(box, image.shape[:2], layers[0][1].confidence.shape)
        shape = enlarger.x.shape
        total = np.zeros((*shape, 3), np.float32)
        weight, shown = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        hidden = np.ones(shape, np.float32)
        for share, layer in layers:
            confidence = enlarger.map(layer.confidence[enlarger.small_box].astype(np.float32) / 255)
            weight += share * confidence
            hidden *= 1 - confidence
            if layer.rim.size:
                part = relative(layer.box, box)
                total[part] += share * confidence[part][..., None] * layer.change
                shown[part] = np.maximum(shown[part], layer.rim)
        total *= ((1 - hidden) / np.maximum(weight, 1e-9))[..., None]
        wanted = shown > 0.5
        if mask is not None:
            total[~mask[box]] = 0
            wanted &= mask[box]
        self.masked += int(wanted.sum())
        self.unseen += int((wanted & (hidden > 0.5)).sum())
        result = image.copy()
        changed = total.any(axis=2)
        result[box][changed] = from_levels(to_levels(image[box][changed]) + total[changed], image.dtype)
        return result

    def _edit(self, source: _Source, index: int) -> _Edit:
        """The edit of a keyframe, checked."""
        image = next(iter(source.read(index, index + 1)), None)
        if image is None:
            raise EditError(f"edits: expected indices below the number of frames, got {index}")
        edited = self.edits[index]
        if edited.dtype not in (np.uint8, np.uint16) or edited.ndim != 3 or edited.shape[2] != 3:
            raise EditError(
                f"edits[{index}]: expected [H,W,3] of uint8 or uint16, "
                f"got {list(edited.shape)} of {edited.dtype}"
            )
        if edited.shape != image.shape:
            raise EditError(
                f"edits[{index}]: expected {image.shape[1]}x{image.shape[0]} pixels like the frames, "
                f"got {edited.shape[1]}x{edited.shape[0]}"
            )
        edit = _Edit.of(image, edited)
        if edit is None:
            raise EditError(
                f"edits[{index}]: expected an image that differs from frame {index} by more than noise, "
                f"got at most {np.abs(to_levels(edited) - to_levels(image)).max():.1f} levels of 255"
            )
        return edit


@dataclass
class _Edit:
    """What was changed in a keyframe; colours are levels of 255."""

    image: np.ndarray  # [H,W,3] uint8, unedited
    change: np.ndarray  # [H,W,4] float32: a * (edited - keyframe), and a: 1 inside the edit, 0 outside
    keyframe: np.ndarray  # [H,W,4] float32: the image with all its digits, and a * (1 - m)

    @staticmethod
    def of(image: np.ndarray, edited: np.ndarray) -> _Edit | None:
        """None where the two do not differ by more than noise does."""
        rim = _rim(image, edited)
        if not rim.any():
            return None
        keyframe, painted = to_levels(image), to_levels(edited)
        change = np.dstack([rim[..., None] * (painted - keyframe), rim])
        covers = rim * (1 - _texture_kept(keyframe, painted))
        return _Edit(to_bytes(image), change, np.dstack([keyframe, covers]))

    @property
    def rim(self) -> np.ndarray:
        return self.change[..., 3]

    def layer(self, tracker: Tracker, image: np.ndarray) -> _Layer:
        """What the edit makes of ``image``, which the tracker has reached at its own size."""
        confidence = (255 * tracker.everywhere()).round().astype(np.uint8)
        small, full = confidence.shape, self.rim.shape
        around = tracker.shown()
        if around is None:
            empty = np.zeros((0, 0, 3), np.float32)
            return _Layer((slice(0, 0), slice(0, 0)), confidence, empty, empty[..., 0])
        box = around if small == full else _scaled(around, small, full)
        enlarger = Enlarger(box, full, small)
        followed = relative(enlarger.small_box, tracker.box)
        x, y = enlarger.positions(tracker.flow[..., followed[0], followed[1]])
        shading = enlarger.map(np.ascontiguousarray(tracker.shading[followed]))
        # Beyond the keyframe's rim there is no edit, but the keyframe goes on.
        change = cv2.remap(self.change, x, y, cv2.INTER_CUBIC)
        keyframe = look_up(self.keyframe, x, y)
        rim = change[..., 3].clip(0, 1)
        covers = keyframe[..., 3].clip(0, rim)[..., None]
        total = shading * change[..., :3] + covers * (shading * keyframe[..., :3] - to_levels(image[box]))
        total[rim == 0] = 0  # where the cubic rings
        return _Layer(box, confidence, total, rim)


@dataclass
class _Layer:
    """What a keyframe makes of another frame: ``confidence * change`` is to be added to its colours."""

    box: Box  # where the edit is; empty if it is nowhere
    confidence: np.ndarray  # uint8, in parts of 255, at the tracker's size
    change: np.ndarray  # [h,w,3] float32, levels of 255
    rim: np.ndarray  # [h,w] float32


class _Chain:
    """An edit on its way from frame to frame in one direction, as far as the scene goes.

    Up to ``FLASH`` frames unlike the scene, such as flashes, are passed over; more are a cut.
    """

    def __init__(self, edit: _Edit, estimator: FlowEstimator, stages: Stages) -> None:
        self.edit, self.stages = edit, stages
        self.image = shrink(edit.image, SIDE)  # the last frame of the scene
        self.tracker = Tracker(self.image, shrink(edit.rim, SIDE) > 0, estimator)
        self.seen = _thumbnail(self.image)
        self.unlike = 0  # frames since then

    @property
    def ended(self) -> bool:
        return self.unlike > FLASH

    def advance(self, image: np.ndarray) -> None:
        """Go on to the neighbour ``image``."""
        if self.ended:
            return
        with self.stages.timed("track"):
            colours = shrink(to_bytes(image), SIDE)
            seen = _thumbnail(colours)
            if not same_scene(self.seen, seen):
                self.unlike += 1
                return
            self.tracker.advance(self.image, colours)
            self.image, self.seen, self.unlike = colours, seen, 0

    def layer(self, image: np.ndarray) -> _Layer | None:
        """What the edit makes of the frame that was reached; None where it is not of the scene."""
        if self.unlike:
            return None
        with self.stages.timed("composite"):
            return self.edit.layer(self.tracker, image)


class _Stretch:
    """The frames between two keyframes, the first of them included, or before the first keyframe.

    What the keyframe after it says is found at once when a layer is first asked for, so a stretch of
    finished frames costs nothing.
    """

    def __init__(self, owner: EditPropagator, source: _Source, before: int | None, after: int | None) -> None:
        self.owner, self.source = owner, source
        self.before, self.after = before, after
        self.behind: _Chain | None = None
        self.present = -1  # the frame that it has reached
        self.stack: _Stack | None = None

    @property
    def stop(self) -> float:
        return float("inf") if self.after is None else self.after

    def layers(self, t: int, image: np.ndarray) -> list[tuple[float, _Layer]]:
        """The layers of frame ``t`` and their weights of time."""
        nearness = 0.0
        if self.before is not None and self.after is not None:
            nearness = (t - self.before) / (self.after - self.before)
        found = [
            (1 - nearness if self.after is not None else 1.0, self._from_behind(t, image)),
            (nearness if self.before is not None else 1.0, self._from_ahead(t)),
        ]
        return [(weight, layer) for weight, layer in found if layer is not None]

    def close(self) -> None:
        if self.stack is not None:
            self.stack.close()

    def _from_behind(self, t: int, image: np.ndarray) -> _Layer | None:
        """What the keyframe before says; None beyond a cut."""
        if self.before is None:
            return None
        if self.behind is None:
            self.behind = self._chain(self.before)
            self.present = self.before
        for frame in self.source.read(self.present + 1, t):  # those that had been finished
            self.behind.advance(frame)
        if t > self.before:
            self.behind.advance(image)
        self.present = t
        return self.behind.layer(image)

    def _from_ahead(self, t: int) -> _Layer | None:
        """What the keyframe after says; None before a cut."""
        if self.after is None or t == self.before:
            return None
        if self.stack is None:
            self.stack = _Stack(self.owner.folder)
            chain = self._chain(self.after)
            for index, image in self.source.backwards(t, self.after):
                chain.advance(image)
                if chain.ended:
                    break
                layer = chain.layer(image)
                if layer is not None:
                    self.stack.push(index, layer)
        return self.stack.pop(t)

    def _chain(self, index: int) -> _Chain:
        edit = self.owner._edit(self.source, index)
        return _Chain(edit, self.owner.estimator, self.owner.stages)


class _Stack:
    """Layers in a temporary file, compressed; the last one is the first to come back."""

    TRAILER = 10 * 8  # bytes after each layer: index, size, box, length of the three parts

    def __init__(self, folder: str | Path | None) -> None:
        # Closed by close(), and without a name: nothing is left behind by a process that is killed.
        self.file = cast(BinaryIO, tempfile.TemporaryFile(dir=folder, prefix="edits-"))  # noqa: SIM115

    def push(self, index: int, layer: _Layer) -> None:
        parts = layer.confidence, layer.change, layer.rim
        packed = [zlib.compress(np.ascontiguousarray(part).tobytes(), 1) for part in parts]
        rows, columns = layer.box
        box = rows.start, rows.stop, columns.start, columns.stop
        trailer = np.array([index, *layer.confidence.shape, *box, *map(len, packed)], np.int64)
        self.file.write(b"".join([*packed, trailer.tobytes()]))

    def pop(self, index: int) -> _Layer | None:
        """The layer of that frame, or None; what lies above it is dropped."""
        while end := self.file.seek(0, 2):
            trailer = np.frombuffer(self._read(end - self.TRAILER, self.TRAILER), np.int64)
            found, height, width, top, bottom, left, right, *sizes = (int(n) for n in trailer)
            if found > index:
                break
            start = end - self.TRAILER - sum(sizes)
            packed = self._read(start, sum(sizes))
            self.file.truncate(start)
            if found == index:
                first, second = sizes[0], sizes[0] + sizes[1]
                shape = bottom - top, right - left
                return _Layer(
                    (slice(top, bottom), slice(left, right)),
                    _unpacked(packed[:first], np.uint8, (height, width)),
                    _unpacked(packed[first:second], np.float32, (*shape, 3)),
                    _unpacked(packed[second:], np.float32, shape),
                )
        return None

    def close(self) -> None:
        self.file.close()

    def _read(self, start: int, size: int) -> bytes:
        self.file.seek(start)
        return self.file.read(size)


def _unpacked(data: bytes, dtype: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(bytearray(zlib.decompress(data)), dtype).reshape(shape)


class _Source:
    """Frames in order, in pieces, and in blocks from behind, of a sequence or of a source."""

    def __init__(self, frames: ReadableFrames | Sequence[np.ndarray]) -> None:
        if not hasattr(frames, "read") and not (
            hasattr(frames, "__getitem__") and hasattr(frames, "__len__")
        ):
            raise TypeError(
                f"frames: expected a sequence or a source with read(start, stop), got {type(frames).__name__}"
            )
        self.frames: Any = frames

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.frames)

    def read(self, start: int, stop: int) -> Iterable[np.ndarray]:
        if hasattr(self.frames, "read"):
            return self.frames.read(start, stop)
        return (self.frames[i] for i in range(start, min(stop, len(self.frames))))

    def backwards(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """Frames ``last - 1`` down to ``first``, with their indices."""
        for stop in range(last, first, -BLOCK):
            start = max(first, stop - BLOCK)
            for offset, image in reversed(list(enumerate(self.read(start, stop)))):
                yield start + offset, image


def _scaled(box: Box, small: tuple[int, ...], full: tuple[int, ...]) -> Box:
    """A box of the small grid on the full one, rounded outward."""
    rows, columns = (
        slice(side.start * many // few, -(-side.stop * many // few))
        for side, few, many in zip(box, small, full, strict=True)
    )
    return rows, columns


def _next_mask(masks: Iterator[np.ndarray] | None, index: int, image: np.ndarray) -> np.ndarray | None:
    if masks is None:
        return None
    mask = next(masks, None)
    if mask is None:
        raise ValueError(f"masks: expected one for every frame, got {index}")
    if mask.shape != image.shape[:2]:
        raise ValueError(
            f"masks: expected {image.shape[1]}x{image.shape[0]} pixels like the frames, "
            f"got {mask.shape[1]}x{mask.shape[0]} at frame {index}"
        )
    return mask


def _thumbnail(image: np.ndarray) -> Thumbnail:
    return thumbnail(image, np.zeros(image.shape[:2], bool))


def _rim(image: np.ndarray, edited: np.ndarray) -> np.ndarray:
    """Where the edit is, ``[H,W]``: 1 inside, 0 outside, soft between.

    Differences are averaged with their signs: what compression does averages out. How strong it is tells
    the rest, which has little of a smooth change in it, even where that covers the whole frame.
    """
    difference = to_levels(edited) - to_levels(image)
    smooth = cv2.GaussianBlur(difference, (0, 0), GRAIN)
    noise = float(np.median(np.abs(difference - smooth).max(axis=2)))
    least = min(max(NOISE_LEAST, NOISE_FACTOR * noise), NOISE_MOST)
    smooth = np.abs(smooth).max(axis=2)
    count, labels = cv2.connectedComponents((smooth > least).astype(np.uint8))
    peaks = np.zeros(count, np.float32)
    np.maximum.at(peaks, labels.ravel(), smooth.ravel())
    certain = peaks > CERTAIN * least
    certain[0] = False
    inside = certain[labels]
    if not inside.any():
        return np.zeros_like(smooth)
    outside = cv2.distanceTransform((~inside).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return (1 + RIM - outside).clip(0, 1).astype(np.float32)


def _texture_kept(keyframe: np.ndarray, edited: np.ndarray) -> np.ndarray:
    """The share [H,W] of the keyframe's texture that the edited one has; 1 where there is none."""
    before, after = (cv2.GaussianBlur(i, (0, 0), 0.6).mean(axis=2) for i in (keyframe, edited))

    def mean(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, (0, 0), TEXTURE)

    middle = mean(before)
    variance = mean(before**2) - middle**2
    covariance = mean(before * after) - middle * mean(after)
    nothing = 4.0  # levels squared: grain is no texture
    return ((covariance + nothing) / (variance.clip(0) + nothing)).clip(0, 1)
