"""From a file to the tensors that are wanted of it."""

from __future__ import annotations

import ctypes
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import torch

from gi_model.checkpoints.archives import Archive
from gi_model.checkpoints.descriptions import (
    ProblemError,
    Source,
    Storage,
    View,
    checked_view,
    kind_of,
    shown,
)
from gi_model.checkpoints.legacy import Legacy
from gi_model.checkpoints.safetensors import Safetensors
from gi_model.errors import CheckpointError


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
    try:
        with opened(path) as source:
            return read_tensors(source, _choose(_without_module(source.entries()), part))
    except ProblemError as problem:
        raise CheckpointError(f"{path}: {problem}") from problem


@contextmanager
def opened(path: str) -> Iterator[Source]:
    """A file whose description has been read; raises ``ProblemError`` where it cannot be."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise ProblemError(f"is {'a directory' if stat.S_ISDIR(mode) else 'no regular file'}")
    with open(path, "rb") as file:
        yield _source(file, os.fstat(file.fileno()).st_size)


def _source(file: BinaryIO, length: int) -> Source:
    """Tell the format from the first bytes and read the description."""
    start = file.read(16)
    file.seek(0)
    if start[:4] == b"PK\x03\x04":
        return Archive(file, length)
    if start[8:9] == b"{":
        return Safetensors(file, length)
    if start[:1] == b"\x80":
        return Legacy(file, length)
    if not length:
        raise ProblemError("is empty")
    raise ProblemError(
        f"is no checkpoint: expected one of torch.save or safetensors, it begins with {start!r}"
    )


def _without_module(entries: dict[Any, Any]) -> dict[str, Any]:
    """Entries with names that are strings, without ``module.`` if all have it."""
    if not entries:
        raise ProblemError("holds no tensors")
    for name in entries:
        if not isinstance(name, str):
            raise ProblemError(f"names of tensors must be strings, got {kind_of(name)}")
    if all(name.startswith("module.") for name in entries):
        return {name.removeprefix("module."): value for name, value in entries.items()}
    return entries


def _choose(entries: dict[str, Any], part: str | None) -> dict[str, Any]:
    if part is None:
        return entries
    chosen = {n.removeprefix(part + "."): value for n, value in entries.items() if n.startswith(part + ".")}
    if not chosen:
        prefixes = _prefixes(entries)
        listed = ", ".join(shown(p) for p in prefixes[:20]) + (", ..." if len(prefixes) > 20 else "")
        raise ProblemError(f"part: holds nothing below {part!r}; there are {listed or 'no prefixes'}")
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


def read_tensors(source: Source, entries: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Make the tensors; everything is checked before the first is read."""
    views: dict[str, View] = {}
    located: set[str] = set()
    for name, value in entries.items():
        try:
            views[name] = value if isinstance(value, View) else checked_view(value)
            size = math.prod(views[name].size) * views[name].dtype.itemsize
            if size > source.length:
                raise ProblemError(f"a tensor of {size} bytes in a file of {source.length}")
            if views[name].storage.key not in located:
                source.locate(views[name].storage)
                located.add(views[name].storage.key)
        except ProblemError as problem:
            raise ProblemError(f"{shown(name)}: {problem}") from problem
    memory: dict[str, torch.UntypedStorage] = {}
    tensors = {}
    for name, view in views.items():
        key = view.storage.key
        if key not in memory:
            memory[key] = _read_storage(source, view.storage)
        empty = torch.empty(0, dtype=view.dtype, device="cpu")
        tensors[name] = empty.set_(memory[key], view.offset, view.size, view.stride)
    return tensors


def _read_storage(source: Source, storage: Storage) -> torch.UntypedStorage:
    memory = torch.UntypedStorage(storage.bytes, device="cpu")
    buffer: Any = ctypes.c_ubyte * storage.bytes
    buffer = buffer.from_address(memory.data_ptr()) if storage.bytes else buffer()
    source.read_into(storage, memoryview(buffer).cast("B"))
    if storage.dtype is torch.bool:  # compiled code relies on 0 and 1
        torch.empty(0, dtype=torch.uint8, device="cpu").set_(memory).ne_(0)
    return memory
