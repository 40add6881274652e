"""Makes validation sets in the published format from any photos."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gi_model.data.photos import PATIENCE, Photos, read_photo
from gi_model.errors import InputError
from gi_model.sheet import write_png
from gi_model.staging import staged_folder

LIST = "filelist.txt"


def make_validation(photos: Photos, folder: Path, count: int) -> Iterator[int]:
    """Write ``count`` samples into ``folder``; yield the number of each when it is written.

    The folder appears under its name when it is whole.

    Per sample ``image_XXXXXX.png``, ``image_XXXXXX_mask.png``, and per reference
    ``image_XXXXXX_src_YYYYYY.png`` and ``image_XXXXXX_src_YYYYYY_m.png``; masks are 255 where pixels are
    missing, pictures are whole. ``filelist.txt`` names all of them, relative to the folder. Photos take
    turns; those that cannot be read are left out. The same photos and seed give the same files.

    Raises:
        InputError: ``folder`` exists, or too few photos can be read.
        OSError: what the file system answers.
    """
    if folder.exists():
        raise InputError(f"-o: {folder} exists; name a new folder")
    with staged_folder(folder) as temporary:
        yield from _written(photos, temporary, count)


def _written(photos: Photos, folder: Path, count: int) -> Iterator[int]:
    """:func:`make_validation` into a folder that is there."""
    names: list[str] = []
    failures = 0
    photo_index = 0
    for number in range(count):
        photo = None
        while photo is None:
            path = photos.paths[photo_index % len(photos)]
            photo = read_photo(path)
            photo_index += 1
            failures = 0 if photo is not None else failures + 1
            if failures >= min(PATIENCE, len(photos)):
                raise InputError(f"PHOTOS: {failures} in a row cannot be read, the last is {path}")
        frames, masks = photos.frames(photo, np.random.default_rng((photos.seed, number)), number)
        stem = f"image_{number:06d}"
        pictures = {f"{stem}_mask.png": masks[0], f"{stem}.png": frames[0]}
        for i in range(photos.references):
            pictures[f"{stem}_src_{i:06d}_m.png"] = masks[1 + i]
            pictures[f"{stem}_src_{i:06d}.png"] = frames[1 + i]
        for name, picture in pictures.items():
            write_png(folder / name, picture)
        names += pictures
        yield number
    (folder / LIST).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
