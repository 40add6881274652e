"""Repair the masked region of a video, or carry an edited frame to the others.

Pixels are carried along optical flow from the frames that see them; what no frame sees is filled from
its surroundings. Needs no weights and no GPU. With --checkpoint a trained generator fills the region
instead. Memory does not grow with the length of the video.

With --keyframe, what was changed in one or more frames follows the scene to all others.
"""

from __future__ import annotations

import argparse
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gi_model.errors import InputError
from gi_model.progress import progress

if TYPE_CHECKING:
    import numpy as np

    from gi_model.commands._outputs import Outputs
    from gi_model.propagation.finished import Journal
    from gi_model.video import FrameSource, MaskSource
    from gi_model.video.masks import Step

NAME = "propagate"
SUMMARY = "repair the masked region of a video, or carry an edited frame to the others"
EXTRA = "video"

NOTES = """\
examples:
  gi-model propagate clip.mp4 --masks masks/ -o repaired.mp4
      masks/ holds an image per frame, white where to repair
  gi-model propagate clip.mov --masks logo.png -o repaired.mov --side-by-side
      one mask for all frames; also writes repaired-side-by-side.mov
  gi-model propagate DAVIS --sequence bear -o bear.mkv --codec ffv1
      frames and masks of a data set, without any loss
  gi-model propagate frames/ --masks masks/ -o out --resume
      a folder of images to a folder of images; goes on where an earlier run was stopped
  gi-model propagate clip.mp4 --keyframe 0=edited.png -o edited.mp4
      edited.png is frame 0 with something changed; frames are counted from 0

Frames of more than 8 bits stay so: PNG of 16 bits, video of 10 where the codec has them. Rotation, times
of frames, colour tags and sound are kept; subtitles and chapters are not. docs/propagation.md has more.

Writes OUT and, beside it, OUT-frames.png with a few frames before and after. PSNR and SSIM are those of
the frames before they are encoded. Exit code 2 if something cannot be used or written; an earlier OUT is
then as it was.
"""

#: Frames that are decoded ahead, and results that wait to be encoded.
AHEAD = BEHIND = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.epilog = NOTES
    parser.usage = (
        "gi-model propagate VIDEO --masks MASKS -o OUT [options]\n"
        "       gi-model propagate VIDEO --keyframe INDEX=IMAGE -o OUT [options]"
    )
    parser.add_argument(
        "video", metavar="VIDEO", help="a video file, a folder of images, or a DAVIS data set (--sequence)"
    )
    _add_region(parser.add_argument_group("what to repair"))
    _add_result(parser.add_argument_group("the result"))
    _add_method(parser.add_argument_group("how"))


def _add_region(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--masks",
        metavar="MASKS",
        help="white where to repair: a video, a folder of images, or one image for all frames; in PNG images "
        "with a palette, every label but 0",
    )
    group.add_argument(
        "--keyframe",
        action="append",
        default=[],
        metavar="INDEX=IMAGE",
        help="the frame of this index (from 0) with something changed, which is carried to the other frames, "
        "inside the masks if there are --masks; may be given several times",
    )
    group.add_argument(
        "--sequence",
        metavar="NAME",
        help="which sequence of the data set VIDEO, such as bear or 480p/bear; its annotations are the masks "
        "unless there are --masks",
    )


def _add_result(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="a video (.mp4, .mov, .mkv, .webm, .avi) or, without a suffix, a folder of PNG images",
    )
    group.add_argument(
        "--codec",
        metavar="NAME",
        help="h264 (default), h265, av1, vp9 (default of .webm), mpeg4 (default of .avi), or ffv1, which is "
        "lossless",
    )
    group.add_argument(
        "--quality",
        type=int,
        metavar="N",
        help="lower is better and larger: CRF of h264 (default 18), h265 (20), vp9 (20), av1 (25), quantiser "
        "of mpeg4 (3)",
    )
    group.add_argument("--no-sound", action="store_true", help="leave the sound of VIDEO out")
    group.add_argument(
        "--side-by-side", action="store_true", help="also write OUT-side-by-side: masked | repaired, a video"
    )
    group.add_argument(
        "--pictures", type=int, default=4, metavar="N", help="frames in OUT-frames.png (default 4)"
    )
    group.add_argument(
        "--keep-intermediate",
        action="store_true",
        help="also write OUT-intermediate: what was filled in, and pictures of the motion that was followed",
    )
    group.add_argument(
        "--truth", metavar="TRUTH", help="the unharmed video, to measure PSNR and SSIM inside the mask"
    )


def _add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--radius", type=int, default=15, metavar="N", help="frames to look back and ahead (default 15)"
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on where an earlier run with the same inputs and options was stopped; the result is the "
        "same to the bit",
    )
    group.add_argument(
        "--checkpoint", metavar="FILE", help="weights of a generator, for instance a released .ckpt"
    )
    group.add_argument(
        "--flow-checkpoint",
        metavar="FILE",
        help="weights of RAFT for the generator's flow, for instance raft-things.pth (default: DIS)",
    )
    group.add_argument(
        "--config",
        default="ours",
        metavar="NAME",
        help="the checkpoint's configuration: ours, ours_big, ours_no_ffc, or a file (default ours)",
    )


def run(options: argparse.Namespace) -> int:
    """``gi-model propagate``."""
    from gi_model.commands._outputs import Outputs, Places
    from gi_model.propagation.finished import Journal
    from gi_model.staging import remove_leftovers
    from gi_model.video import aligned, read_ahead, write_behind
    from gi_model.video.threads import Clock

    for name in ("radius", "pictures"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.flow_checkpoint and not options.checkpoint:
        raise InputError("--flow-checkpoint: expected --checkpoint too")
    edits = _edits(options)
    frames, masks, truth = _sources(options)
    places = Places(Path(options.output))
    places.check_apart(frames, masks.frames if masks else None, truth)
    outputs = Outputs(options, places, frames, with_truth=truth is not None)
    places.check_free(options)
    propagator = _propagator(options, edits)
    decoding = Clock()
    started = time.perf_counter()
    with ExitStack() as stack:
        for path in places.all:
            remove_leftovers(path)
        stale = places.journal.exists()
        steps = stack.enter_context(read_ahead(aligned(frames, masks, truth), AHEAD, decoding))
        reading = _Reading(frames, steps)
        journal = Journal(
            places.journal, _signature(options, frames, masks), reading.original, options.resume
        )
        stack.push(_keeping(journal, options.resume))
        if options.resume:
            print(f"{journal.found} frames had been finished", file=sys.stderr)
        elif stale:
            print(f"removed what an earlier run had finished ({places.journal})", file=sys.stderr)
        outputs.journal = journal
        stack.enter_context(outputs)
        outputs.watch(propagator)
        send = stack.enter_context(write_behind(outputs.write, BEHIND))
        results = propagator.run(reading, reading.masks() if masks else None, finished=journal)
        stack.callback(getattr(results, "close", int))
        for index, result in enumerate(progress(results, frames.count, "repairing")):
            send((index, reading.take(index), result))
    seconds = time.perf_counter() - started
    brightest = masks.brightest if masks else 0.0
    _report(outputs, seconds, propagator, brightest, journal.found if options.resume else 0)
    stages = {"decode": decoding.seconds, **_computing(propagator), "encode": outputs.clock.seconds}
    print("seconds:", ", ".join(f"{name} {took:.1f}" for name, took in stages.items()))
    print(f"wrote {' and '.join(map(str, outputs.written))}")
    return 0


def _edits(options: argparse.Namespace) -> dict[int, Path]:
    """Edited keyframes by index."""
    edits: dict[int, Path] = {}
    for given in options.keyframe:
        index, equals, name = given.partition("=")
        if not (equals and name and index.isdecimal()):
            raise InputError(f"--keyframe: expected the index of a frame, = and an image, got {given}")
        if int(index) in edits:
            raise InputError(f"--keyframe: expected one image for frame {int(index)}, got {given} too")
        if not Path(name).is_file():
            raise InputError(f"--keyframe: {name} does not exist")
        edits[int(index)] = Path(name)
    if edits and options.checkpoint:
        raise InputError("--checkpoint: expected none with --keyframe")
    return edits


def _sources(options: argparse.Namespace) -> tuple[FrameSource, MaskSource | None, FrameSource | None]:
    from gi_model.video import FrameSource, MaskSource, davis_sequence

    video, masks = options.video, options.masks
    if options.sequence is not None or (Path(video) / "JPEGImages").is_dir():
        sequence = davis_sequence(video, options.sequence)
        video, masks = sequence.frames, masks or sequence.masks
    if masks is None and not options.keyframe:
        raise InputError("--masks: expected a video, a folder of images, or an image, got nothing")
    truth = FrameSource(options.truth, "--truth") if options.truth else None
    return FrameSource(video, "VIDEO"), MaskSource(masks) if masks else None, truth


def _propagator(options: argparse.Namespace, edits: Mapping[int, Path]) -> AnyPropagator:
    if edits:
        from gi_model.propagation.edits import EditPropagator

        return EditPropagator(_Images(edits))
    if options.checkpoint:
        from gi_model.propagation import load_propagator

        return load_propagator(options.checkpoint, options.flow_checkpoint, options.config, options.radius)
    from gi_model.propagation import Propagator

    return Propagator(radius=options.radius)


class _Images(Mapping[int, "np.ndarray"]):
    """Edited keyframes that are read when they are looked up."""

    def __init__(self, paths: Mapping[int, Path]) -> None:
        self.paths = paths

    def __getitem__(self, index: int) -> np.ndarray:
        from gi_model.video.images import read_image

        return read_image(self.paths[index], "--keyframe")

    def __iter__(self) -> Iterator[int]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def _signature(options: argparse.Namespace, frames: FrameSource, masks: MaskSource | None) -> dict[str, str]:
    """What the repaired frames depend on, by the names that a user knows."""
    import cv2
    import torch

    from gi_kernels import native
    from gi_model.propagation.finished import fingerprint

    files = {
        "VIDEO": str(frames.path),
        "--masks": str(masks.frames.path) if masks else None,
        **{f"--keyframe {given.partition('=')[0]}": given.partition("=")[2] for given in options.keyframe},
        "--checkpoint": options.checkpoint,
        "--flow-checkpoint": options.flow_checkpoint,
    }
    return {
        **{name: fingerprint(path) for name, path in files.items() if path},
        "--radius": str(options.radius),
        "--config": options.config,
        "versions": f"torch {torch.__version__}, OpenCV {cv2.__version__}",
        "kernels": native.PROBLEM or import_module("gi_kernels._C").cpu_capability(),
        "threads": f"{torch.get_num_threads()}, {cv2.getNumThreads()} of OpenCV",
    }


class AnyPropagator(Protocol):
    """What this command asks of a propagator; those without a default for masks are given some."""

    masked: int
    unseen: int

    def run(self, frames: Any, masks: Any, *, finished: Journal) -> Iterator[np.ndarray]:
        """Results in order."""
        ...


class _Reading:
    """What has been read but not written yet, as many frames as the propagator looks ahead.

    The frames and the masks that a propagator is given; they may be asked for in any order. ``read`` gives
    any frame of the source again.
    """

    def __init__(self, frames: FrameSource, steps: Iterator[Step]) -> None:
        self.frames = frames
        self.steps = steps
        self.count = 0
        self.waiting: dict[int, Step] = {}

    def __iter__(self) -> Iterator[np.ndarray]:
        return (step.image for step in self._all())

    def masks(self) -> Iterator[np.ndarray]:
        """Masks, in step with the frames."""
        return (step.mask for step in self._all())

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Frames ``start`` to ``stop - 1``."""
        return self.frames.read(start, stop)

    def original(self, index: int) -> np.ndarray:
        """The frame of an index."""
        step = self.waiting.get(index)
        return next(self.read(index, index + 1)) if step is None else step.image

    def take(self, index: int) -> Step:
        """The step of a finished frame, which will not be needed again."""
        return self.waiting.pop(index)

    def _all(self) -> Iterator[Step]:
        index = 0
        while True:
            if index == self.count:
                step = next(self.steps, None)
                if step is None:
                    return
                self.waiting[index] = step
                self.count += 1
            yield self.waiting[index]
            index += 1


def _keeping(journal: Journal, resume: bool) -> Callable[..., None]:
    """What to do with the journal at the end of a run, as the exit of a ``with`` block.

    Interrupted runs keep it, and so do failed ones that were told to resume.
    """

    def close(kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        count = len(journal)
        keep = count > 0 and kind is not None and (stopped or resume)
        journal.close(keep)
        if keep and stopped:
            raise KeyboardInterrupt(f"{count} finished frames are kept: --resume goes on from there")

    return close


def _computing(propagator: AnyPropagator) -> dict[str, float]:
    """Seconds by stage of the propagator, if it counts them; its reading is waiting for the decoder."""
    stages: Mapping[str, float] = getattr(propagator, "stages", {})
    return {"waiting for frames" if name == "read" else name: seconds for name, seconds in stages.items()}


def _report(
    outputs: Outputs,
    seconds: float,
    propagator: AnyPropagator,
    brightest: float,
    found: int,
) -> None:
    masked, unseen = propagator.masked, propagator.unseen
    parts = []
    if found:
        parts.append(f"{found} frames were finished before")
    edited = hasattr(propagator, "edits")
    if not outputs.masked and not edited:
        dark = f"; the brightest pixel is {brightest:.1%} of white, above 50% counts" if brightest else ""
        parts.append(f"the masks are empty{dark}")
    elif outputs.ours is not None and outputs.masked:
        parts.append(
            f"inside the mask: PSNR {outputs.ours.psnr:.2f} dB, SSIM {outputs.ours.ssim:.3f} (OpenCV "
            f"inpainting per frame: {outputs.inpainted.psnr:.2f} dB, {outputs.inpainted.ssim:.3f})"
        )
    if masked:
        share = "edited with confidence" if edited else "seen by other frames"
        parts.append(f"{share}: {1 - unseen / masked:.1%}")
    parts += [f"{outputs.count / seconds:.2f} frames per second", f"peak memory {peak_memory():.0f} MiB"]
    print("; ".join(parts))


def peak_memory() -> float:
    """The most memory that this process has held, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage counts what the parent held when it started this process.
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if found:
            return int(found[1]) / 2**10
    # Kilobytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
