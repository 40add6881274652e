"""Reads a pickle, which is a program, without running it: nothing is imported and nothing called."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from gi_model.checkpoints.descriptions import (
    REFUSED_TENSORS,
    GlobalName,
    Opaque,
    ProblemError,
    Storage,
    TensorCall,
    is_size,
    kind_of,
    shown,
)
from gi_model.checkpoints.files import CHUNK

MOST_PARAMETERS = 1 << 20  # of an optimizer, whose state is kept by their numbers
MOST_OPERATIONS = 4_000_000  # a tensor takes about 40
LONGEST_LINE = 1 << 12  # bytes, of a name or number in a pickle

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
DENSE_TENSORS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"}
DICTS = {
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "dict"),
    ("__builtin__", "dict"),
}


def state_dict_of(content: object) -> dict[Any, Any]:
    """The state dict in what a file of ``torch.save`` holds."""
    if not isinstance(content, dict):
        raise ProblemError(f"expected a dict with state_dict or of tensors, got {kind_of(content)}")
    state = content.get("state_dict")
    if "state_dict" not in content or isinstance(state, TensorCall):
        state = content
    if not isinstance(state, dict):
        raise ProblemError(f"expected a dict for state_dict, got {kind_of(state)}")
    return state


def _is_plain(key: object) -> bool:
    """Whether it is a string or a parameter's number; others may collide as often as a file wants."""
    return type(key) is str or (type(key) is int and 0 <= key < MOST_PARAMETERS)


class Machine:
    """Interprets one pickle, protocols 0 to 5, up to its end.

    Of the values that a pickle can make, only ``None``, bool, int, float, str, tuple, list and dict are
    made; names, storages and tensors become descriptions, all else ``Opaque``. Keys of dicts that are
    neither strings nor small whole numbers become ``Opaque``, so that no value is hashed or compared whose
    cost the file decides.
    """

    def __init__(self, file: BinaryIO, end: int) -> None:
        self.file = file
        self.end = end  # position in the file
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under each mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.left = MOST_OPERATIONS

    def run(self) -> Any:
        try:
            while (code := self.file.read(1)) != b".":
                operation = OPERATIONS.get(code)
                if operation is None:
                    what = f"has the unknown operation {code!r}" if code else "ends too early"
                    raise ProblemError(f"its pickle {what}")
                self.spend(1)
                operation(self)
            return self.stack.pop()
        except IndexError as error:
            raise ProblemError("its pickle takes from an empty stack") from error

    def spend(self, operations: int) -> None:
        self.left -= operations
        if self.left < 0:
            raise ProblemError(f"its pickle takes more than {MOST_OPERATIONS} operations")

    # Arguments in the pickle

    def take(self, count: int) -> bytes:
        # A short read is met by its length; only for a long one is it worth asking where the file ends.
        if count > CHUNK and count > self.end - self.file.tell():
            raise ProblemError("its pickle ends too early")
        data = self.file.read(count)
        if len(data) != count:
            raise ProblemError("its pickle ends too early")
        return data

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> bytes:
        line = self.file.readline(LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise ProblemError("its pickle has a line that does not end")
        return line[:-1]

    def skip(self, count: int) -> None:
        if count <= LONGEST_LINE:
            self.take(count)
        elif count > self.end - self.file.tell():
            raise ProblemError("its pickle ends too early")
        else:
            self.file.seek(count, os.SEEK_CUR)

    # Values

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_opaque(self, what: str, count: int = 0) -> None:
        self.skip(count)
        self.push(Opaque(what))

    def push_line(self) -> None:
        self.line()
        self.push(Opaque("a text value"))

    def push_text(self, layout: str, strict: bool = True) -> None:
        data = self.take(self.length(layout))
        try:
            self.push(data.decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            if strict:
                raise ProblemError("its pickle has text that is not UTF-8") from error
            self.push(Opaque("bytes"))  # a string of Python 2

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
            self.push(Opaque("a long number"))
        else:
            self.push(self.decimal(text))

    def decimal(self, text: bytes) -> int:
        try:
            return int(text)
        except ValueError as error:
            raise ProblemError(f"its pickle has {text[:20]!r} for a number") from error

    def length(self, layout: str) -> int:
        count = self.number(layout)
        if count < 0:
            raise ProblemError("its pickle has a negative length")
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
        self.push(Opaque(what))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(items)

    def put(self, index: int) -> None:
        if not 0 <= index < 1 << 32:
            raise ProblemError("its pickle remembers a value under a number out of range")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ProblemError("its pickle recalls a value that it never had")
        self.push(self.memo[index])

    # Containers

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise ProblemError(f"its pickle appends to {kind_of(target)}")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise ProblemError("its pickle has a key without a value")
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[key if _is_plain(key) else Opaque(kind_of(key))] = value
        elif not isinstance(target, Opaque):
            raise ProblemError(f"its pickle sets items of {kind_of(target)}")

    def set_item(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self.set_items([key, value])

    def make_dict(self) -> None:
        items = self.since_mark()
        self.push({})
        self.set_items(items)

    # Names, calls, storages

    def name(self) -> GlobalName:
        try:
            return GlobalName(self.line().decode(), self.line().decode())
        except UnicodeDecodeError as error:
            raise ProblemError("its pickle has a name that is not UTF-8") from error

    def stack_name(self) -> None:
        name = self.stack.pop()
        module = self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ProblemError("its pickle has a name that is no string")
        self.push(GlobalName(module, name))

    def call(self) -> None:
        arguments = self.stack.pop()
        self.push(self.result(self.stack.pop(), arguments))

    def call_with_keywords(self) -> None:
        self.stack.pop()
        self.call()

    def call_since_mark(self, function: GlobalName | None) -> None:
        items = self.since_mark()
        if function is None:
            function = items.pop(0)
        self.push(self.result(function, tuple(items)))

    def build(self) -> None:
        self.stack.pop()  # a state; nothing here has one
        if isinstance(self.stack[-1], TensorCall):
            self.stack[-1] = Opaque("a tensor with a state of its own")

    def result(self, function: object, arguments: object) -> Any:
        """The description of what a call would return."""
        if not isinstance(function, GlobalName) or type(arguments) is not tuple:
            return Opaque("an object")
        module, name = function.module, function.name
        if module in ("torch._tensor", "torch.tensor") and name.startswith("_rebuild_from_type"):
            # (function, class, its arguments, state): the tensor without what a subclass adds
            if (
                len(arguments) < 3
                or not isinstance(arguments[0], GlobalName)
                or type(arguments[2]) is not tuple
            ):
                return Opaque("a tensor of a class of its own")
            module, name, arguments = arguments[0].module, arguments[0].name, arguments[2]
        if module == "torch._utils":
            if name in DENSE_TENSORS or name in REFUSED_TENSORS:
                return TensorCall(name, arguments)
            if name in ("_rebuild_parameter", "_rebuild_parameter_with_state") and arguments:
                return arguments[0] if isinstance(arguments[0], TensorCall) else Opaque("a parameter")
        elif (module, name) in DICTS:
            return self.pairs(arguments[0]) if arguments and isinstance(arguments[0], list) else {}
        elif (module, name) == ("torch", "Size") and len(arguments) == 1 and type(arguments[0]) is tuple:
            return arguments[0]
        return Opaque(f"an object of {function.shown}")

    def pairs(self, items: list[Any]) -> Any:
        """A dict of a list of keys and values, as Python 2 wrote ordered dicts."""
        self.spend(len(items))  # the same list may be given to many calls
        made: dict[Any, Any] = {}
        for item in items:
            if not isinstance(item, list | tuple) or len(item) != 2:
                return Opaque("a dict of no pairs")
            made[item[0] if type(item[0]) is str else Opaque(kind_of(item[0]))] = item[1]
        return made

    def persistent(self) -> None:
        identity = self.stack.pop()
        if type(identity) is not tuple or not identity:
            raise ProblemError(f"expected a storage's description in its pickle, got {kind_of(identity)}")
        if identity[0] == "module" and len(identity) > 1:  # a class with its source text
            self.push(identity[1])
            return
        if identity[0] != "storage" or len(identity) not in (5, 6):
            raise ProblemError("its pickle refers to something outside it that is no storage")
        if identity[5:] not in ((), (None,)):
            raise ProblemError("storages within storages (torch before 0.4) are not supported")
        self.push(self.storage(identity[1], identity[2], identity[4]))

    def storage(self, kind: object, key: object, count: object) -> Storage:
        known = isinstance(kind, GlobalName) and kind.module in ("torch", "torch.storage")
        if not isinstance(kind, GlobalName) or not known or kind.name not in STORAGE_TYPES:
            raise ProblemError(f"its pickle has a storage of unknown type, {kind_of(kind)}")
        if type(key) is not str or not is_size(count):
            raise ProblemError("its pickle has a storage without key or size")
        assert isinstance(count, int)
        new = Storage(key, STORAGE_TYPES[kind.name], count, kind.name != "UntypedStorage")
        storage = self.storages.setdefault(key, new)
        if (storage.dtype, storage.count, storage.typed) != (new.dtype, new.count, new.typed):
            raise ProblemError(f"its pickle describes storage {shown(key)} in two ways")
        return storage

    def out_of_place(self) -> None:
        raise ProblemError("its pickle refers to something outside it by text")

    def protocol(self) -> None:
        number = self.number("<B")
        if number > 5:
            raise ProblemError(f"its pickle has protocol {number}; known are those up to 5")


OPERATIONS: dict[bytes, Callable[[Machine], None]] = {
    # constants
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"}": lambda m: m.push({}),
    b"\x8f": lambda m: m.push_opaque("a set"),
    # numbers
    b"I": Machine.push_decimal,
    b"L": Machine.push_decimal,
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.push_long("<B"),
    b"\x8b": lambda m: m.push_long("<i"),
    b"F": Machine.push_line,
    b"G": lambda m: m.push(m.number(">d")),
    # text and bytes; in protocol 0, which S and V belong to, torch writes no tensors
    b"S": Machine.push_line,
    b"V": Machine.push_line,
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
    b"(": Machine.mark,
    b"0": Machine.pop,
    b"1": Machine.drop_mark,
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
    b"d": Machine.make_dict,
    b"\x91": lambda m: m.replace_mark("a set"),
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.since_mark()),
    b"\x90": lambda m: m.extend(m.since_mark()),
    b"s": Machine.set_item,
    b"u": lambda m: m.set_items(m.since_mark()),
    # names and calls
    b"c": lambda m: m.push(m.name()),
    b"\x93": Machine.stack_name,
    b"R": Machine.call,
    b"\x81": Machine.call,
    b"\x92": Machine.call_with_keywords,
    b"i": lambda m: m.call_since_mark(m.name()),
    b"o": lambda m: m.call_since_mark(None),
    b"b": Machine.build,
    b"\x82": lambda m: m.push_opaque("an extension", 1),
    b"\x83": lambda m: m.push_opaque("an extension", 2),
    b"\x84": lambda m: m.push_opaque("an extension", 4),
    # what lies outside, and framing
    b"P": Machine.out_of_place,
    b"Q": Machine.persistent,
    b"\x80": Machine.protocol,
    b"\x95": lambda m: m.skip(8),
}
