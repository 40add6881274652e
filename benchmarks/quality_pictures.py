"""Pictures beside the table of quality: windows around the mask, consecutive frames, slices through time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from gi_model.sheet import HOLE
from gi_model.staging import staged

WINDOW = 144  # pixels of a window's sides
GAP = 4  # pixels of white between windows
HEADING = 18  # pixels
CONSECUTIVE = 6  # frames
JPEG_QUALITY = 66

Frames = Sequence[np.ndarray]  # [H,W,3] uint8
Masks = Sequence[np.ndarray]  # [H,W] bool


def save(
    path: Path, truth: Frames, masks: Masks, results: Mapping[str, Frames], ours: str, detailed: bool
) -> None:
    """Write a sheet of every method side by side; if ``detailed``, also how they change over time.

    Rows: a moment of the clip, or two. Detailed: slices, where a window's middle line is stacked over
    all frames, so that what is steady runs in smooth lines downwards and what flickers is ragged; then
    consecutive frames of ``ours``, and the truth below.
    """
    columns = {"masked": _tinted(truth, masks), "truth": truth, **results}
    count = len(truth)
    sheet = []
    for moment in (count // 3, 2 * count // 3) if detailed else (count // 2,):
        window = _window(masks[moment])
        sheet.append(_headed({f"{k} {moment}": f[moment][window] for k, f in columns.items()}))
    if detailed:
        rows, across = _window(masks[count // 2])
        line = (rows.start + rows.stop) // 2
        slices = {k: np.stack([frame[line, across] for frame in f]) for k, f in columns.items()}
        sheet.append(_headed({f"{k}, x-t": s for k, s in slices.items()}))
        first = max(0, min(count // 2, count - CONSECUTIVE))
        window = _window(masks[min(first + CONSECUTIVE // 2, count - 1)])
        for name in (ours, "truth"):
            moments = range(first, min(first + CONSECUTIVE, count))
            sheet.append(_headed({f"{name} {i}": columns[name][i][window] for i in moments}))
    width = max(strip.shape[1] for strip in sheet)
    padded = [np.pad(s, [(0, GAP), (0, width - s.shape[1]), (0, 0)], constant_values=255) for s in sheet]
    picture = cv2.cvtColor(np.concatenate(padded), cv2.COLOR_RGB2BGR)
    _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    with staged(path) as temporary:
        temporary.write_bytes(data.tobytes())


def _tinted(frames: Frames, masks: Masks) -> list[np.ndarray]:
    tint = np.array(HOLE, np.uint8)
    return [np.where(mask[..., None], tint, frame) for frame, mask in zip(frames, masks, strict=True)]


def _window(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of a window about the middle of ``mask``, moved into the frame."""
    slices = []
    for axis, length in zip((1, 0), mask.shape, strict=True):
        found = np.flatnonzero(mask.any(axis=axis))
        middle = int(found[0] + found[-1]) // 2 if found.size else length // 2
        size = min(WINDOW, length)
        start = min(max(0, middle - size // 2), length - size)
        slices.append(slice(start, start + size))
    return slices[0], slices[1]


def _headed(images: Mapping[str, np.ndarray]) -> np.ndarray:
    """Images of one size in a row, each with its name above."""
    tiles = []
    for name, image in images.items():
        strip = np.full((HEADING, image.shape[1], 3), 255, np.uint8)
        cv2.putText(strip, name, (2, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (40, 40, 40), 1, cv2.LINE_AA)
        tile = np.concatenate([strip, image])
        tiles.append(np.pad(tile, [(0, 0), (0, GAP), (0, 0)], constant_values=255))
    return np.concatenate(tiles, axis=1)[:, :-GAP]
