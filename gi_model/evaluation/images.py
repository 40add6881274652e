"""Measures a generator on a validation set: the published evaluation of filled images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from gi_model.data.validation import ValidationSet
from gi_model.errors import InputError
from gi_model.evaluation.filling import Filler
from gi_model.evaluation.inception import Inception
from gi_model.evaluation.journal import Journal
from gi_model.evaluation.lpips import LPIPS, sum_of
from gi_model.evaluation.precision import full_float32
from gi_model.evaluation.scores import Scores, aggregate
from gi_model.evaluation.similarity import psnr, ssim

#: What is compared with the truth: the prediction as it is, and the prediction inside the mask only.
EVALUATORS = ("raw", "stitched")
PER_IMAGE = ("ssim", "psnr", "lpips")


@dataclass
class Measures:
    """What is measured besides SSIM and PSNR; ``None`` where weights are missing."""

    lpips: LPIPS | None = None
    inception: Inception | None = None

    @torch.no_grad()
    @full_float32()
    def __call__(
        self, images: torch.Tensor, masks: torch.Tensor, predicted: torch.Tensor
    ) -> dict[str, np.ndarray]:
        """Numbers of each image: ``area``, ``raw/ssim`` and so on, and features ``truth/features`` and so on.

        Args:
            images, predicted: ``[B,3,H,W]`` in [0, 1]; masks: ``[B,1,H,W]``, 0 or 1.
        """
        results = {"raw": predicted, "stitched": masks * predicted + (1 - masks) * images}
        measured = {"area": masks.mean(dim=(1, 2, 3))}
        truth = self.lpips.describe(images) if self.lpips else []
        if self.inception:
            measured["truth/features"] = self.inception(images)
        for name, result in results.items():
            measured[f"{name}/ssim"] = ssim(result, images)
            measured[f"{name}/psnr"] = psnr(result, images)
            if self.lpips:
                terms = self.lpips.terms(self.lpips.describe(result), truth)
                measured[f"{name}/lpips"] = sum_of([term.mean(dim=(1, 2, 3)) for term in terms])
            if self.inception:
                measured[f"{name}/features"] = self.inception(result)
        return {name: value.float().cpu().numpy() for name, value in measured.items()}


def batches_of(samples: ValidationSet, size: int) -> list[range]:
    """Numbers of the samples of each batch, in order."""
    return [range(at, min(at + size, len(samples))) for at in range(0, len(samples), size)]


def measure(
    filler: Filler,
    samples: ValidationSet,
    measures: Measures,
    journal: Journal,
    batches: list[range],
    device: torch.device,
    workers: int = 0,
) -> Iterator[int]:
    """Measure the batches that ``journal`` does not have; yield the number of images of each, when done.

    Args:
        filler, measures: on ``device``.
        batches: number of the batch in ``journal`` -> its samples; a batch without any is left out.
        workers: processes that read images.
    """
    left = [i for i, batch in enumerate(batches) if len(batch) and not journal.has(i)]
    loader = DataLoader(samples, batch_sampler=[list(batches[i]) for i in left], num_workers=workers)
    loaded = iter(loader)
    for number in left:
        try:
            images, masks, srcs, srcs_masks = channels_first(next(loaded), device)
        except RuntimeError as error:
            if "stack expects each tensor to be equal size" not in str(error):
                raise
            raise InputError(f"data: {error}; images of different sizes need --batch-size 1") from error
        journal.add(number, measures(images, masks, filler(images, masks, srcs, srcs_masks)))
        yield len(images)


def channels_first(batch: dict[str, torch.Tensor], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Images, masks, references and their masks ``[...,C,H,W]`` in [0, 1] of a batch as it is loaded."""
    return tuple(
        ((batch[name].to(device) + 1) / 2).movedim(-1, -3).contiguous()
        for name in ("image", "mask", "srcs", "srcs_masks")
    )


def scores_of(measured: dict[str, np.ndarray]) -> dict[str, Scores]:
    """Scores of each evaluator from the measured images."""
    scores = {}
    for name in EVALUATORS:
        per_image = {s: measured[f"{name}/{s}"] for s in PER_IMAGE if f"{name}/{s}" in measured}
        features = None
        if "truth/features" in measured:
            features = measured[f"{name}/features"], measured["truth/features"]
        scores[name] = aggregate(measured["area"], per_image, features)
    return scores
