"""Moving masks of three kinds, the same every time: a walking figure, a box, thick strokes."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np


def figure(count: int, height: int, width: int) -> list[np.ndarray]:
    """A figure of ellipses that walks across the frame, swings its limbs and bobs: about 9 % of it."""
    unit = math.sqrt(height * width)
    masks = []
    for i in range(count):
        t = i / max(1, count - 1)
        stride = math.sin(2 * math.pi * i / 18)  # a step takes nine frames
        x = width * (0.18 + 0.64 * t)
        y = 0.46 * height + 0.008 * unit * math.cos(4 * math.pi * i / 18)
        mask = np.zeros((height, width), np.uint8)

        def ellipse(dx: float, dy: float, rx: float, ry: float, angle: float = 0.0) -> None:
            centre = x + dx * unit, y + dy * unit  # noqa: B023
            axes = 2 * rx * unit, 2 * ry * unit
            cv2.ellipse(mask, (centre, axes, angle), 1, -1)  # noqa: B023

        ellipse(0.01 * stride, -0.205, 0.052, 0.062)  # head
        ellipse(0, -0.03, 0.090, 0.135, 4 * stride)  # trunk
        for side in (-1, 1):
            swing = 26 * stride * side
            reach = math.sin(math.radians(swing))
            ellipse(-0.13 * reach + 0.02 * side, 0.205, 0.036, 0.125, swing)  # leg
            ellipse(0.11 * reach + 0.085 * side, 0.0, 0.024, 0.115, -swing)  # arm
        masks.append(mask.astype(bool))
    return masks


def box(count: int, height: int, width: int) -> list[np.ndarray]:
    """A box of 8 % of the frame that wanders."""
    h, w = round(0.29 * height), round(0.28 * width)
    masks = []
    for i in range(count):
        t = i / max(1, count - 1)
        top = round((height - h) * (0.5 + 0.38 * math.sin(2 * math.pi * t + 0.5)))
        left = round((width - w) * (0.5 - 0.40 * math.cos(1.4 * math.pi * t)))
        mask = np.zeros((height, width), bool)
        mask[top : top + h, left : left + w] = True
        masks.append(mask)
    return masks


def strokes(count: int, height: int, width: int) -> list[np.ndarray]:
    """Five bent strokes, each a thirtieth of the frame thick, that drift apart: 6 to 9 % of it."""
    random = np.random.default_rng(7)
    unit = math.sqrt(height * width)
    starts = random.uniform(0.15, 0.85, (5, 1, 2))
    turns = np.cumsum(random.uniform(-1.0, 1.0, (5, 4)), axis=1) + random.uniform(0, 2 * math.pi, (5, 1))
    bends = 0.09 * np.cumsum(np.stack([np.cos(turns), np.sin(turns)], axis=2), axis=1)
    lines = (starts + np.concatenate([np.zeros((5, 1, 2)), bends], axis=1)) * (width, height)
    headings = random.uniform(0, 2 * math.pi, 5)
    speed = 0.0035 * unit  # pixels per frame
    masks = []
    for i in range(count):
        mask = np.zeros((height, width), np.uint8)
        for line, heading in zip(lines, headings, strict=True):
            moved = line + i * speed * np.array([math.cos(heading), math.sin(heading)])
            points = np.round(16 * moved).astype(np.int32)  # sixteenths of a pixel
            cv2.polylines(mask, [points], False, 1, round(unit / 30), cv2.LINE_8, 4)
        masks.append(mask.astype(bool))
    return masks


KINDS: dict[str, Callable[[int, int, int], list[np.ndarray]]] = {
    "object": figure,
    "box": box,
    "stroke": strokes,
}
