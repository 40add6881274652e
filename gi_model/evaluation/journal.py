"""What an evaluation has measured so far, on disk: a file per batch, so that it can go on after a stop.

A batch is computed the same whoever computes it and whenever, so results do not depend on stops nor on the
number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gi_model.errors import InputError
from gi_model.staging import staged

SETTINGS = "settings.json"


class Journal:
    """The measured batches in a folder.

    Args:
        folder: is made if need be.
        settings: all that results depend on, plain values by name.
        restart: forget what is there.

    Raises:
        InputError: the folder holds what was measured with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], restart: bool = False) -> None:
        self.folder = folder
        if restart and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / SETTINGS
        if path.exists():
            _check(path, settings)
        else:
            with staged(path) as temporary:
                temporary.write_text(json.dumps(settings, indent=1))

    def has(self, batch: int) -> bool:
        """Whether ``batch`` has been measured."""
        return self._path(batch).exists()

    def add(self, batch: int, measured: Mapping[str, np.ndarray]) -> None:
        """Keep what was measured of ``batch``; the first axis of every array is that of the images."""
        arrays: dict[str, Any] = dict(measured)
        with staged(self._path(batch)) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    def read(self, batches: Iterable[int]) -> dict[str, np.ndarray]:
        """What was measured of ``batches``, at least one, which must be there; joined in their order.

        Raises:
            InputError: a batch is missing or damaged.
        """
        parts: list[dict[str, np.ndarray]] = []
        for batch in batches:
            path = self._path(batch)
            try:
                with np.load(path, allow_pickle=False) as file:
                    parts.append(dict(file))
            except Exception as error:  # whatever a damaged archive leads to
                raise InputError(f"{path} cannot be read, remove it to measure it again: {error}") from error
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _path(self, batch: int) -> Path:
        return self.folder / f"batch-{batch:06d}.npz"


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file."""
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            hashed.update(chunk)
    return hashed.hexdigest()


def _check(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        earlier = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--output: {path} cannot be read: {error}; see --restart") from error
    plain = json.loads(json.dumps(settings))
    changed = sorted(name for name in {*earlier, *plain} if earlier.get(name) != plain.get(name))
    if changed:
        raise InputError(
            f"--output: {path.parent} holds an evaluation with other settings ({', '.join(changed)}): give "
            "another folder, or --restart to begin again"
        )
