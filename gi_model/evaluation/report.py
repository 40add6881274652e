"""Scores as a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gi_model.evaluation.images import scores_of
from gi_model.evaluation.scores import TOTAL, Scores, bin_index, bin_names, published_names
from gi_model.staging import staged


@dataclass
class Result:
    """Scores of one data set.

    Attributes:
        key: in published names, such as ``two``.
        references: of each image.
        images: per group, how many.
        scores: per evaluator.
    """

    key: str
    references: int
    images: dict[str, int]
    scores: dict[str, Scores]


def result_of(key: str, references: int, measured: Mapping[str, np.ndarray]) -> Result:
    """The scores of a data set from what was measured of its images, see ``Measures``."""
    index, names = bin_index(measured["area"]), bin_names()
    images = {TOTAL: len(index)} | {name: int((index == i).sum()) for i, name in enumerate(names)}
    present = {group: count for group, count in images.items() if count}
    return Result(key, references, present, scores_of(dict(measured)))


def print_results(results: list[Result], not_computed: Mapping[str, str]) -> None:
    """A table per data set and evaluator, then what could not be computed and why."""
    console = Console(width=None if Console().is_terminal else 120)
    for result in results:
        for evaluator, scores in result.scores.items():
            title = f"{evaluator}, {counted(result.references, 'reference')}"
            table = Table(title=title, title_justify="left")
            table.add_column("masked")
            table.add_column("images", justify="right")
            columns = _columns(scores)
            for score, statistic in columns:
                heading = score if statistic == "mean" else "±"
                table.add_column(heading, justify="right", min_width=6)
            for group in _groups(result):
                values = [scores[s].get(group, {}).get(statistic, math.nan) for s, statistic in columns]
                shown = ["" if math.isnan(value) else f"{value:.4f}" for value in values]
                name = "all" if group == TOTAL else group
                table.add_row(name, str(result.images[group]), *shown, end_section=_last_bin(result, group))
            console.print(table)
    for name, why in not_computed.items():
        console.print(f"not computed: {name} ({why})", highlight=False)


def counted(number: int, thing: str) -> str:
    """``1 reference``, ``2 references``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def write_csv(path: Path, results: list[Result]) -> None:
    """A row per data set, evaluator and group; columns in the order of the scores; empty where undefined."""
    columns: dict[tuple[str, str], None] = {}
    for result in results:
        for scores in result.scores.values():
            columns |= dict.fromkeys(_columns(scores))
    titles = [f"{score}_{statistic}" for score, statistic in columns]
    rows: list[list[Any]] = [["data_set", "references", "evaluator", "masked", "images", *titles]]
    for result in results:
        for evaluator, scores in result.scores.items():
            for group in _groups(result):
                values = [scores.get(s, {}).get(group, {}).get(statistic) for s, statistic in columns]
                row = [result.key, result.references, evaluator, group, result.images[group]]
                rows.append([*row, *(cell(value) for value in values)])
    write_rows(path, rows)


def write_json(
    path: Path, results: list[Result], not_computed: Mapping[str, str], settings: Mapping[str, Any]
) -> None:
    """All scores, also under their published names; undefined ones are null, infinite ones ``"inf"``."""
    tree = {
        "settings": settings,
        "not_computed": not_computed,
        "data_sets": {
            result.key: {"references": result.references, "images": result.images, "scores": result.scores}
            for result in results
        },
        "published_names": {
            name: value
            for result in results
            for evaluator, scores in result.scores.items()
            for name, value in published_names(scores, evaluator, result.key).items()
        },
    }
    write_tree(path, tree)


def write_rows(path: Path, rows: list[list[Any]]) -> None:
    """A CSV file."""
    with staged(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def cell(value: float | None) -> str:
    """All digits of a number in a CSV file; empty where there is none."""
    return "" if value is None or math.isnan(value) else repr(value)


def write_tree(path: Path, tree: Mapping[str, Any]) -> None:
    """A JSON file; undefined numbers are null, infinite ones ``"inf"`` and ``"-inf"``."""
    with staged(path) as temporary:
        temporary.write_text(json.dumps(_plain(tree), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _columns(scores: Scores) -> list[tuple[str, str]]:
    return [(score, statistic) for score, groups in scores.items() for statistic in groups[TOTAL]]


def _groups(result: Result) -> list[str]:
    """Bins from small to large masks, then the total."""
    bins = [group for group in result.images if group != TOTAL]
    return [*sorted(bins, key=lambda group: float(group.split("-")[0])), TOTAL]


def _last_bin(result: Result, group: str) -> bool:
    groups = _groups(result)
    return len(groups) > 1 and group == groups[-2]


def _plain(value: Any) -> Any:
    """``value`` with what JSON has no numbers for replaced."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value
