"""Image files: RGB frames of 8 or 16 bits, and masks."""

from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np

from gi_model.errors import InputError

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
PNG, PALETTE = b"\x89PNG\r\n\x1a\n", 3  # how a PNG file begins; its colour type with a palette
# PNG: much faster than the default of 3, files about a tenth larger.
COMPRESSION = [cv2.IMWRITE_PNG_COMPRESSION, 1]


def read_image(path: Path, argument: str) -> np.ndarray:
    """The image ``[H,W,3]`` RGB, uint8 or uint16 as in the file; grey becomes RGB, alpha is dropped.

    Raises:
        InputError: not an image, or one of other numbers than 8 and 16 bits; names ``argument``.
    """
    data = np.frombuffer(path.read_bytes(), np.uint8)
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH) if data.size else None
    except (cv2.error, MemoryError):  # larger than OpenCV allows, or than fits
        image = None
    if image is None:
        raise InputError(f"{argument}: {path} is not a readable image")
    if image.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{argument}: expected 8 or 16 bits per channel, got {image.dtype} in {path}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_labels(path: Path, argument: str) -> np.ndarray | None:
    """The numbers ``[H,W]`` uint8 of a PNG with a palette, before they become colours; else None.

    Raises:
        InputError: the file is damaged; names ``argument``.
    """
    with path.open("rb") as file:
        head = file.read(26)
    # IHDR comes first: length, name, width, height, depth, colour type.
    if head[:8] != PNG or len(head) < 26 or head[25] != PALETTE:
        return None
    try:
        with av.open(str(path), format="png_pipe") as container:
            frame = next(container.decode(video=0))
    except (av.FFmpegError, OSError, StopIteration, ValueError) as error:
        raise InputError(f"{argument}: {path} is not a readable image") from error
    if frame.format.name != "pal8":  # transparency turns a palette into colours
        return None
    return np.ascontiguousarray(frame.to_ndarray()[0])


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an RGB image of the kind that the suffix of ``path`` says; uint16 needs PNG or TIFF.

    Raises:
        OSError: the file system did not take it; a part may have been written, see ``staged``.
    """
    parameters = COMPRESSION if path.suffix.lower() == ".png" else []
    _, data = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), parameters)
    path.write_bytes(data.tobytes())


def to_8_bit(image: np.ndarray) -> np.ndarray:
    """uint16 levels as the nearest uint8 ones; uint8 as it is."""
    return image if image.dtype == np.uint8 else ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
