"""Repair the masked region of a video: pixels are carried along optical flow from the frames that see
them; what no frame sees is inpainted. Needs no weights and no GPU. With --checkpoint a trained
generator fills the region instead.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gi_model.errors import InputError
from gi_model.progress import progress

if TYPE_CHECKING:
    import numpy as np

    from gi_model.metrics import MaskedQuality
    from gi_model.video import FrameSource

NAME = "propagate"
SUMMARY = "repair the masked region of a video from the frames that see it"
EXTRA = "video"

NOTES = """\
Writes OUT and, beside it, OUT-frames.png with a few frames before and after. Sound is not kept. PSNR
and SSIM are those of the frames before they are encoded. Exit code 2 if something cannot be used or
written; an earlier OUT is then as it was.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.epilog = NOTES
    parser.add_argument("video", metavar="VIDEO", help="a video file or a folder of images")
    parser.add_argument(
        "--masks",
        required=True,
        metavar="MASKS",
        help="white where to repair: a video, a folder of images, or one image for all frames",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="a video (.mp4, .mkv, ...) or a folder of PNG images",
    )
    parser.add_argument(
        "--truth", metavar="TRUTH", help="the unharmed video, to measure PSNR and SSIM inside the mask"
    )
    parser.add_argument(
        "--radius", type=int, default=15, metavar="N", help="frames to look back and ahead (default 15)"
    )
    parser.add_argument(
        "--pictures", type=int, default=4, metavar="N", help="frames in the picture (default 4)"
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights of a generator, for instance a released .ckpt"
    )
    parser.add_argument(
        "--flow-checkpoint",
        metavar="FILE",
        help="weights of RAFT for the generator's flow, for instance raft-things.pth (default: DIS)",
    )
    parser.add_argument(
        "--config",
        default="ours",
        metavar="NAME",
        help="the checkpoint's configuration: ours, ours_big, ours_no_ffc, or a file (default ours)",
    )


def run(options: argparse.Namespace) -> int:
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
