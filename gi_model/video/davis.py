"""The folder layout of the DAVIS data sets."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from gi_model.errors import InputError

FRAMES, MASKS = "JPEGImages", "Annotations"
SHOWN = 6  # names in a message


class Sequence(NamedTuple):
    """Folders of a sequence."""

    frames: Path
    masks: Path


def davis_sequence(root: str | Path, name: str | None = None, argument: str = "VIDEO") -> Sequence:
    """Folders of a sequence below ``root``: ``JPEGImages/<resolution>/<sequence>`` and ``Annotations/...``.

    Args:
        root: the folder that holds ``JPEGImages``.
        name: a sequence, such as ``bear`` or ``480p/bear``; may be left out where there is only one.
        argument: what messages call ``root``.

    Raises:
        InputError: there is no such sequence, or there are several.
    """
    images = Path(root) / FRAMES
    found = sorted(p for p in images.glob("*/*") if p.is_dir() and p.name[0] != ".")
    names = [p.relative_to(images).as_posix() for p in found]
    fitting = [i for i, n in enumerate(names) if name is None or name in (n, n.split("/")[1])]
    if len(fitting) != 1:
        candidates = [names[i] for i in fitting] or names
        listed = ", ".join(candidates[:SHOWN]) + (", ..." if len(candidates) > SHOWN else "")
        wanted = "a sequence" if name is None else f"one sequence {name}"
        raise InputError(f"{argument}: expected --sequence to name {wanted} of {images}, which has {listed}")
    place = names[fitting[0]]
    return Sequence(images / place, Path(root) / MASKS / place)
