"""Convert a checkpoint of training, ours or published, into one that holds nothing but weights, under their
published names: a .ckpt that the published code reads (its --resume_from_checkpoint with --train false), or
.safetensors.

With --run the .ckpt also holds states of optimizers and schedules, epoch and step: the published training
goes on from it, and so does gi-model train --resume_from_checkpoint, which takes published checkpoints as
they are, too. An epoch that was going on begins again.

Nothing in FILE is run. gi-model train --weights takes weights as the beginning of a run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gi_model.errors import InputError

if TYPE_CHECKING:
    import torch

NAME = "convert-checkpoint"
SUMMARY = "a training checkpoint to or from the published layout; weights as .ckpt or .safetensors"
EXTRA = "evaluation"

GENERATOR, AVERAGE = "generator.", "generator_average."
DTYPES = ("float32", "bfloat16", "float16")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add("checkpoint", metavar="FILE", help="a checkpoint of training, ours or published")
    add("-o", "--output", required=True, metavar="OUT", help="a new .ckpt or .safetensors file")
    add(
        "--run",
        dest="whole",
        action="store_true",
        help="also what a run needs to go on, in the published layout",
    )
    add(
        "--complete-with",
        metavar="FILE",
        help="a published checkpoint, from which to take the networks that the published code wants and the "
        "other FILE lacks, those of its evaluators",
    )
    add("--generator-only", action="store_true", help="leave out the discriminator and all other networks")
    add("--average", action="store_true", help="take the average of the generator (train --ema)")
    add("--dtype", choices=DTYPES, help="of the weights (default: as they are)")


def run(options: argparse.Namespace) -> int:
    """``gi-model convert-checkpoint``: the exit code."""
    from gi_model.checkpoints import load_checkpoint

    output = Path(options.output)
    if output.suffix not in (".ckpt", ".safetensors"):
        raise InputError(f"-o: expected a name that ends in .ckpt or .safetensors, got {output}")
    if output.exists():
        raise InputError(f"-o: {output} exists; name a new file")
    if options.whole:
        return _convert_run(options, output)
    state = load_checkpoint(options.checkpoint)
    if not any(key.startswith(GENERATOR) for key in state):
        raise InputError(f"FILE: {options.checkpoint} holds no weights of a generator")
    if options.average:
        averaged = {k.replace(AVERAGE, GENERATOR, 1): v for k, v in state.items() if k.startswith(AVERAGE)}
        if not averaged:
            raise InputError(f"--average: {options.checkpoint} holds no average, expected one of train --ema")
        state |= averaged
    state = {key: value for key, value in state.items() if not key.startswith(AVERAGE)}
    if options.generator_only:
        state = {key: value for key, value in state.items() if key.startswith(GENERATOR)}
    if options.complete_with is not None:
        state = _completed(state, options.complete_with)
    if options.dtype is not None:
        state = {key: _cast(value, options.dtype) for key, value in state.items()}
    _write({"state_dict": state}, output)
    print(f"wrote {len(state)} tensors to {output}")
    return 0


def _convert_run(options: argparse.Namespace, output: Path) -> int:
    from gi_model.checkpoints import load_run
    from gi_model.training.optimizer_states import for_published

    for name in ("average", "generator_only", "dtype"):
        if getattr(options, name):
            raise InputError(
                f"--{name.replace('_', '-')}: expected none with --run, whose states would not fit"
            )
    if output.suffix != ".ckpt":
        raise InputError(f"-o: expected a name that ends in .ckpt with --run, got {output}")
    run = for_published(load_run(options.checkpoint))
    state = {key: value for key, value in run["state_dict"].items() if not key.startswith(AVERAGE)}
    if options.complete_with is not None:
        state = _completed(state, options.complete_with)
    _write({**run, "state_dict": state}, output)
    print(f"wrote {len(state)} tensors and the run after {run['global_step']} steps to {output}")
    return 0


def _completed(state: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """``state`` and what the checkpoint in ``path`` has besides."""
    from gi_model.checkpoints import load_checkpoint

    others = load_checkpoint(path)
    return state | {k: v for k, v in others.items() if k not in state and not k.startswith(AVERAGE)}


def _cast(value: torch.Tensor, dtype: str) -> torch.Tensor:
    """Counters stay whole numbers."""
    import torch

    return value.to(getattr(torch, dtype)) if value.is_floating_point() else value


def _write(checkpoint: dict[str, Any], output: Path) -> None:
    from gi_model.staging import staged

    with staged(output) as temporary:
        if output.suffix == ".safetensors":
            from safetensors.torch import save_file

            # The format has no shared tensors: those under several names are written several times.
            state = checkpoint["state_dict"]
            save_file({key: value.clone().contiguous() for key, value in state.items()}, temporary)
        else:
            import torch

            torch.save(checkpoint, temporary)
