"""Names under which results are made, until they are whole and take the place of an earlier one."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes ``path`` if the block ends well."""
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place if the block ends well."""
    temporary = temporary_name(path)
    try:
        temporary.mkdir()
        yield temporary
        publish_folder(temporary, path)
    finally:
        remove(temporary)


def temporary_name(path: Path) -> Path:
    """A hidden name beside ``path``, of the same suffix, that no other process uses."""
    return path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed have left under temporary names for ``path``."""
    pattern = re.compile(rf"\.{re.escape(path.stem)}\.(\d+)\.partial{re.escape(path.suffix)}(\.earlier)?")
    for found in path.parent.iterdir():
        match = pattern.fullmatch(found.name)
        if match and not _alive(int(match[1])):
            remove(found)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def publish_folder(temporary: Path, path: Path) -> None:
    """Let a folder take the place of ``path``, which comes back if that fails."""
    if not path.exists():
        os.replace(temporary, path)
        return
    earlier = temporary.with_name(f"{temporary.name}.earlier")
    os.replace(path, earlier)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(earlier, path)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # of another user; or not a number of this system
        return True
    return True
