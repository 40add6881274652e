"""Launching Triton kernels, and the choices that all launchers share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from gi_kernels.jit import INTERPRETED
from gi_kernels.precision import accumulation_dtype

LANGUAGE_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True)
class Launch:
    """A kernel and what it is called with; ``options`` are constants, and Triton's own settings."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


_recorded: list[Launch] | None = None
_interpreter = threading.Lock()  # it exchanges functions of triton.language while a kernel runs


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Run ``programs`` instances of ``kernel`` on the device and the current stream of its first tensor."""
    if programs == 0:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, args, options))
        return
    device = next(a for a in args if isinstance(a, torch.Tensor)).device
    if INTERPRETED:
        with _interpreter:
            kernel[(programs,)](*args, **options)
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*args, **options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside the ``with`` block are collected and not run: for compiling ahead of time."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def sums(tensor: torch.Tensor) -> tl.dtype:
    """Type of coordinates and sums for tensors stored like ``tensor``."""
    return LANGUAGE_DTYPES[accumulation_dtype(tensor.dtype)]


def index_type(*tensors: torch.Tensor) -> tl.dtype:
    """Type of offsets inside the tensors: 64 bits only where they need them."""
    return tl.int64 if any(_span(t) >= 2**31 for t in tensors) else tl.int32


def _span(tensor: torch.Tensor) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 0)


@dataclass(frozen=True)
class Tiling:
    """How maps [N,C,H,W] are cut: tiles of P pixels times CB channels, ``channels`` per program."""

    P: int
    CB: int
    channels: int
    splits: int
    pixel_blocks: int

    @property
    def options(self) -> dict[str, int]:
        """The constants of a kernel that is cut like this."""
        return {"P": self.P, "CB": self.CB}


#: Numbers of a tile: sixteen for each of 128 threads, so that the loads of four taps are in flight.
TILE = 2048
#: Programs below which the channels of a pixel are spread over several: a few for each multiprocessor.
FEWEST_PROGRAMS = 1024


def tiling(maps: torch.Tensor, split: bool = True, one_block: bool = False, numbers: int = TILE) -> Tiling:
    """Tiles that follow the memory of ``maps``: along the channels where these are contiguous.

    A tile has about ``numbers``. A program works through all channels of its pixels (``split=False``),
    through one block of them (``one_block``), or through a share that makes enough programs.
    """
    N, C, H, W = maps.shape
    if INTERPRETED:  # what counts is the number of tiles
        CB = min(256, triton.next_power_of_2(max(C, 1)))
    elif maps.stride(1) == 1 and C > 1:
        CB = min(128, triton.next_power_of_2(C))
    else:
        CB = min(8, triton.next_power_of_2(max(C, 1)))
    P = min(max(numbers // CB // 2 if CB < 64 else numbers // CB, 8), triton.next_power_of_2(max(H * W, 16)))
    pixel_blocks = triton.cdiv(H * W, P)
    blocks = triton.cdiv(C, CB)
    if one_block:
        return Tiling(P, CB, CB, blocks, pixel_blocks)
    splits = min(blocks, triton.cdiv(FEWEST_PROGRAMS, max(N * pixel_blocks, 1))) if split else 1
    per_split = triton.cdiv(blocks, max(splits, 1))
    return Tiling(P, CB, per_split * CB, triton.cdiv(blocks, max(per_split, 1)), pixel_blocks)
