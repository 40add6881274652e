"""How long one step of the two-stream model takes on this machine: ours against the published style."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

import torch

from gi_kernels.testing import machine, timing
from gi_model.testing.steps import Steps

Call = Callable[[], object]

PARTS = ("flow stage", "generator", "whole step")
PUBLISHED, FLOAT32, BFLOAT16 = "published", "ours", "ours, bfloat16"


@dataclass
class StepTimes:
    """Times of the parts of a step, by part and style.

    Iterate over it to measure: it yields after each call, ``len()`` times in all. Styles take turns, so
    that a disturbance of the machine meets all of them.

    Args:
        steps: what is timed.
        rounds: how often each call is timed, after an untimed one.
    """

    steps: Steps
    rounds: int = 3
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calls = calls(self.steps)

    def __len__(self) -> int:
        return (1 + self.rounds) * len(self.calls)

    def __iter__(self) -> Iterator[None]:
        for call in self.calls.values():
            call()
            yield
        for _ in range(self.rounds):
            for name, call in self.calls.items():
                self.seconds.setdefault(name, []).append(timing.seconds(call))
                yield

    def __str__(self) -> str:
        """A table of medians, with how many times faster than published in brackets."""
        styles = [s for s in (PUBLISHED, FLOAT32, BFLOAT16) if (PARTS[0], s) in self.calls]
        rows = [["", *styles]]
        for part in PARTS:
            published, *ours = (median(self.seconds[part, style]) for style in styles)
            rows.append([part, f"{published:.2f} s", *(f"{t:.2f} s ({published / t:.1f}x)" for t in ours)])
        B, T, _, H, W = self.steps.sources.shape
        heading = (
            f"One step of {B} at {H} x {W} with {T} references, "
            f"{machine.cpu_name()}, {torch.get_num_threads()} threads:"
        )
        return "\n".join([heading, "", *_aligned(rows)])


def calls(steps: Steps) -> Mapping[tuple[str, str], Call]:
    """What is timed, by part and style; bfloat16 only where this machine gains by it."""
    dtypes = {FLOAT32: torch.float32}
    if gains_by_bfloat16():
        dtypes[BFLOAT16] = torch.bfloat16
    found: dict[tuple[str, str], Call] = {}
    for part, make in zip(PARTS, (steps.flow_stage, steps.generation, steps.whole), strict=True):
        pairs = {style: make(dtype) for style, dtype in dtypes.items()}
        found[part, PUBLISHED] = pairs[FLOAT32].published
        found |= {(part, style): pair.ours for style, pair in pairs.items()}
    return found


def gains_by_bfloat16() -> bool:
    """Whether matrix products are faster in bfloat16: processors without units for it imitate them."""
    exact = torch.rand(512, 512)
    low = exact.bfloat16()
    times = timing.interleave({"exact": lambda: exact @ exact, "low": lambda: low @ low}, budget=0.2)
    return times["low"].median < times["exact"].median


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    first, *others = (len(max(column, key=len)) for column in zip(*rows, strict=True))
    return [
        "  ".join([row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], others, strict=True))])
        for row in rows
    ]
