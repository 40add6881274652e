"""What ``gi-model propagate`` writes: the result and what lies beside it."""

from __future__ import annotations

import argparse
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import cv2
import numpy as np

from gi_model.errors import InputError
from gi_model.flow.colours import flow_colours
from gi_model.inpainting import inpaint_frame
from gi_model.metrics import MaskedQuality
from gi_model.sheet import HOLE, Sheet
from gi_model.staging import staged, staged_folder
from gi_model.video import VIDEOS, FrameWriter, to_8_bit, write_image
from gi_model.video.threads import Clock

if TYPE_CHECKING:
    from gi_model.propagation.finished import Journal
    from gi_model.video import FrameSource
    from gi_model.video.masks import Step

# Pixels per frame from which on a picture of motion has its full colour, as a share of the shorter side.
FAST = 0.02


class Places:
    """Where things are written: all beside OUT."""

    def __init__(self, output: Path) -> None:
        suffix = output.suffix if output.suffix.lower() in VIDEOS else ".mp4"
        self.output = output
        self.picture = output.with_name(f"{output.stem}-frames.png") if output.name else output
        self.side = self._beside("side-by-side", suffix)
        self.intermediate = self._beside("intermediate", "")
        self.journal = output.with_name(f".{output.name}.finished") if output.name else output
        self.all = (self.output, self.picture, self.side, self.intermediate)

    def check_apart(self, *sources: FrameSource | None) -> None:
        """Raise ``InputError`` if something would replace what is read, or end up among it."""
        for source in sources:
            if source is not None:
                self._check_apart(source)

    def check_free(self, options: argparse.Namespace) -> None:
        """Raise ``InputError`` if something else is in the way of what lies beside OUT."""
        if self.picture.is_dir():
            raise InputError(f"-o: the picture would be {self.picture}, which is a folder")
        if options.side_by_side and self.side.is_dir():
            raise InputError(f"--side-by-side: the video would be {self.side}, which is a folder")
        if options.keep_intermediate and self.intermediate.exists():
            names = {p.name for p in self.intermediate.iterdir()} if self.intermediate.is_dir() else {""}
            if not names <= {"finished", "flow"}:
                raise InputError(
                    f"--keep-intermediate: {self.intermediate} holds other files than an earlier run's"
                )

    def _check_apart(self, source: FrameSource) -> None:
        path = source.path.resolve()
        for place in self.all:
            if place.resolve() == path or (path.is_dir() and place.resolve().parent == path):
                raise InputError(f"-o: expected a place outside {source.argument} {source.path}, got {place}")

    def _beside(self, what: str, suffix: str) -> Path:
        return (
            self.output.with_name(f"{self.output.stem}-{what}{suffix}") if self.output.name else self.output
        )


class Outputs:
    """The result, its pictures and, if asked for, the video beside the masked one and the intermediates.

    All appear when the ``with`` block ends well, else none does. Frames are written in order.

    Args:
        options: of the command.
        places: where everything goes.
        frames: what is repaired; the result takes over its rate, times, tags and sound.
        with_truth: whether the steps have the truth.

    Attributes:
        count, masked: frames and masked pixels so far.
        ours, inpainted: measures against the truth, of the result and of inpainting every frame; ``ours``
            is None without a truth.
        written: what there is to tell of.
        journal: the finished frames, which are among the intermediates.
        clock: seconds spent here, those at the end included, when encoders give what they have kept.
    """

    def __init__(
        self, options: argparse.Namespace, places: Places, frames: FrameSource, with_truth: bool
    ) -> None:
        def writer(path: Path, sound: bool) -> FrameWriter:
            codec, quality = options.codec, options.quality
            if path.suffix != places.output.suffix:  # a folder has a video beside it
                codec = quality = None
            return FrameWriter(
                path,
                frames.rate,
                aspect=frames.aspect,
                codec=codec,
                quality=quality,
                colour=frames.colour,
                time_base=frames.time_base,
                sound=frames.path if sound and not frames.images else None,
            )

        self.places = places
        self.result = writer(places.output, not options.no_sound)
        self.side = writer(places.side, False) if options.side_by_side else None
        self.intermediate = options.keep_intermediate
        self.sheet = Sheet(frames.count, options.pictures)
        self.ours, self.inpainted = (MaskedQuality() if with_truth else None), MaskedQuality()
        self.count = self.masked = 0
        self.written = [places.output, places.picture]
        self.journal: Journal | None = None
        self.clock = Clock()
        self._stack = ExitStack()
        self._picture: Path | None = None
        self._motion: _Motion | None = None
        self._flow_is_given = False

    def __enter__(self) -> Outputs:
        with ExitStack() as stack:
            # Left in the opposite order: the result comes first, and if that fails nothing comes.
            self._picture = stack.enter_context(staged(self.places.picture))
            if self.side is not None:
                stack.enter_context(self.side)
                self.written.append(self.places.side)
            if self.intermediate:
                self._motion = _Motion(stack.enter_context(staged_folder(self.places.intermediate)))
                self.written.append(self.places.intermediate)
            stack.enter_context(self.result)
            self._stack = stack.pop_all()
        return self

    def watch(self, propagator: object) -> None:
        """Keep pictures of the flow that a propagator follows; without any, of the result's motion."""
        if self._motion is not None and hasattr(propagator, "on_flow"):
            propagator.on_flow = self._motion.write
            self._flow_is_given = True

    def write(self, item: tuple[int, Step, np.ndarray]) -> None:
        """Take a frame's index, what was read, and the result."""
        with self.clock.running():
            self._write(*item)

    def _write(self, index: int, step: Step, result: np.ndarray) -> None:
        self.result.write(result, step.time)
        self.count += 1
        self.masked += int(step.mask.sum())
        image, repaired = to_8_bit(step.image), to_8_bit(result)
        truth = None if step.truth is None else to_8_bit(step.truth)
        self.sheet.add(index, image, step.mask, repaired, truth)
        if self.side is not None:
            self.side.write(_beside(step.image, step.mask, result), step.time)
        if self._motion is not None and not self._flow_is_given:
            self._motion.add(index, repaired)
        if step.truth is not None and self.ours is not None:
            known = _as_deep_as(result, step.truth)
            self.ours.add(result, known, step.mask)
            self.inpainted.add(inpaint_frame(step.image, step.mask), known, step.mask)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.clock.running(), self._stack:
            if error is not None:
                raise error
            assert self._picture is not None
            write_image(self._picture, self.sheet.image())
            if self._motion is not None and self.journal is not None:
                shutil.copytree(self.journal.folder, self._motion.folder.parent / "finished")


class _Motion:
    """Pictures of the motion from each frame to the next."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "flow"
        self.folder.mkdir()
        self.estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self.last: np.ndarray | None = None

    def add(self, index: int, image: np.ndarray) -> None:
        """Write a picture of the motion from the frame before to this one, ``[H,W,3]`` uint8."""
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if self.last is not None and min(grey.shape) >= 32:  # smaller ones have no coarse level
            flow = self.estimator.calc(self.last, grey, np.zeros((*grey.shape, 2), np.float32))
            self.write(index - 1, flow)
        self.last = grey

    def write(self, index: int, flow: np.ndarray) -> None:
        """Write a picture of the flow ``[h,w,2]`` from frame ``index`` to the next, in pixels of its grid."""
        write_image(self.folder / f"{index:06d}.png", flow_colours(flow, FAST * min(flow.shape[:2])))


def _as_deep_as(result: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """``truth`` with as many bits as ``result``."""
    if truth.dtype == result.dtype:
        return truth
    return to_8_bit(truth) if result.dtype == np.uint8 else truth.astype(np.uint16) * 257


def _beside(image: np.ndarray, mask: np.ndarray, result: np.ndarray) -> np.ndarray:
    """The frame with its mask tinted, and the result to its right."""
    tinted = image.copy()
    tinted[mask] = np.array(HOLE, image.dtype) * (257 if image.dtype == np.uint16 else 1)
    return np.concatenate([tinted, result], axis=1)
