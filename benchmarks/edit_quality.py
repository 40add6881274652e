"""How well edits of keyframes are carried, against known truth: ``python -m benchmarks.edit_quality``.

Clips are made from the bundled one, so nothing is fetched. On most of them a camera pans, turns and zooms
over one of its frames, enlarged to a plane, and the edit is a disc painted on the plane: its motion is known
exactly. On the others the clip itself is recoloured, teal to orange, pixel by pixel, so that every
frame's truth is known too. One frame's truth is given as the edited keyframe; the others are compared with
theirs inside the edit. Writes ``table.md``, ``edits.json`` and pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from gi_model.evaluation.video import flicker
from gi_model.propagation import EditPropagator
from gi_model.staging import staged
from gi_model.video import FrameSource, write_image

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "edits"
CLIP = ROOT / "gi_model" / "assets" / "city.mp4"
COUNT = 60
HEIGHT, WIDTH = 270, 480
#: Frames after the keyframe at which the error is listed.
DISTANCES = (1, 5, 10, 20, 30, 40, 59)
DISC = 70, 90  # height and width
SHOWN = (1, 15, 26, 34, 45, 59)  # frames in pictures


@dataclass(frozen=True)
class Case:
    """Frames, their truth, and where the edit is seen in each, ``[H,W]`` bool."""

    frames: list[np.ndarray]
    truth: list[np.ndarray]
    masks: list[np.ndarray]


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; the exit code is 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.edit_quality", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="FOLDER", help=f"{RESULTS}")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = [row for name in options.only or CASES for row in measure(name, options.output)]
    text = report(rows)
    for name, content in (("edits.json", json.dumps(rows, indent=1) + "\n"), ("table.md", text)):
        with staged(options.output / name) as temporary:
            temporary.write_text(content)
    print(text)
    return 0


def measure(name: str, output: Path) -> list[dict]:
    """Rows of a case: from its first frame, and from its first and last."""
    case = CASES[name]()
    rows = []
    for keys in ((0,), (0, COUNT - 1)):
        propagator = EditPropagator({key: case.truth[key] for key in keys})
        results = list(propagator.run(case.frames))
        errors = [psnr(*images) for images in zip(results, case.truth, case.masks, strict=True)]
        untouched = [psnr(*images) for images in zip(case.frames, case.truth, case.masks, strict=True)]
        beside = [
            psnr(result, frame, ~cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))).astype(bool))
            for result, frame, mask in zip(results, case.frames, case.masks, strict=True)
        ]
        rows.append(
            {
                "case": name,
                "keyframes": keys,
                "psnr": errors,
                "unedited": float(np.nanmean(untouched)),
                "beside": float(np.nanmin(beside)),
                "flicker": flicker(results, case.truth, case.masks),
            }
        )
        if len(keys) == 1:
            strips = [np.hstack([case.frames[i], results[i], case.truth[i]]) for i in SHOWN]
            picture = cv2.resize(np.vstack(strips), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            write_image(output / f"{name}.jpg", picture)
    return rows


def report(rows: Sequence[dict]) -> str:
    """The table, in Markdown."""
    lines = [
        "# Carried edits against the truth",
        "",
        "Made by `python -m benchmarks.edit_quality`. PSNR in dB inside the edit, by frames from the first "
        "keyframe; `hidden` where nothing of it is seen. `beside`: the worst frame outside the edit, against "
        "the original. `flicker`: how much the error changes from frame to frame, in levels of 8 bits. The "
        "plane and the clip are those that margins were chosen on: no independent evidence.",
        "",
        f"| case | keyframes | {' | '.join(map(str, DISTANCES))} | median | unedited | beside | flicker |",
        "|---|---|" + "---:|" * (len(DISTANCES) + 4),
    ]
    for row in rows:
        cells = [_decibel(row["psnr"][d]) for d in DISTANCES]
        cells += [_decibel(v) for v in (np.nanmedian(row["psnr"]), row["unedited"], row["beside"])]
        cells += [f"{row['flicker']:.2f}"]
        lines.append(
            f"| {row['case']} | {', '.join(map(str, row['keyframes']))} | " + " | ".join(cells) + " |"
        )
    return "\n".join([*lines, "", *ABOUT, ""])


def psnr(image: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Inside ``mask``, in dB, at most 99; NaN without a pixel."""
    if mask.sum() < 50:
        return float("nan")
    mean = ((image[mask].astype(np.float64) - truth[mask]) ** 2).mean()
    return float(min(99.0, 10 * np.log10(255**2 / max(mean, 1e-12))))


def _decibel(value: float) -> str:
    return "hidden" if np.isnan(value) else f"{value:.1f}"


def disc(
    noise: float = 0, front: bool = False, light: Callable[[int], np.ndarray | float] | None = None
) -> Case:
    """A painted disc under a camera that moves over a plane.

    Args:
        noise: deviation of the noise of frames and truth alike, in levels.
        front: whether something passes in front of it.
        light: what colours are multiplied by, by frame.
    """
    plane = cv2.resize(next(iter(FrameSource(CLIP, "clip"))), None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
    plane = plane.astype(np.float32)
    painted, share = _painted(plane)
    random = np.random.default_rng(0)
    case = Case([], [], [])
    for t in range(COUNT):
        camera = _camera(t, plane.shape)
        frame, truth, mask = (
            cv2.warpAffine(image, camera, (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC)
            for image in (plane, painted, share)
        )
        seen = mask > 0.01
        if front:
            shape, texture = _front(t)
            frame, truth = (np.where(shape[..., None], texture, i) for i in (frame, truth))
            seen &= ~shape
        lit = 1.0 if light is None else light(t)
        grain = random.normal(0, noise, frame.shape) if noise else 0
        case.frames.append((frame * lit + grain).round().clip(0, 255).astype(np.uint8))
        case.truth.append((truth * lit + grain).round().clip(0, 255).astype(np.uint8))
        case.masks.append(seen)
    return case


def _painted(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The plane with a disc on it, and the disc's share of each pixel."""
    height, width = DISC
    y, x = np.mgrid[:height, :width]
    radius = np.hypot((x - width / 2) * height / width, y - height / 2)
    share = np.zeros(plane.shape[:2], np.float32)
    top, left = (n // 2 - size // 2 for n, size in zip(plane.shape, DISC, strict=False))
    share[top : top + height, left : left + width] = np.clip(height / 2 - 2 - radius, 0, 1)
    colour = np.stack([200 + 40 * np.sin(x / 4), 60 + 50 * np.sin(y / 5), np.full(x.shape, 60.0)], axis=-1)
    painted = plane.copy()
    painted[top : top + height, left : left + width] = colour
    return plane + share[..., None] * (painted - plane), share


def _camera(t: int, shape: Sequence[int]) -> np.ndarray:
    """A matrix [2,3] from the plane to the frame: 8 degrees, a quarter of zoom, a hundred pixels."""
    s = t / (COUNT - 1)
    centre = shape[1] / 2 + 60 * np.sin(3 * s), shape[0] / 2 + 30 * np.sin(5 * s)
    camera = cv2.getRotationMatrix2D(centre, 8 * np.sin(4 * s), 1 + 0.25 * np.sin(6 * s))
    camera[:, 2] += (WIDTH - shape[1]) / 2, (HEIGHT - shape[0]) / 2
    return camera


def _front(t: int) -> tuple[np.ndarray, np.ndarray]:
    """Where something passes in front, ten pixels a frame, and its colours."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    centre = (WIDTH + 120) * t / (COUNT - 1) - 60
    texture = np.stack(
        [90 + 60 * np.sin((x - centre) / 6), 120 + 40 * np.sin(y / 7), np.full(x.shape, 150)], -1
    )
    return np.hypot(x - centre, (y - HEIGHT / 2) / 2) < 45, texture.astype(np.float32)


def _shadow(t: int) -> np.ndarray:
    """A soft edge of shadow that wanders across the frame."""
    x = np.arange(WIDTH)[None, :, None]
    return 1 - 0.35 * np.clip((x - 8 * t + 150) / 60, 0, 1)


def recolouring() -> Case:
    """The clip itself, what is teal turned to orange."""
    case = Case([], [], [])
    for frame in FrameSource(CLIP, "clip"):
        levels = frame.astype(np.float32)
        teal = np.clip((levels[..., 1:].mean(axis=2) - levels[..., 0] - 15) / 40, 0, 1)
        teal = cv2.GaussianBlur(teal, (0, 0), 1)[..., None]
        truth = levels + teal * (levels[..., [1, 1, 0]] * (1.0, 0.62, 0.5) - levels)
        case.frames.append(frame)
        case.truth.append(truth.round().clip(0, 255).astype(np.uint8))
        case.masks.append(teal[..., 0] > 0.5)
    return case


CASES: dict[str, Callable[[], Case]] = {
    "pan": disc,
    "noise": lambda: disc(noise=4),
    "hidden": lambda: disc(front=True),
    "light": lambda: disc(light=lambda t: 1 - 0.4 * np.sin(t / 15) ** 2),
    "shadow": lambda: disc(light=_shadow),
    "recoloured": recolouring,
}
ABOUT = (
    "- pan: a camera pans, turns and zooms over a plane with a painted disc.",
    "- noise: the same with noise of 4 levels, in the truth too.",
    "- hidden: something passes in front of the disc and covers it.",
    "- light: it goes down to 60 % and up again.",
    "- shadow: a soft shadow wanders across.",
    "- recoloured: the bundled clip, what is teal turned to orange. What comes into view later cannot be "
    "recoloured from the first frame.",
)

if __name__ == "__main__":
    sys.exit(main())
