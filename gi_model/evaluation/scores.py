"""Scores of a data set from scores of its images: over all, per bin of mask area, and combined."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from gi_model.errors import InputError
from gi_model.evaluation.frechet import frechet_distance

BINS = 10
TOTAL = "total"

#: ``scores[score][group][statistic]``; a group is ``total`` or the name of a bin.
Scores = dict[str, dict[str, dict[str, float]]]

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def aggregate(
    areas: np.ndarray,
    per_image: Mapping[str, np.ndarray],
    features: tuple[np.ndarray, np.ndarray] | None = None,
    bins: int = BINS,
) -> Scores:
    """Scores of a data set, in total and per bin of mask area; empty bins are left out.

    Args:
        areas: ``[N]`` float32, share of each image that is masked.
        per_image: for a score, such as ``ssim``, its value ``[N]`` for each image. Of these: ``mean`` and
            population ``std``.
        features: Inception's of the results and of the truth, ``[N,2048]`` each: adds ``fid``, only with a
            ``mean``, NaN in groups of one image. With ``ssim`` or ``lpips`` its combinations too.
        bins: how many bins.

    Raises:
        InputError: no images.
    """
    if not len(areas):
        raise InputError("scores: expected at least one image")
    index, names = bin_index(areas, bins), bin_names(bins)
    groups = {TOTAL: np.ones(len(areas), bool)}
    groups |= {name: index == i for i, name in enumerate(names) if (index == i).any()}
    scores: Scores = {}
    for score, values in per_image.items():
        scores[score] = {name: _statistics(values[chosen]) for name, chosen in groups.items()}
    if features is not None:
        scores["fid"] = {name: {"mean": _fid(features, chosen)} for name, chosen in groups.items()}
        scores |= _integrals(scores)
    return scores


def bin_index(areas: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Number of the bin of each area; a bin holds its upper edge, the first one also 0.

    Areas are float32, edges float64, as published: 0.1 in float32 lies above 0.1.
    """
    edges = np.linspace(0, 1, bins + 1)
    return np.clip(np.searchsorted(edges, areas.astype(np.float64), side="left") - 1, 0, bins - 1)


def bin_names(bins: int = BINS) -> list[str]:
    """``0-10%``, ``10-20%``, ...; a digit more for more than 10 bins."""
    digits = max(0, math.ceil(math.log10(bins)) - 1)
    edges = [f"{100 * edge:.{digits}f}" for edge in np.linspace(0, 1, bins + 1)]
    return [f"{low}-{high}%" for low, high in pairwise(edges)]


def integral(quality: float, fid: float) -> float:
    """A score in [0, 1] and FID as one: ``2 q g / (q + g + 0.001)`` with ``g = max(0, 100 - fid) / 100``.

    ``quality``: mean SSIM, or 1 less mean LPIPS.
    """
    g = max(0.0, 100 - fid) / 100
    return 2 * quality * g / (quality + g + 1e-3)


def published_names(scores: Scores, evaluator: str, references: str) -> dict[str, float]:
    """Scores under the published names, such as ``val_evaluator_raw_state_two_ssim_0-10%_mean``.

    Args:
        scores: of ``aggregate``.
        evaluator: ``raw`` or ``stitched``.
        references: the data set's key, such as ``two``.
    """
    return {
        f"val_evaluator_{evaluator}_state_{references}_{score}_{group}_{statistic}": value
        for score, groups in scores.items()
        for group, statistics in groups.items()
        for statistic, value in statistics.items()
    }


def reference_key(count: int) -> str:
    """The data set's key for a number of references: ``two`` for 2."""
    return NUMBER_WORDS[count] if count < len(NUMBER_WORDS) else str(count)


def _statistics(values: np.ndarray) -> dict[str, float]:
    values = values.astype(np.float64)
    mean = float(values.mean())
    # Equal images have an infinite PSNR.
    return {"mean": mean, "std": float(values.std()) if math.isfinite(mean) else math.nan}


def _fid(features: tuple[np.ndarray, np.ndarray], chosen: np.ndarray) -> float:
    if chosen.sum() < 2:
        return math.nan
    results, truth = (torch.from_numpy(np.ascontiguousarray(f[chosen])) for f in features)
    return frechet_distance(results, truth)


def _integrals(scores: Mapping[str, Any]) -> Scores:
    fid = scores["fid"][TOTAL]["mean"]
    found: Scores = {}
    if "ssim" in scores:
        found["ssim_fid100_f1"] = {TOTAL: {"mean": integral(scores["ssim"][TOTAL]["mean"], fid)}}
    if "lpips" in scores:
        found["lpips_fid100_f1"] = {TOTAL: {"mean": integral(1 - scores["lpips"][TOTAL]["mean"], fid)}}
    return found
