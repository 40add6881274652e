"""Scores of videos and splits as a table, as CSV and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from gi_model.evaluation.devil import PER_VIDEO
from gi_model.evaluation.frechet import frechet_distance
from gi_model.evaluation.report import cell, write_rows, write_tree
from gi_model.evaluation.splits import Video

FRECHET = ("fid", "vfid")


@dataclass
class Split:
    """Scores of a split.

    Attributes:
        videos: scores of each by name; ``frames`` among them.
        mean, error: of each score, over videos: mean and standard error (NaN for one video).
        distances: ``fid`` of all frames and ``vfid`` of all videos, where there are features.
    """

    name: str
    videos: dict[str, dict[str, float]]
    mean: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    distances: dict[str, float] = field(default_factory=dict)


def split_results(videos: list[Video], measured: list[dict[str, np.ndarray]]) -> list[Split]:
    """Scores per split, of what was measured of each video.

    An infinite PSNR counts, in the mean, as much as the largest finite one of the split, as in DEVIL.
    """
    splits = []
    for name in sorted({video.split for video in videos}):
        members = [i for i, video in enumerate(videos) if video.split == name]
        scores = {
            videos[i].name: {s: float(measured[i][s][0]) for s in ("frames", *PER_VIDEO) if s in measured[i]}
            for i in members
        }
        split = Split(name, scores)
        for score in PER_VIDEO:
            values = np.array([one[score] for one in scores.values() if score in one])
            values = values[~np.isnan(values)]
            if len(values):
                finite = values[np.isfinite(values)]
                clipped = np.minimum(values, finite.max()) if len(finite) else values
                split.mean[score] = float(clipped.mean())
                spread = clipped.std(ddof=1) if len(clipped) > 1 and len(finite) else math.nan
                split.error[score] = float(spread / math.sqrt(len(clipped)))
        for score in FRECHET:
            if all(f"{score}/result" in measured[i] for i in members):
                sets = [
                    torch.from_numpy(np.concatenate([measured[i][f"{score}/{which}"] for i in members]))
                    for which in ("result", "truth")
                ]
                split.distances[score] = frechet_distance(*sets) if len(sets[0]) > 1 else math.nan
        splits.append(split)
    return splits


def print_splits(splits: list[Split], not_computed: Mapping[str, str]) -> None:
    """A table of the splits, then what could not be computed and why."""
    console = Console(width=None if Console().is_terminal else 140)
    table = Table(title="mean over videos ± standard error", title_justify="left")
    table.add_column("split")
    table.add_column("videos", justify="right")
    names = [n for n in PER_VIDEO if any(n in s.mean for s in splits)]
    distances = [n for n in FRECHET if any(n in s.distances for s in splits)]
    for name in (*names, *distances):
        table.add_column(name, justify="right")
    for split in splits:
        cells = [_with_error(split.mean.get(n, math.nan), split.error.get(n, math.nan)) for n in names]
        cells += [_with_error(split.distances.get(n, math.nan), math.nan) for n in distances]
        table.add_row(split.name, str(len(split.videos)), *cells)
    console.print(table)
    console.print("warp errors: along the truth's flow by DIS; DEVIL's, by FlowNet2, are other numbers")
    for name, why in not_computed.items():
        console.print(f"not computed: {name} ({why})", highlight=False)


def write_results(folder: Path, splits: list[Split], not_computed: Mapping[str, str]) -> None:
    """``videos.csv``, ``splits.csv`` and ``results.json`` in ``folder``."""
    rows: list[list[Any]] = [["split", "video", "frames", *PER_VIDEO]]
    for split in splits:
        for name, scores in split.videos.items():
            rows.append([split.name, name, int(scores["frames"]), *(cell(scores.get(s)) for s in PER_VIDEO)])
    write_rows(folder / "videos.csv", rows)
    titles = [title for s in PER_VIDEO for title in (f"{s}_mean", f"{s}_standard_error")]
    rows = [["split", "videos", *titles, *FRECHET]]
    for split in splits:
        cells = [cell(part.get(s)) for s in PER_VIDEO for part in (split.mean, split.error)]
        rows.append([split.name, len(split.videos), *cells, *(cell(split.distances.get(s)) for s in FRECHET)])
    write_rows(folder / "splits.csv", rows)
    tree = {
        "not_computed": not_computed,
        "flow_of_warp_errors": "DIS",
        "splits": {
            s.name: {
                "mean": s.mean, "standard_error": s.error, "distances": s.distances, "videos": s.videos
            }
            for s in splits
        },
    }  # fmt: skip
    write_tree(folder / "results.json", tree)


def _with_error(value: float, error: float) -> str:
    if math.isnan(value):
        return ""
    digits = 2 if abs(value) >= 10 else 4
    return f"{value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")
