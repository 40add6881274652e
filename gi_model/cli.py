"""The command ``gi-model``."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gi_model.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from gi_model.metrics import MaskedQuality

FAILED = 2  # exit code for anything the user can mend


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``gi-model`` with command-line ``arguments``; return its exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except InputError as error:
        print(f"gi-model: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        print(
            f"gi-model: {error.name} is not installed; video needs `pip install 'gi-kernels[video]'`",
            file=sys.stderr,
        )
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"gi-model: {error.strerror or error}{where}", file=sys.stderr)
    except KeyboardInterrupt:
        print("gi-model: interrupted; nothing was written", file=sys.stderr)
        return 130
    return FAILED


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
        "frames that see them; what no frame sees is inpainted. Needs no weights and no GPU.",
        epilog="Writes OUT and, beside it, a picture of a few frames. Exit code 2 if something given "
        "cannot be used; nothing is written then.",
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
        "--truth", metavar="VIDEO", help="the unharmed video, to measure PSNR and SSIM inside the mask"
    )
    propagate.add_argument(
        "--radius", type=int, default=15, metavar="N", help="frames to look back and ahead (default 15)"
    )
    propagate.add_argument(
        "--pictures", type=int, default=4, metavar="N", help="frames in the picture (default 4)"
    )
    propagate.set_defaults(run=run_propagate)
    return parser


def run_propagate(options: argparse.Namespace) -> int:
    """``gi-model propagate``."""
    import itertools

    from gi_model.metrics import MaskedQuality
    from gi_model.propagation import Propagator, inpaint_frame
    from gi_model.video import FrameSource, FrameWriter, MaskSource, save_image

    if options.radius < 1:
        raise InputError(f"--radius: expected at least 1, got {options.radius}")
    if options.pictures < 1:
        raise InputError(f"--pictures: expected at least 1, got {options.pictures}")
    frames, masks = FrameSource(options.video, "VIDEO"), MaskSource(options.masks)
    masks.check(frames)
    truth = FrameSource(options.truth, "--truth") if options.truth else None
    if truth and truth.count and frames.count and truth.count < frames.count:
        raise InputError(f"--truth: expected {frames.count} frames like VIDEO, got {truth.count}")
    output = Path(options.output)
    if frames.path.resolve() == output.resolve():
        raise InputError("-o: expected another name than VIDEO")
    writer = FrameWriter(output, frames.rate)
    shown = set(_spread(frames.count, options.pictures))
    rows: list[list[np.ndarray]] = []
    ours, inpainted = MaskedQuality(), MaskedQuality()
    picture = output.with_name(f"{output.stem}-frames.png")
    # Frames and masks are read a second time, in step with the results, for pictures and scores.
    originals = zip(frames, masks, truth or itertools.repeat(None), strict=False)
    started = time.perf_counter()
    with writer:
        results = Propagator(radius=options.radius).run(frames, masks)
        for index, result in enumerate(_progress(results, frames.count)):
            writer.write(result)
            image, mask, unharmed = next(originals)
            if unharmed is not None:
                if unharmed.shape != result.shape:
                    raise InputError(
                        f"--truth: expected frames of {result.shape[1]}x{result.shape[0]} pixels like VIDEO, "
                        f"got {unharmed.shape[1]}x{unharmed.shape[0]}"
                    )
                ours.add(result, unharmed, mask)
                inpainted.add(inpaint_frame(image, mask), unharmed, mask)
            if index in shown or (not frames.count and len(rows) < options.pictures):
                rows.append([_tinted(image, mask), result] + ([] if unharmed is None else [unharmed]))
        seconds = time.perf_counter() - started
        save_image(picture, _sheet(rows))
    _report(writer.count, seconds, ours if truth else None, inpainted)
    print(f"wrote {output} and {picture}")
    return 0


def _report(count: int, seconds: float, ours: MaskedQuality | None, inpainted: MaskedQuality) -> None:
    parts = []
    if ours is not None:
        parts.append(
            f"inside the mask: PSNR {ours.psnr:.2f} dB, SSIM {ours.ssim:.3f} "
            f"(inpainting per frame: {inpainted.psnr:.2f} dB, {inpainted.ssim:.3f})"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    parts += [f"{count / seconds:.2f} frames per second", f"peak memory {peak:.0f} MiB"]
    print("; ".join(parts))


def _progress(results: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yield ``results`` under a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("repairing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(results, total=count or None)


def _spread(count: int, wanted: int) -> list[int]:
    """``wanted`` indices spread over ``count`` frames."""
    return [int((i + 0.5) * count / wanted) for i in range(min(wanted, count))]


def _tinted(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import numpy as np

    out = image.copy()
    out[mask] = np.array([255, 60, 160], np.uint8)
    return out


def _sheet(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Rows of frames (masked, result, truth) with white lines between."""
    import numpy as np

    if not rows:
        raise InputError("VIDEO: expected at least one frame, got none")
    line = 4
    padded = [
        np.concatenate([np.pad(i, ((0, line), (0, line), (0, 0)), constant_values=255) for i in row], axis=1)
        for row in rows
    ]
    return np.concatenate(padded, axis=0)[:-line, :-line]


if __name__ == "__main__":
    sys.exit(main())
