"""How close a repaired region is to the truth."""

from __future__ import annotations

import cv2
import numpy as np


class MaskedQuality:
    """PSNR and SSIM inside masks, over all frames of a clip.

    PSNR in dB: of the mean squared error of all masked numbers, peak 255. SSIM: the mean, over masked
    pixels, of the index of Wang et al., "Image quality assessment: from error visibility to structural
    similarity", 2004, on luma with a Gaussian window of sigma 1.5.
    """

    def __init__(self) -> None:
        self.squared_error = 0.0
        self.numbers = 0
        self.similarity = 0.0
        self.pixels = 0

    def add(self, image: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> None:
        """Count a frame: two ``[H,W,3]`` uint8 images and a ``[H,W]`` bool mask."""
        if not mask.any():
            return
        difference = image[mask].astype(np.float64) - truth[mask]
        self.squared_error += float((difference**2).sum())
        self.numbers += difference.size
        self.similarity += float(similarity_map(image, truth)[mask].sum())
        self.pixels += int(mask.sum())

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB; NaN without a masked pixel."""
        if not self.numbers:
            return float("nan")
        mean = self.squared_error / self.numbers
        return float("inf") if mean == 0 else float(10 * np.log10(255**2 / mean))

    @property
    def ssim(self) -> float:
        """Mean structural similarity; NaN without a masked pixel."""
        return self.similarity / self.pixels if self.pixels else float("nan")


def similarity_map(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """SSIM per pixel, ``[H,W]``, of two ``[H,W,3]`` uint8 images."""
    x, y = (cv2.cvtColor(i, cv2.COLOR_RGB2GRAY).astype(np.float64) for i in (image, other))

    def mean(v: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(v, (11, 11), 1.5, borderType=cv2.BORDER_REFLECT)

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
