"""The format of ``torch.save`` before zip archives."""

from __future__ import annotations

import struct
import sys
from typing import Any, BinaryIO

from gi_model.checkpoints.descriptions import ProblemError, Storage, shown
from gi_model.checkpoints.files import CHUNK, bytes_at, read_exactly
from gi_model.checkpoints.pickles import Machine, state_dict_of

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file of torch before 1.6
LEGACY_PROTOCOL = 1001


class Legacy:
    """Five pickles (magic number, protocol, machine, content, keys), then the storages in that order."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self.file = file
        self.length = length
        if self.pickle().run() != LEGACY_MAGIC:
            raise ProblemError("a pickle, but not one of torch.save")
        if self.pickle().run() != LEGACY_PROTOCOL:
            raise ProblemError(f"expected protocol {LEGACY_PROTOCOL} of torch.save")
        machine = self.pickle().run()
        little = machine.get("little_endian") if isinstance(machine, dict) else None
        if little is not (sys.byteorder == "little"):
            raise ProblemError(f"expected {sys.byteorder} byte order, got little_endian={shown(little)}")
        content = self.pickle()
        self.state = state_dict_of(content.run())
        self.places = self.find(content.storages)

    def pickle(self) -> Machine:
        return Machine(self.file, self.length)

    def find(self, storages: dict[str, Storage]) -> dict[str, int]:
        """Where the bytes of each storage begin."""
        keys = self.pickle().run()
        if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
            raise ProblemError("its list of storages does not fit its pickle")
        places: dict[str, int] = {}
        place = self.file.tell()
        for key in keys:
            if key in places:
                raise ProblemError(f"storage {shown(key)} is listed twice")
            (count,) = struct.unpack(
                "<q" if sys.byteorder == "little" else ">q", bytes_at(self.file, place, 8)
            )
            if count != storages[key].count:
                raise ProblemError(
                    f"storage {shown(key)} has {count} elements, its pickle says {storages[key].count}"
                )
            places[key] = place + 8
            place += 8 + storages[key].bytes
        if place != self.length:
            what = "ends too early" if place > self.length else "goes on behind its last storage"
            raise ProblemError(f"{what}: has {self.length} bytes, expected {place}")
        return places

    def entries(self) -> dict[Any, Any]:
        return self.state

    def locate(self, storage: Storage) -> None:
        if storage.key not in self.places:
            raise ProblemError(f"storage {shown(storage.key)} is missing")

    def read_into(self, storage: Storage, memory: memoryview) -> None:
        self.file.seek(self.places[storage.key])
        for start in range(0, len(memory), CHUNK):
            read_exactly(self.file, memory[start : start + CHUNK])
