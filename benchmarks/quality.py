"""How good propagation is, on clips with known truth: ``python -m benchmarks.quality``.

Hides moving regions of three kinds in every clip, repairs them by three classical methods and by weights-free
propagation, and measures inside the masks. Writes ``quality.json``, ``table.md`` and pictures, and judges
the results by the floors below. Repairers see black where the masks are. ``--clips`` names the folder that
``python -m benchmarks.clips`` has filled; without it the table has the clips that are bundled.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.progress import Progress

from benchmarks import masks as kinds
from benchmarks.classical import BASELINES
from benchmarks.clips import CLIPS, Clip
from benchmarks.quality_pictures import save
from gi_model.errors import InputError
from gi_model.evaluation.lpips import lpips
from gi_model.evaluation.video import flicker, masked_lpips, motion, warp_error
from gi_model.metrics import MaskedQuality
from gi_model.propagation import Propagator
from gi_model.propagation.sampling import bounding_box
from gi_model.staging import staged

OURS = "ours"
ROOT = Path(__file__).resolve().parents[1]
RESULTS, QUICK_RESULTS = ROOT / "benchmarks" / "results" / "quality", ROOT / "build" / "quality"
#: dB of PSNR: how far ours may lie below the median where the camera stands, and below anything anywhere.
BELOW_MEDIAN, BELOW_ANY = 1.0, 0.3
NETWORK = "alexnet"  # of LPIPS
SSIM_MARGIN = 8  # pixels around a mask, more than SSIM's window reaches
#: Of a quick run: clips, frames of each, kinds of masks.
QUICK = ("city", "city-still"), 16, ("object", "box")

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Measure, write and judge; the exit code is 1 if a floor is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=Path, metavar="FOLDER", help="files of benchmarks.clips")
    parser.add_argument(
        "--quick", action="store_true", help="a few frames of the bundled clip: under a minute"
    )
    parser.add_argument("--only", nargs="+", metavar="CLIP", help="these clips; the others' rows are kept")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help=f"{RESULTS}; quick: {QUICK_RESULTS}"
    )
    options = parser.parse_args(arguments)
    options.output = options.output or (QUICK_RESULTS if options.quick else RESULTS)
    if options.clips is not None and not options.clips.is_dir():
        parser.error(f"--clips: expected a folder, got {options.clips}")
    known = [clip.name for clip in CLIPS]
    for name in options.only or []:
        if name not in known:
            parser.error(f"--only: expected some of {', '.join(known)}, got {name}")
    wanted = [c for c in CLIPS if c.name in (QUICK[0] if options.quick else options.only or known)]
    absent = [clip.name for clip in wanted if clip.missing(options.clips)]
    if absent:
        print(f"not run, for want of files: {', '.join(absent)} (python -m benchmarks.clips FOLDER, --clips)")
    wanted = [clip for clip in wanted if clip.name not in absent]
    if not wanted:
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    rows = _measured(wanted, options.clips, options.quick, options.output)
    file = options.output / "quality.json"
    if options.only and file.exists():
        old = json.loads(file.read_text())["rows"]
        rows += [row for row in old if row["clip"] not in options.only]
    rows.sort(key=lambda row: (known.index(row["clip"]), list(kinds.KINDS).index(row["mask"])))
    versions = {"torch": torch.__version__, "opencv": cv2.__version__, "numpy": np.__version__}
    text = report(rows, judge(rows), absent)
    for target, content in (
        (file, json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n"),
        (options.output / "table.md", text),
    ):
        with staged(target) as temporary:
            temporary.write_text(content)
    print(text)
    print(f"wrote {options.output}")
    return 1 if judge(rows) else 0


def judge(rows: Sequence[Row]) -> list[str]:
    """What falls short of the floors, one line each."""
    failures = []
    for row in rows:
        psnr = {name: method["psnr"] for name, method in row["methods"].items()}
        where = f"{row['clip']}, {row['mask']}"
        gain = psnr[OURS] - psnr["telea"]
        if row["floor"] is not None and not gain >= row["floor"]:
            failures.append(f"{where}: {gain:.2f} dB above telea, floor {row['floor']:g}")
        if not row["moving"] and not psnr[OURS] >= psnr["median"] - BELOW_MEDIAN:
            short = psnr["median"] - psnr[OURS]
            failures.append(f"{where}: {short:.2f} dB below median, floor {BELOW_MEDIAN:g}")
        for name in BASELINES:
            if not psnr[OURS] >= psnr[name] - BELOW_ANY:
                short = psnr[name] - psnr[OURS]
                failures.append(f"{where}: {short:.2f} dB below {name}, floor {BELOW_ANY:g}")
    return failures


def report(rows: Sequence[Row], failures: Sequence[str], absent: Sequence[str]) -> str:
    """The table and the verdict, in Markdown."""
    lines = [
        "# Quality of weights-free propagation",
        "",
        "Made by `make quality`. Inside the masks, against the truth. Warp error in thousandths, after it "
        "that of the truth itself; flicker in levels of 8 bits. Best of a row in bold.",
        "",
    ]
    methods = [*BASELINES, OURS]
    for title, key, digits, best in (
        ("PSNR, dB", "psnr", 2, max),
        ("SSIM", "ssim", 3, max),
        ("LPIPS (AlexNet)", "lpips", 3, min),
        ("Warp error, 1e-3", "warp_error", 2, min),
        ("Flicker, levels", "flicker", 2, min),
    ):
        measured = [row for row in rows if key in row["methods"][OURS]]
        if not measured:
            continue
        extra = ["truth"] if key == "warp_error" else []
        lines += [f"## {title}", "", "| clip | mask | " + " | ".join(methods + extra) + " |"]
        lines += ["|---|---|" + "---:|" * len(methods + extra)]
        for row in measured:
            values = [row["methods"][name][key] for name in methods]
            cells = [f"**{v:.{digits}f}**" if v == best(values) else f"{v:.{digits}f}" for v in values]
            cells += [f"{row['truth_warp_error']:.{digits}f}"] if extra else []
            lines.append(f"| {row['clip']} | {row['mask']} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## Floors", ""]
    lines += [f"- missed: {failure}" for failure in failures] or ["All are met."]
    lines += ["", "## Clips", ""]
    for clip in CLIPS:
        row = next((row for row in rows if row["clip"] == clip.name), None)
        if row is not None:
            size = f"{row['width']}x{row['height']}, {row['frames']} frames"
            lines.append(f"- {clip.name}: {size}; {clip.about}{clip.credit}.")
    if absent:
        lines.append(f"- not run, for want of files: {', '.join(absent)}.")
    lines += ["", *NOTES, ""]
    return "\n".join(lines)


NOTES = (
    "The margins of the engine were chosen while looking at the bundled clip and at parts of all others: "
    "no row is independent evidence.",
)


def _measured(clips: Sequence[Clip], folder: Path | None, quick: bool, output: Path) -> list[Row]:
    """All rows of ``clips``; a process for each core, with one thread."""
    try:
        lpips(NETWORK)
    except InputError as error:
        print(f"without LPIPS: {error}", file=sys.stderr)
    jobs = [(clip.name, kind) for clip in clips for kind in (QUICK[2] if quick else kinds.KINDS)]
    cores = len(os.sched_getaffinity(0))
    rows = []
    with (
        ProcessPoolExecutor(min(cores, len(jobs)), get_context("spawn"), _one_thread) as pool,
        Progress() as bar,
    ):
        task = bar.add_task("clips x masks", total=len(jobs))
        frames = QUICK[1] if quick else None
        for done in as_completed([pool.submit(measure, *job, folder, frames, output) for job in jobs]):
            rows.append(done.result())
            bar.advance(task)
    return rows


def _one_thread() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def measure(name: str, kind: str, folder: Path | None, count: int | None, output: Path) -> Row:
    """One row: a clip under one kind of mask, every method; writes its pictures into ``output``."""
    clip = next(clip for clip in CLIPS if clip.name == name)
    truth = clip.frames(folder)[:count]
    height, width = truth[0].shape[:2]
    masks = kinds.KINDS[kind](len(truth), height, width)
    blank = [np.where(mask[..., None], np.uint8(0), frame) for frame, mask in zip(truth, masks, strict=True)]
    results = {method: repair(blank, masks) for method, repair in BASELINES.items()}
    results[OURS] = list(Propagator().run(iter(blank), iter(masks)))
    save(output / f"{name}-{kind}.jpg", truth, masks, results, OURS, detailed=kind == "object")
    steps = motion(truth)
    values = {method: _inside(result, truth, masks) for method, result in results.items()}
    for method, result in results.items():
        values[method]["warp_error"] = 1000 * warp_error(result, masks, steps)
        values[method]["flicker"] = flicker(result, truth, masks)
    _add_lpips(values, results, truth, masks)
    return {
        "clip": name,
        "mask": kind,
        "frames": len(truth),
        "width": width,
        "height": height,
        "moving": clip.moving,
        "floor": clip.floor,
        "masked_share": float(np.mean([mask.mean() for mask in masks])),
        "truth_warp_error": 1000 * warp_error(truth, masks, steps),
        "methods": values,
    }


Values = dict[str, float]


def _inside(result: Sequence[np.ndarray], truth: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Values:
    quality = MaskedQuality()
    for frame, true, mask in zip(result, truth, masks, strict=True):
        if mask.any():
            box = bounding_box(mask, SSIM_MARGIN)
            quality.add(frame[box], true[box], mask[box])
    return {"psnr": quality.psnr, "ssim": quality.ssim}


def _add_lpips(
    values: Mapping[str, Values],
    results: Mapping[str, Sequence[np.ndarray]],
    truth: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
) -> None:
    """LPIPS of every method, the mean over frames; nothing without its weights."""
    try:
        metric = lpips(NETWORK)
    except InputError:
        return
    frames = [i for i, mask in enumerate(masks) if mask.any()]
    distances = [masked_lpips(metric, [r[i] for r in results.values()], truth[i], masks[i]) for i in frames]
    for method, distance in zip(results, np.mean(distances, axis=0), strict=True):
        values[method]["lpips"] = float(distance)


if __name__ == "__main__":
    sys.exit(main())
