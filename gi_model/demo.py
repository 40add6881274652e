"""The first run, in two acts.

Hides a moving region of the bundled clip, repairs it without weights, and measures the result. Then times
the two-stream generator, whose weights are not bundled, on this machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gi_model import cli
from gi_model.progress import progress

if TYPE_CHECKING:
    import numpy as np

    from gi_model.video import FrameSource

CLIP = Path(__file__).parent / "assets" / "city.mp4"

CLOSING = """
Published: the published style in eager PyTorch, float32. Ours keeps what belongs to the references.
Weights are random here: they take as long as trained ones, but what they paint is not worth a look.
With the published checkpoints the generator fills the mask, also what no frame of a clip shows, which
without weights is continued from around it:
  gi-model propagate VIDEO --masks MASKS -o OUT --checkpoint ours.ckpt --flow-checkpoint raft-things.pth
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m gi_model.demo``: the command's exit code."""
    parser = argparse.ArgumentParser(prog="python -m gi_model.demo", description=__doc__)
    parser.add_argument("-o", "--output", default="demo-output", metavar="FOLDER", help="where to write")
    folder = Path(parser.parse_args(arguments).output)
    failed = cli.guarded("demo", lambda: harm(CLIP, folder))
    if failed:
        return failed
    command = ["propagate", str(folder / "masked.mkv"), "--masks", str(folder / "masks")]
    command += ["--truth", str(CLIP), "-o", str(folder / "repaired.mp4")]
    print("gi-model", *command)
    return cli.main(command) or cli.guarded("demo", show_times, f"the repaired clip is in {folder}")


def harm(clip: Path, folder: Path) -> int:
    """Write ``masked.mkv`` (the region black, the rest exact) and ``masks/`` for ``clip``."""
    import numpy as np

    from gi_model.video import FrameSource, FrameWriter

    folder.mkdir(parents=True, exist_ok=True)
    frames = FrameSource(clip, "clip")
    with (
        FrameWriter(folder / "masked.mkv", frames.rate, lossless=True) as video,
        FrameWriter(folder / "masks") as masks,
    ):
        for frame, mask in zip(frames, moving_masks(frames), strict=True):
            video.write(np.where(mask[..., None], 0, frame).astype(np.uint8))
            masks.write(np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255)
    return 0


def moving_masks(frames: FrameSource) -> Iterator[np.ndarray]:
    """The masks of :func:`swinging_masks` for a clip."""
    height, width = next(iter(frames)).shape[:2]
    return swinging_masks(height, width, frames.count)


def swinging_masks(height: int, width: int, count: int) -> Iterator[np.ndarray]:
    """A blob of about 7 % of the frame that swings across it and changes its shape and size."""
    import numpy as np

    y, x = np.mgrid[:height, :width]
    for i in range(count):
        t = i / max(1, count - 1)
        centre_x = width * (0.5 - 0.3 * np.cos(2.5 * np.pi * t + 0.6))
        centre_y = height * (0.5 + 0.2 * np.sin(3 * np.pi * t))
        angle = np.arctan2(y - centre_y, x - centre_x)
        radius = height * (0.19 + 0.03 * np.sin(3 * angle + 9 * t) + 0.02 * np.cos(5 * angle - 7 * t))
        yield np.hypot((x - centre_x) / 1.15, y - centre_y) < radius


def show_times() -> int:
    """Print how long the parts of a step take, and what a checkpoint would add."""
    from gi_model.step_times import StepTimes
    from gi_model.testing.steps import Steps

    print("\nThe two-stream generator and its flow stage, timed for a minute:")
    times = StepTimes(Steps(references=2))
    for _ in progress(times, len(times), "timing"):
        pass
    print(times)
    print(CLOSING, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
