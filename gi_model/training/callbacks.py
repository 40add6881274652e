"""What Lightning's trainer does beside training: pictures, speed, progress, logs."""

from __future__ import annotations

import sys
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from gi_model.errors import InputError
from gi_model.sheet import write_png
from gi_model.staging import staged
from gi_model.training.pictures import sheets

WINDOW = 50  # batches, of which speed is the mean


def loggers(folder: str | Path) -> list[Logger]:
    """Logs of a run: ``tensorboard/`` and ``csv/version_N/metrics.csv``, one N per start of the run."""
    return [TensorBoardLogger(folder, "tensorboard", ""), CSVLogger(folder, "csv")]


class Pictures(Callback):
    """Draws batches: PNG files, and the same pictures in TensorBoard.

    Of training: batches 1, 2, 4, 8 and so on up to 512 of the run, and every ``every``-th. Of validation:
    the first batch of each data set. Files are named as published, ``KEY_gs-STEP_e-EPOCH_b-BATCH.png`` in
    ``train/`` or ``val/``, with the keys of :func:`~gi_model.training.pictures.sheets`.

    While a batch is to be drawn, the module's ``wants_pictures`` is true; the module then leaves a
    :class:`~gi_model.training.pictures.Sample` in ``latest``. Where the run is, all callbacks here learn
    from the module: Lightning's own counters know nothing of earlier starts.

    Args:
        folder: where the files go.
        every: batches.
        count: images of a batch.
    """

    def __init__(self, folder: str | Path, every: int = 750, count: int = 4) -> None:
        for name, value in (("every", every), ("count", count)):
            if value < 1:
                raise InputError(f"{name}: expected at least 1, got {value}")
        self.folder, self.every, self.count = Path(folder), every, count
        self._where = (0, 0)  # epoch and batch of what is to be drawn

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        number = module.batches_done + 1
        due = number % self.every == 0 or (number <= 512 and number & (number - 1) == 0)
        self._ask(trainer, module, due)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self._draw(trainer, module, "train")

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, index: int, dataset: int = 0
    ) -> None:
        self._ask(trainer, module, index == 0)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        index: int,
        dataset: int = 0,
    ) -> None:
        self._draw(trainer, module, f"val_{dataset}" if dataset else "val")

    def _ask(self, trainer: Trainer, module: Any, due: bool) -> None:
        module.wants_pictures, module.latest = due and trainer.is_global_zero, None
        self._where = module.epoch, module.number

    @rank_zero_only
    def _draw(self, trainer: Trainer, module: Any, phase: str) -> None:
        sample, module.wants_pictures, module.latest = module.latest, False, None
        if sample is None:
            return
        epoch, number = self._where
        for key, picture in sheets(sample, self.count).items():
            name = f"{key}_gs-{module.steps:06d}_e-{epoch:06d}_b-{number:06d}.png"
            path = self.folder / phase / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with staged(path) as temporary:
                write_png(temporary, picture)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(f"{phase}/{key}", picture, module.steps, dataformats="HWC")


class Throughput(Callback):
    """Measures speed and logs it as ``train/images_per_second``.

    Attributes:
        images_per_second: of all processes, over the last 50 batches, data loading included and
            validation left out; 0 before there are any.
        left: seconds until the last batch, at the pace of this start of the run, validation included.
    """

    def __init__(self) -> None:
        self.images_per_second = self.left = 0.0
        self._taken: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._begun = self._mark = 0.0
        self._before = 0

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self._begun = self._mark = time.perf_counter()
        self._before = module.batches_done

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._mark = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        now = time.perf_counter()
        self._taken.append((len(batch["image"]) * trainer.world_size, now - self._mark))
        self._mark = now
        self.images_per_second = sum(n for n, _ in self._taken) / sum(t for _, t in self._taken)
        pace = (now - self._begun) / max(1, module.batches_done - self._before)
        self.left = max(0, module.batches_in_all - module.batches_done) * pace
        module.log("train/images_per_second", self.images_per_second)


class Progress(RichProgressBar):
    """A bar on the terminal with speed and the time left in the run; without one, a line now and then.

    Args:
        throughput: what measures.
        every: seconds between lines.
    """

    def __init__(self, throughput: Throughput, every: float = 60) -> None:
        self.throughput, self.every = throughput, every
        self.bar = sys.stderr.isatty()
        self._said = float("-inf")
        super().__init__(refresh_rate=4 if self.bar else 0, console_kwargs={"stderr": True})

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """What stands beside the bar: speed, time left, and what the module logs for it."""
        shown = {k: v for k, v in super().get_metrics(trainer, module).items() if k != "v_num"}
        return {
            "images/s": f"{self.throughput.images_per_second:.2f}",
            "left": str(timedelta(seconds=round(self.throughput.left))),
            **shown,
        }

    @property
    def total_train_batches(self) -> int:
        """Of the whole run: to Lightning, a run is one epoch without end."""
        module: Any = self.trainer.lightning_module
        return module.batches_in_all

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, module.batches_done - 1)
        now = time.perf_counter()
        if self.bar or now < self._said + self.every or not trainer.is_global_zero:
            return
        self._said = now
        metrics = self.get_metrics(trainer, module)
        values = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        where = f"epoch {module.epoch}, batch {module.batches_done} of {module.batches_in_all}"
        print(f"{where}: {values}", file=sys.stderr, flush=True)

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"  # in place of Lightning's count of epochs
