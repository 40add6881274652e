"""Which of a GPU's backends ``auto`` prefers: rules, each beside the measurement that it comes from.

The first rule that fits a call decides. ``make gpu-suite`` times every operator on both backends and
prints the rules that its numbers support; one that is taken over names the device and the numbers. A
rule must hold wherever it was not measured too: no device's tuning table, but what the kernels' designs
explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rule:
    """Backends for some calls, best first; one that cannot run a call is passed over.

    Attributes:
        operator: its name; ``*`` for all.
        order: ``cuda`` and ``triton``.
        dtypes: of the first tensor; none for all.
        least, below: sizes of the largest tensor in numbers, from ``least`` on and ``below`` that.
        measured_on: the device, None where nothing was measured yet.
        numbers: what was measured there.
    """

    operator: str
    order: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = ()
    least: int = 0
    below: int | None = None
    measured_on: str | None = None
    numbers: str = ""


#: In order; the last one fits every call.
RULES = (
    Rule(
        "*",
        ("cuda", "triton"),
        numbers="not measured yet; the CUDA kernels start with less work on the host",
    ),
)


def preferred(operator: str, tensors: Sequence[torch.Tensor], rules: Sequence[Rule] = RULES) -> Rule:
    """The rule that decides a call of ``operator``."""
    for rule in rules:
        if rule.operator in ("*", operator) and _fits(rule, tensors):
            return rule
    raise LookupError(f"{operator}: no rule fits")


def _fits(rule: Rule, tensors: Sequence[torch.Tensor]) -> bool:
    if rule.dtypes and (not tensors or tensors[0].dtype not in rule.dtypes):
        return False
    if rule.least == 0 and rule.below is None:
        return True
    numbers = max((t.numel() for t in tensors), default=0)
    return rule.least <= numbers and (rule.below is None or numbers < rule.below)
