"""What a file describes, kept inert: names, storages and tensors, and the check of a tensor's description."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch

LARGEST = 1 << 48  # a size, stride or offset
MOST_DIMENSIONS = 64  # what PyTorch's iterators take

QUANTISED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
# Dtypes younger than typed storages: their tensors name the dtype and lie in untyped storages.
YOUNG_DTYPES = {
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
}
REFUSED_TENSORS = {
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_qtensor": "quantised",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_meta_tensor_no_storage": "meta",
    "_rebuild_wrapper_subclass": "wrapped",
    "_rebuild_device_tensor_from_numpy": "NumPy-backed",
    "_rebuild_device_tensor_from_cpu_tensor": "device-specific",
}


class ProblemError(Exception):
    """What is wrong with the file, which the message does not name yet."""


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """Anything that is of no use here. Takes any call, item or state, and does nothing."""

    what: str


@dataclass(frozen=True, slots=True, eq=False)
class GlobalName:
    """The name of a class or function; it is never looked up."""

    module: str
    name: str

    @property
    def shown(self) -> str:
        return repr(f"{self.module[:80]}.{self.name[:80]}")


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Memory that tensors view: ``count`` elements, to be found in the file by ``key``."""

    key: str
    dtype: torch.dtype
    count: int
    typed: bool = True

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class TensorCall:
    """A call that would make a tensor, unchecked."""

    function: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor within a storage, checked. Offset and strides in elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Source(Protocol):
    """A file whose description has been read."""

    length: int  # bytes of the file

    def entries(self) -> dict[Any, Any]:
        """The state dict; values of any kind."""

    def read_into(self, storage: Storage, memory: memoryview) -> None:
        """Fill the memory, as long as the storage, with the storage's bytes."""

    def locate(self, storage: Storage) -> None:
        """Check that the file has this storage in this size."""


def shown(text: object) -> str:
    """Something short of a file, as it may stand in a message."""
    if isinstance(text, str | bytes) and len(text) > 80:
        return repr(text[:80]) + "..."
    return repr(text) if isinstance(text, str | bytes | int | None) else kind_of(text)


def kind_of(value: object) -> str:
    if isinstance(value, Opaque):
        return value.what
    if isinstance(value, GlobalName):
        return f"the name {value.shown}"
    if isinstance(value, Storage):
        return "a storage"
    if isinstance(value, TensorCall):
        return "a tensor"
    return "None" if value is None else type(value).__name__


def checked_view(value: object) -> View:
    """Check the description of a tensor, in integers that cannot overflow."""
    if not isinstance(value, TensorCall):
        raise ProblemError(f"expected a tensor, got {kind_of(value)}")
    refused = REFUSED_TENSORS.get(value.function)
    if refused is not None:
        raise ProblemError(f"{refused} tensors are not supported")
    arguments = value.arguments
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        raise ProblemError("a tensor without storage, offset, size and stride")
    storage, offset, size, stride = arguments[:4]
    rest = arguments[6:]
    dtype = storage.dtype
    count = storage.count
    if dtype in QUANTISED:
        raise ProblemError("quantised tensors are not supported")
    if value.function == "_rebuild_tensor_v3":
        named = rest[0] if rest else None
        if not isinstance(named, GlobalName) or named.module != "torch" or named.name not in YOUNG_DTYPES:
            raise ProblemError(f"expected a dtype of torch, got {kind_of(named)}")
        if storage.typed:
            raise ProblemError(f"expected an untyped storage, got one of {dtype}")
        dtype = YOUNG_DTYPES[named.name]
        count //= dtype.itemsize
        rest = rest[1:]
    if rest and rest[0] is not None and rest[0] != {}:
        raise ProblemError("tensors that are conjugated or negated lazily are not supported")

    if not is_size(offset):
        raise ProblemError(f"expected an offset from 0 to 2**48, got {shown(offset)}")
    for what, values in (("sizes", size), ("strides", stride)):
        if type(values) is not tuple or len(values) > MOST_DIMENSIONS or not all(map(is_size, values)):
            raise ProblemError(f"{what} must be at most {MOST_DIMENSIONS} numbers from 0 to 2**48")
    if len(size) != len(stride):
        raise ProblemError(f"expected as many strides as sizes, got {len(stride)} and {len(size)}")
    if math.prod(n or 1 for n in size) > LARGEST:
        raise ProblemError("sizes are too large")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    end = offset if 0 in size else last + 1
    if end > count:
        raise ProblemError(f"a tensor that ends at element {end} of a storage of {count}")
    return View(storage, dtype, offset, size, stride)


def is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST
