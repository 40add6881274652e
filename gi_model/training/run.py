"""A training run from its configuration; needs the extra ``training``."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from gi_kernels import backend
from gi_model.checkpoints import load_checkpoint
from gi_model.configs import build_generator
from gi_model.data import Photos, ValidationSet, build_mask, find_photos
from gi_model.data.photos import MASKS
from gi_model.discriminator import Discriminator
from gi_model.errors import InputError
from gi_model.evaluation.inception import Inception, inception
from gi_model.flow import RAFT, FlowStage, Stage, stage_without_weights
from gi_model.generator import Generator
from gi_model.published import load_published
from gi_model.training.callbacks import loggers
from gi_model.training.configuration import Configuration, ValidationOptions
from gi_model.training.keeping import LAST, AtomicFiles, Last, Stopped, best
from gi_model.training.module import DISCRIMINATOR, GENERATOR, TrainingModule
from gi_model.training.objective import Objective, Weights
from gi_model.training.perceptual import PerceptualLoss
from gi_model.training.step import Step
from gi_model.training.watch import LossError


def train(
    configuration: Configuration,
    folder: str | Path,
    *,
    resume: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    started: Callable[[], None] = lambda: None,
) -> TrainingModule:
    """Train, and keep in ``folder``: ``checkpoints/last.ckpt``, the best ones beside it, and logs.

    A run that goes on from its ``last.ckpt`` computes what the uninterrupted run would have, to the bit on
    a CPU with the same number of threads, processes and samples per batch.

    Args:
        configuration: of the run.
        folder: of the run; made if it is missing.
        resume: a checkpoint to go on from.
        callbacks: of Lightning, besides those that keep checkpoints.
        started: called in the first process when all is checked, before the first step.

    Returns:
        The trained module.

    Raises:
        InputError: what the configuration names is missing or does not fit, or a term of the loss is lost
            (``LossError``); ``last.ckpt`` is then from before.
        KeyboardInterrupt: stopped by a signal; its message says from where to go on.
    """
    folder = Path(folder)
    module = build(configuration)
    checkpoints = folder / "checkpoints"
    validating = bool(module.sets) and configuration.validation_batches != 0
    kept: list[Callback] = [best(checkpoints, configuration.monitored)] if validating else []
    last = checkpoints / LAST
    with backend(configuration.backend), _quiet():
        trainer = pl.Trainer(
            **_devices(configuration),
            num_nodes=configuration.nodes,
            precision=configuration.precision,  # type: ignore[arg-type]
            max_epochs=-1,  # the module says when it is over
            logger=loggers(folder),
            callbacks=[*callbacks, *kept, Last(checkpoints, configuration.save_every)],
            plugins=[AtomicFiles()],
            log_every_n_steps=configuration.log_every,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=None,
            val_check_interval=_validation_interval(configuration, module),
            limit_val_batches=configuration.validation_batches if validating else 0,
            use_distributed_sampler=False,
            enable_progress_bar=any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks),
            enable_checkpointing=bool(kept),  # or Lightning adds its own
            enable_model_summary=False,
            benchmark=True,
            default_root_dir=folder,
        )
        if trainer.global_rank == 0:
            started()
        if configuration.compile:
            module.step.generator.compile()
        try:
            trainer.fit(module, ckpt_path=None if resume is None else str(resume))
        except Stopped:
            raise KeyboardInterrupt(f"step {module.steps} is kept: --resume {last}") from None
        except SystemExit:  # what Lightning makes of a second Ctrl-C
            raise KeyboardInterrupt from None
        except LossError as error:
            kept_at = (
                f"the last good checkpoint is {last}" if last.exists() else "no checkpoint had been written"
            )
            raise LossError(f"{error}; {kept_at}") from None
    return module


def build(configuration: Configuration) -> TrainingModule:
    """Networks, objective and data of a run, checked before anything is computed.

    Raises:
        InputError: as for :func:`train`.
    """
    data, losses = configuration.data, configuration.losses
    if not data.photos:
        raise InputError("data.photos: expected a folder of photos, got none")
    photos = Photos(
        find_photos(data.photos, data.list),
        size=data.size,
        references=data.references,
        scale=data.scale,
        mask=build_mask(data.mask_kind, **(data.masks or (MASKS if data.mask_kind == "mixed" else {}))),
        easy=data.easy,
        seed=configuration.seed,
    )
    sets = validation_sets(data.validation)
    judge = _inception(configuration, sets)
    # Fresh weights are those of the seed; the random numbers of the process go on from there.
    pl.seed_everything(configuration.seed, verbose=False)
    generator = build_generator(configuration.generator)
    unit = 2**generator.downsamplings
    if photos.side % unit or photos.side < 2 * unit:
        raise InputError(
            f"data.size, data.scale: expected frames of a multiple of {unit}, at least {2 * unit}, "
            f"got {photos.side}"
        )
    discriminator = Discriminator(3, configuration.discriminator.width, configuration.discriminator.layers)
    objective = Objective(
        losses.adversarial,
        _perceptual(configuration),
        Weights(losses.l1_known, losses.l1_missing, losses.feature_matching, losses.feature_matching_masked),
    )
    stage = build_stage(configuration, generator)
    if configuration.weights is not None:
        _begin_with(configuration.weights, generator, discriminator)
    step = Step(generator, discriminator, objective)
    return TrainingModule(configuration, step, photos, sets, stage, judge)


def validation_sets(options: Mapping[str, ValidationOptions]) -> dict[str, ValidationSet]:
    """The sets, by name."""
    return {name: ValidationSet(given.data, given.references) for name, given in options.items()}


def _inception(configuration: Configuration, sets: Mapping[str, ValidationSet]) -> Inception | None:
    if configuration.inception is None or not sets:
        return None
    if not Path(configuration.inception).is_file():
        raise InputError(f"inception: {configuration.inception} does not exist")
    batches, size = configuration.validation_batches, configuration.data.batch_size
    for name, samples in sets.items():
        if batches != 0 and (len(samples) < 2 or batches == size == 1):
            raise InputError(f"data.validation.{name}: FID needs at least 2 images")
    return inception(configuration.inception)


def _perceptual(configuration: Configuration) -> PerceptualLoss | None:
    losses = configuration.losses
    if losses.perceptual <= 0:
        return None
    how = "give its weights (losses.perceptual_weights=FILE), or leave the term out with --no-perceptual"
    if losses.perceptual_weights is None:
        raise InputError(f"losses.perceptual_weights: expected weights of the scene encoder, got none; {how}")
    if not Path(losses.perceptual_weights).is_file():
        raise InputError(f"losses.perceptual_weights: {losses.perceptual_weights} does not exist; {how}")
    loss = PerceptualLoss(losses.perceptual, frozen=losses.perceptual_eval)
    loss.load_encoder(load_checkpoint(losses.perceptual_weights))
    return loss


def build_stage(configuration: Configuration, generator: Generator) -> Stage | None:
    """What estimates flow for ``generator``, on the CPU; None where it needs none.

    Raises:
        InputError: weights of RAFT are missing or do not fit.
    """
    flow = configuration.flow
    if not generator.needs_flow:
        return None
    if flow.kind == "none":
        raise InputError("flow.kind: this generator needs flow, expected raft, dis or planar, got none")
    stage = stage_without_weights(flow.kind)
    if stage is not None:
        return stage
    how = "flow.checkpoint=FILE (such as raft-things.pth), or flow.kind=dis or planar, which need none"
    if flow.checkpoint is None:
        raise InputError(f"flow.checkpoint: expected weights of RAFT, got none; {how}")
    if not Path(flow.checkpoint).is_file():
        raise InputError(f"flow.checkpoint: {flow.checkpoint} does not exist; {how}")
    if len(flow.resolution) != 2:
        raise InputError(f"flow.resolution: expected height and width, got {list(flow.resolution)}")
    raft = RAFT.of_published(load_checkpoint(flow.checkpoint))
    return FlowStage(raft, (flow.resolution[0], flow.resolution[1]), flow.iterations)


def _begin_with(path: str, generator: Generator, discriminator: Discriminator) -> None:
    """Weights of a checkpoint in the published layout; without a discriminator that one stays fresh."""
    if not Path(path).is_file():
        raise InputError(f"weights: {path} does not exist")
    state = load_checkpoint(path)
    load_published(generator, state, GENERATOR)
    if any(key.startswith(DISCRIMINATOR) for key in state):
        load_published(discriminator, state, DISCRIMINATOR)


def _devices(configuration: Configuration) -> dict[str, Any]:
    """Accelerator, devices and strategy of a trainer; torchrun's numbers of processes are taken over."""
    launched = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    gpus = torch.cuda.device_count()
    chosen = configuration.devices
    if chosen is not None and not gpus:
        raise InputError("--gpus: this machine has no GPU that PyTorch can use")
    if chosen is not None and (not chosen or not all(0 <= index < gpus for index in chosen)):
        raise InputError(
            f"--gpus: expected some of 0 to {gpus - 1}, got {','.join(map(str, chosen)) or 'none'}"
        )
    if gpus and chosen is not None:
        devices: Any = list(chosen)
        count = len(chosen)
    else:
        devices = count = launched or 1
    several = count * configuration.nodes > 1
    return {
        "accelerator": "gpu" if gpus else "cpu",
        "devices": devices,
        # In each pass one of the networks gets no gradients.
        "strategy": DDPStrategy(find_unused_parameters=True) if several else "auto",
    }


def _validation_interval(configuration: Configuration, module: TrainingModule) -> int:
    """Batches between validations."""
    if configuration.validate_every is not None:
        return configuration.validate_every * configuration.accumulate
    if configuration.validate_every_batches is not None:
        return configuration.validate_every_batches
    world = int(os.environ.get("WORLD_SIZE", "0")) or len(configuration.devices or (0,)) * configuration.nodes
    per_epoch = -(-len(module.photos) // (world * configuration.data.batch_size))
    return max(1, int(per_epoch * configuration.validate_every_epochs))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice about what is as intended here."""
    advice = (
        "does not have many workers", "LR scheduler", "eval mode at the start", "GPU available but not used",
        "exists and is not empty", "callbacks used to create", "IterableDataset", "isinstance.treespec",
    )  # fmt: skip
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for text in advice:
                warnings.filterwarnings("ignore", f".*{text}")
            yield
    finally:
        logger.setLevel(level)
