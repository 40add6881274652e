"""A small clip with a known motion, and a mask in the middle of it."""

from __future__ import annotations

import cv2
import numpy as np

H, W, COUNT = 64, 96, 5


def scene(step: int = 2) -> list[np.ndarray]:
    """A textured plane seen by a camera that moves ``step`` pixels per frame to the right."""
    noise = np.random.default_rng(0).integers(40, 200, (H // 4, W // 2, 3)).astype(np.uint8)
    plane = cv2.GaussianBlur(cv2.resize(noise, (2 * W, H), interpolation=cv2.INTER_CUBIC), (0, 0), 1.5)
    return [np.ascontiguousarray(plane[:, step * i : step * i + W]) for i in range(COUNT)]


def centre() -> list[np.ndarray]:
    mask = np.zeros((H, W), bool)
    mask[20:44, 30:60] = True
    return [mask] * COUNT
