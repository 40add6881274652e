"""How close a repaired region is to the truth."""

from __future__ import annotations

import cv2
import numpy as np


class MaskedQuality:
    """PSNR and SSIM inside masks, over all frames of a clip.

    PSNR in dB: of the mean squared error of all masked numbers, against the range of the clip's type, 255
    or 65535. SSIM: the mean, over masked pixels, of the index of Wang et al., "Image quality assessment:
    from error visibility to structural similarity", 2004, on luma with a Gaussian window of sigma 1.5.
    """

    def __init__(self) -> None:
        self.squared_error = 0.0  # of numbers in grey levels of 8 bits
        self.numbers = 0
        self.similarity = 0.0
        self.pixels = 0

    def add(self, image: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> None:
        """Count a frame: two ``[H,W,3]`` images, both uint8 or both uint16, and a ``[H,W]`` bool mask.

        Raises:
            TypeError: the images have other types, or two.
        """
        level = _levels(image, truth)
        if not mask.any():
            return
        difference = (image[mask].astype(np.float64) - truth[mask]) / level
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
    """SSIM per pixel, ``[H,W]``, of two ``[H,W,3]`` images, both uint8 or both uint16."""
    level = _levels(image, other)
    x, y = (cv2.cvtColor(i, cv2.COLOR_RGB2GRAY).astype(np.float64) / level for i in (image, other))

    def mean(v: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(v, (11, 11), 1.5, borderType=cv2.BORDER_REFLECT)

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))


def _levels(image: np.ndarray, other: np.ndarray) -> int:
    """How many steps of the images' type a grey level of 8 bits has."""
    if image.dtype != other.dtype or image.dtype not in (np.uint8, np.uint16):
        raise TypeError(f"images: expected two uint8 or two uint16, got {image.dtype} and {other.dtype}")
    return 1 if image.dtype == np.uint8 else 257
