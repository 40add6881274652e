"""safetensors files."""

from __future__ import annotations

import json
import math
import struct
import sys
from typing import Any, BinaryIO

import torch

from gi_model.checkpoints.descriptions import (
    LARGEST,
    MOST_DIMENSIONS,
    ProblemError,
    Storage,
    View,
    is_size,
    shown,
)
from gi_model.checkpoints.files import CHUNK, bytes_at, read_exactly

MOST_HEADER_BYTES = 1 << 24

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Safetensors:
    """The length of a header, 8 bytes; the header, JSON; the tensors, without gap or overlap."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self.file = file
        self.length = length
        (size,) = struct.unpack("<Q", bytes_at(file, 0, 8))
        if size > MOST_HEADER_BYTES:
            raise ProblemError(f"a safetensors header of {size} bytes, expected at most {MOST_HEADER_BYTES}")
        if sys.byteorder != "little":
            raise ProblemError("safetensors on a big-endian machine are not supported")
        self.start = 8 + size
        self.places: dict[str, int] = {}
        self.state: dict[Any, Any] = {}
        spans = []
        for name, entry in _json_object(bytes_at(file, 8, size)).items():
            if name != "__metadata__":
                try:
                    begin, end, self.state[name] = _safetensors_entry(name, entry)
                except ProblemError as problem:
                    raise ProblemError(f"{shown(name)}: {problem}") from problem
                self.places[name] = self.start + begin
                spans.append((begin, end, name))
        covered = 0
        for begin, end, name in sorted(spans):
            if begin != covered:
                raise ProblemError(f"{shown(name)}: begins at byte {begin}, expected {covered}")
            covered = end
        if self.start + covered != length:
            what = "ends too early" if self.start + covered > length else "goes on behind its last tensor"
            raise ProblemError(f"{what}: has {length} bytes, expected {self.start + covered}")

    def entries(self) -> dict[Any, Any]:
        return self.state

    def locate(self, storage: Storage) -> None:
        pass

    def read_into(self, storage: Storage, memory: memoryview) -> None:
        self.file.seek(self.places[storage.key])
        for start in range(0, len(memory), CHUNK):
            read_exactly(self.file, memory[start : start + CHUNK])


def _json_object(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ProblemError("a safetensors header with a name twice")
        return made

    def number(digits: str) -> int:
        if len(digits) > 20:
            raise ProblemError("a safetensors header with a number too large")
        return int(digits)

    try:
        content = json.loads(text.decode(), object_pairs_hook=unique, parse_int=number)
    except (ValueError, RecursionError) as error:
        raise ProblemError(f"a damaged safetensors header: {str(error)[:100]}") from error
    if not isinstance(content, dict):
        raise ProblemError("a safetensors header that is no object")
    return content


def _safetensors_entry(name: str, entry: object) -> tuple[int, int, View]:
    """Begin and end in the data, and the tensor."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ProblemError("expected dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = SAFETENSORS_DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise ProblemError(f"dtype {shown(kind)} is not supported")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(is_size(n) for n in shape):
        raise ProblemError("expected a shape of at most 64 numbers from 0 to 2**48")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(n) for n in offsets):
        raise ProblemError("expected two data_offsets from 0 to 2**48")
    if math.prod(n or 1 for n in shape) > LARGEST:
        raise ProblemError("its shape is too large")
    count = math.prod(shape)
    if offsets[1] - offsets[0] != count * dtype.itemsize:
        raise ProblemError(
            f"has {offsets[1] - offsets[0]} bytes, its shape and dtype need {count * dtype.itemsize}"
        )
    stride = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        stride[i - 1] = stride[i] * (shape[i] or 1)
    return *offsets, View(Storage(name, dtype, count), dtype, 0, tuple(shape), tuple(stride))
