"""Folders of repaired videos with their truth and masks, by split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gi_model.errors import InputError
from gi_model.video import VIDEOS, FrameSource, MaskSource, aligned


@dataclass
class Video:
    """One repaired video: its name, its split, and where its frames, truth and masks are."""

    name: str
    split: str
    result: Path
    truth: Path
    masks: Path | None

    def size(self) -> tuple[int, int, int]:
        """Number of frames, height and width."""
        source = FrameSource(self.result, "RESULTS")
        first = next(iter(source))
        return source.count or sum(1 for _ in source), first.shape[0], first.shape[1]

    def frames(self) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray] | None]:
        """Results, truth ``[H,W,3]`` float32 in [0, 1], and masks ``[H,W]`` bool if there are any.

        With masks, results are taken inside them only, and are the truth elsewhere.

        Raises:
            InputError: unreadable frames, or numbers or sizes that differ.
        """
        source = FrameSource(self.result, "RESULTS")
        masks = None if self.masks is None else MaskSource(self.masks, "MASKS")
        results, truths, own_masks = [], [], []
        for step in aligned(source, masks, FrameSource(self.truth, "TRUTH")):
            assert step.truth is not None
            result, truth = _unit(step.image), _unit(step.truth)
            if masks is not None:
                result = np.where(step.mask[..., None], result, truth)
            results.append(result)
            truths.append(truth)
            own_masks.append(step.mask)
        return results, truths, None if masks is None else own_masks


def find_videos(results: Path, truth: Path, masks: Path | None) -> list[Video]:
    """All videos below ``results``, in the order of their names.

    A video is a folder of images or a video file; a folder of folders is a split. Its truth and its masks are
    at the same place below ``truth`` and ``masks``, or there under the video's name alone, for splits that
    share them. Endings of video files may differ; masks may be one image for all frames.

    Raises:
        InputError: nothing is found, or no truth or masks of a video.
    """
    for argument, path in (("RESULTS", results), ("TRUTH", truth), ("MASKS", masks)):
        if path is not None and not path.exists():
            raise InputError(f"{argument}: {path} does not exist")
    found = []
    for path in _videos_below(results):
        place = path.relative_to(results)
        if place != Path(".") and path.is_file():
            place = place.with_suffix("")
        split = str(place.parent) if place.parent != Path(".") else "all"
        name = place.name or results.stem
        own_masks = None if masks is None else _matching(masks, place, "MASKS")
        found.append(Video(name, split, path, _matching(truth, place, "TRUTH"), own_masks))
    if not found:
        raise InputError(f"RESULTS: {results} holds no folders of images and no videos")
    return sorted(found, key=lambda video: (video.split, video.name))


def _videos_below(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        yield folder
        return
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    deeper = [path for path in inside if path.is_dir() or path.suffix.lower() in VIDEOS]
    if not deeper and inside:
        yield folder
    for path in deeper:
        yield from _videos_below(path)


def _matching(root: Path, place: Path, argument: str) -> Path:
    """What belongs to the video at ``place``, below ``root``."""
    if place == Path("."):
        return root
    for wanted in (root / place, root / place.name):
        if wanted.exists():
            return wanted
        if wanted.parent.is_dir():
            for other in sorted(wanted.parent.iterdir()):
                if other.is_file() and other.stem == wanted.name:
                    return other
    raise InputError(f"{argument}: expected {root / place} or {root / place.name}, neither exists")


def _unit(frame: np.ndarray) -> np.ndarray:
    """Levels of 8 or 16 bits as float32 in [0, 1]."""
    return frame.astype(np.float32) / np.iinfo(frame.dtype).max
