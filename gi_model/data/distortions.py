"""The ``distortions`` of training: one view of a photo shared by all frames, then one of its own for each.

Order, probabilities and ranges are the published ones. Each step is a function of an image and its
parameters on OpenCV; the two chains draw the parameters from the generator that is handed in.
Images are ``[H,W,3]`` uint8 RGB.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

# The shared view is larger than the frames cut out of it by this many pixels.
MARGIN, EASY_MARGIN = 200, 25


@dataclass(frozen=True)
class Distortions:
    """The chain for frames of ``size`` x ``size`` pixels; ``easy`` leaves out all that bends a frame."""

    size: int
    easy: bool = False

    def shared(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A view of a photo of any size: padded, cropped, mirrored, its colours changed."""
        side = self.size + (EASY_MARGIN if self.easy else MARGIN)
        image = random_crop(pad(image, side, side), side, rng)
        if rng.random() < 0.5:
            image = np.ascontiguousarray(image[:, ::-1])
        if rng.random() < 0.5:
            image = equalize(image, rng.uniform(1, 4))
        return recolour(image, rng, contrast=0.2, brightness=0.2, hue=5, saturation=30, value=5)

    def individual(self, view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A frame of a view: seen from elsewhere, through another lens, cropped, slightly recoloured."""
        if self.easy:
            return random_crop(view, self.size, rng)
        if rng.random() < 0.5:
            view = tilt(view, rng.normal(0, rng.uniform(0, 0.06), (4, 2)))
        if rng.random() < 0.5:
            scale, shear = rng.uniform(0.7, 1.3, 2), rng.uniform(-0.1, 0.1, 2)
            view = turn(view, affine_matrix(view.shape[:2], scale, rng.uniform(-40, 40), shear))
        if rng.random() < 0.5:
            view = bend(view, rng.uniform(-0.05, 0.05))
        frame = random_crop(view, self.size, rng)
        return recolour(frame, rng, contrast=0.01, brightness=0.01, hue=0, saturation=3, value=1)


def recolour(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    contrast: float,
    brightness: float,
    hue: float,
    saturation: float,
    value: float,
) -> np.ndarray:
    """Contrast and brightness with probability 1/2, then hue, saturation and value likewise.

    Each changes by at most the given limit: contrast as a share, brightness as a share of 255, the
    others in the units of :func:`shift_hsv`.
    """
    if rng.random() < 0.5:
        image = adjust(image, 1 + rng.uniform(-contrast, contrast), rng.uniform(-brightness, brightness))
    if rng.random() < 0.5:
        image = shift_hsv(image, *(rng.uniform(-limit, limit) for limit in (hue, saturation, value)))
    return image


def pad(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """``image``, mirrored around its edge pixels to at least ``height`` x ``width``, in the middle."""
    missing = [max(0, wanted - length) for wanted, length in zip((height, width), image.shape, strict=False)]
    if not any(missing):
        return image
    (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in missing)
    return cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_REFLECT_101)


def random_crop(image: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """A square of ``side`` pixels anywhere in ``image``, which is at least as large."""
    y, x = (int((length - side) * rng.random()) for length in image.shape[:2])
    return image[y : y + side, x : x + side]


def equalize(image: np.ndarray, limit: float) -> np.ndarray:
    """Contrast-limited adaptive histogram equalization of the lightness in 8 x 8 tiles."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(limit, (8, 8)).apply(lab[..., 0])
    return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)


def adjust(image: np.ndarray, contrast: float, brightness: float) -> np.ndarray:
    """``contrast * image + 255 * brightness``, cut off at both ends."""
    levels = np.arange(256, dtype=np.float32) * np.float32(contrast) + np.float32(brightness * 255)
    return cv2.LUT(image, np.clip(levels, 0, 255).astype(np.uint8))


def shift_hsv(image: np.ndarray, hue: float, saturation: float, value: float) -> np.ndarray:
    """Hue, saturation and value shifted, in OpenCV's 8-bit units: hue in steps of 2 degrees."""
    planes = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    levels = np.arange(256, dtype=np.float64)
    tables = [
        np.mod(levels + hue, 180),
        np.clip(levels + saturation, 0, 255),
        np.clip(levels + value, 0, 255),
    ]
    shifted = [cv2.LUT(p, t.astype(np.uint8)) for p, t in zip(planes, tables, strict=True)]
    return cv2.cvtColor(cv2.merge(shifted), cv2.COLOR_HSV2RGB)


def tilt(image: np.ndarray, jitter: np.ndarray) -> np.ndarray:
    """``image`` seen in perspective: what lies between four corners fills the frame.

    Args:
        jitter: ``[4,2]``: how far the corners, clockwise from the top left, move inwards, x first, as a
            share of the sides; signs and whole sides are dropped.
    """
    height, width = image.shape[:2]
    matrix, (inner_height, inner_width) = perspective(height, width, jitter)
    size = (inner_width, inner_height)
    out = cv2.warpPerspective(image, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    enlarged = inner_height < height or inner_width < width
    # OpenCV's area interpolation, when it enlarges, keeps pixels apart where a linear one blurs them.
    return cv2.resize(out, (width, height), interpolation=cv2.INTER_AREA if enlarged else cv2.INTER_LINEAR)


def perspective(height: int, width: int, jitter: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """The matrix [3,3] from the frame to an upright rectangle, and that rectangle's height and width."""
    inwards = np.mod(np.abs(jitter), 1)
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    places = (corners + np.where(corners > 0, -inwards, inwards)) * (width, height)
    lengths = np.linalg.norm(np.roll(places, -1, axis=0) - places, axis=1)  # top, right, bottom, left
    inner_width, inner_height = (max(2, int(max(lengths[i], lengths[i + 2]))) for i in (0, 1))
    target = corners * (inner_width, inner_height)
    matrix = cv2.getPerspectiveTransform(places.astype(np.float32), target.astype(np.float32))
    return matrix, (inner_height, inner_width)


def turn(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """``image`` moved by an affine ``matrix`` [3,3], mirrored where nothing comes from."""
    height, width = image.shape[:2]
    return cv2.warpAffine(
        image, matrix[:2], (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )


def affine_matrix(size: tuple[int, int], scale: np.ndarray, rotation: float, shear: np.ndarray) -> np.ndarray:
    """Scaling, rotation and shear about the middle of a frame of ``size`` [height,width] -> [3,3].

    Args:
        scale, shear: of x and y; ``rotation`` and ``shear`` in degrees.
    """
    angle, (a, b) = np.radians(rotation), np.radians(shear)
    linear = np.array(
        [
            [scale[0] * np.cos(angle), -scale[1] * np.sin(angle + a)],
            [scale[0] * np.sin(angle), scale[1] * np.cos(angle + a)],
        ]
    )
    quarter = np.array([[0.0, -1.0], [1.0, 0.0]])
    linear = linear @ quarter @ np.array([[1, -np.sin(b)], [0, np.cos(b)]]) @ quarter.T
    centre = np.array([size[1] / 2 - 0.5, size[0] / 2 - 0.5])
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, centre - linear @ centre
    return matrix


def bend(image: np.ndarray, k: float) -> np.ndarray:
    """``image`` through a lens with both radial distortion coefficients ``k``."""
    height, width = image.shape[:2]
    camera = np.array([[width, 0, width / 2], [0, height, height / 2], [0, 0, 1]], np.float32)
    distortion = np.array([k, k, 0, 0, 0], np.float32)
    centred = camera.copy()  # what OpenCV takes where it is given no camera for the result
    centred[:2, 2] = (width - 1) / 2, (height - 1) / 2
    size = (width, height)
    x, y = cv2.initUndistortRectifyMap(camera, distortion, np.eye(3), centred, size, cv2.CV_32FC1)
    return cv2.remap(image, x, y, interpolation=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
