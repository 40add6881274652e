"""Make a validation set from photos: targets, references that show the same photo distorted, and a mask
for each, in the published format. The same photos, options and seed give the same files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gi_model.errors import InputError
from gi_model.progress import progress

NAME = "make-validation"
SUMMARY = "make a validation set from photos"
EXTRA = "training"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("photos", metavar="PHOTOS", help="a folder of photos, looked through to its depths")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--list", metavar="FILE", help="take only the photos named here, a path per line")
    parser.add_argument("--count", type=int, metavar="N", help="samples (default: one per photo)")
    parser.add_argument(
        "--references", type=int, default=4, metavar="T", help="references per target (default 4)"
    )
    parser.add_argument("--size", type=int, default=256, metavar="N", help="pixels per side (default 256)")
    parser.add_argument("--easy", action="store_true", help="frames are crops of one view, nothing more")
    parser.add_argument(
        "--seed", type=int, default=23, metavar="N", help="of all random numbers (default 23)"
    )


def run(options: argparse.Namespace) -> int:
    """``gi-model make-validation``: the exit code."""
    from gi_model.data.making import make_validation
    from gi_model.data.photos import Photos, find_photos

    photos = Photos(
        find_photos(options.photos, options.list),
        size=options.size,
        references=options.references,
        easy=options.easy,
        seed=options.seed,
    )
    count = len(photos) if options.count is None else options.count
    if count < 1:
        raise InputError(f"--count: expected at least 1, got {count}")
    folder = Path(options.output)
    if not folder.absolute().parent.is_dir():
        raise InputError(f"-o: the folder {folder.absolute().parent} does not exist")
    for _ in progress(make_validation(photos, folder, count), count, "making"):
        pass
    print(f"wrote {count} samples with {options.references} references each to {folder}")
    return 0
