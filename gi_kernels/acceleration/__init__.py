"""Acceleration of models built from the published classes, without editing or importing them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from gi_kernels.acceleration import verification
from gi_kernels.acceleration.flow import FLOW
from gi_kernels.acceleration.layers import LAYERS
from gi_kernels.acceleration.report import Entry, Report
from gi_kernels.acceleration.swapping import Replacement, is_swapped, replacement_of
from gi_kernels.nn import DeformableAggregation, LatentAttention, WindowRead, WindowWrite

Mode = Literal["inference", "training"]

#: What can be accelerated, in the order in which a class of an ambiguous name is tried.
REPLACEMENTS: tuple[type[Replacement], ...] = (*LAYERS, *FLOW)

OPERATORS = tuple(r.operator for r in REPLACEMENTS)

#: Layers that are fast as they are.
_OURS: dict[type[nn.Module], str] = {
    DeformableAggregation: "deformable_write",
    WindowRead: "windowed_read",
    WindowWrite: "windowed_write",
    LatentAttention: "attention",
}


def accelerate(
    model: nn.Module,
    *,
    mode: Mode = "inference",
    operators: Sequence[str] | None = None,
    verify: Any = None,
    strict: bool = True,
) -> Report:
    """Let the published modules inside ``model`` run on the kernels of this package, in place.

    Modules are found by the name of their class, or of the class that they inherit ``forward`` from, and
    the names and shapes of their parameters. Each gets a subclass of its class with another ``forward``:
    it stays an instance of its class, keeps its parameters, buffers, hooks and keys of the state dict, and
    can be copied, pickled, compiled and wrapped. Nothing is patched outside of ``model``.

    Args:
        model: any module, for instance a published generator, flow wrapper or Lightning module; it may
            itself be what is replaced.
        mode: ``inference`` or ``training``; with ``verify``, whether gradients are compared and timed too.
        operators: names of ``OPERATORS`` to be replaced; by default all.
        verify: a batch on which every replacement is compared with the original, and kept only if it
            agrees and is faster: a tensor, a tuple of arguments, a dictionary (of keyword arguments, or
            the one argument of a ``forward`` that does not name its keys), or a function without
            arguments that runs the model. The batch, buffers and the random state are as before afterwards.
        strict: whether an operator that was named but not found is an error.

    Returns:
        A :class:`Report`: what was found, what replaced it, error, time and memory where verified, and
        why others were left alone. ``report.undo()`` takes everything back.

    Raises:
        TypeError, ValueError: a wrong argument, a model in which nothing can be replaced or is fast
            already, or, if strict, an operator that was named and not found. The model is as it was.
    """
    wanted = _checked(model, mode, operators)
    run = None if verify is None else _runner(model, verify)
    entries = [entry for path, module in model.named_modules() if (entry := _found(path, module, wanted))]
    chosen = [entry for entry in entries if entry.replacement]
    if not any(entry.replacement or entry.fast for entry in entries):
        raise ValueError(f"model: expected published modules to accelerate, found none\n{_listed(entries)}")
    found = {entry.operator for entry in entries if entry.replacement or entry.fast}
    missing = [name for name in wanted if name not in found]
    if operators is not None and strict and missing:
        raise ValueError(f"operators: {missing[0]!r} was not found in the model\n{_listed(entries)}")
    if run is not None and chosen:
        verification.verify(model, chosen, run, training=mode == "training")
    else:
        for entry in chosen:
            entry.replace()
    return Report(entries)


def _checked(model: Any, mode: Any, operators: Any) -> tuple[str, ...]:
    """The operators that are wanted."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if mode not in ("inference", "training"):
        raise ValueError(f"mode: expected 'inference' or 'training', got {mode!r}")
    if operators is None:
        return OPERATORS
    if isinstance(operators, str) or not isinstance(operators, Iterable):
        raise TypeError(f"operators: expected a sequence of names, got {operators!r}")
    wanted = tuple(operators)
    for name in wanted:
        if name not in OPERATORS:
            raise ValueError(f"operators: expected names among {', '.join(OPERATORS)}, got {name!r}")
    return wanted


def _found(path: str, module: nn.Module, wanted: Sequence[str]) -> Entry | None:
    """The entry for a module of a known class; None for others."""
    if is_swapped(module):
        operator = replacement_of(module).operator
        return Entry(path, module, operator, reason="it is accelerated already", fast=True)
    for ours, operator in _OURS.items():
        if isinstance(module, ours):
            return Entry(path, module, operator, reason="it is a layer of gi_kernels", fast=True)
    reasons = {}
    for replacement in REPLACEMENTS:
        operator = replacement.operator
        known = next((c for c in type(module).__mro__ if c.__name__ == replacement.replaces), None)
        if known is None:
            continue
        reason = replacement.refuse(module)
        if reason is None:
            reason = _overridden(module, known) or ("" if operator in wanted else "it was not asked for")
            return Entry(path, module, operator, None if reason else replacement, reason)
        reasons[operator] = reason
    if not reasons:
        return None
    operator, reason = next(iter(reasons.items()))
    if len(reasons) > 1:  # a name that two classes have
        reason = "; ".join(f"as {o}, {r}" for o, r in reasons.items())
    return Entry(path, module, operator, reason=reason)


def _overridden(module: nn.Module, known: type) -> str | None:
    """Why the ``forward`` that runs is not that of the ``known`` class; None if it is."""
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if type(module).forward is not getattr(known, "forward", None):
        return f"its class {type(module).__name__} has a forward of its own"
    return None


def _runner(model: nn.Module, verify: Any) -> Callable[[], Any]:
    if isinstance(verify, torch.Tensor):
        verify = (verify,)
    if isinstance(verify, tuple):
        return lambda: model(*verification.detached(verify))
    if isinstance(verify, dict):
        if set(verify) <= set(inspect.signature(model.forward).parameters):
            return lambda: model(**verification.detached(verify))
        return lambda: model(verification.detached(verify))
    if callable(verify):
        return verify
    raise TypeError(f"verify: expected a tensor, tuple, dict or function, got {type(verify).__name__}")


def _listed(entries: Sequence[Entry]) -> str:
    reasons = [f"  {e.path or '(the model)'}: {e.reason}" for e in entries if e.reason]
    return "\n".join(reasons) or "  no class of a known name"


__all__ = ["OPERATORS", "Report", "accelerate"]
