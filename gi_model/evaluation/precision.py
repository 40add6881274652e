"""The arithmetic of scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Convolve float32 in float32 on GPUs too, which PyTorch would round to 10 bits by default.

    SSIM subtracts numbers of nearly the same size; rounded that far, nothing would be left of the difference.
    """
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    earlier = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = earlier
