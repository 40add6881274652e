"""The command ``gi-model``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from gi_model.commands import add_commands
from gi_model.errors import InputError

FAILED = 2  # exit code for anything the user can mend
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``gi-model`` with command-line ``arguments``; return its exit code."""
    options = build_parser().parse_args(arguments)
    left = getattr(options, "left", "nothing was written")
    return guarded("gi-model", lambda: options.run(options), left, options.extra)


def build_parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    parser = argparse.ArgumentParser(
        prog="gi-model", description="Keyframe propagation: repair regions of a video."
    )
    add_commands(parser)
    return parser


def guarded(
    name: str, run: Callable[[], int], left: str = "nothing was written", extra: str = "video"
) -> int:
    """Exit code of ``run``; what a user can mend becomes a line on standard error.

    Args:
        name: what the line begins with.
        left: what an interrupted run leaves behind, unless the interruption says it.
        extra: the package's extra that brings what ``run`` imports.
    """
    try:
        with _terminable():
            return run()
    except InputError as error:
        message = str(error)
    except ImportError as error:
        message = f"{error}; for this command: pip install 'gi-kernels[{extra}]'"
    except OSError as error:
        message = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    except MemoryError:
        message = "not enough memory"
    except KeyboardInterrupt as stopped:
        print(f"{name}: interrupted; {str(stopped) or left}", file=sys.stderr)
        return INTERRUPTED
    print(f"{name}: {message}", file=sys.stderr)
    return FAILED


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM clean up like Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        earlier = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


if __name__ == "__main__":
    sys.exit(main())
