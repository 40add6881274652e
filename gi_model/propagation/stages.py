"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Stages(dict[str, float]):
    """Seconds by stage; a stage within another is not counted as part of it.

    What another thread adds runs beside the rest: then the sum may exceed the time that has passed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time inside the ``with`` block as that stage's."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def iterate(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """``items``, with the time it takes to get each counted as that stage's."""
        iterator = iter(items)
        while True:
            with self.timed(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured otherwise; each stage from one thread only."""
        self[name] = self.get(name, 0.0) + seconds

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.add(self._open[-1], now - self._since)
        self._since = now
