"""What can be measured here: networks with the weights that there are, and a device."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from gi_model.errors import InputError
from gi_model.evaluation.images import Measures
from gi_model.evaluation.inception import inception
from gi_model.evaluation.journal import digest
from gi_model.evaluation.lpips import lpips
from gi_model.evaluation.lpips_weights import cached_name


def load_measures(
    lpips_files: list[str] | None, inception_file: str | None, network: str = "vgg16"
) -> tuple[Measures, dict[str, str | None], dict[str, str]]:
    """What can be measured, hashes of its weights, and what cannot be measured and why.

    Raises:
        InputError: files that were named do not fit. Without names, weights that are missing are no error.
    """
    measures, not_computed = Measures(), {}
    files = [Path(file) for file in lpips_files or [str(cached_name(network))]]
    if lpips_files or files[0].is_file():
        measures.lpips = lpips(network, files)
    else:
        not_computed["lpips"] = "no weights: run `gi-model fetch-lpips`, or give --lpips"
    if inception_file:
        measures.inception = inception(inception_file)
    else:
        not_computed["fid"] = "no weights: give --inception"
        not_computed["ssim_fid100_f1"] = "needs fid"
    if measures.lpips is None or measures.inception is None:
        missing = [name for name in ("lpips", "fid") if name in not_computed]
        not_computed["lpips_fid100_f1"] = f"needs {' and '.join(missing)}"
    hashes = {
        "lpips": " ".join(digest(file) for file in files) if measures.lpips else None,
        "inception": digest(inception_file) if inception_file else None,
    }
    return measures, hashes, not_computed


def chosen_device(name: str | None) -> torch.device:
    """The device of that name; by default this process's GPU, or the CPU without any."""
    try:
        if name is None:
            name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device: {name!r} cannot be used: {error}") from error
