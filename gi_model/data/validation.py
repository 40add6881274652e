"""The validation set of the published evaluation: targets, their masks, and masked references of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import Dataset

from gi_model.data.photos import read_photo
from gi_model.errors import InputError

MASK = "*image*mask*.png"
REFERENCE_MASK = "*image*_src*_m.png"


@dataclass
class Target:
    """Files of one target."""

    image: Path
    mask: Path
    references: list[tuple[Path, Path]] = field(default_factory=list)  # (picture, mask)


class ValidationSet(Dataset):
    """Samples of a folder, or of a published list of files.

    Names: ``image_X.png`` is a target and ``image_X_mask.png`` its mask; ``image_X_src_Y.png`` is a reference
    of it and ``image_X_src_Y_m.png`` that one's mask. White is what is missing. Masks define the samples:
    a picture without one is no sample. In a folder, files are taken in the order of their names; in a list,
    a text file with a path per line, in its order. Paths in a list are taken as written.

    A sample is a dict of float32 arrays in [-1, 1]: ``image [H,W,3]``, ``mask [H,W,1]``, ``srcs [T,H,W,3]``,
    ``srcs_masks [T,H,W,1]``; masks are -1 or 1.

    Args:
        source: the folder or list.
        references: T, the first so many of each target.
        scale: resize pictures by area, masks to the nearest pixel.
        multiple: pad below and right, mirrored, to a multiple of so many pixels.

    Raises:
        InputError: no samples, too few references, names without their picture, target or mask.

    Source: the published dataset's format; there scaling and padding fail for references.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        references: int,
        *,
        scale: float | None = None,
        multiple: int | None = None,
    ) -> None:
        if references < 1:
            raise InputError(f"references: expected at least 1, got {references}")
        if scale is not None and scale <= 0:
            raise InputError(f"scale: expected a number above 0, got {scale}")
        if multiple is not None and multiple < 1:
            raise InputError(f"multiple: expected at least 1, got {multiple}")
        self.source, self.references = Path(source), references
        self.scale, self.multiple = scale, multiple
        self.targets = find_targets(self.source)
        for target in self.targets:
            if len(target.references) < references:
                raise InputError(
                    f"data: {target.mask} has {len(target.references)} references, expected at least "
                    f"{references}"
                )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        target = self.targets[index]
        chosen = target.references[: self.references]
        image = self._fitted(_picture(target.image), cv2.INTER_AREA)
        frames = [self._fitted(_picture(path), cv2.INTER_AREA) for path, _ in chosen]
        masks = [self._fitted(_mask(path), cv2.INTER_NEAREST) for _, path in chosen]
        mask = self._fitted(_mask(target.mask), cv2.INTER_NEAREST)
        paths = [target.mask, *(path for pair in chosen for path in pair)]
        others = [mask, *(one for pair in zip(frames, masks, strict=True) for one in pair)]
        for path, other in zip(paths, others, strict=True):
            if other.shape[:2] != image.shape[:2]:
                raise InputError(
                    f"data: {path} has {other.shape[1]}x{other.shape[0]} pixels, expected "
                    f"{image.shape[1]}x{image.shape[0]} like {target.image}"
                )
        return {
            "image": 2 * image - 1,
            "mask": 2 * mask[..., None] - 1,
            "srcs": 2 * np.stack(frames) - 1,
            "srcs_masks": 2 * np.stack(masks)[..., None] - 1,
        }

    def _fitted(self, pixels: np.ndarray, interpolation: int) -> np.ndarray:
        """Scaled and padded as the options ask for."""
        if self.scale is not None:
            pixels = cv2.resize(pixels, None, fx=self.scale, fy=self.scale, interpolation=interpolation)
        return padded(pixels, self.multiple) if self.multiple is not None else pixels


def padded(pixels: np.ndarray, multiple: int) -> np.ndarray:
    """``[H,W,...]`` padded below and right to multiples, mirrored with the edge repeated."""
    missing = [(0, -length % multiple) for length in pixels.shape[:2]]
    return np.pad(pixels, missing + [(0, 0)] * (pixels.ndim - 2), mode="symmetric")


def find_targets(source: Path) -> list[Target]:
    """The targets of a folder or list, with all their references.

    Raises:
        InputError: as for ``ValidationSet``.
    """
    if source.is_dir():
        paths = sorted(path for path in source.iterdir() if path.suffix == ".png")
    else:
        try:
            paths = [Path(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"data: {source} is no folder and no list of files: {error}") from error
    targets = _paired(paths)
    if not targets:
        raise InputError(f"data: {source} has no masks of targets, expected names like image_000000_mask.png")
    return targets


def _paired(paths: Sequence[Path]) -> list[Target]:
    known = set(paths)
    targets: dict[Path, Target] = {}
    for path in paths:
        if fnmatchcase(path.name, MASK):
            image = path.with_name(path.name.rpartition("_mask")[0] + ".png")
            if image not in known and not image.exists():
                raise InputError(f"data: {path} has no target, expected {image}")
            targets[image] = Target(image, path)
    for path in paths:
        if fnmatchcase(path.name, REFERENCE_MASK):
            image = path.with_name(path.name.rpartition("_src")[0] + ".png")
            picture = path.with_name(path.name.removesuffix("_m.png") + ".png")
            for other, what in ((image, "target"), (picture, "picture")):
                if other not in known and not other.exists():
                    raise InputError(f"data: {path} has no {what}, expected {other}")
            if image not in targets:
                raise InputError(f"data: {path} is a reference of {image}, which has no mask")
            targets[image].references.append((picture, path))
    return list(targets.values())


def _picture(path: Path) -> np.ndarray:
    """``[H,W,3]`` float32 in [0, 1], RGB."""
    pixels = read_photo(path)
    if pixels is None:
        raise InputError(f"data: {path} is not a readable image")
    return pixels.astype(np.float32) / 255


def _mask(path: Path) -> np.ndarray:
    """``[H,W]`` float32, 1 where grey is above 127."""
    grey = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if grey is None:
        raise InputError(f"data: {path} is not a readable image")
    return (grey > 127).astype(np.float32)
