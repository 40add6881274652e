"""Options of the published trainer, as flags and in ``lightning.trainer``: kept, ineffective, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gi_model.errors import InputError
from gi_model.published import nearest

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "32-true": "32-true", "bf16-mixed": "bf16-mixed"}

#: Options that change nothing here, and why.
WITHOUT_EFFECT = {
    "amp_backend": "mixed precision is PyTorch's",
    "benchmark": "always on",
    "checkpoint_callback": "checkpoints are always kept",
    "default_root_dir": "the run's folder is --logdir and --name",
    "flush_logs_every_n_steps": "logs are written as they come",
    "log_gpu_memory": "not logged",
    "move_metrics_to_cpu": "sums are small",
    "num_sanity_val_steps": "validation sets are checked when a run starts",
    "prepare_data_per_node": "nothing is prepared",
    "process_position": "there is one bar",
    "progress_bar_refresh_rate": "a bar on terminals, else a line a minute",
    "replace_sampler_ddp": "processes share the photos in any case",
    "strategy": "several processes train by DDP",
    "terminate_on_nan": "always on, for exploding losses too",
    "weights_summary": "not shown",
}

#: Options that would change what is computed, and what to do instead.
REFUSED = {
    "amp_level": "levels are those of apex; --precision bf16-mixed is mixed precision",
    "auto_lr_find": "set learning_rate",
    "auto_scale_batch_size": "set data.batch_size",
    "auto_select_gpus": "name them: --gpus 0,1",
    "callbacks": "none can be given in a file",
    "deterministic": "runs on a CPU are; on a GPU, set PyTorch's own switch",
    "devices": "--gpus 0,1",
    "fast_dev_run": "--steps 1 --limit_val_batches 1",
    "gradient_clip_algorithm": "gradients are not clipped, as in the published recipe",
    "gradient_clip_val": "gradients are not clipped, as in the published recipe",
    "ipus": "CPUs and GPUs only",
    "limit_predict_batches": "gi-model propagate predicts",
    "limit_test_batches": "give a shorter list as data.test",
    "limit_train_batches": "--steps N ends a run early; data.list=FILE names fewer photos",
    "logger": "logs are TensorBoard and CSV",
    "max_time": "--steps N, or Ctrl-C, which keeps what was learnt",
    "min_epochs": "nothing ends a run early",
    "min_steps": "nothing ends a run early",
    "multiple_trainloader_mode": "there is one set of photos",
    "num_processes": "torchrun --nproc-per-node N --no-python gi-model train ...",
    "overfit_batches": "data.list=FILE names fewer photos",
    "plugins": "none can be given",
    "profiler": "gi-model demo and benchmarks/ time steps",
    "reload_dataloaders_every_epoch": "samples do not depend on their loaders",
    "reload_dataloaders_every_n_epochs": "samples do not depend on their loaders",
    "stochastic_weight_avg": "--ema DECAY averages the generator",
    "sync_batchnorm": "batch norms see their own process, as published",
    "tpu_cores": "CPUs and GPUs only",
    "track_grad_norm": "losses are logged and watched",
    "truncated_bptt_steps": "there is no sequence",
    "weights_save_path": "checkpoints are in the run's folder",
}


def of_trainer(options: Mapping[str, Any], prefix: str = "--") -> dict[str, Any]:
    """Options of the published trainer as our own keys.

    Args:
        options: values by name; texts, as flags have them, or what YAML makes of them.
        prefix: what a message puts before a name.

    Raises:
        InputError: an unknown option, one that is refused, or a wrong value.
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        if value is None or name in WITHOUT_EFFECT:
            continue
        if name in REFUSED:
            raise InputError(f"{prefix}{name}: not supported; {REFUSED[name]}")
        if name not in KEPT:
            raise InputError(f"{prefix}{name}: unknown{nearest(name, NAMES)}; known: {', '.join(NAMES)}")
        found |= KEPT[name](value, prefix + name)
    return found


def _count(key: str) -> Callable[[Any, str], dict[str, Any]]:
    return lambda value, name: {key: _whole(value, name)}


def _whole(value: Any, name: str) -> int:
    try:
        if not isinstance(value, bool | float):
            return int(value)
    except ValueError:
        pass
    raise InputError(f"{name}: expected a whole number, got {value!r}")


def _precision(value: Any, name: str) -> dict[str, Any]:
    if str(value) not in PRECISIONS:
        raise InputError(f"{name}: expected 32-true (32) or bf16-mixed (bf16), got {value}")
    return {"precision": PRECISIONS[str(value)]}


def _gpus(value: Any, name: str) -> dict[str, Any]:
    given = value if isinstance(value, list | tuple) else str(value).split(",")
    try:
        return {"devices": [int(index) for index in given if str(index).strip()]}
    except ValueError:
        raise InputError(f"{name}: expected indices such as 0,1, got {value}") from None


def _validation_batches(value: Any, name: str) -> dict[str, Any]:
    if str(value) == "1.0":  # all
        return {}
    return {"validation_batches": _whole(value, name)}


def _validation_interval(value: Any, name: str) -> dict[str, Any]:
    """A whole number of batches, or a share of an epoch, written with a point."""
    if isinstance(value, float) or "." in str(value):
        return {"validate_every_epochs": float(value)}
    return {"validate_every_batches": _whole(value, name)}


def _every_epochs(value: Any, name: str) -> dict[str, Any]:
    return {"validate_every_epochs": float(_whole(value, name))}


def _accelerator(value: Any, name: str) -> dict[str, Any]:
    if value not in ("ddp", "auto", "gpu", "cpu"):
        raise InputError(f"{name}: expected ddp, by which several processes train, got {value}")
    return {}


#: Options that are kept: what they are in our own keys.
KEPT: dict[str, Callable[[Any, str], dict[str, Any]]] = {
    "accelerator": _accelerator,
    "accumulate_grad_batches": _count("accumulate"),
    "check_val_every_n_epoch": _every_epochs,
    "distributed_backend": _accelerator,
    "gpus": _gpus,
    "limit_val_batches": _validation_batches,
    "log_every_n_steps": _count("log_every"),
    "max_epochs": _count("epochs"),
    "max_steps": _count("steps"),
    "num_nodes": _count("nodes"),
    "precision": _precision,
    "val_check_interval": _validation_interval,
}

NAMES = sorted({*KEPT, *WITHOUT_EFFECT, *REFUSED})
