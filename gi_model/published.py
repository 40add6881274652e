"""Weights under the names of the published checkpoints, both ways.

A module with published weights has ``published_names()``: for each key of its own state dict, the
published key or keys that hold the same tensor. Everything here works with any such module.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from gi_model.errors import InputError

Names = dict[str, tuple[str, ...]]

SUGGESTIONS = 20  # per list: each is compared with every candidate, which takes a while


@runtime_checkable
class Published(Protocol):
    """A module whose weights have been published, perhaps under other names."""

    def published_names(self) -> Names:
        """Own state-dict key -> the published keys of the same tensor."""
        ...


def renamed(module: nn.Module, names: Mapping[str, str]) -> Names:
    """Published names of ``module`` from those of its parts.

    Args:
        module: what the names belong to.
        names: own name of a part (a submodule at any depth, a parameter or a buffer) -> its published
            name. Submodules without ``published_names`` keep the names of their tensors.
    """
    own: Names = {}
    for part, published in names.items():
        parent, _, leaf = part.rpartition(".")
        child = getattr(module.get_submodule(parent), leaf)
        if isinstance(child, torch.Tensor):
            own[part] = (published,)
            continue
        inner = child.published_names() if isinstance(child, Published) else identical(child)
        own |= {f"{part}.{key}": tuple(f"{published}.{name}" for name in inner[key]) for key in inner}
    return own


def identical(module: nn.Module) -> Names:
    """The names of a module that names its tensors as published."""
    return {key: (key,) for key in module.state_dict()}


def load_published(module: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str = "") -> None:
    """Load published weights; either all of them fit, or nothing is changed.

    Args:
        module: any module with ``published_names()``.
        state_dict: published key -> tensor. One dtype may be loaded into another.
        prefix: only keys with it are looked at, without it: ``"generator."`` for a training checkpoint.

    Raises:
        InputError: keys are missing or unexpected, tensors have other shapes or are none, or keys that
            are names of one tensor hold different ones. The message lists them all.
        TypeError: ``module`` has no published names.
    """
    names = _names(module)
    own = module.state_dict()
    given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    problems = _problems(names, own, given)
    if problems:
        heading = f"state_dict: these weights do not fit {type(module).__name__}"
        heading += f" (of the keys that begin with {prefix!r})" if prefix else ""
        hint = _prefix_hint(names, state_dict, prefix)
        raise InputError("\n".join([heading + ":", *problems, *hint]))
    module.load_state_dict({key: given[published[0]] for key, published in names.items()})


def export_published(module: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """The weights of ``module`` under their published names; tensors are shared, as in a state dict.

    Raises:
        TypeError: ``module`` has no published names.
    """
    own = module.state_dict()
    return {prefix + name: own[key] for key, published in _names(module).items() for name in published}


def parameter_order(module: nn.Module) -> list[str]:
    """Own names of the parameters of ``module`` in the order in which published optimizers number them.

    That of PyTorch: each published module's own tensors, then those of its parts, one part after another.
    ``published_names`` has the parts of a module in the order in which the published one makes them.

    Raises:
        TypeError: ``module`` has no published names.
    """
    trained = {name for name, _ in module.named_parameters()}
    tree: dict[str, Any] = {}
    for own, published in _names(module).items():
        *parts, leaf = published[0].split(".")
        branch = tree
        for part in parts:
            branch = branch.setdefault(part, {})
        branch[leaf] = own
    return [own for own in _leaves_first(tree) if own in trained]


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)``, or nothing where no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _names(module: nn.Module) -> Names:
    if not isinstance(module, Published):
        raise TypeError(f"module: expected one with published_names(), got {type(module).__name__}")
    return module.published_names()


def _leaves_first(tree: Mapping[str, Any]) -> Iterator[str]:
    yield from (value for value in tree.values() if isinstance(value, str))
    for value in tree.values():
        if not isinstance(value, str):
            yield from _leaves_first(value)


def _problems(names: Names, own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> list[str]:
    """Lines that say what does not fit; none if all does."""
    expected = {name: own[key] for key, published in names.items() for name in published}
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    misshapen = [
        f"  {name}: expected {list(like.shape)}, got {_shape(given[name])}"
        for name, like in expected.items()
        if name in given and _shape(given[name]) != str(list(like.shape))
    ]
    # Pairs of names of one tensor, when nothing worse is wrong.
    unequal = [
        f"  {published[0]}, {name}"
        for published in names.values()
        for name in published[1:]
        if not (missing or misshapen) and not torch.equal(given[published[0]], given[name])
    ]
    return [
        *_listed("missing", missing, unexpected),
        *_listed("unexpected", unexpected, missing),
        *([f"misshapen ({len(misshapen)}):", *misshapen] if misshapen else []),
        *(["different tensors under names of one:", *unequal] if unequal else []),
    ]


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def _listed(kind: str, keys: list[str], candidates: Collection[str]) -> list[str]:
    lines = [f"  {key}{nearest(key, candidates) if i < SUGGESTIONS else ''}" for i, key in enumerate(keys)]
    return [f"{kind} ({len(keys)}):", *lines] if keys else []


def _prefix_hint(names: Names, state_dict: Mapping[str, torch.Tensor], prefix: str) -> list[str]:
    """What to give as ``prefix`` instead, if with it more keys would be found."""
    first = next(iter(names.values()))[0]
    for key in state_dict:
        other = key.removesuffix(first)
        if key.endswith(first) and other != prefix:
            return [f"The state dict has {key!r}: prefix={other!r} would read it."]
    return []
