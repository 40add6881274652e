"""Filling a hole in a single image: what flow and propagation begin with, and are compared with."""

from __future__ import annotations

import cv2
import numpy as np


def inpaint_frame(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Fill ``mask`` from the frame itself (Telea, 2004): ``[H,W,3]`` uint8 or uint16, ``[H,W]`` bool.

    What is inside the mask has no influence. Grey where there is nothing outside.
    """
    if not mask.any():
        return image
    if mask.all():
        return np.full_like(image, np.iinfo(image.dtype).max // 2)
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    margin = 8  # the method looks 3 pixels far
    box = (
        slice(max(0, top - margin), top + height + margin),
        slice(max(0, left - margin), left + width + margin),
    )
    blank = np.where(mask[box][..., None], image.dtype.type(0), image[box])
    hole = mask[box].astype(np.uint8)
    if image.dtype == np.uint8:
        filled = cv2.inpaint(blank, hole, 3, cv2.INPAINT_TELEA)
    else:  # OpenCV takes these one channel at a time
        channels = [cv2.inpaint(c, hole, 3, cv2.INPAINT_TELEA) for c in np.moveaxis(blank, 2, 0).copy()]
        filled = np.stack(channels, axis=2)
    result = image.copy()
    result[box] = filled
    return result
