"""Stops a run whose loss is lost, before anything has been learnt from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gi_model.errors import InputError


class LossError(InputError):
    """A term of the loss is not finite, or far larger than it was."""


class Watch:
    """Knows how large each term usually is.

    Args:
        limit: how many times its usual size a term may reach.
        patience: so many values of a term make its usual size, a running mean.
    """

    def __init__(self, limit: float = 1000, patience: int = 100) -> None:
        self.limit, self.patience = limit, patience
        self.usual: dict[str, float] = {}
        self.seen: dict[str, int] = {}

    def __call__(self, terms: Mapping[str, float], step: int) -> None:
        """Take the terms of a batch into account.

        Raises:
            LossError: one is not finite or has exploded; the message names it.
        """
        for name, value in terms.items():
            if not math.isfinite(value):
                raise LossError(f"{name} is {value} at step {step}")
            usual, seen = self.usual.get(name, 0.0), self.seen.get(name, 0)
            if seen >= self.patience and abs(value) > self.limit * max(usual, 1e-3):
                raise LossError(
                    f"{name} is {value:.4g} at step {step}, "
                    f"more than {self.limit:.0f} times its usual {usual:.4g}"
                )
            share = 1 / min(seen + 1, self.patience)
            self.usual[name] = usual + share * (abs(value) - usual)
            self.seen[name] = seen + 1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"usual": dict(self.usual), "seen": dict(self.seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.usual, self.seen = dict(state["usual"]), dict(state["seen"])
