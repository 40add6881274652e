"""Train a generator. The run is described by a YAML file, ours or as published, and by key.sub=value, which
come last and win. Its folder, logs/<date>_<name>, holds the configuration, checkpoints (last.ckpt and the
best), and logs.

Ctrl-C saves after the current step; gi-model train --resume FOLDER goes on with the same numbers, also after
the process was killed. Several GPUs: --gpus 0,1, or torchrun --no-python gi-model train ...
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gi_model.errors import InputError
from gi_model.training.trainer_options import KEPT, NAMES, of_trainer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from gi_model.flow import Stage
    from gi_model.training.configuration import Configuration

NAME = "train"
SUMMARY = "train a generator on photos"
EXTRA = "training"

FOLDER = "GI_MODEL_RUN"  # environment variable

YES, NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.usage = (
        "gi-model train --config FILE [options] [key.sub=value ...]\n"
        "       gi-model train --resume FOLDER [options] [key.sub=value ...]"
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key.sub=value", help="replace what the files say; values are YAML")
    run = parser.add_argument_group("the run")
    run.add_argument("-c", "--config", metavar="FILE", help="a YAML file, ours or published")
    run.add_argument(
        "-b", "--base", nargs="*", default=[], metavar="FILE", help="YAML files, merged from left to right"
    )
    run.add_argument("-n", "--name", help="of the run's folder (default: of the configuration)")
    run.add_argument("-f", "--postfix", default="", help="appended to the folder's name")
    run.add_argument("-l", "--logdir", default="logs", metavar="DIR", help="holds the folders (default logs)")
    run.add_argument(
        "-r", "--resume", metavar="PATH", help="go on with a run: its folder, or a checkpoint in it"
    )
    run.add_argument("--resume_from_checkpoint", metavar="FILE", help="go on from it in a new folder")
    run.add_argument("--weights", metavar="FILE", help="begin with weights, such as a released .ckpt")
    run.add_argument("-s", "--seed", type=int, metavar="N", help="of all random numbers (default 23)")
    run.add_argument("--steps", type=int, metavar="N", help="stop after N steps")
    run.add_argument("--epochs", type=int, metavar="N", help="stop after N epochs")
    how = parser.add_argument_group("how")
    how.add_argument("--no-perceptual", action="store_true", help="leave the perceptual term out")
    how.add_argument(
        "--perceptual-eval",
        action="store_true",
        help="keep the perceptual encoder in eval mode (published: its batch norms are in training mode)",
    )
    how.add_argument(
        "--flow", choices=("raft", "dis", "planar", "none"), help="dis and planar need no weights"
    )
    how.add_argument("--flow-checkpoint", metavar="FILE", help="weights of RAFT, such as raft-things.pth")
    how.add_argument("--ema", type=float, metavar="DECAY", help="validate an average of the generator")
    how.add_argument("--accumulate", type=int, metavar="N", help="batches per step")
    how.add_argument("--precision", metavar="NAME", help="32-true (default, also 32) or bf16-mixed (bf16)")
    how.add_argument(
        "--inception", metavar="FILE", help="choose the best by FID: pt_inception-2015-12-05-6726825d.pth"
    )
    how.add_argument("--compile", action="store_true", help="compile the generator with torch.compile")
    how.add_argument("--backend", metavar="NAME", help="of the operators: auto (default), reference, ...")
    how.add_argument("--gpus", metavar="0,1", help="indices of GPUs")
    how.add_argument("--nodes", type=int, metavar="N", help="machines")
    how.add_argument("--validate-every", type=int, metavar="N", help="steps between validations")
    published = parser.add_argument_group("as published; docs/training.md lists all")
    published.add_argument(
        "-t", "--train", nargs="?", const="true", default="true", metavar="BOOL", help="no: only test"
    )
    published.add_argument(
        "--no-test", nargs="?", const="true", default="false", metavar="BOOL", help="do not measure data.test"
    )
    published.add_argument(
        "-d",
        "--debug",
        nargs="?",
        const="true",
        default="false",
        metavar="BOOL",
        help="on an error, start the debugger; move the run's folder to debug_runs/ at the end",
    )
    published.add_argument("-p", "--project", help="no effect")
    published.add_argument("-x", "--xtraspeed", nargs="?", const="true", metavar="BOOL", help="refused")
    for name in NAMES:
        if name not in ("gpus", "precision"):
            text = argparse.SUPPRESS if name not in KEPT else f"trainer option {name}"
            published.add_argument(f"--{name}", nargs="?", const="true", metavar="VALUE", help=text)
    parser.set_defaults(left="nothing was kept but checkpoints that were written before")


def run(options: argparse.Namespace) -> int:
    """``gi-model train``: the exit code."""
    from gi_model.training.callbacks import Pictures, Progress, Throughput
    from gi_model.training.configuration import configuration, merged, read_tree
    from gi_model.training.keeping import LAST, read_run
    from gi_model.training.run import train

    if options.xtraspeed is not None:
        raise InputError("--xtraspeed: DeepSpeed is not used; --gpus 0,1 trains on several GPUs")
    files, overrides = _inputs(options)
    folder, resume, earlier = _resumed(options)
    files = [*earlier, *files]
    if not files:
        raise InputError("--config: expected a YAML file, got none")
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"--config: {file} does not exist")
    if resume is not None:
        read_run(resume)
    tree = merged(read_tree(files, overrides), _flags(options))
    configured = configuration(tree)
    if folder is None:
        folder = _folder(options, files[0])
    first = is_first_process()
    testing = bool(configured.data.test) and not _flag(options, "no_test")
    if not _flag(options, "train"):
        return _only_test(configured, resume, folder) if first else 0
    if first:
        print(f"training in {folder}; the best checkpoints are those by {_monitor(configured)}")
    throughput = Throughput()
    shown = [Pictures(folder / "images", configured.pictures_every), throughput, Progress(throughput)]
    # Processes that this one starts run the same command, and find the folder's name here.
    os.environ[FOLDER] = str(folder)
    try:
        with _debugging(_flag(options, "debug") and first, folder, move=options.resume is None):
            module = train(
                configured,
                folder,
                resume=resume,
                callbacks=shown,
                started=lambda: _write_configuration(tree, folder),
            )
            if first:
                if module.unreadable:
                    print(f"{module.unreadable} photos could not be read and were replaced by others")
                print(f"trained {module.steps} steps; wrote {folder / 'checkpoints' / LAST}")
                if testing:
                    _test(configured, module.step.generator, module.stages[0], folder, module.device)
    finally:
        del os.environ[FOLDER]
    return 0


def is_first_process() -> bool:
    """Whether this is the only process of a run, or the first of several: that one prints and writes."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # of torchrun, Lightning, Slurm
    return all(os.environ.get(name, "0") == "0" for name in names)


def _monitor(configured: Configuration) -> str:
    if configured.monitored == "fid":
        return "FID"
    return f"{configured.monitored.upper()} inside the mask (for FID, as published: --inception FILE)"


def _only_test(configured: Configuration, resume: Path | None, folder: Path) -> int:
    """As the published command does with ``--train false``."""
    from gi_model.checkpoints import load_checkpoint
    from gi_model.configs import build_generator
    from gi_model.evaluation.loading import chosen_device
    from gi_model.published import load_published
    from gi_model.training.run import build_stage

    if resume is None:
        raise InputError("--train: without training, expected --resume_from_checkpoint FILE, got none")
    if not configured.data.test:
        raise InputError("data.test: expected a set to measure, got none; gi-model evaluate takes any")
    generator = build_generator(configured.generator)
    load_published(generator, load_checkpoint(resume), "generator.")
    device, stage = chosen_device(None), build_stage(configured, generator)
    _test(configured, generator, stage, folder, device)
    return 0


def _test(
    configured: Configuration, generator: nn.Module, stage: Stage | None, folder: Path, device: torch.device
) -> None:
    from torch import nn

    from gi_model.generator import Generator
    from gi_model.training.testing import measure_test_sets

    assert isinstance(generator, Generator)

    if isinstance(stage, nn.Module):
        stage.to(device)
    measure_test_sets(configured, generator, stage, folder / "test", device)
    print(f"wrote {folder / 'test' / 'results.csv'}, {folder / 'test' / 'results.json'}")


@contextmanager
def _debugging(wanted: bool, folder: Path, move: bool) -> Iterator[None]:
    """On an error, Python's debugger where it happened; in the end the folder goes to ``debug_runs``."""
    if not wanted:
        yield
        return
    import pdb
    import sys

    try:
        yield
    except Exception:
        pdb.post_mortem(sys.exc_info()[2])
        raise
    finally:
        if move and folder.exists():
            target = folder.parent / "debug_runs" / folder.name
            target.parent.mkdir(exist_ok=True)
            folder.rename(target)
            print(f"moved {folder} to {target}")


def _flag(options: argparse.Namespace, name: str) -> bool:
    """A published switch: yes, true, t, y, 1 and their opposites."""
    value = getattr(options, name).lower()
    if value not in YES + NO:
        raise InputError(f"--{name.replace('_', '-')}: expected true or false, got {value}")
    return value in YES


def _inputs(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Files and overrides; an override may stand behind an option that takes several words."""
    words = [*options.base, *options.overrides]
    files = [options.config] if options.config else []
    overrides = [word for word in words if "=" in word]
    for name, default in (("train", "true"), ("no_test", "true"), ("debug", "true")):
        if "=" in getattr(options, name):
            overrides.insert(0, getattr(options, name))
            setattr(options, name, default)
    stray = [word for word in options.overrides if "=" not in word]
    if stray:
        raise InputError(f"override: expected key.sub=value, got {stray[0]!r}")
    return [*files, *(word for word in options.base if "=" not in word)], overrides


def _resumed(options: argparse.Namespace) -> tuple[Path | None, Path | None, list[str]]:
    """Folder, checkpoint and configurations of the run that is to go on."""
    if options.resume is None:
        given = options.resume_from_checkpoint
        return None, None if given is None else Path(given), []
    for name in ("name", "resume_from_checkpoint"):
        if getattr(options, name) is not None:
            raise InputError(f"--resume: expected no --{name} with it, got {getattr(options, name)}")
    resume = Path(options.resume)
    if resume.is_dir():
        resume = resume / "checkpoints" / "last.ckpt"
    folder = resume.absolute().parent.parent
    return folder, resume, sorted(map(str, (folder / "configs").glob("*.yaml")))


def _flags(options: argparse.Namespace) -> dict[str, Any]:
    """What options say, as a tree of our keys."""
    from gi_model.training.configuration import merged

    trainer = of_trainer({name: getattr(options, name) for name in NAMES})
    given: dict[str, Any] = {
        "weights": options.weights,
        "seed": options.seed,
        "steps": options.steps,
        "epochs": options.epochs,
        "accumulate": options.accumulate,
        "inception": options.inception,
        "backend": options.backend,
        "nodes": options.nodes,
        "validate_every": options.validate_every,
        "compile": options.compile or None,
        "averaging": None if options.ema is None else {"decay": options.ema},
    }
    tree = trainer | {key: value for key, value in given.items() if value is not None}
    losses = {"perceptual": 0} if options.no_perceptual else {}
    if options.perceptual_eval:
        losses["perceptual_eval"] = True
    flow = {"kind": options.flow, "checkpoint": options.flow_checkpoint}
    sections = {"losses": losses, "flow": {key: value for key, value in flow.items() if value is not None}}
    return merged(tree, {key: value for key, value in sections.items() if value})


def _folder(options: argparse.Namespace, first: str) -> Path:
    """A new run's folder."""
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER])
    name = f"{time.strftime('%Y-%m-%dT%H-%M-%S')}_{options.name or Path(first).stem}{options.postfix}"
    return Path(options.logdir) / name


def _write_configuration(tree: dict[str, Any], folder: Path) -> None:
    """Keep what the run is made of, in place of what an earlier start of it kept."""
    import yaml

    from gi_model.staging import staged

    path = folder / "configs" / "project.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as temporary:
        temporary.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
