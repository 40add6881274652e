"""The training as Lightning runs it; needs the extra ``training``."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, SequentialSampler

from gi_model.data import Batches, Draws, Photos, ValidationSet
from gi_model.data.loading import loader
from gi_model.errors import InputError
from gi_model.evaluation.frechet import frechet_distance
from gi_model.evaluation.precision import full_float32
from gi_model.evaluation.similarity import ssim_map
from gi_model.flow import FlowStage, Stage
from gi_model.published import export_published, load_published
from gi_model.training.configuration import Configuration, OptimizerOptions, as_tree
from gi_model.training.keeping import VERSION
from gi_model.training.objective import Terms
from gi_model.training.optimizer_states import (
    completed,
    numbered_as_own,
    numbered_as_published,
    schedule_state,
    steps_done,
)
from gi_model.training.pictures import Sample
from gi_model.training.step import Alternation, Batch, Step, evaluating, filled
from gi_model.training.watch import Watch

#: Prefixes of the parts of a published checkpoint.
GENERATOR, DISCRIMINATOR, AVERAGE = "generator.", "discriminator.", "generator_average."
ENCODER, RAFT = "loss_resnet_pl.impl.", "flow.raft."


class TrainingModule(pl.LightningModule):
    """Both passes of each batch by the rules of :class:`Alternation`, validation, and what checkpoints hold.

    Where a run is lies in ``epoch``, ``number`` (batches done in this epoch) and ``steps`` (optimizer steps),
    not in Lightning's counters: to Lightning a run is one epoch without end. A checkpoint's ``state_dict``
    has the published names, and its optimizers number parameters as the published ones do, so that everything
    which reads published checkpoints reads these too; a run goes on from published ones as well.

    ``batches_done`` and ``batches_in_all`` say how far a run is. While ``wants_pictures`` is true, batches
    are left in ``latest``. ``train/<term>`` are logged per batch; ``val/<set>/psnr`` and ``ssim``, of the
    composite inside the mask, per validation, with Inception ``val/<set>/fid`` of whole composites; and the
    one by which checkpoints are kept as ``ckpt_monitor``.

    Args:
        configuration: of the run.
        step: the networks and the objective.
        photos: to learn from.
        sets: to validate with, by name.
        stage: estimates flow; None for generators without.
        inception: the network whose features FID compares; None for no FID.
    """

    def __init__(
        self,
        configuration: Configuration,
        step: Step,
        photos: Photos,
        sets: Mapping[str, ValidationSet] | None = None,
        stage: Stage | None = None,
        inception: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.allow_zero_length_dataloader_with_multiple_devices = True  # more processes than samples
        self.configuration, self.step, self.photos, self.sets = configuration, step, photos, dict(sets or {})
        self.stages = (stage,)  # no submodule: it stays in eval mode and is not learnt
        self.judges = () if inception is None else (inception,)  # the same
        self.average: AveragedModel | None = None
        if configuration.averaging is not None:
            decay = get_ema_multi_avg_fn(configuration.averaging.decay)
            self.average = AveragedModel(step.generator, multi_avg_fn=decay)
            self.average.requires_grad_(False)
        self.watch = Watch()
        self.epoch = self.number = self.steps = 0
        self.unreadable = 0
        self.random_state: dict[str, Any] | None = None  # to be restored when the first batch comes
        self.wants_pictures = False
        self.latest: Sample | None = None
        self._sums: list[torch.Tensor] = []
        self._features: list[list[torch.Tensor]] = []  # per set and batch, [2,B,D]: of composites, of truth

    def configure_optimizers(self) -> Any:
        """Both optimizers and their schedules, of which :class:`Alternation` takes care."""
        given = self.configuration
        rate = given.rate(self.trainer.world_size)
        options = (given.generator_optimizer, given.discriminator_optimizer)
        optimizers = [_optimizer(*pair, rate) for pair in zip(self._networks(), options, strict=True)]
        self.alternation = Alternation(
            self.step,
            (optimizers[0], optimizers[1]),
            given.schedule,
            given.accumulate,
            backward=self._backward,
            inspect=self._inspect,
            rescale=given.rescale_last_window,
        )
        return optimizers, self.alternation.schedules

    def _networks(self) -> tuple[nn.Module, nn.Module]:
        """What the optimizers learn, in their order."""
        return self.step.generator, self.step.discriminator

    def _backward(self, loss: torch.Tensor, stepping: bool) -> None:
        """Gradients; processes share them when they are complete."""
        waiting = self.trainer.world_size > 1 and not stepping
        with self.trainer.strategy.block_backward_sync() if waiting else nullcontext():  # type: ignore[attr-defined]
            self.manual_backward(loss)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches from where the run is, without end."""
        data = self.configuration.data
        draws = Draws(len(self.photos), self.configuration.seed, self.global_rank, self.trainer.world_size)
        self.batches = Batches(draws, data.batch_size, self.epoch, self.number)
        return loader(self.photos, self.batches, None, data.workers)

    def val_dataloader(self) -> list[DataLoader[dict[str, Any]]]:
        """The validation sets, of which each process has every so-manieth sample."""
        data, rank, world = self.configuration.data, self.global_rank, self.trainer.world_size
        shares = [_Share(samples, range(rank, len(samples), world)) for samples in self.sets.values()]
        return [loader(share, SequentialSampler(share), data.batch_size, data.workers) for share in shares]

    def on_fit_start(self) -> None:
        """Bring the stage to where the networks are, and tell Lightning where the run is."""
        for part in (*self.stages, *self.judges):
            if isinstance(part, nn.Module):
                part.to(self.device)
        wrapped: Any = self.optimizers()  # through which precision and Lightning's counters go
        self.alternation.optimizers = tuple(wrapped)  # type: ignore[assignment]
        self.alternation.global_step = self.steps
        loop = self.trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = self.steps
        loop.manual_optimization.optim_step_progress.total.completed = self.alternation.passes * self.steps
        for name in ("ready", "started", "processed", "completed"):
            setattr(loop.batch_progress.total, name, self.batches_done)

    def training_step(self, samples: Mapping[str, Any], index: int) -> None:
        """The passes of a batch."""
        if self.random_state is not None:
            _set_random_state(self.random_state)
            self.random_state = None
        self.unreadable += int(samples["unreadable"].sum())
        batch = self.batch(samples)
        steps = self.alternation.global_step
        self.inspected: dict[str, float] = {}
        self.alternation.batch(batch, self.number, last=self.number + 1 == self.batches.per_epoch)
        self.number += 1
        if self.number == self.batches.per_epoch:
            self.epoch, self.number = self.epoch + 1, 0
        self.steps = self.alternation.global_step
        if self.steps > steps:
            self._take_average()
        rates = {f"train/lr_{i}": s.get_last_lr()[0] for i, s in enumerate(self.alternation.schedules)}
        # Loggers take their x from "step".
        self.log_dict({**self.inspected, **rates, "step": float(self.steps), "epoch": float(self.epoch)})
        if self.wants_pictures:
            self.latest = self.pictured(batch)
        if self.configuration.steps is not None and self.steps >= self.configuration.steps:
            self.trainer.should_stop = True
        if self.epoch >= self.configuration.epochs:
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        """Photos that could not be read are those of all processes."""
        self.unreadable = sum(self._gathered(self.unreadable))

    @property
    def batches_done(self) -> int:
        """Batches of this process since the beginning of the run, also of earlier starts."""
        return self.epoch * self._per_epoch() + self.number

    @property
    def batches_in_all(self) -> int:
        """Batches of this process in the whole run."""
        per_epoch, given = self._per_epoch(), self.configuration
        epochs = given.epochs * per_epoch
        if given.steps is None:
            return epochs
        # An epoch ends with a step, however few batches have gathered.
        whole, rest = divmod(given.steps, -(-per_epoch // given.accumulate))
        return min(epochs, whole * per_epoch + rest * given.accumulate)

    def _per_epoch(self) -> int:
        return -(-len(self.photos) // (self.trainer.world_size * self.configuration.data.batch_size))

    def batch(self, samples: Mapping[str, Any]) -> Batch:
        """A batch with its flow, in float32 also where networks run in low precision."""
        return Batch.of_samples(samples, self.stages[0], self.configuration.flow.sees_hidden)

    @torch.no_grad()
    def pictured(self, batch: Batch) -> Sample:
        """Prediction and attention of the generator in eval mode; attention is empty where there is none."""
        generator = self.step.generator
        attends = bool(getattr(generator, "attends", False))
        with evaluating(generator):
            made = filled(generator, batch, return_attention=True) if attends else filled(generator, batch)
        return Sample(batch, *(made if attends else (made, [])))

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        self._sums = [torch.zeros(3, dtype=torch.float64, device=self.device) for _ in self.sets]
        self._features = [[] for _ in self.sets]

    def validation_step(self, samples: Mapping[str, Any], index: int, dataloader_idx: int = 0) -> None:
        """PSNR and SSIM of composites inside the mask; features of whole composites for FID."""
        batch = self.batch(samples)
        generator: nn.Module = self.step.generator
        if self.average is not None and self.average.n_averaged > 0:
            generator = self.average.module
        if self.wants_pictures:
            self.latest = self.pictured(batch)
        composite = batch.composite(filled(generator, batch).float())
        self._sums[dataloader_idx] += masked_quality(composite, batch.image, batch.mask)
        for inception in self.judges:
            with full_float32(), torch.autocast(self.device.type, enabled=False):
                both = [inception(images.float()) for images in (composite, batch.image)]
            self._features[dataloader_idx].append(torch.stack(both).cpu())

    def on_validation_epoch_end(self) -> None:
        """Log means over all samples of all processes."""
        if self.trainer.sanity_checking:
            return
        for i, (name, sums) in enumerate(zip(self.sets, self._sums, strict=True)):
            psnr, ssim, count = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
            found = {"psnr": psnr / max(count, 1), "ssim": ssim / max(count, 1)}
            if self.judges:
                features = torch.cat(
                    [part for share in self._gathered(self._features[i]) for part in share], 1
                )
                found["fid"] = frechet_distance(features[0], features[1])
            # Lightning keeps metrics in float32.
            values = {f"val/{name}/{key}": float(value) for key, value in found.items()}
            if i == 0:
                values["ckpt_monitor"] = found[self.configuration.monitored]
            self.log_dict({**values, "step": float(self.steps), "epoch": float(self.epoch)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Weights and optimizers in the published layout, and where the run is."""
        checkpoint["state_dict"] = self.published_state()
        pairs = zip(checkpoint["optimizer_states"], self._networks(), strict=True)
        checkpoint["optimizer_states"] = [numbered_as_published(*pair) for pair in pairs]
        del checkpoint["loops"]  # where the run is, stands below
        checkpoint |= {"epoch": self.epoch, "global_step": self.steps}
        checkpoint["gi_model"] = {
            "version": VERSION,
            "configuration": as_tree(self.configuration),
            "epoch": self.epoch,
            "number": self.number,
            "steps": self.steps,
            "samples_per_batch": self.configuration.data.batch_size * self.trainer.world_size,
            "averaged": 0 if self.average is None else int(self.average.n_averaged),
            "watch": self.watch.state_dict(),
            "random": self._gathered(_random_state()),  # one of each process
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where a checkpoint was written, by this training or by the published one."""
        own = checkpoint.get("gi_model")
        self.load_published_state(checkpoint["state_dict"], own is not None)
        checkpoint["state_dict"] = self.state_dict()
        if len(checkpoint["optimizer_states"]) != len(self._networks()):
            raise InputError(f"optimizer_states: expected 2, got {len(checkpoint['optimizer_states'])}")
        pairs = zip(checkpoint["optimizer_states"], self._networks(), strict=True)
        checkpoint["optimizer_states"] = [numbered_as_own(*pair) for pair in pairs]
        if own is None:
            self._go_on_as_published(checkpoint)
            return
        if self.average is not None:
            self.average.n_averaged.fill_(own["averaged"])
        self.epoch, self.number, self.steps = own["epoch"], own["number"], own["steps"]
        per_batch = self.configuration.data.batch_size * self.trainer.world_size
        if own["samples_per_batch"] != per_batch and self.number:
            raise InputError(
                f"--resume: the checkpoint is inside an epoch of {own['samples_per_batch']} samples a batch "
                f"in all processes, this run has {per_batch}"
            )
        self.watch.load_state_dict(own["watch"])
        if len(own["random"]) == self.trainer.world_size:  # otherwise the seed's
            self.random_state = own["random"][self.global_rank]

    def _go_on_as_published(self, checkpoint: dict[str, Any]) -> None:
        """As the published training does: with the next epoch, whatever was left of the last one."""
        schedule, self.steps = self.configuration.schedule, steps_done(checkpoint)
        self.epoch, self.number = checkpoint["epoch"], 0
        states = [completed(state, schedule, self.steps) for state in checkpoint["optimizer_states"]]
        checkpoint["optimizer_states"] = states
        checkpoint["lr_schedulers"] = [schedule_state(state, schedule, self.steps) for state in states]

    def published_state(self) -> dict[str, torch.Tensor]:
        """All weights under their published names; a generator that was never published keeps its own."""
        state = export_published(self.step.generator, GENERATOR)
        state |= export_published(self.step.discriminator, DISCRIMINATOR)
        if isinstance(self.stages[0], FlowStage):
            state |= export_published(self.stages[0].raft, RAFT)
        if self.step.objective.perceptual is not None:
            state |= export_published(self.step.objective.perceptual.encoder, ENCODER)
        if self.average is not None:
            state |= export_published(self.average.module, AVERAGE)
        return state

    def load_published_state(self, state: Mapping[str, torch.Tensor], whole: bool = True) -> None:
        """Take weights of :meth:`published_state`.

        Args:
            whole: otherwise encoder and average may be missing; the average then begins anew.

        Raises:
            InputError: some are missing or do not fit.
        """
        optional = [
            *(
                []
                if self.step.objective.perceptual is None
                else [(self.step.objective.perceptual.encoder, ENCODER)]
            ),
            *([] if self.average is None else [(self.average.module, AVERAGE)]),
        ]
        load_published(self.step.generator, state, GENERATOR)
        load_published(self.step.discriminator, state, DISCRIMINATOR)
        for network, prefix in optional:
            if whole or any(key.startswith(prefix) for key in state):
                load_published(network, state, prefix)

    def _inspect(self, which: int, terms: Terms) -> None:
        """Stop before a loss that is lost is learnt from; log terms, as means over the processes."""
        values = torch.stack([term.detach().float() for term in terms.values()])
        if self.trainer.world_size > 1:
            values = self.trainer.strategy.reduce(values, reduce_op="mean")  # type: ignore[assignment]
        named = dict(zip((_term_name(which, name) for name in terms), values.tolist(), strict=True))
        self.watch(named, self.alternation.global_step)
        self.inspected |= {f"train/{name}": value for name, value in named.items()}

    def _gathered(self, value: Any) -> list[Any]:
        """``value`` of every process."""
        if self.trainer.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.trainer.world_size
        dist.all_gather_object(values, value)
        return values

    def _take_average(self) -> None:
        options = self.configuration.averaging
        if self.average is None or options is None:
            return
        if self.steps >= options.start and (self.steps - options.start) % options.period == 0:
            self.average.update_parameters(self.step.generator)


def masked_quality(composite: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums over images with a mask of PSNR in dB and SSIM inside it, and how many images there are: ``[3]``.

    PSNR is ``-10 log10`` of the mean squared error of an image's masked numbers, at most 100; SSIM the mean
    of the index over masked pixels.

    Args:
        composite, image: ``[B,3,H,W]`` in [0, 1].
        mask: ``[B,1,H,W]``, 1 where missing.
    """
    numbers = 3 * mask.sum(dim=(1, 2, 3))
    error = (mask * (composite - image) ** 2).sum(dim=(1, 2, 3)) / numbers.clamp(min=1)
    with torch.autocast(image.device.type, enabled=False):  # variances are small differences
        index = ssim_map(composite, image)
    similarity = (mask * index).sum(dim=(1, 2, 3)) / numbers.clamp(min=1)
    psnr = -10 * error.clamp(min=1e-10).log10()
    counted = numbers > 0
    return torch.stack([psnr[counted].sum(), similarity[counted].sum(), counted.sum()]).double()


class _Share(torch.utils.data.Dataset):
    """Some of the samples of a data set."""

    def __init__(self, samples: ValidationSet, chosen: Sequence[int]) -> None:
        self.samples, self.chosen = samples, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.samples[self.chosen[index]]


def _optimizer(network: nn.Module, options: OptimizerOptions, rate: float) -> torch.optim.Optimizer:
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.kind]
    betas = (options.betas[0], options.betas[1])
    return kind(
        network.parameters(), options.factor * rate, betas, options.eps, weight_decay=options.weight_decay
    )


def _term_name(which: int, name: str) -> str:
    """The published name of a term of the generator, 0, or of the discriminator, 1."""
    if which == 0:
        return f"gen_{name}"
    return "discr_adv" if name == "adv" else f"adv_discr_{name}"


def _random_state() -> dict[str, Any]:
    """The state of the generators of random numbers, as plain data and tensors."""
    numpy_state: Any = np.random.get_state()
    kind, keys, *rest = numpy_state
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, keys.tolist(), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
