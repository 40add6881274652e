"""Pictures of a few frames side by side: masked, repaired, truth, or whatever else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

HOLE = (255, 60, 160)  # RGB
LINE = 4  # pixels of white between frames
HEADING = 24  # pixels


class Sheet:
    """Collects rows of frames, spread evenly over a clip.

    Args:
        count: frames of the clip, or 0 if not known: then rows are thinned out as frames come.
        rows: how many frames to show.
    """

    def __init__(self, count: int, rows: int) -> None:
        self.rows = rows
        self.collected: list[list[np.ndarray]] = []
        self.chosen = {int((i + 0.5) * count / rows) for i in range(rows)} if count else None
        self.every = 1

    def add(
        self, index: int, image: np.ndarray, mask: np.ndarray, result: np.ndarray, truth: np.ndarray | None
    ) -> None:
        """Offer frame ``index``, in order: ``[H,W,3]`` uint8 images and a ``[H,W]`` bool mask."""
        if index not in self.chosen if self.chosen is not None else index % self.every:
            return
        tinted = image.copy()
        tinted[mask] = np.array(HOLE, np.uint8)
        self.collected.append([tinted, result] + ([] if truth is None else [truth]))
        if len(self.collected) >= 2 * self.rows:
            self.collected = self.collected[::2]
            self.every *= 2

    def image(self) -> np.ndarray:
        """The sheet, ``[H,W,3]`` uint8; at least one frame must have been added."""
        shown = self.collected[: self.rows]
        return tabulate(("masked", "repaired", "truth")[: len(shown[0])], shown)


def tabulate(titles: Sequence[str], rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Rows of pictures ``[H,W,3]`` uint8 of one size under the titles of their columns, in one picture."""
    headings = [_heading(title, rows[0][0].shape[1]) for title in titles]
    lines = [_joined(headings), *(_lined(_joined(row), 0) for row in rows)]
    return np.concatenate(lines, axis=0)[:-LINE]


def write_png(path: Path, picture: np.ndarray) -> None:
    """A PNG of an RGB picture ``[H,W,3]`` or of one channel ``[H,W]``, uint8."""
    if picture.ndim == 3:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".png", picture)
    path.write_bytes(data.tobytes())


def _joined(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures side by side, white lines between them."""
    return np.concatenate([_lined(picture, 1) for picture in pictures], axis=1)[:, :-LINE]


def _lined(picture: np.ndarray, axis: int) -> np.ndarray:
    """``picture`` with a white line after it."""
    margin = [(0, 0), (0, 0), (0, 0)]
    margin[axis] = (0, LINE)
    return np.pad(picture, margin, constant_values=255)


def _heading(title: str, width: int) -> np.ndarray:
    strip = np.full((HEADING, width, 3), 255, np.uint8)
    return cv2.putText(
        strip, title, (4, HEADING - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (40, 40, 40), 1, cv2.LINE_AA
    )
