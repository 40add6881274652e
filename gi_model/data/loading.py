"""Batches from samples."""

from __future__ import annotations

from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def loader(
    dataset: Dataset, draws: Sampler, batch_size: int | None, workers: int = 0, pinned: bool | None = None
) -> DataLoader[dict[str, Any]]:
    """Batches of ``dataset`` in the order of ``draws``; the last one may be small.

    Args:
        batch_size: None where ``draws`` are whole batches.
        workers: processes that make samples; 0: this one.
        pinned: whether batches lie in page-locked memory; where there is a GPU by default.
    """
    return DataLoader(
        dataset,
        **({"batch_sampler": draws} if batch_size is None else {"sampler": draws, "batch_size": batch_size}),
        num_workers=workers,
        pin_memory=torch.cuda.is_available() if pinned is None else pinned,
        worker_init_fn=_alone,
        generator=torch.Generator().manual_seed(0),  # leaves the process's random numbers alone
    )


def _alone(worker: int) -> None:
    """One thread per worker: there are as many workers as cores for them."""
    cv2.setNumThreads(0)
