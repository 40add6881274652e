"""Pictures of flow."""

from __future__ import annotations

import cv2
import numpy as np


def flow_colours(flow: np.ndarray, longest: float) -> np.ndarray:
    """Colours of a flow: hue tells the direction, red being right, saturation the length.

    Args:
        flow: ``[...,H,W,2]`` in pixels, x first.
        longest: length in pixels that has full saturation; longer ones have it too.

    Returns:
        ``[...,H,W,3]`` uint8 RGB; white where nothing moves, black where the flow is not finite.
    """
    x, y = flow[..., 0].astype(np.float32), flow[..., 1].astype(np.float32)
    known = np.isfinite(x) & np.isfinite(y)
    x, y = np.where(known, x, 0), np.where(known, y, 0)
    hue = np.rad2deg(np.arctan2(y, x)) % 360
    saturation = np.minimum(np.hypot(x, y) / max(longest, 1e-6), 1)
    wide = (-1, flow.shape[-2], 3)  # OpenCV wants a single picture
    hsv = np.stack([hue, saturation, known], axis=-1).astype(np.float32)
    colours = cv2.cvtColor(hsv.reshape(wide), cv2.COLOR_HSV2RGB).reshape(hsv.shape)
    return np.rint(255 * colours).astype(np.uint8)
