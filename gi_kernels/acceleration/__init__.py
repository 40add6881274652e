"""Acceleration of models built from the published classes, without editing or importing them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from gi_kernels import nn as layers
from gi_kernels.acceleration import verification
from gi_kernels.acceleration.flow import FLOW
from gi_kernels.acceleration.layers import LAYERS
from gi_kernels.acceleration.report import Entry, Report
from gi_kernels.acceleration.swapping import Replacement, is_swapped, replacement_of

Mode = Literal["inference", "training"]

#: What can be accelerated, in the order in which a class of an ambiguous name is tried.
REPLACEMENTS: tuple[type[Replacement], ...] = (*LAYERS, *FLOW)

OPERATORS = tuple(r.operator for r in REPLACEMENTS)

#: Layers that are fast as they are.
_OURS = (layers.DeformableAggregation, layers.LatentAttention, layers.WindowRead, layers.WindowWrite)


def accelerate(
    model: nn.Module,
    *,
    mode: Mode = "inference",
    operators: Sequence[str] | None = None,
    verify: Any = None,
    strict: bool = True,
) -> Report:
    """Let the published modules inside ``model`` run on the kernels of this package, in place.

    Modules are found by the name of their class and the names and shapes of their parameters. Each
    gets a subclass of its class with another ``forward``: it stays an instance of its class, keeps
    its parameters, buffers, hooks and keys of the state dict, and can be copied, pickled, compiled and
    wrapped. Nothing is patched outside of ``model``.

    Args:
        model: any module, for instance a published generator, flow wrapper or Lightning module; it may
            itself be what is replaced.
        mode: ``inference`` or ``training``; with ``verify``, whether gradients are compared and timed too.
        operators: names of ``OPERATORS`` to be replaced; by default all.
        verify: a batch on which every replacement is compared with the original, and kept only if it
            agrees and is faster: a tuple of arguments, a dictionary of keyword arguments, or a function
            without arguments that runs the model. The one argument of a Lightning module is a
            dictionary: pass ``(batch,)``. Buffers and the random state are as before afterwards.
        strict: whether an operator that was named but not found is an error.

    Returns:
        A :class:`Report`: what was found, what replaced it, error, time and memory where verified, and
        why others were left alone. ``report.undo()`` takes everything back.

    Raises:
        TypeError, ValueError: a wrong argument, a model in which nothing could be replaced, or, if
            strict, an operator that was named and not found. The model is as it was.
    """
    _check(model, mode, operators)
    wanted = OPERATORS if operators is None else tuple(operators)
    entries = [entry for path, module in model.named_modules() for entry in _found(path, module, wanted)]
    chosen = [entry for entry in entries if entry.replacement]
    if not chosen:
        raise ValueError(f"model: expected published modules to accelerate, found none\n{_listed(entries)}")
    missing = [name for name in wanted if all(e.operator != name for e in chosen)]
    if operators is not None and strict and missing:
        raise ValueError(f"operators: {missing[0]!r} was not found in the model\n{_listed(entries)}")
    if verify is not None:
        verification.verify(model, chosen, _runner(model, verify), training=mode == "training")
    else:
        for entry in chosen:
            entry.replace()
    return Report(entries)


def _check(model: Any, mode: Any, operators: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if mode not in ("inference", "training"):
        raise ValueError(f"mode: expected 'inference' or 'training', got {mode!r}")
    if isinstance(operators, str):
        raise TypeError(f"operators: expected a sequence of names, got the string {operators!r}")
    for name in operators or ():
        if name not in OPERATORS:
            raise ValueError(f"operators: expected names among {', '.join(OPERATORS)}, got {name!r}")


def _found(path: str, module: nn.Module, wanted: Sequence[str]) -> list[Entry]:
    """The entry for a module that is known by the name of its class; none for others."""
    if isinstance(module, _OURS) and not is_swapped(module):
        return [Entry(path, module, type(module).__name__, reason="it is a layer of gi_kernels already")]
    if is_swapped(module):
        return [Entry(path, module, replacement_of(module).operator, reason="it is accelerated already")]
    name, reasons = type(module).__name__, {}
    for replacement in REPLACEMENTS:
        if name not in replacement.replaces:
            continue
        reason = replacement.refuse(module)
        if reason is None and replacement.operator not in wanted:
            reason = "it was not asked for"
        if reason is None:
            return [Entry(path, module, replacement.operator, replacement)]
        reasons[replacement.operator] = reason
    if not reasons:
        return []
    operator, reason = next(iter(reasons.items()))
    return [Entry(path, module, operator, reason=reason)]


def _runner(model: nn.Module, verify: Any) -> Callable[[], Any]:
    if isinstance(verify, tuple):
        return lambda: model(*verify)
    if isinstance(verify, dict):
        return lambda: model(**verify)
    if callable(verify):
        return verify
    raise TypeError(f"verify: expected a tuple, a dict or a function, got {type(verify).__name__}")


def _listed(entries: Sequence[Entry]) -> str:
    reasons = [f"  {e.path or '(the model)'}: {e.reason}" for e in entries if e.reason]
    return "\n".join(reasons) or "  no class of a known name"


__all__ = ["OPERATORS", "Report", "accelerate"]
