"""Training samples from photos: a target, its references and a mask for each."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from gi_model.data.distortions import Distortions
from gi_model.data.draws import Draw
from gi_model.data.masks import Mask, build_mask
from gi_model.errors import InputError
from gi_model.published import nearest

log = logging.getLogger(__name__)

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}

#: Masks of the published configurations.
MASKS: dict[str, Any] = {
    "irregular_proba": 1,
    "irregular_kwargs": {"max_angle": 4, "max_len": 200, "max_width": 100, "max_times": 5, "min_times": 1},
    "box_proba": 1,
    "box_kwargs": {
        "margin": 10, "bbox_min_size": 30, "bbox_max_size": 150, "max_times": 4, "min_times": 1
    },
    "segm_proba": 0,
}  # fmt: skip

# So many photos in a row that cannot be read mean that something else is wrong.
PATIENCE = 20


class Photos(Dataset):
    """Samples of frames that show one photo, each distorted in its own way and with its own mask.

    A sample is a function of the seed, of its number in the run and of the photo: the number of workers
    and processes has no influence, and an interrupted run that goes on draws what it would have drawn.
    A photo that cannot be read is named in the log, counted, and replaced by another.

    Args:
        paths: the photos.
        size: pixels of a frame's side.
        references: frames beside the target.
        scale: factor of the finished frames' size, up to 1, for small networks: pictures are resized by area,
            masks to the nearest pixel. Published: 1.
        mask: kind of masks; the published mixture by default.
        easy: frames are crops of one view, nothing more.
        seed: of all random numbers.

    Source: the published training recipe.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        size: int = 256,
        references: int = 2,
        scale: float = 1,
        mask: Mask | None = None,
        easy: bool = False,
        seed: int = 23,
    ) -> None:
        for name, value in (("size", size), ("references", references)):
            if value < 1:
                raise InputError(f"{name}: expected at least 1, got {value}")
        if not 0 < scale <= 1 or round(size * scale) < 1:
            raise InputError(f"scale: expected a number above 0, up to 1, got {scale}")
        if not paths:
            raise InputError("paths: expected at least one photo, got none")
        self.paths = list(paths)
        self.references = references
        self.side = round(size * scale)
        self.distortions = Distortions(size, easy)
        self.mask = mask or build_mask(**MASKS)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        """The sample of a draw; of a bare index as if it was the draw of that number.

        Returns:
            float32 tensors, channels last: ``image [H,W,3]`` and ``srcs [T,H,W,3]``, not masked, in
            [-1, 1]; ``mask [H,W,1]`` and ``srcs_masks [T,H,W,1]``, 1 where missing, else -1. And
            ``unreadable``: the number of photos that were replaced.

        Raises:
            InputError: many photos in a row cannot be read.
        """
        number, index = (draw, draw) if isinstance(draw, int) else draw
        rng = np.random.default_rng((self.seed, number))
        photo, unreadable = self._photo(index, rng)
        frames, masks = self.frames(photo, rng, number)
        image, mask = (_signed(values) for values in (frames, masks[..., None]))
        return {
            "image": image[0],
            "mask": mask[0],
            "srcs": image[1:],
            "srcs_masks": mask[1:],
            "unreadable": unreadable,
        }

    def frames(
        self, photo: np.ndarray, rng: np.random.Generator, number: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Target and references of a photo, and their masks.

        Returns:
            ``[1+T,H,W,3]`` uint8 and ``[1+T,H,W]`` uint8, 0 or 255, of ``side`` pixels; the target comes
            first.
        """
        count, size = 1 + self.references, self.distortions.size
        view = self.distortions.shared(photo, rng)
        frames = np.stack([self.distortions.individual(view, rng) for _ in range(count)])
        masks = np.stack([self.mask(rng, size, size, number * count + i) for i in range(count)])
        masks = masks.astype(np.uint8) * 255
        if self.side < size:
            frames, masks = (
                np.stack([cv2.resize(one, (self.side, self.side), interpolation=how) for one in whole])
                for whole, how in ((frames, cv2.INTER_AREA), (masks, cv2.INTER_NEAREST))
            )
        return frames, masks

    def _photo(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """A photo, and how many could not be read before it was found."""
        for unreadable in range(PATIENCE):
            path = self.paths[index]
            photo = read_photo(path)
            if photo is not None:
                return photo, unreadable
            log.warning("not a readable photo, another is taken: %s", path)
            index = int(rng.integers(len(self.paths)))
        raise InputError(f"photos: {PATIENCE} in a row cannot be read, the last is {path}")


def published_photos(options: Mapping[str, Any], seed: int = 23) -> Photos:
    """The data set of a published ``train`` section: ``root``, ``filelist``, ``out_size`` and so on.

    Raises:
        InputError: an unknown key, a value that is not supported, or a list that cannot be read.
    """
    known = {
        "root": None, "filelist": None, "out_size": 512, "n_references": None, "mask_gen_kwargs": None,
        "transform_variant": "distortions", "mask_generator_kind": "mixed", "easy": False,
        "kind": "default", "clean_prob": None,
    }  # fmt: skip
    for key in options:
        if key not in known:
            raise InputError(
                f"data: unknown key {key!r}{nearest(str(key), known)}; known: {', '.join(known)}"
            )
    given = {**known, **{key: value for key, value in options.items() if value is not None}}
    for key in ("root", "filelist", "n_references"):
        if given[key] is None:
            raise InputError(f"data: expected a {key}, got none")
    for key in ("transform_variant", "kind"):
        if given[key] != known[key]:
            raise InputError(f"data: {key}: only {known[key]!r} is supported, got {given[key]!r}")
    kind = given["mask_generator_kind"]
    masks = given["mask_gen_kwargs"] or (MASKS if kind == "mixed" else {})
    return Photos(
        find_photos(given["root"], given["filelist"]),
        size=given["out_size"],
        references=given["n_references"],
        mask=build_mask(kind, **masks),
        easy=given["easy"],
        seed=seed,
    )


def find_photos(root: str | Path, filelist: str | Path | None = None) -> list[Path]:
    """The photos that a list names, one path from ``root`` per line; without a list, all below ``root``.

    Empty lines are passed over. Photos below a folder are sorted, so that their order is the same on
    every machine; hidden files and folders are not looked at.

    Raises:
        InputError: the folder or the list is missing, unreadable, or holds nothing.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"root: {root} is not a folder")
    if filelist is None:
        below = (p for p in root.rglob("*") if p.suffix.lower() in IMAGES)
        found = sorted(
            p for p in below if not any(part.startswith(".") for part in p.relative_to(root).parts)
        )
        if not found:
            raise InputError(f"root: no photos ({', '.join(sorted(IMAGES))}) below {root}")
        return found
    try:
        lines = Path(filelist).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"filelist: cannot read {filelist}: {error}") from error
    found = [root / line for line in lines if line.strip()]
    if not found:
        raise InputError(f"filelist: {filelist} names no photo")
    return found


def read_photo(path: Path) -> np.ndarray | None:
    """An image ``[H,W,3]`` uint8 RGB, upright as its EXIF data says; None if it cannot be read."""
    try:
        data = np.fromfile(path, np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except (OSError, cv2.error):  # missing, or larger than OpenCV allows
        return None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _signed(values: np.ndarray) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return torch.from_numpy(values).float().div_(127.5).sub_(1)
