"""Frames per second and peak memory of ``gi-model propagate``, by size.

    python -m benchmarks.bench_propagation

A camera pans over a picture made of noise at all scales; a hole of about 7 % of the frame swings across
it, as in the demo. Or a poster of that area is painted on the picture in the first frame, or in the first and
last one, and carried to the others (``--keyframe``). The clip is an H.264 file, masks and keyframes are PNG
images, the result is an H.264 file.
Every size runs in a fresh process: its peak memory includes Python and PyTorch. Writes
``propagation.json`` beside the other results of this machine.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gi_kernels.testing import machine

HERE = Path(__file__).resolve().parent
# Pixels per frame that the camera moves, as a share of the width.
SPEED = 0.006
# The poster: rows and columns, as shares of height and width; columns are those of the first frame.
POSTER = (0.35, 0.65), (0.4, 0.63)

COMMAND = "import sys; from gi_model.cli import main; sys.exit(main(sys.argv[1:]))"
SPEED_LINE = re.compile(r"([\d.]+) frames per second; peak memory (\d+) MiB")


class Size(NamedTuple):
    """A case. Frames: more than the propagator holds at a time, so that its memory is at its peak."""

    name: str
    width: int
    height: int
    frames: int
    keyframes: tuple[int, ...] = ()  # those that are edited; without any, a hole is repaired


SIZES = (
    Size("256", 256, 256, 48),
    Size("480p", 854, 480, 40),
    Size("720p", 1280, 720, 36),
    Size("1080p", 1920, 1080, 36),
    Size("480p-edit", 854, 480, 40, (0,)),
    Size("480p-edits", 854, 480, 40, (0, 39)),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_propagation", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--sizes", nargs="*", choices=[s.name for s in SIZES], help="only these; not kept")
    options = parser.parse_args(arguments)
    cases = []
    for size in SIZES:
        if options.sizes is None or size.name in options.sizes:
            cases.append(measure(size))
            print(f"{size.name}: {cases[-1]['frames_per_second']:.2f} frames per second, ", end="")
            print(f"{cases[-1]['peak_bytes'] / 2**20:.0f} MiB; {cases[-1]['stages']}")
    about = machine.describe()
    found = {
        "machine": about,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cases": cases,
    }
    if options.sizes is None:
        file = options.results / about["slug"] / "propagation.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"results: {file} (python -m benchmarks.report makes the table)")
    return 0


def measure(size: Size) -> dict[str, Any]:
    """Repair a clip of this size, or carry its edits, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = ["propagate", str(folder / "clip.mp4"), *write_clip(folder, size)]
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *command, "-o", str(folder / "out.mp4")],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"{size.name}: exit code {done.returncode}: {done.stderr}")
    speed = SPEED_LINE.search(done.stdout)
    stages = re.search(r"^seconds: (.*)$", done.stdout, re.MULTILINE)
    assert speed is not None and stages is not None, done.stdout
    return {
        "id": f"propagate-{size.name}",
        "suite": "propagation",
        **size._asdict(),
        "frames_per_second": float(speed[1]),
        "peak_bytes": int(speed[2]) * 2**20,
        "stages": {
            name: float(seconds) for name, seconds in re.findall(r"([a-z][a-z ]*) ([\d.]+)", stages[1])
        },
    }


def write_clip(folder: Path, size: Size) -> list[str]:
    """Write ``clip.mp4``, and ``masks/`` or keyframes; the options that name these."""
    from gi_model.demo import swinging_masks
    from gi_model.video import FrameWriter
    from gi_model.video.images import write_image

    options = [] if size.keyframes else ["--masks", str(folder / "masks")]
    with FrameWriter(folder / "clip.mp4") as clip:
        for i, frame in enumerate(pan(size)):
            clip.write(frame)
            if i in size.keyframes:
                write_image(folder / f"{i}.png", with_poster(frame, size, i))
                options += ["--keyframe", f"{i}={folder / f'{i}.png'}"]
    if not size.keyframes:
        with FrameWriter(folder / "masks") as masks:
            for mask in swinging_masks(size.height, size.width, size.frames):
                masks.write(np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255)
    return options


def with_poster(frame: np.ndarray, size: Size, index: int) -> np.ndarray:
    """Frame ``index`` of the pan with a red poster on the picture."""
    (top, bottom), (left, right) = (
        [round(share * length) for share in side]
        for side, length in zip(POSTER, (size.height, size.width), strict=True)
    )
    moved = _step(size) * index
    frame = frame.copy()
    frame[top:bottom, max(0, left - moved) : max(0, right - moved)] = 220, 40, 30
    return frame


def pan(size: Size) -> Iterator[np.ndarray]:
    """Frames ``[H,W,3]`` uint8 of a camera that moves sideways over a picture with detail at all scales."""
    import cv2

    step = _step(size)
    width = size.width + step * size.frames
    rng = np.random.default_rng(0)
    picture = np.zeros((size.height, width, 3), np.float32)
    scale = 2
    while scale < size.height:
        shape = (max(2, size.height // scale), max(2, width // scale), 3)
        noise = rng.normal(size=shape).astype(np.float32)
        picture += scale**0.8 * cv2.resize(noise, (width, size.height), interpolation=cv2.INTER_CUBIC)
        scale *= 2
    picture = np.clip(127 + 45 * picture / picture.std(), 0, 255).astype(np.uint8)
    for i in range(size.frames):
        yield np.ascontiguousarray(picture[:, step * i : step * i + size.width])


def _step(size: Size) -> int:
    """Pixels per frame that the camera moves."""
    return max(1, round(SPEED * size.width))


if __name__ == "__main__":
    sys.exit(main())
