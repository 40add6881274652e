"""What an acceleration did, and taking it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from gi_kernels.acceleration.swapping import Replacement, restore, swap


@dataclass
class Entry:
    """One module of the model that has a known class."""

    #: Its name in ``model.named_modules()``; empty for the model itself.
    path: str
    module: nn.Module
    operator: str
    #: What replaces it; None where it is left alone.
    replacement: type[Replacement] | None = None
    #: Why it is left alone.
    reason: str = ""
    #: Whether it was fast before: a layer of this package, or accelerated already.
    fast: bool = False
    #: Largest error of results, and of gradients, relative to the largest magnitude; None if not verified.
    error: float | None = None
    gradient_error: float | None = None
    #: Seconds and peak bytes, before and after; None if not verified. Modules inside are accelerated
    #: before, too. Of one call, but of both calls of a training step where the inputs are the same twice.
    seconds: tuple[float, float] | None = None
    bytes: tuple[int, int] | None = None

    def replace(self) -> None:
        """Swap the module's class."""
        assert self.replacement is not None
        swap(self.module, self.replacement)

    def leave_alone(self, reason: str) -> None:
        """Do not replace it after all."""
        restore(self.module)
        self.replacement, self.reason = None, reason


class Report:
    """The modules that were found. ``str(report)`` is a table; ``undo()`` takes the replacements back."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)

    @property
    def replaced(self) -> tuple[Entry, ...]:
        """Entries that are accelerated."""
        return tuple(e for e in self.entries if e.replacement is not None)

    @property
    def left_alone(self) -> tuple[Entry, ...]:
        """Entries that are not, with their ``reason``."""
        return tuple(e for e in self.entries if e.replacement is None)

    def undo(self) -> None:
        """Give all modules their own classes back; their behaviour is the same to the bit. Once is enough."""
        for entry in self.replaced:
            restore(entry.module)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} modules accelerated, {len(self.left_alone)} left alone"]
        for e in self.entries:
            outcome = f"left alone: {e.reason}" if e.replacement is None else f"by {e.replacement.__name__}"
            lines.append("; ".join([f"  {e.path or '(the model)'} ({e.operator}) {outcome}", *_measured(e)]))
        return "\n".join(lines)


def _measured(e: Entry) -> list[str]:
    parts = []
    if e.error is not None:
        parts.append(f"error {e.error:.1e}")
    if e.gradient_error is not None:
        parts.append(f"gradients {e.gradient_error:.1e}")
    if e.seconds is not None:
        before, after = e.seconds
        parts.append(f"{1e3 * before:.3g} ms -> {1e3 * after:.3g} ms ({before / after:.2f}x)")
    if e.bytes is not None:
        parts.append(f"{e.bytes[0] / 2**20:.1f} MiB -> {e.bytes[1] / 2**20:.1f} MiB")
    return parts
