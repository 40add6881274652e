"""A picture of a few frames: masked, repaired, truth."""

from __future__ import annotations

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
        height, width = self.collected[0][0].shape[:2]
        rows = [_heading(width, len(self.collected[0]))]
        for row in self.collected[: self.rows]:
            rows += [np.concatenate([_lined(i, 1) for i in row], axis=1)[:, :-LINE]]
        return np.concatenate([rows[0], *(_lined(r, 0) for r in rows[1:])], axis=0)[:-LINE]


def _lined(image: np.ndarray, axis: int) -> np.ndarray:
    """``image`` with a white line after it."""
    margin = [(0, 0), (0, 0), (0, 0)]
    margin[axis] = (0, LINE)
    return np.pad(image, margin, constant_values=255)


def _heading(width: int, columns: int) -> np.ndarray:
    strip = np.full((HEADING, columns * (width + LINE) - LINE, 3), 255, np.uint8)
    for i, text in enumerate(("masked", "repaired", "truth")[:columns]):
        at = (i * (width + LINE) + 4, HEADING - 8)
        cv2.putText(strip, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (40, 40, 40), 1, cv2.LINE_AA)
    return strip
