"""Bytes of a file that may be shorter than it says."""

from __future__ import annotations

import os
from typing import Any, BinaryIO

from gi_model.checkpoints.descriptions import ProblemError

CHUNK = 1 << 24  # bytes read at once


def bytes_at(file: BinaryIO, place: int, count: int) -> bytes:
    if place + count > os.fstat(file.fileno()).st_size:
        raise ProblemError("ends too early")
    file.seek(place)
    data = file.read(count)
    if len(data) != count:
        raise ProblemError("ends too early")
    return data


def read_exactly(file: Any, memory: memoryview) -> None:
    while memory:
        count = file.readinto(memory)
        if not count:
            raise ProblemError("ends too early")
        memory = memory[count:]
