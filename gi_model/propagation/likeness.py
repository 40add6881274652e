"""Whether a frame shows what is expected of it, by its colours.

Colours are levels from 0 to 255. Images are ``[h,w,3]`` float32, maps ``[h,w]`` float32.
"""

from __future__ import annotations

import cv2
import numpy as np

# Difference of colour at which visibility has halved: levels, plus a share of the contrast around.
NOISE, CONTRAST = 7.0, 0.25
# Deviation of the windows that colours are compared in, of those that find the shading, and of those in
# which texture is compared.
BLUR, SHADING, TEXTURE = 1.2, 5.0, 3.0
# Correlation of textures at which it counts half that they are the same.
ALIKE = 0.6


def difference(image: np.ndarray, other: np.ndarray, blur: float = BLUR) -> np.ndarray:
    """Difference of colours in small windows of that deviation."""
    return cv2.GaussianBlur(grey(cv2.absdiff(image, other)), (0, 0), blur)


def shading(image: np.ndarray, other: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """How bright ``image`` is as a multiple of ``other``: smooth, the same in all channels.

    Where there is no weight, that of the surroundings.
    """
    weight = weight + np.float32(1e-3)
    means = [cv2.GaussianBlur(weight * grey(i), (0, 0), SHADING) for i in (image, other)]
    steady = 4.0 * cv2.GaussianBlur(weight, (0, 0), SHADING)  # dark regions have no ratio
    return (means[0] + steady) / (means[1] + steady)


def agreement(
    difference: np.ndarray, image: np.ndarray, expected: np.ndarray, trusted: np.ndarray
) -> np.ndarray:
    """From 1, where the image shows what is expected of it, to 0.

    Where positions are not ``trusted``, textures must correlate too.
    """
    alike = 1 / (1 + ((1 - _correlation(grey(expected), grey(image))) / (1 - ALIKE)) ** 4)
    return closeness(difference, expected) * (1 - (1 - trusted) * (1 - alike))


def closeness(difference: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The same from 1 to 0 by the difference of colours alone.

    It says less where the expected image has contrast: a small displacement makes a large difference.
    """
    plane = grey(expected)
    kernel = np.ones((3, 3), np.uint8)
    contrast = cv2.GaussianBlur(cv2.dilate(plane, kernel) - cv2.erode(plane, kernel), (0, 0), BLUR)
    return 1 / (1 + (difference / (NOISE + CONTRAST * contrast)) ** 4)


def grey(image: np.ndarray) -> np.ndarray:
    """The mean of the channels."""
    return cv2.transform(image, np.full((1, 3), 1 / 3, np.float32))


def _correlation(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of two images [h,w] in small windows; 1 where both are flat."""

    def mean(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, (0, 0), TEXTURE)

    middle, middle_other = mean(image), mean(other)
    flat = NOISE**2 / 4
    variance = (mean(image**2) - middle**2).clip(0) + flat
    variance_other = (mean(other**2) - middle_other**2).clip(0) + flat
    return (mean(image * other) - middle * middle_other + flat) / np.sqrt(variance * variance_other)
