"""All that a checkpoint of a training run needs to go on, beside its weights."""

from __future__ import annotations

import os
from typing import Any

from gi_model.checkpoints.archives import Archive
from gi_model.checkpoints.descriptions import Opaque, ProblemError, TensorCall
from gi_model.checkpoints.loading import opened, read_tensors
from gi_model.checkpoints.pickles import MOST_OPERATIONS
from gi_model.errors import CheckpointError

DEEPEST = 6  # optimizer_states / one / state / a parameter's / name / value
COUNTS = ("epoch", "global_step")
LISTS = ("optimizer_states", "lr_schedulers")


def load_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Weights, states of optimizers and schedules, and where a run is; nothing that the file says is run.

    Args:
        path: a checkpoint as PyTorch Lightning writes it.

    Returns:
        ``state_dict``: names and tensors; ``optimizer_states`` and ``lr_schedulers``: lists of dicts of
        plain values and tensors; ``epoch`` and ``global_step``. Objects of any class, such as NumPy's
        numbers, are left out of dicts, and are None in lists.

    Raises:
        CheckpointError: as ``load_checkpoint``, or the file holds weights alone.
        OSError: as the file system gives them.
    """
    path = os.fspath(path)
    try:
        with opened(path) as source:
            whole = source.whole if isinstance(source, Archive) else None
            lacking = [key for key in (*COUNTS, *LISTS) if not isinstance(whole, dict) or key not in whole]
            if lacking:
                raise ProblemError(f"is no checkpoint of a training run: without {', '.join(lacking)}")
            assert isinstance(whole, dict)
            if not all(isinstance(whole[key], list) for key in LISTS) or not all(
                type(whole[key]) is int for key in COUNTS
            ):
                raise ProblemError(
                    f"expected lists for {', '.join(LISTS)} and numbers for {', '.join(COUNTS)}"
                )
            found: dict[str, Any] = {}
            states = _Plain(found).of([whole[key] for key in LISTS])
            weights = source.entries()
            tensors = read_tensors(source, {**{f"state_dict/{k}": v for k, v in weights.items()}, **found})
    except ProblemError as problem:
        raise CheckpointError(f"{path}: {problem}") from problem
    return {
        "state_dict": {name: tensors[f"state_dict/{name}"] for name in weights},
        **{key: _filled(value, tensors) for key, value in zip(LISTS, states, strict=True)},
        **{key: whole[key] for key in COUNTS},
    }


class _Plain:
    """Copies what a pickle described, up to a depth; names descriptions of tensors in ``found``."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found, self.left = found, MOST_OPERATIONS

    def of(self, value: Any, depth: int = DEEPEST) -> Any:
        self.left -= 1  # the same list may stand in many places
        if self.left < 0:
            raise ProblemError("describes too many values")
        if isinstance(value, TensorCall):
            name = f"tensor {len(self.found)}"
            self.found[name] = value
            return _Named(name)
        if isinstance(value, dict | list | tuple) and not depth:
            return None
        if isinstance(value, dict):
            kept = (
                (k, v) for k, v in value.items() if not isinstance(k, Opaque) and not isinstance(v, Opaque)
            )
            return {key: self.of(item, depth - 1) for key, item in kept}
        if isinstance(value, list | tuple):
            return [self.of(item, depth - 1) for item in value]
        return value if isinstance(value, bool | int | float | str) else None


class _Named(str):
    """Stands for the tensor of that name."""


def _filled(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, _Named):
        return tensors[value]
    if isinstance(value, dict):
        return {key: _filled(item, tensors) for key, item in value.items()}
    return [_filled(item, tensors) for item in value] if isinstance(value, list) else value
