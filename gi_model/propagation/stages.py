"""Where the time of a run goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Stages(dict[str, float]):
    """Seconds by stage; a stage within another is not counted as part of it.

    Threads run beside each other: with several the sum may exceed the time that has passed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._thread = _Thread()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time inside the ``with`` block as that stage's."""
        self._charge()
        self._thread.open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._thread.open.pop()

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
        """Count seconds that were measured otherwise."""
        with self._lock:
            self[name] = self.get(name, 0.0) + seconds

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._thread.open:
            self.add(self._thread.open[-1], now - self._thread.since)
        self._thread.since = now


class _Thread(threading.local):
    """The stages that a thread is in, and since when it has not been charged."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.since = 0.0
