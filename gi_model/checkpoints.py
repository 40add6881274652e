"""Tensors out of checkpoint files, without running anything a file says.

A ``.ckpt`` or ``.pth`` file holds a pickle: a program that may import and call whatever is installed.
``_Machine`` reads that program itself. It imports nothing and calls nothing: what the program would
build is kept as inert descriptions, and a tensor is made from its description only when it is returned
and has been checked against the bytes that the file really has.
"""

from __future__ import annotations

import ctypes
import io
import json
import math
import os
import stat
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import torch

from gi_model.errors import CheckpointError

__all__ = ["CheckpointError", "load_checkpoint"]

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file of torch before 1.6
LEGACY_PROTOCOL = 1001

# Bounds on what is held in memory besides the tensors. A tensor takes about 40 operations.
MOST_OPERATIONS = 4_000_000
MOST_PICKLE_BYTES = 1 << 28
MOST_DIRECTORY_BYTES = 1 << 24
MOST_HEADER_BYTES = 1 << 24
LONGEST_LINE = 1 << 12  # bytes, of a name or number in a pickle
LARGEST = 1 << 48  # a size, stride or offset
MOST_DIMENSIONS = 64  # what PyTorch's iterators take
CHUNK = 1 << 24  # bytes read at once

STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}
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


def load_checkpoint(path: str | os.PathLike[str], *, part: str | None = None) -> dict[str, torch.Tensor]:
    """Read the state dict of a checkpoint; nothing that the file says is run.

    The format is told from the content, not from the name:

    - what ``torch.save`` writes, as a zip archive (torch since 1.6) or in the format before it: either a
      dict with an entry ``state_dict``, as PyTorch Lightning saves it, or a state dict itself;
    - safetensors.

    Whatever else a pickle holds (configurations, callbacks, optimizer states, objects of any class) is
    passed over: no class is imported, no function called, no tensor of it read. If all names begin with
    ``module.``, as those of ``DataParallel`` do, that is removed.

    Args:
        path: the file.
        part: only the entries below this prefix, such as ``generator``, ``discriminator`` or
            ``flow.raft``; the prefix and its dot are removed. All entries if ``None``.

    Returns:
        Names and tensors in the order of the file: ordinary writable tensors on the CPU without
        gradient, also where the file has parameters, subclasses of tensors or another device. Views of
        one storage in the file share one storage, which is read whole. Memory beyond the storages of
        the returned tensors is that of the pickle or header.

    Raises:
        FileNotFoundError: there is no such file. Other ``OSError`` as the file system gives them.
        TypeError: ``part`` is neither a string nor ``None``.
        CheckpointError: not a checkpoint, truncated, damaged, or with what is not supported: entries of
            the state dict that are no dense tensors (sparse, quantised, nested, without data,
            conjugated or negated lazily), tensors that reach outside their storage or are larger than
            the file, compressed or encrypted archives, a byte order other than this machine's,
            TorchScript, storages within storages (torch before 0.4), more than 4 million pickle
            operations. No entry below ``part``: the message lists the prefixes there are.

    Source: own. Formats: ``torch.save`` as documented in PyTorch's serialization notes, Python's
    ``pickletools``, PKWARE's APPNOTE for zip, the safetensors format description.
    """
    if part is not None and not isinstance(part, str):
        raise TypeError(f"part: expected a string or None, got {type(part).__name__}")
    path = os.fspath(path)
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is {'a directory' if stat.S_ISDIR(mode) else 'no regular file'}")
    try:
        with open(path, "rb") as file:
            source = _open(file, os.fstat(file.fileno()).st_size)
            return _read(source, _choose(_without_module(source.entries()), part))
    except _ProblemError as problem:
        raise CheckpointError(f"{path}: {problem}") from problem


class _ProblemError(Exception):
    """What is wrong with the file, which the message does not name yet."""


# ---- What a file describes -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Opaque:
    """Anything that is of no use here. Takes any call, item or state, and does nothing."""

    what: str


@dataclass(frozen=True, slots=True, eq=False)
class _Global:
    """The name of a class or function; it is never looked up."""

    module: str
    name: str

    @property
    def shown(self) -> str:
        return repr(f"{self.module[:80]}.{self.name[:80]}")


@dataclass(frozen=True, slots=True, eq=False)
class _Storage:
    """Memory that tensors view: ``count`` elements, to be found in the file by ``key``."""

    key: str
    dtype: torch.dtype
    count: int
    typed: bool = True

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """A call that would make a tensor, unchecked."""

    function: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """A tensor within a storage, checked. Offset and strides in elements."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Source(Protocol):
    """A file whose description has been read."""

    length: int  # bytes of the file

    def entries(self) -> dict[Any, Any]:
        """The state dict; values of any kind."""

    def read_into(self, storage: _Storage, memory: memoryview) -> None:
        """Fill the memory, as long as the storage, with the storage's bytes."""

    def locate(self, storage: _Storage) -> None:
        """Check that the file has this storage in this size."""


# ---- From entries to tensors -----------------------------------------------------------------------


def _shown(text: object) -> str:
    """Something short of a file, as it may stand in a message."""
    if isinstance(text, str | bytes) and len(text) > 80:
        return repr(text[:80]) + "..."
    return repr(text) if isinstance(text, str | bytes | int | None) else _kind(text)


def _kind(value: object) -> str:
    if isinstance(value, _Opaque):
        return value.what
    if isinstance(value, _Global):
        return f"the name {value.shown}"
    if isinstance(value, _Storage):
        return "a storage"
    if isinstance(value, _Tensor):
        return "a tensor"
    return "None" if value is None else type(value).__name__


def _without_module(entries: dict[Any, Any]) -> dict[str, Any]:
    """Entries with names that are strings, without ``module.`` if all have it."""
    if not entries:
        raise _ProblemError("holds no tensors")
    for name in entries:
        if not isinstance(name, str):
            raise _ProblemError(f"names of tensors must be strings, got {_kind(name)}")
    if all(name.startswith("module.") for name in entries):
        return {name.removeprefix("module."): value for name, value in entries.items()}
    return entries


def _choose(entries: dict[str, Any], part: str | None) -> dict[str, Any]:
    if part is None:
        return entries
    chosen = {n.removeprefix(part + "."): value for n, value in entries.items() if n.startswith(part + ".")}
    if not chosen:
        prefixes = _prefixes(entries)
        listed = ", ".join(_shown(p) for p in prefixes[:20]) + (", ..." if len(prefixes) > 20 else "")
        raise _ProblemError(f"part: holds nothing below {part!r}; there are {listed or 'no prefixes'}")
    return chosen


def _prefixes(entries: dict[str, Any]) -> list[str]:
    """First components of the names, and up to three more as far as all names below them agree."""
    common: dict[str, list[str]] = {}
    for name in entries:
        above = name.split(".", 4)[:-1]
        if above:
            known = common.setdefault(above[0], above)
            same = (i for i, pair in enumerate(zip(known, above, strict=False)) if pair[0] != pair[1])
            common[above[0]] = known[: next(same, min(len(known), len(above)))]
    return sorted(".".join(shared[: i + 1]) for shared in common.values() for i in range(len(shared)))


def _read(source: _Source, entries: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Make the tensors; everything is checked before the first is read."""
    views: dict[str, _View] = {}
    located: set[str] = set()
    for name, value in entries.items():
        try:
            views[name] = value if isinstance(value, _View) else _view(value)
            size = math.prod(views[name].size) * views[name].dtype.itemsize
            if size > source.length:
                raise _ProblemError(f"a tensor of {size} bytes in a file of {source.length}")
            if views[name].storage.key not in located:
                source.locate(views[name].storage)
                located.add(views[name].storage.key)
        except _ProblemError as problem:
            raise _ProblemError(f"{_shown(name)}: {problem}") from problem
    memory: dict[str, torch.UntypedStorage] = {}
    tensors = {}
    for name, view in views.items():
        key = view.storage.key
        if key not in memory:
            memory[key] = _read_storage(source, view.storage)
        empty = torch.empty(0, dtype=view.dtype, device="cpu")
        tensors[name] = empty.set_(memory[key], view.offset, view.size, view.stride)
    return tensors


def _read_storage(source: _Source, storage: _Storage) -> torch.UntypedStorage:
    memory = torch.UntypedStorage(storage.bytes, device="cpu")
    buffer: Any = ctypes.c_ubyte * storage.bytes
    buffer = buffer.from_address(memory.data_ptr()) if storage.bytes else buffer()
    source.read_into(storage, memoryview(buffer).cast("B"))
    if storage.dtype is torch.bool:  # compiled code relies on 0 and 1
        torch.empty(0, dtype=torch.uint8, device="cpu").set_(memory).ne_(0)
    return memory


def _view(value: object) -> _View:
    """Check the description of a tensor, in integers that cannot overflow."""
    if not isinstance(value, _Tensor):
        raise _ProblemError(f"expected a tensor, got {_kind(value)}")
    refused = REFUSED_TENSORS.get(value.function)
    if refused is not None:
        raise _ProblemError(f"{refused} tensors are not supported")
    arguments = value.arguments
    if len(arguments) < 4 or not isinstance(arguments[0], _Storage):
        raise _ProblemError("a tensor without storage, offset, size and stride")
    storage, offset, size, stride = arguments[:4]
    rest = arguments[6:]
    dtype = storage.dtype
    count = storage.count
    if dtype in QUANTISED:
        raise _ProblemError("quantised tensors are not supported")
    if value.function == "_rebuild_tensor_v3":
        named = rest[0] if rest else None
        if not isinstance(named, _Global) or named.module != "torch" or named.name not in YOUNG_DTYPES:
            raise _ProblemError(f"expected a dtype of torch, got {_kind(named)}")
        if storage.typed:
            raise _ProblemError(f"expected an untyped storage, got one of {dtype}")
        dtype = YOUNG_DTYPES[named.name]
        count //= dtype.itemsize
        rest = rest[1:]
    if rest and rest[0] is not None and rest[0] != {}:
        raise _ProblemError("tensors that are conjugated or negated lazily are not supported")

    if not _is_size(offset):
        raise _ProblemError(f"expected an offset from 0 to 2**48, got {_shown(offset)}")
    for what, values in (("sizes", size), ("strides", stride)):
        if type(values) is not tuple or len(values) > MOST_DIMENSIONS or not all(map(_is_size, values)):
            raise _ProblemError(f"{what} must be at most {MOST_DIMENSIONS} numbers from 0 to 2**48")
    if len(size) != len(stride):
        raise _ProblemError(f"expected as many strides as sizes, got {len(stride)} and {len(size)}")
    if math.prod(n or 1 for n in size) > LARGEST:
        raise _ProblemError("sizes are too large")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    end = offset if 0 in size else last + 1
    if end > count:
        raise _ProblemError(f"a tensor that ends at element {end} of a storage of {count}")
    return _View(storage, dtype, offset, size, stride)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


# ---- Pickles ---------------------------------------------------------------------------------------

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
DENSE_TENSORS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}
DICTS = {
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "dict"),
    ("__builtin__", "dict"),
}


class _Machine:
    """Interprets one pickle, protocols 0 to 5, up to its end.

    Of the values that a pickle can make, only ``None``, bool, int, str, tuple, list and dict are made;
    names, storages and tensors become descriptions, all else ``_Opaque``. Keys of dicts that are no
    strings become ``_Opaque``, so that no value is hashed or compared whose cost the file decides.
    """

    def __init__(self, file: BinaryIO, end: int) -> None:
        self.file = file
        self.end = end  # position in the file
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under each mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}
        self.left = MOST_OPERATIONS

    def run(self) -> Any:
        try:
            while (code := self.file.read(1)) != b".":
                operation = OPERATIONS.get(code)
                if operation is None:
                    what = f"has the unknown operation {code!r}" if code else "ends too early"
                    raise _ProblemError(f"its pickle {what}")
                self.spend(1)
                operation(self)
            return self.stack.pop()
        except IndexError as error:
            raise _ProblemError("its pickle takes from an empty stack") from error

    def spend(self, operations: int) -> None:
        self.left -= operations
        if self.left < 0:
            raise _ProblemError(f"its pickle takes more than {MOST_OPERATIONS} operations")

    # Arguments in the pickle

    def take(self, count: int) -> bytes:
        # A short read is met by its length; only for a long one is it worth asking where the file ends.
        if count > CHUNK and count > self.end - self.file.tell():
            raise _ProblemError("its pickle ends too early")
        data = self.file.read(count)
        if len(data) != count:
            raise _ProblemError("its pickle ends too early")
        return data

    def number(self, layout: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> bytes:
        line = self.file.readline(LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise _ProblemError("its pickle has a line that does not end")
        return line[:-1]

    def skip(self, count: int) -> None:
        if count <= LONGEST_LINE:
            self.take(count)
        elif count > self.end - self.file.tell():
            raise _ProblemError("its pickle ends too early")
        else:
            self.file.seek(count, os.SEEK_CUR)

    # Values

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_opaque(self, what: str, count: int = 0) -> None:
        self.skip(count)
        self.push(_Opaque(what))

    def push_line(self) -> None:
        self.line()
        self.push(_Opaque("a text value"))

    def push_text(self, layout: str, strict: bool = True) -> None:
        data = self.take(self.length(layout))
        try:
            self.push(data.decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            if strict:
                raise _ProblemError("its pickle has text that is not UTF-8") from error
            self.push(_Opaque("bytes"))  # a string of Python 2

    def push_long(self, layout: str) -> None:
        count = self.length(layout)
        if count > 16:  # no use for a number of that size
            self.push_opaque("a long number", count)
        else:
            self.push(int.from_bytes(self.take(count), "little", signed=True))

    def push_decimal(self) -> None:
        text = self.line().removesuffix(b"L")
        if text in (b"00", b"01"):
            self.push(text == b"01")
        elif len(text) > 20:
            self.push(_Opaque("a long number"))
        else:
            self.push(self.decimal(text))

    def decimal(self, text: bytes) -> int:
        try:
            return int(text)
        except ValueError as error:
            raise _ProblemError(f"its pickle has {text[:20]!r} for a number") from error

    def length(self, layout: str) -> int:
        count = self.number(layout)
        if count < 0:
            raise _ProblemError("its pickle has a negative length")
        return count

    # Stack and memo

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop()
        return items

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def drop_mark(self) -> None:
        self.since_mark()

    def replace_mark(self, what: str) -> None:
        self.since_mark()
        self.push(_Opaque(what))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(items)

    def put(self, index: int) -> None:
        if not 0 <= index < 1 << 32:
            raise _ProblemError("its pickle remembers a value under a number out of range")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise _ProblemError("its pickle recalls a value that it never had")
        self.push(self.memo[index])

    # Containers

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, _Opaque):
            raise _ProblemError(f"its pickle appends to {_kind(target)}")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise _ProblemError("its pickle has a key without a value")
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[key if type(key) is str else _Opaque(_kind(key))] = value
        elif not isinstance(target, _Opaque):
            raise _ProblemError(f"its pickle sets items of {_kind(target)}")

    def set_item(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self.set_items([key, value])

    def make_dict(self) -> None:
        items = self.since_mark()
        self.push({})
        self.set_items(items)

    # Names, calls, storages

    def name(self) -> _Global:
        try:
            return _Global(self.line().decode(), self.line().decode())
        except UnicodeDecodeError as error:
            raise _ProblemError("its pickle has a name that is not UTF-8") from error

    def stack_name(self) -> None:
        name = self.stack.pop()
        module = self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _ProblemError("its pickle has a name that is no string")
        self.push(_Global(module, name))

    def call(self) -> None:
        arguments = self.stack.pop()
        self.push(self.result(self.stack.pop(), arguments))

    def call_with_keywords(self) -> None:
        self.stack.pop()
        self.call()

    def call_since_mark(self, function: _Global | None) -> None:
        items = self.since_mark()
        if function is None:
            function = items.pop(0)
        self.push(self.result(function, tuple(items)))

    def build(self) -> None:
        self.stack.pop()  # a state; nothing here has one
        if isinstance(self.stack[-1], _Tensor):
            self.stack[-1] = _Opaque("a tensor with a state of its own")

    def result(self, function: object, arguments: object) -> Any:
        """The description of what a call would return."""
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            return _Opaque("an object")
        module, name = function.module, function.name
        if module in ("torch._tensor", "torch.tensor") and name.startswith("_rebuild_from_type"):
            # (function, class, its arguments, state): the tensor without what a subclass adds
            if len(arguments) < 3 or not isinstance(arguments[0], _Global) or type(arguments[2]) is not tuple:
                return _Opaque("a tensor of a class of its own")
            module, name, arguments = arguments[0].module, arguments[0].name, arguments[2]
        if module == "torch._utils":
            if name in DENSE_TENSORS or name in REFUSED_TENSORS:
                return _Tensor(name, arguments)
            if name in ("_rebuild_parameter", "_rebuild_parameter_with_state") and arguments:
                return arguments[0] if isinstance(arguments[0], _Tensor) else _Opaque("a parameter")
        elif (module, name) in DICTS:
            return self.pairs(arguments[0]) if arguments and isinstance(arguments[0], list) else {}
        elif (module, name) == ("torch", "Size") and len(arguments) == 1 and type(arguments[0]) is tuple:
            return arguments[0]
        return _Opaque(f"an object of {function.shown}")

    def pairs(self, items: list[Any]) -> Any:
        """A dict of a list of keys and values, as Python 2 wrote ordered dicts."""
        self.spend(len(items))  # the same list may be given to many calls
        made: dict[Any, Any] = {}
        for item in items:
            if not isinstance(item, list | tuple) or len(item) != 2:
                return _Opaque("a dict of no pairs")
            made[item[0] if type(item[0]) is str else _Opaque(_kind(item[0]))] = item[1]
        return made

    def persistent(self) -> None:
        identity = self.stack.pop()
        if type(identity) is not tuple or not identity:
            raise _ProblemError(f"expected a storage's description in its pickle, got {_kind(identity)}")
        if identity[0] == "module" and len(identity) > 1:  # a class with its source text
            self.push(identity[1])
            return
        if identity[0] != "storage" or len(identity) not in (5, 6):
            raise _ProblemError("its pickle refers to something outside it that is no storage")
        if identity[5:] not in ((), (None,)):
            raise _ProblemError("storages within storages (torch before 0.4) are not supported")
        self.push(self.storage(identity[1], identity[2], identity[4]))

    def storage(self, kind: object, key: object, count: object) -> _Storage:
        known = isinstance(kind, _Global) and kind.module in ("torch", "torch.storage")
        if not isinstance(kind, _Global) or not known or kind.name not in STORAGE_TYPES:
            raise _ProblemError(f"its pickle has a storage of unknown type, {_kind(kind)}")
        if type(key) is not str or not _is_size(count):
            raise _ProblemError("its pickle has a storage without key or size")
        assert isinstance(count, int)
        new = _Storage(key, STORAGE_TYPES[kind.name], count, kind.name != "UntypedStorage")
        storage = self.storages.setdefault(key, new)
        if (storage.dtype, storage.count, storage.typed) != (new.dtype, new.count, new.typed):
            raise _ProblemError(f"its pickle describes storage {_shown(key)} in two ways")
        return storage

    def out_of_place(self) -> None:
        raise _ProblemError("its pickle refers to something outside it by text")

    def protocol(self) -> None:
        number = self.number("<B")
        if number > 5:
            raise _ProblemError(f"its pickle has protocol {number}; known are those up to 5")


OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
    # constants
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"}": lambda m: m.push({}),
    b"\x8f": lambda m: m.push_opaque("a set"),
    # numbers
    b"I": _Machine.push_decimal,
    b"L": _Machine.push_decimal,
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.push_long("<B"),
    b"\x8b": lambda m: m.push_long("<i"),
    b"F": _Machine.push_line,
    b"G": lambda m: m.push_opaque("a float", 8),
    # text and bytes; in protocol 0, which S and V belong to, torch writes no tensors
    b"S": _Machine.push_line,
    b"V": _Machine.push_line,
    b"U": lambda m: m.push_text("<B", strict=False),
    b"T": lambda m: m.push_text("<i", strict=False),
    b"X": lambda m: m.push_text("<I"),
    b"\x8c": lambda m: m.push_text("<B"),
    b"\x8d": lambda m: m.push_text("<Q"),
    b"C": lambda m: m.push_opaque("bytes", m.number("<B")),
    b"B": lambda m: m.push_opaque("bytes", m.number("<I")),
    b"\x8e": lambda m: m.push_opaque("bytes", m.number("<Q")),
    b"\x96": lambda m: m.push_opaque("bytes", m.number("<Q")),
    b"\x97": lambda m: m.push_opaque("a buffer"),
    b"\x98": lambda m: None,
    # stack and memo
    b"(": _Machine.mark,
    b"0": _Machine.pop,
    b"1": _Machine.drop_mark,
    b"2": lambda m: m.push(m.stack[-1]),
    b"p": lambda m: m.put(m.decimal(m.line()[:20])),
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"g": lambda m: m.get(m.decimal(m.line()[:20])),
    b"h": lambda m: m.get(m.number("<B")),
    b"j": lambda m: m.get(m.number("<I")),
    # containers
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"l": lambda m: m.push(m.since_mark()),
    b"d": _Machine.make_dict,
    b"\x91": lambda m: m.replace_mark("a set"),
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.since_mark()),
    b"\x90": lambda m: m.extend(m.since_mark()),
    b"s": _Machine.set_item,
    b"u": lambda m: m.set_items(m.since_mark()),
    # names and calls
    b"c": lambda m: m.push(m.name()),
    b"\x93": _Machine.stack_name,
    b"R": _Machine.call,
    b"\x81": _Machine.call,
    b"\x92": _Machine.call_with_keywords,
    b"i": lambda m: m.call_since_mark(m.name()),
    b"o": lambda m: m.call_since_mark(None),
    b"b": _Machine.build,
    b"\x82": lambda m: m.push_opaque("an extension", 1),
    b"\x83": lambda m: m.push_opaque("an extension", 2),
    b"\x84": lambda m: m.push_opaque("an extension", 4),
    # what lies outside, and framing
    b"P": _Machine.out_of_place,
    b"Q": _Machine.persistent,
    b"\x80": _Machine.protocol,
    b"\x95": lambda m: m.skip(8),
}


# ---- Zip archives of torch.save --------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Record:
    """A file in an archive. Positions in bytes."""

    name: bytes
    header: int
    end: int  # of what may belong to it: where the next record or the directory begins
    size: int
    crc: int
    packing: str  # how the bytes are not simply those of the content; empty if they are


class _Archive:
    """A zip archive with uncompressed records, as ``torch.save`` writes it, and the pickle in it."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self.file = file
        self.length = length
        self.records = self.directory(*self.directory_place())
        pickles = [n for n in self.records if n.endswith(b"/data.pkl") and n.count(b"/") == 1]
        if len(pickles) != 1:
            raise _ProblemError(f"an archive with {len(pickles)} records named data.pkl, expected one")
        self.folder = pickles[0].removesuffix(b"data.pkl")
        if self.folder + b"constants.pkl" in self.records:
            raise _ProblemError("a TorchScript archive, expected a state dict")
        order = b"little"
        if self.folder + b"byteorder" in self.records:
            order = self.content(self.folder + b"byteorder", 16)
        if order != sys.byteorder.encode():
            raise _ProblemError(f"byte order {order!r} is not supported, expected {sys.byteorder}")
        data = self.content(pickles[0], MOST_PICKLE_BYTES)
        self.state = _state_dict(_Machine(io.BytesIO(data), len(data)).run())

    def entries(self) -> dict[Any, Any]:
        return self.state

    def locate(self, storage: _Storage) -> None:
        record = self.records.get(self.record_name(storage))
        if record is None:
            raise _ProblemError(f"storage {_shown(storage.key)} is missing")
        if record.size != storage.bytes:
            raise _ProblemError(
                f"storage {_shown(storage.key)} has {record.size} bytes, its pickle says {storage.bytes}"
            )
        self.data_place(record)

    def record_name(self, storage: _Storage) -> bytes:
        return self.folder + b"data/" + storage.key.encode("utf-8", "surrogatepass")

    def read_into(self, storage: _Storage, memory: memoryview) -> None:
        self.fill(self.records[self.record_name(storage)], memory)

    def content(self, name: bytes, most: int) -> bytes:
        record = self.records[name]
        if record.size > most:
            raise _ProblemError(f"record {_shown(name)} has {record.size} bytes, expected at most {most}")
        self.data_place(record)  # before memory is taken for it
        content = bytearray(record.size)
        self.fill(record, memoryview(content))
        return bytes(content)

    def fill(self, record: _Record, memory: memoryview) -> None:
        self.file.seek(self.data_place(record))
        crc = 0
        for start in range(0, record.size, CHUNK):
            chunk = memory[start : start + CHUNK]
            _fill(self.file, chunk)
            crc = zlib.crc32(chunk, crc)
        if crc != record.crc:
            raise _ProblemError(f"record {_shown(record.name)} is damaged: its CRC-32 differs")

    def data_place(self, record: _Record) -> int:
        """Where the bytes of a record begin, behind its own header."""
        if record.packing:
            raise _ProblemError(f"record {_shown(record.name)} is {record.packing}, which is not supported")
        header = _at(self.file, record.header, 30)
        signature, _, _, _, _, _, _, _, _, name, extra = struct.unpack("<4s5H3I2H", header)
        start = record.header + 30 + name + extra
        if signature != b"PK\x03\x04" or start + record.size > record.end:
            raise _ProblemError(f"record {_shown(record.name)} does not lie where the archive says")
        if self.file.read(name) != record.name:
            raise _ProblemError(f"record {_shown(record.name)} has another name in its own header")
        return start

    def directory_place(self) -> tuple[int, int, int]:
        """Begin, bytes and records of the central directory."""
        last = self.length - 22
        if last < 0:
            raise _ProblemError("an archive that ends too early")
        signature, disk, _, _, count, size, start, comment = struct.unpack(
            "<4s4H2IH", _at(self.file, last, 22)
        )
        if signature != b"PK\x05\x06" or comment:
            raise _ProblemError("an archive that ends too early: its directory is missing")
        if count == 0xFFFF or 0xFFFFFFFF in (size, start):
            if last < 20:
                raise _ProblemError("an archive that ends too early")
            signature, _, place, _ = struct.unpack("<4sIQI", _at(self.file, last - 20, 20))
            if signature != b"PK\x06\x07" or place > last - 20 - 56:
                raise _ProblemError("an archive whose directory cannot be found")
            signature, _, _, _, disk, _, _, count, size, start = struct.unpack(
                "<4sQ2H2I4Q", _at(self.file, place, 56)
            )
            if signature != b"PK\x06\x06":
                raise _ProblemError("an archive whose directory cannot be found")
            last = place
        if disk or start + size > last:
            raise _ProblemError("an archive whose directory does not lie within it")
        if size > MOST_DIRECTORY_BYTES:
            raise _ProblemError(f"an archive with a directory of {size} bytes")
        return start, size, count

    def directory(self, start: int, size: int, count: int) -> dict[bytes, _Record]:
        data = _at(self.file, start, size)
        found: dict[bytes, tuple[int, int, int, str]] = {}
        place = 0
        while place < size:
            name, entry, place = _directory_entry(data, place)
            if name in found:
                raise _ProblemError(f"an archive with two records named {_shown(name)}")
            found[name] = entry
        if len(found) != count:
            raise _ProblemError(f"an archive with {len(found)} records that says it has {count}")
        # Records may not overlap: a few bytes could stand for any number of storages.
        order = sorted(found, key=lambda name: found[name][0])
        ends = [found[name][0] for name in order[1:]] + [start]
        return {
            name: _Record(name, found[name][0], end, *found[name][1:])
            for name, end in zip(order, ends, strict=True)
        }


def _directory_entry(data: bytes, place: int) -> tuple[bytes, tuple[int, int, int, str], int]:
    """Name; place of the header, bytes, CRC-32 and packing; where the next entry begins."""
    fixed = data[place : place + 46]
    if len(fixed) < 46 or fixed[:4] != b"PK\x01\x02":
        raise _ProblemError("an archive with a damaged directory")
    flags, method = struct.unpack_from("<2H", fixed, 8)
    crc, packed, size, names, extras, comments = struct.unpack_from("<3I3H", fixed, 16)
    (header,) = struct.unpack_from("<I", fixed, 42)
    name = data[place + 46 : place + 46 + names]
    extra = data[place + 46 + names : place + 46 + names + extras]
    end = place + 46 + names + extras + comments
    if end > len(data):
        raise _ProblemError("an archive with a damaged directory")
    # What does not fit into 32 bits stands in the field numbered 1, in this order.
    large = _long_numbers(extra)
    try:
        size = large.pop(0) if size == 0xFFFFFFFF else size
        packed = large.pop(0) if packed == 0xFFFFFFFF else packed
        header = large.pop(0) if header == 0xFFFFFFFF else header
    except IndexError as error:
        raise _ProblemError(f"record {_shown(name)} has no size or place") from error
    packing = "encrypted" if flags & 0x41 else "compressed" if method or packed != size else ""
    return name, (header, size, crc, packing), end


def _long_numbers(extra: bytes) -> list[int]:
    place = 0
    while place + 4 <= len(extra):
        field, size = struct.unpack_from("<2H", extra, place)
        if field == 1:
            content = extra[place + 4 : place + 4 + size]
            return [n for (n,) in struct.iter_unpack("<Q", content[: len(content) // 8 * 8])]
        place += 4 + size
    return []


# ---- The format before zip archives ----------------------------------------------------------------


class _Legacy:
    """Five pickles (magic number, protocol, machine, content, keys), then the storages in that order."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self.file = file
        self.length = length
        if self.pickle().run() != LEGACY_MAGIC:
            raise _ProblemError("a pickle, but not one of torch.save")
        if self.pickle().run() != LEGACY_PROTOCOL:
            raise _ProblemError(f"expected protocol {LEGACY_PROTOCOL} of torch.save")
        machine = self.pickle().run()
        little = machine.get("little_endian") if isinstance(machine, dict) else None
        if little is not (sys.byteorder == "little"):
            raise _ProblemError(f"expected {sys.byteorder} byte order, got little_endian={_shown(little)}")
        content = self.pickle()
        self.state = _state_dict(content.run())
        self.places = self.find(content.storages)

    def pickle(self) -> _Machine:
        return _Machine(self.file, self.length)

    def find(self, storages: dict[str, _Storage]) -> dict[str, int]:
        """Where the bytes of each storage begin."""
        keys = self.pickle().run()
        if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
            raise _ProblemError("its list of storages does not fit its pickle")
        places: dict[str, int] = {}
        place = self.file.tell()
        for key in keys:
            if key in places:
                raise _ProblemError(f"storage {_shown(key)} is listed twice")
            (count,) = struct.unpack("<q" if sys.byteorder == "little" else ">q", _at(self.file, place, 8))
            if count != storages[key].count:
                raise _ProblemError(
                    f"storage {_shown(key)} has {count} elements, its pickle says {storages[key].count}"
                )
            places[key] = place + 8
            place += 8 + storages[key].bytes
        if place != self.length:
            what = "ends too early" if place > self.length else "goes on behind its last storage"
            raise _ProblemError(f"{what}: has {self.length} bytes, expected {place}")
        return places

    def entries(self) -> dict[Any, Any]:
        return self.state

    def locate(self, storage: _Storage) -> None:
        if storage.key not in self.places:
            raise _ProblemError(f"storage {_shown(storage.key)} is missing")

    def read_into(self, storage: _Storage, memory: memoryview) -> None:
        self.file.seek(self.places[storage.key])
        for start in range(0, len(memory), CHUNK):
            _fill(self.file, memory[start : start + CHUNK])


def _state_dict(content: object) -> dict[Any, Any]:
    """The state dict in what a file of ``torch.save`` holds."""
    if not isinstance(content, dict):
        raise _ProblemError(f"expected a dict with state_dict or of tensors, got {_kind(content)}")
    state = content.get("state_dict")
    if "state_dict" not in content or isinstance(state, _Tensor):
        state = content
    if not isinstance(state, dict):
        raise _ProblemError(f"expected a dict for state_dict, got {_kind(state)}")
    return state


# ---- safetensors -----------------------------------------------------------------------------------


class _Safetensors:
    """The length of a header, 8 bytes; the header, JSON; the tensors, without gap or overlap."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self.file = file
        self.length = length
        (size,) = struct.unpack("<Q", _at(file, 0, 8))
        if size > MOST_HEADER_BYTES:
            raise _ProblemError(f"a safetensors header of {size} bytes, expected at most {MOST_HEADER_BYTES}")
        if sys.byteorder != "little":
            raise _ProblemError("safetensors on a big-endian machine are not supported")
        self.start = 8 + size
        self.places: dict[str, int] = {}
        self.state: dict[Any, Any] = {}
        spans = []
        for name, entry in _json_object(_at(file, 8, size)).items():
            if name != "__metadata__":
                try:
                    begin, end, self.state[name] = _safetensors_entry(name, entry)
                except _ProblemError as problem:
                    raise _ProblemError(f"{_shown(name)}: {problem}") from problem
                self.places[name] = self.start + begin
                spans.append((begin, end, name))
        covered = 0
        for begin, end, name in sorted(spans):
            if begin != covered:
                raise _ProblemError(f"{_shown(name)}: begins at byte {begin}, expected {covered}")
            covered = end
        if self.start + covered != length:
            what = "ends too early" if self.start + covered > length else "goes on behind its last tensor"
            raise _ProblemError(f"{what}: has {length} bytes, expected {self.start + covered}")

    def entries(self) -> dict[Any, Any]:
        return self.state

    def locate(self, storage: _Storage) -> None:
        pass

    def read_into(self, storage: _Storage, memory: memoryview) -> None:
        self.file.seek(self.places[storage.key])
        for start in range(0, len(memory), CHUNK):
            _fill(self.file, memory[start : start + CHUNK])


def _json_object(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise _ProblemError("a safetensors header with a name twice")
        return made

    def number(digits: str) -> int:
        if len(digits) > 20:
            raise _ProblemError("a safetensors header with a number too large")
        return int(digits)

    try:
        content = json.loads(text.decode(), object_pairs_hook=unique, parse_int=number)
    except (ValueError, RecursionError) as error:
        raise _ProblemError(f"a damaged safetensors header: {str(error)[:100]}") from error
    if not isinstance(content, dict):
        raise _ProblemError("a safetensors header that is no object")
    return content


def _safetensors_entry(name: str, entry: object) -> tuple[int, int, _View]:
    """Begin and end in the data, and the tensor."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _ProblemError("expected dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = SAFETENSORS_DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise _ProblemError(f"dtype {_shown(kind)} is not supported")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(_is_size(n) for n in shape):
        raise _ProblemError("expected a shape of at most 64 numbers from 0 to 2**48")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise _ProblemError("expected two data_offsets from 0 to 2**48")
    if math.prod(n or 1 for n in shape) > LARGEST:
        raise _ProblemError("its shape is too large")
    count = math.prod(shape)
    if offsets[1] - offsets[0] != count * dtype.itemsize:
        raise _ProblemError(
            f"has {offsets[1] - offsets[0]} bytes, its shape and dtype need {count * dtype.itemsize}"
        )
    stride = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        stride[i - 1] = stride[i] * (shape[i] or 1)
    return *offsets, _View(_Storage(name, dtype, count), dtype, 0, tuple(shape), tuple(stride))


# ---- Files -----------------------------------------------------------------------------------------


def _open(file: BinaryIO, length: int) -> _Source:
    """Tell the format from the first bytes and read the description."""
    start = file.read(16)
    file.seek(0)
    if start[:4] == b"PK\x03\x04":
        return _Archive(file, length)
    if start[8:9] == b"{":
        return _Safetensors(file, length)
    if start[:1] == b"\x80":
        return _Legacy(file, length)
    if not length:
        raise _ProblemError("is empty")
    raise _ProblemError(
        f"is no checkpoint: expected one of torch.save or safetensors, it begins with {start!r}"
    )


def _at(file: BinaryIO, place: int, count: int) -> bytes:
    if place + count > os.fstat(file.fileno()).st_size:
        raise _ProblemError("ends too early")
    file.seek(place)
    data = file.read(count)
    if len(data) != count:
        raise _ProblemError("ends too early")
    return data


def _fill(file: Any, memory: memoryview) -> None:
    while memory:
        count = file.readinto(memory)
        if not count:
            raise _ProblemError("ends too early")
        memory = memory[count:]
