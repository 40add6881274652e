"""Timing contenders against each other on a machine that is not perfectly quiet."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

#: Calls shorter than this (seconds) are preceded by an untimed one, so that all contenders are
#: timed with their code and data as warm as a loop would have them.
SHORT = 2e-3


@dataclass(frozen=True)
class Times:
    """Durations of one contender's calls in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle duration."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles; 0 for a single call."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return high - low


def seconds(call: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Duration of one call.

    On a CUDA device: between two events on the current stream, after everything queued before has
    finished. On the CPU: by the clock. The call's result is freed after the clock has stopped.
    """
    if torch.device(device).type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end) * 1e-3  # milliseconds
    else:
        begin = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - begin
    del result
    return elapsed


def warm_seconds(call: Callable[[], object], device: str | torch.device, expected: float) -> float:
    """``seconds(call)``, after an untimed call if ``expected`` says that it is short."""
    if expected < SHORT:
        call()
    return seconds(call, device)


def rounds_for(expected: Mapping[str, float], budget: float, fewest: int = 3, most: int = 25) -> int:
    """How many rounds of all contenders fit into ``budget`` seconds, between ``fewest`` and ``most``."""
    one_round = sum(t if t >= SHORT else 2 * t for t in expected.values())
    return max(fewest, min(most, int(budget / max(one_round, 1e-9))))


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    device: str | torch.device = "cpu",
    budget: float = 1.0,
) -> dict[str, Times]:
    """Time the contenders in turns, so that a disturbance of the machine meets all of them."""
    for call in contenders.values():
        call()
    expected = {name: seconds(call, device) for name, call in contenders.items()}
    rounds = rounds_for(expected, budget)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            samples[name].append(warm_seconds(call, device, expected[name]))
    return {name: Times(tuple(taken)) for name, taken in samples.items()}
