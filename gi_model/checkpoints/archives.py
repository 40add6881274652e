"""Zip archives of ``torch.save``."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

from gi_model.checkpoints.descriptions import ProblemError, Storage, shown
from gi_model.checkpoints.files import CHUNK, bytes_at, read_exactly
from gi_model.checkpoints.pickles import Machine, state_dict_of

MOST_PICKLE_BYTES = 1 << 28
MOST_DIRECTORY_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class _Record:
    """A file in an archive. Positions in bytes."""

    name: bytes
    header: int
    end: int  # of what may belong to it: where the next record or the directory begins
    size: int
    crc: int
    packing: str  # how the bytes are not simply those of the content; empty if they are


class Archive:
    """A zip archive with uncompressed records, as ``torch.save`` writes it, and the pickle in it."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self.file = file
        self.length = length
        self.records = self.directory(*self.directory_place())
        pickles = [n for n in self.records if n.endswith(b"/data.pkl") and n.count(b"/") == 1]
        if len(pickles) != 1:
            raise ProblemError(f"an archive with {len(pickles)} records named data.pkl, expected one")
        self.folder = pickles[0].removesuffix(b"data.pkl")
        if self.folder + b"constants.pkl" in self.records:
            raise ProblemError("a TorchScript archive, expected a state dict")
        order = b"little"
        if self.folder + b"byteorder" in self.records:
            order = self.content(self.folder + b"byteorder", 16)
        if order != sys.byteorder.encode():
            raise ProblemError(f"byte order {order!r} is not supported, expected {sys.byteorder}")
        data = self.content(pickles[0], MOST_PICKLE_BYTES)
        self.whole = Machine(io.BytesIO(data), len(data)).run()
        self.state = state_dict_of(self.whole)

    def entries(self) -> dict[Any, Any]:
        return self.state

    def locate(self, storage: Storage) -> None:
        record = self.records.get(self.record_name(storage))
        if record is None:
            raise ProblemError(f"storage {shown(storage.key)} is missing")
        if record.size != storage.bytes:
            raise ProblemError(
                f"storage {shown(storage.key)} has {record.size} bytes, its pickle says {storage.bytes}"
            )
        self.data_place(record)

    def record_name(self, storage: Storage) -> bytes:
        return self.folder + b"data/" + storage.key.encode("utf-8", "surrogatepass")

    def read_into(self, storage: Storage, memory: memoryview) -> None:
        self.fill(self.records[self.record_name(storage)], memory)

    def content(self, name: bytes, most: int) -> bytes:
        record = self.records[name]
        if record.size > most:
            raise ProblemError(f"record {shown(name)} has {record.size} bytes, expected at most {most}")
        self.data_place(record)  # before memory is taken for it
        content = bytearray(record.size)
        self.fill(record, memoryview(content))
        return bytes(content)

    def fill(self, record: _Record, memory: memoryview) -> None:
        self.file.seek(self.data_place(record))
        crc = 0
        for start in range(0, record.size, CHUNK):
            chunk = memory[start : start + CHUNK]
            read_exactly(self.file, chunk)
            crc = zlib.crc32(chunk, crc)
        if crc != record.crc:
            raise ProblemError(f"record {shown(record.name)} is damaged: its CRC-32 differs")

    def data_place(self, record: _Record) -> int:
        """Where the bytes of a record begin, behind its own header."""
        if record.packing:
            raise ProblemError(f"record {shown(record.name)} is {record.packing}, which is not supported")
        header = bytes_at(self.file, record.header, 30)
        signature, _, _, _, _, _, _, _, _, name, extra = struct.unpack("<4s5H3I2H", header)
        start = record.header + 30 + name + extra
        if signature != b"PK\x03\x04" or start + record.size > record.end:
            raise ProblemError(f"record {shown(record.name)} does not lie where the archive says")
        if self.file.read(name) != record.name:
            raise ProblemError(f"record {shown(record.name)} has another name in its own header")
        return start

    def directory_place(self) -> tuple[int, int, int]:
        """Begin, bytes and records of the central directory."""
        last = self.length - 22
        if last < 0:
            raise ProblemError("an archive that ends too early")
        signature, disk, _, _, count, size, start, comment = struct.unpack(
            "<4s4H2IH", bytes_at(self.file, last, 22)
        )
        if signature != b"PK\x05\x06" or comment:
            raise ProblemError("an archive that ends too early: its directory is missing")
        if count == 0xFFFF or 0xFFFFFFFF in (size, start):
            if last < 20:
                raise ProblemError("an archive that ends too early")
            signature, _, place, _ = struct.unpack("<4sIQI", bytes_at(self.file, last - 20, 20))
            if signature != b"PK\x06\x07" or place > last - 20 - 56:
                raise ProblemError("an archive whose directory cannot be found")
            signature, _, _, _, disk, _, _, count, size, start = struct.unpack(
                "<4sQ2H2I4Q", bytes_at(self.file, place, 56)
            )
            if signature != b"PK\x06\x06":
                raise ProblemError("an archive whose directory cannot be found")
            last = place
        if disk or start + size > last:
            raise ProblemError("an archive whose directory does not lie within it")
        if size > MOST_DIRECTORY_BYTES:
            raise ProblemError(f"an archive with a directory of {size} bytes")
        return start, size, count

    def directory(self, start: int, size: int, count: int) -> dict[bytes, _Record]:
        data = bytes_at(self.file, start, size)
        found: dict[bytes, tuple[int, int, int, str]] = {}
        place = 0
        while place < size:
            name, entry, place = _directory_entry(data, place)
            if name in found:
                raise ProblemError(f"an archive with two records named {shown(name)}")
            found[name] = entry
        if len(found) != count:
            raise ProblemError(f"an archive with {len(found)} records that says it has {count}")
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
        raise ProblemError("an archive with a damaged directory")
    flags, method = struct.unpack_from("<2H", fixed, 8)
    crc, packed, size, names, extras, comments = struct.unpack_from("<3I3H", fixed, 16)
    (header,) = struct.unpack_from("<I", fixed, 42)
    name = data[place + 46 : place + 46 + names]
    extra = data[place + 46 + names : place + 46 + names + extras]
    end = place + 46 + names + extras + comments
    if end > len(data):
        raise ProblemError("an archive with a damaged directory")
    # What does not fit into 32 bits stands in the field numbered 1, in this order.
    large = _long_numbers(extra)
    try:
        size = large.pop(0) if size == 0xFFFFFFFF else size
        packed = large.pop(0) if packed == 0xFFFFFFFF else packed
        header = large.pop(0) if header == 0xFFFFFFFF else header
    except IndexError as error:
        raise ProblemError(f"record {shown(name)} has no size or place") from error
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
