"""The command ``gi-model``."""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from gi_model.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from gi_model.metrics import MaskedQuality
    from gi_model.video import FrameSource

T = TypeVar("T")

FAILED = 2  # exit code for anything the user can mend
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``gi-model`` with command-line ``arguments``; return its exit code."""
    options = build_parser().parse_args(arguments)
    return guarded("gi-model", lambda: options.run(options))


def guarded(name: str, run: Callable[[], int], left: str = "nothing was written") -> int:
    """Exit code of ``run``; what a user can mend becomes a line on standard error.

    ``left``: what an interrupted run leaves behind.
    """
    try:
        with _terminable():
            return run()
    except InputError as error:
        message = str(error)
    except ImportError as error:
        message = f"{error}; for video: pip install 'gi-kernels[video]'"
    except OSError as error:
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    except MemoryError:
        message = "not enough memory; a smaller --radius needs less"
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {left}", file=sys.stderr)
        return INTERRUPTED
    print(f"{name}: {message}", file=sys.stderr)
    return FAILED


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM clean up like Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        earlier = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="gi-model", description="Keyframe propagation: repair regions of a video."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    propagate = commands.add_parser(
        "propagate",
        help="repair the masked region of a video from the frames that see it",
        description="Repair the masked region of a video: pixels are carried along optical flow from the "
        "frames that see them; what no frame sees is inpainted. Needs no weights and no GPU. With "
        "--checkpoint a trained generator fills the region instead.",
        epilog="Writes OUT and, beside it, OUT-frames.png with a few frames before and after. Sound is not "
        "kept. PSNR and SSIM are those of the frames before they are encoded. Exit code 2 if something "
        "cannot be used or written; an earlier OUT is then as it was.",
    )
    propagate.add_argument("video", metavar="VIDEO", help="a video file or a folder of images")
    propagate.add_argument(
        "--masks",
        required=True,
        metavar="MASKS",
        help="white where to repair: a video, a folder of images, or one image for all frames",
    )
    propagate.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="a video (.mp4, .mkv, ...) or a folder of PNG images",
    )
    propagate.add_argument(
        "--truth", metavar="TRUTH", help="the unharmed video, to measure PSNR and SSIM inside the mask"
    )
    propagate.add_argument(
        "--radius", type=int, default=15, metavar="N", help="frames to look back and ahead (default 15)"
    )
    propagate.add_argument(
        "--pictures", type=int, default=4, metavar="N", help="frames in the picture (default 4)"
    )
    propagate.add_argument(
        "--checkpoint", metavar="FILE", help="weights of a generator, for instance a released .ckpt"
    )
    propagate.add_argument(
        "--flow-checkpoint",
        metavar="FILE",
        help="weights of RAFT for the generator's flow, for instance raft-things.pth (default: DIS)",
    )
    propagate.add_argument(
        "--config",
        default="ours",
        metavar="NAME",
        help="the checkpoint's configuration: ours, ours_big, ours_no_ffc, or a file (default ours)",
    )
    propagate.set_defaults(run=run_propagate)
    return parser


def run_propagate(options: argparse.Namespace) -> int:
    """``gi-model propagate``."""
    from gi_model.metrics import MaskedQuality
    from gi_model.propagation import LearnedPropagator, Propagator, inpaint_frame, load_propagator
    from gi_model.sheet import Sheet
    from gi_model.video import FrameSource, FrameWriter, MaskSource, aligned, staged, write_image

    for name in ("radius", "pictures"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}: expected at least 1, got {getattr(options, name)}")
    if options.flow_checkpoint and not options.checkpoint:
        raise InputError("--flow-checkpoint: expected --checkpoint too")
    frames, masks = FrameSource(options.video, "VIDEO"), MaskSource(options.masks)
    truth = FrameSource(options.truth, "--truth") if options.truth else None
    output = Path(options.output)
    _check_apart(output, frames, masks.frames, truth)
    writer = FrameWriter(output, frames.rate, aspect=frames.aspect)
    picture = output.with_name(f"{output.stem}-frames.png")
    if picture.is_dir():
        raise InputError(f"-o: the picture would be {picture}, which is a folder")

    # What has been read but not yet repaired: as many frames as the propagator looks ahead.
    pending: deque[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = deque()

    def read() -> Iterator[np.ndarray]:
        for item in aligned(frames, masks, truth):
            pending.append(item)
            yield item[0]

    def masks_read() -> Iterator[np.ndarray]:
        while True:
            yield pending[-1][1]

    propagator: Propagator | LearnedPropagator
    if options.checkpoint:
        propagator = load_propagator(
            options.checkpoint, options.flow_checkpoint, options.config, options.radius
        )
    else:
        propagator = Propagator(radius=options.radius)
    sheet = Sheet(frames.count, options.pictures)
    ours, inpainted = MaskedQuality(), MaskedQuality()
    started = time.perf_counter()
    with staged(picture) as temporary_picture, writer:
        results = propagator.run(read(), masks_read())
        for index, result in enumerate(progress(results, frames.count, "repairing")):
            image, mask, unharmed = pending.popleft()
            writer.write(result)
            sheet.add(index, image, mask, result, unharmed)
            if unharmed is not None:
                ours.add(result, unharmed, mask)
                inpainted.add(inpaint_frame(image, mask), unharmed, mask)
        seconds = time.perf_counter() - started
        write_image(temporary_picture, sheet.image())
    _report(writer.count, seconds, propagator.masked, propagator.unseen, ours if truth else None, inpainted)
    print(f"wrote {output} and {picture}")
    return 0


def _check_apart(output: Path, *sources: FrameSource | None) -> None:
    """Raise ``InputError`` if the result would replace, or end up among, what is read."""
    for source in sources:
        if source is None:
            continue
        path = source.path.resolve()
        if output.resolve() == path or (path.is_dir() and output.resolve().parent == path):
            raise InputError(f"-o: expected a place outside {source.argument} {source.path}, got {output}")


def _report(
    count: int,
    seconds: float,
    masked: int,
    unseen: int,
    ours: MaskedQuality | None,
    inpainted: MaskedQuality,
) -> None:
    parts = []
    if not masked:
        parts.append("the masks are empty")
    elif ours is not None:
        parts.append(
            f"inside the mask: PSNR {ours.psnr:.2f} dB, SSIM {ours.ssim:.3f} "
            f"(OpenCV inpainting per frame: {inpainted.psnr:.2f} dB, {inpainted.ssim:.3f})"
        )
    if masked:
        parts.append(f"seen by other frames: {1 - unseen / masked:.1%}")
    # Kilobytes, but bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    parts += [f"{count / seconds:.2f} frames per second", f"peak memory {peak:.0f} MiB"]
    print("; ".join(parts))


def progress(items: Iterable[T], count: int, doing: str) -> Iterator[T]:
    """Yield ``items`` under a progress bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        yield from bar.track(items, total=count or None)


if __name__ == "__main__":
    sys.exit(main())
