"""Smooth continuation of known values into a hole."""

from __future__ import annotations

import cv2
import numpy as np

# Relaxations per level. The coarser level has found all that is smooth, these settle what is left.
SWEEPS = 6
CROSS = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], np.float32) / 4


def membrane(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """``values`` ``[h,w,C]`` float32 where ``known`` ``[h,w]`` bool, elsewhere harmonic between them.

    The solution of Laplace's equation with mirrored borders, by a cascade of grids from coarse to fine.
    Zero where nothing is known at all.
    """
    if not known.any():
        return np.zeros_like(values)
    result = _solve(np.where(known[..., None], values, 0).astype(np.float32), known.astype(np.float32))
    return result.reshape(values.shape)


def _solve(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    height, width = known.shape
    if known.all():
        return values
    if max(height, width) <= 2:
        mean = (values * known[..., None]).sum((0, 1)) / known.sum()
        return np.where(known[..., None] > 0, values, mean)
    even = [(0, height % 2), (0, width % 2)]
    share = _halved(np.pad(known, even))
    half = _halved(np.pad(values, [*even, (0, 0)])) / np.maximum(share, 1e-6)[..., None]
    coarse = _solve(half * (share > 0)[..., None], (share > 0).astype(np.float32))
    size = coarse.shape[1] * 2, coarse.shape[0] * 2
    guess = cv2.resize(coarse, size, interpolation=cv2.INTER_LINEAR)
    guess = np.ascontiguousarray(guess[:height, :width])
    fixed = (known > 0).view(np.uint8)
    out = cv2.copyTo(values, fixed, guess)
    for _ in range(SWEEPS):
        out = cv2.copyTo(values, fixed, cv2.filter2D(out, -1, CROSS, borderType=cv2.BORDER_REPLICATE))
    return out.reshape(values.shape)


def _halved(values: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels."""
    return (values[::2, ::2] + values[1::2, ::2] + values[::2, 1::2] + values[1::2, 1::2]) / 4
