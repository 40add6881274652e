"""The learning rate over time."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmUpCosine:
    """Factor of the learning rate: a linear warm-up, then half a cosine, then constant.

    For step n, with W = ``warm_up_steps`` and D = ``max_decay_steps``::

        n < W:   lr_start + (lr_max - lr_start) n / W
        n >= W:  lr_min + (lr_max - lr_min) (1 + cos(pi t)) / 2,  t = min(1, (n - W) / (D - W))

    ``verbosity_interval`` is accepted and has no effect: the learning rate is logged anyway.
    """

    warm_up_steps: int = 1000
    max_decay_steps: int = 1_000_000
    lr_start: float = 1e-4
    lr_max: float = 1.0
    lr_min: float = 1e-4
    verbosity_interval: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.warm_up_steps < self.max_decay_steps:
            raise ValueError(
                f"warm_up_steps: expected 0 to below max_decay_steps={self.max_decay_steps}, "
                f"got {self.warm_up_steps}"
            )

    def __call__(self, step: int) -> float:
        if step < self.warm_up_steps:
            return self.lr_start + (self.lr_max - self.lr_start) * step / self.warm_up_steps
        t = min(1.0, (step - self.warm_up_steps) / (self.max_decay_steps - self.warm_up_steps))
        return self.lr_min + 0.5 * (self.lr_max - self.lr_min) * (1 + math.cos(math.pi * t))
