"""Checkpoints that survive being killed; needs the extra ``training``."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from gi_model.checkpoints import CheckpointError, load_run
from gi_model.errors import InputError
from gi_model.staging import remove_leftovers, staged

LAST = "last.ckpt"
VERSION = 2  # of what checkpoints hold beside the published layout
BEST = 3  # checkpoints that are kept by the monitor


class Stopped(BaseException):
    """A run was asked to stop, and has been saved."""


class AtomicFiles(TorchCheckpointIO):
    """Checkpoints appear under their names when they are whole, on the disk, and hold plain data only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` beside ``path``, then let it take that name."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with staged(path) as temporary, open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Read what :meth:`save_checkpoint` wrote; a file cannot run anything."""
        return read_run(Path(path))


def read_run(path: Path) -> dict[str, Any]:
    """A checkpoint of a training run, of this training or of the published one; nothing in it is run.

    Raises:
        InputError: missing, damaged, or with weights alone.
    """
    if not path.is_file():
        raise InputError(f"--resume: {path} does not exist")
    instead = "to begin with its weights: --weights"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # unpickling fails in many ways
        checkpoint = None
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("gi_model"), dict):
        found = checkpoint["gi_model"].get("version")
        if found != VERSION:
            raise InputError(
                f"--resume: {path} is of version {found} of this training, expected {VERSION}; {instead}"
            )
        return checkpoint
    try:
        return {**load_run(path), "pytorch-lightning_version": lightning.__version__}
    except CheckpointError as error:
        raise InputError(f"--resume: {error}; {instead}") from error


class Last(Callback):
    """Keeps ``last.ckpt``: every so many steps, when a run ends, and when it is asked to stop.

    Ctrl-C and SIGTERM save after the current step and stop; SIGUSR1 saves and goes on. A second Ctrl-C
    stops at once. Checkpoints are written between steps only, so gathered gradients are never lost.

    Args:
        folder: where.
        every: steps.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.path, self.every = folder / LAST, every
        self.saving = self.stopping = False
        self.saved = self.seen = -1  # steps
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved = self.seen = pl_module.steps  # type: ignore[assignment]
        self._handle(signal.SIGINT, self._stop)
        self._handle(signal.SIGTERM, self._stop)
        if hasattr(signal, "SIGUSR1"):
            self._handle(signal.SIGUSR1, self._save)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps: Any = pl_module.steps
        if steps == self.seen:  # gradients are gathering
            return
        self.seen = steps
        stopping, saving = self.stopping, self.saving or self.stopping
        if trainer.world_size > 1:  # all processes have to agree
            stopping = trainer.strategy.reduce_boolean_decision(stopping, all=False)
            saving = stopping or trainer.strategy.reduce_boolean_decision(saving, all=False)
        if saving or steps % self.every == 0:
            self._write(trainer, pl_module)
        if stopping:
            raise Stopped(steps)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.steps != self.saved:
            self._write(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, earlier in self.handlers.items():
            signal.signal(number, earlier)
        self.handlers.clear()

    def _write(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)
        self.saved, self.saving = module.steps, False  # type: ignore[assignment]

    def _handle(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        try:
            self.handlers[number] = signal.signal(number, handler)
        except ValueError:  # not in the main thread
            return

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.saving = True


def best(folder: Path, monitored: str) -> ModelCheckpoint:
    """Keeps the checkpoints with the best ``ckpt_monitor``, as ``epoch=000012-step=00003456.ckpt``.

    Args:
        folder: where.
        monitored: what ``ckpt_monitor`` is; the lowest FID is best, the highest of anything else.
    """
    return ModelCheckpoint(
        dirpath=folder,
        filename="{epoch:06.0f}-{step:08.0f}",
        monitor="ckpt_monitor",
        mode="min" if monitored == "fid" else "max",
        save_top_k=BEST,
    )
