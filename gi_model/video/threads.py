"""Reading ahead and writing behind, in threads, with a bounded number of items on the way."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Clock:
    """Seconds that a thread has worked, without those in which it waited."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begin


@contextmanager
def read_ahead(items: Iterable[T], depth: int, clock: Clock | None = None) -> Iterator[Iterator[T]]:
    """Iterate over ``items`` in a thread that is at most ``depth`` of them ahead.

    An exception is raised by the iterator after the items before it. When the block ends, also early, the
    thread has ended.

    Example:
        >>> with read_ahead(range(3), depth=2) as items:
        ...     list(items)
        [0, 1, 2]
    """
    channel: _Channel[T] = _Channel(depth)
    clock = clock or Clock()

    def work() -> None:
        iterator = iter(items)
        try:
            while True:
                with clock.running():
                    try:
                        item = next(iterator)
                    except StopIteration:
                        break
                if not channel.put(item):
                    break
        except BaseException as error:
            channel.end(error)
        else:
            channel.end()
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    thread = threading.Thread(target=work, name="read ahead", daemon=True)
    thread.start()
    try:
        yield channel.take_all()
    finally:
        channel.abandon()
        thread.join()


@contextmanager
def write_behind(write: Callable[[T], None], depth: int) -> Iterator[Callable[[T], None]]:
    """Give a function that hands items to ``write`` in a thread, at most ``depth`` of them waiting.

    An exception of ``write`` is raised by the next call, or when the block ends. A block that ends well
    waits until everything is written; otherwise what waits is dropped.

    Example:
        >>> written = []
        >>> with write_behind(written.append, depth=2) as send:
        ...     send(1)
        >>> written
        [1]
    """
    channel: _Channel[T] = _Channel(depth)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for item in channel.take_all():
                write(item)
        except BaseException as error:
            failed.append(error)
            channel.abandon()

    def send(item: T) -> None:
        if not channel.put(item):
            raise failed[0]

    thread = threading.Thread(target=work, name="write behind", daemon=True)
    thread.start()
    try:
        yield send
        channel.end()
        thread.join()
    finally:
        channel.abandon()
        thread.join()
    if failed:
        raise failed[0]


class _Channel(Generic[T]):
    """A bounded queue from one thread to another, which either side can end."""

    def __init__(self, depth: int) -> None:
        if depth < 1:
            raise ValueError(f"depth: expected at least 1, got {depth}")
        self.depth = depth
        self.items: deque[T] = deque()
        self.changed = threading.Condition()
        self.ended = self.abandoned = False
        self.error: BaseException | None = None

    def put(self, item: T) -> bool:
        """Add an item once there is room; False if nobody will take it."""
        with self.changed:
            while len(self.items) >= self.depth and not self.abandoned:
                self.changed.wait()
            if self.abandoned:
                return False
            self.items.append(item)
            self.changed.notify_all()
            return True

    def end(self, error: BaseException | None = None) -> None:
        """No more items will come; ``error`` is raised where they are taken."""
        with self.changed:
            self.ended, self.error = True, error
            self.changed.notify_all()

    def abandon(self) -> None:
        """No more items will be taken."""
        with self.changed:
            self.abandoned = True
            self.items.clear()
            self.changed.notify_all()

    def take_all(self) -> Iterator[T]:
        """Items until the other side ends."""
        while True:
            with self.changed:
                while not (self.items or self.ended or self.abandoned):
                    self.changed.wait()
                if self.items:
                    item = self.items.popleft()
                    self.changed.notify_all()
                elif self.error is not None and not self.abandoned:
                    raise self.error
                else:
                    return
            yield item
