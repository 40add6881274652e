"""Reading checkpoints: what torch.save and safetensors write, and files made to deceive."""

from __future__ import annotations

import argparse
import copyreg
import functools
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gi_model.checkpoints import CheckpointError, load_checkpoint
from gi_model.errors import InputError

safetensors_torch = pytest.importorskip("safetensors.torch", reason="the [test] extra is not installed")

pytestmark = pytest.mark.filterwarnings(  # of torch, about what it is asked to save here
    "ignore:.*pickle protocol 5",
    "ignore:Sparse CSR",
    "ignore:.*quantize",
    "ignore:.*torch.jit",
)
ZIP_AND_LEGACY = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
QUICK = 20.0  # seconds that no file of a few megabytes may take, on a busy machine
FORBIDDEN = (
    *("import", "exec", "compile", "marshal", "os.", "subprocess", "socket", "shutil", "pickle", "ctypes.dl"),
    *("builtins.", "code.", "sys.", "urllib", "webbrowser", "cpython."),
)
watched: list[tuple[str, Any]] | None = None


def _hook(event: str, arguments: Any) -> None:
    if watched is not None and event.startswith(FORBIDDEN):
        watched.append((event, repr(arguments)[:100]))


sys.addaudithook(_hook)  # cannot be removed: it does nothing unless watched is a list


def load(path: Path, part: str | None = None) -> dict[str, torch.Tensor]:
    """Load; whatever comes of it, the interpreter may not have imported, compiled or started anything."""
    global watched
    begin = time.monotonic()
    watched = events = []
    try:
        return load_checkpoint(path, part=part)
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error)) < 2500
        raise
    finally:
        watched = None
        assert not events
        assert time.monotonic() - begin < QUICK


def refused(path: Path, match: str | None, part: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=match):
        load(path, part)


@pytest.fixture(autouse=True, scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What torch and Python import on first use is imported before anything is watched."""
    path = tmp_path_factory.mktemp("warm") / "warm.pt"
    torch.save({"a": torch.ones(2, dtype=torch.bool)}, path)
    load_checkpoint(path)


def same(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(loaded) == list(expected)
    for name, tensor in expected.items():
        got = loaded[name]
        assert type(got) is torch.Tensor and not got.requires_grad and got.device.type == "cpu"
        assert (got.dtype, got.shape, got.stride()) == (tensor.dtype, tensor.shape, tensor.stride()), name
        raw = [t.detach().clone(memory_format=torch.contiguous_format).view(-1) for t in (got, tensor)]
        assert torch.equal(*(t.view(torch.uint8) for t in raw)), name


def every_dtype() -> dict[str, torch.Tensor]:
    base = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) * 50
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
    young = "uint16 uint32 uint64 float8_e4m3fn float8_e5m2"
    return {f"{n}.weight": base.abs().to(getattr(torch, n)) for n in f"{names} {young}".split()}


# ---- Round trips -----------------------------------------------------------------------------------


@ZIP_AND_LEGACY
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype(tmp_path: Path, zipped: bool, protocol: int) -> None:
    path = tmp_path / "x.pt"
    state = every_dtype()
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    same(load(path), state)


@ZIP_AND_LEGACY
def test_shapes_views_and_parameters(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(60, dtype=torch.float32).view(3, 4, 5)
    attributed = torch.nn.Parameter(torch.randn(3))
    attributed.note = "kept by torch.save"  # type: ignore[attr-defined]
    noted = torch.randn(2)
    noted.note = {"a": [1]}  # type: ignore[attr-defined]
    state = OrderedDict(
        base=base,
        view=base[1:, ::2, 3],
        turned=base.permute(2, 0, 1),
        again=base,
        expanded=torch.ones(1, 1).expand(3, 4),
        scalar=torch.tensor(3.5),
        empty=torch.zeros(0),
        hollow=torch.zeros(4, 0, 5),
        tail=base.view(-1)[60:],
        channels_last=torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
        attributed=attributed,
        noted=noted,
        buffer=torch.nn.Buffer(torch.randn(2)),
    )
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    path = tmp_path / "x.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    loaded = load(path)
    same(loaded, state)
    sharing = {loaded[n].untyped_storage().data_ptr() for n in ("base", "view", "turned", "again")}
    assert len(sharing) == 1
    loaded["base"][1, 0, 3] = -7
    assert loaded["view"][0, 0] == -7
    assert loaded["view"].untyped_storage().data_ptr() != loaded["scalar"].untyped_storage().data_ptr()
    loaded["parameter"].requires_grad_().square().sum().backward()
    loaded["scalar"].add_(1)


@ZIP_AND_LEGACY
def test_networks(tmp_path: Path, zipped: bool) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    path = tmp_path / "raft-things.pth"
    torch.save(torch.nn.DataParallel(network).state_dict(), path, _use_new_zipfile_serialization=zipped)
    same(load(path), network.state_dict())
    network.load_state_dict(load(path))


def test_module_is_kept_unless_all_have_it(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(1), "modules.b": torch.ones(1)}
    torch.save(state, tmp_path / "x.pt")
    assert list(load(tmp_path / "x.pt")) == list(state)


def test_bools_are_zero_or_one(tmp_path: Path) -> None:
    state = {"a": torch.tensor([True, False, True])}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[:-3] + b"\xff\x00\x80")
    assert load(tmp_path / "x.pt")["a"].view(torch.uint8).tolist() == [1, 0, 1]


def test_python_2_pickles(tmp_path: Path) -> None:
    # An ordered dict as a call on a list of pairs; names as byte strings.
    program = b"ccollections\nOrderedDict\n(](" + b"(" + b"U\x01a" + tensor(b"U\x010") + b"le" + b"tR."
    write_legacy(tmp_path / "x.pt", b"\x80\x02" + program, {"0": 4})
    assert load(tmp_path / "x.pt")["a"].tolist() == [0, 1, 2, 3]


# ---- What Lightning saves --------------------------------------------------------------------------


class Trap:
    """An object of a class that will be missing; being touched in any way raises."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("touched")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AssertionError("touched")


class Rebuilt(Trap):
    def __reduce__(self) -> Any:
        return Rebuilt, (1, [2]), {"state": 3}, iter([4, 5]), iter([("key", 6)])


class Named(dict):
    """Like AttributeDict: a dict whose entries are attributes."""

    __getattr__ = dict.__getitem__


class Slotted:
    __slots__ = ("a",)


class Subclass(torch.Tensor):
    pass


def free_function() -> None:
    raise AssertionError("called")


@contextmanager
def missing_module() -> Iterator[types.ModuleType]:
    """A module that is there while saving and gone when loading."""
    module = types.ModuleType("missing_lightning")
    for thing in (Trap, Rebuilt, Named, Slotted, Subclass, free_function):
        thing.__module__ = module.__name__
        setattr(module, thing.__name__, thing)
    sys.modules[module.__name__] = module
    try:
        yield module
    finally:
        del sys.modules[module.__name__]
        for thing in (Trap, Rebuilt, Named, Slotted, Subclass, free_function):
            thing.__module__ = __name__


def lightning_state() -> dict[str, torch.Tensor]:
    return OrderedDict(
        {
            "generator.model.1.conv.weight": torch.randn(4, 2, 3, 3),
            "generator.model.1.norm.num_batches_tracked": torch.tensor(7),
            "generator.deformable_writes.0.q.weight": torch.randn(2, 2).half(),
            "discriminator.model0.0.weight": torch.randn(3),
            "flow.raft.fnet.conv1.weight": torch.randn(2, 3),
            "flow.raft.cnet.conv1.weight": torch.randn(2, 3),
        }
    )


def lightning(path: Path, zipped: bool, state: Any = None, protocol: int = 2) -> None:
    slotted = Slotted()
    slotted.a = 1  # type: ignore[attr-defined]
    weight = torch.randn(5)
    with missing_module():
        content = {
            "epoch": 3,
            "global_step": 10**30,
            "pytorch-lightning_version": "1.5.0",
            "state_dict": lightning_state() if state is None else state,
            "callbacks": {Trap: {"best": torch.tensor(0.5), "dirpath": Path("/x")}, "other": Rebuilt()},
            "optimizer_states": [
                {"state": {0: {"step": 1, "exp_avg": weight}}, "param_groups": [{"lr": 0.1}]}
            ],
            "lr_schedulers": [{"_step": functools.partial(free_function), "f": free_function}],
            "hyper_parameters": Named(config=Trap([Trap()]), space=argparse.Namespace(a=1, b=slotted)),
            "sparse": torch.eye(3).to_sparse(),
            "subclass": torch.randn(3).as_subclass(Subclass),
            "plain": [
                *(1.5, None, True, b"bytes", bytearray(b"more"), {1, 2}, frozenset({"a"}), 2**70, -(2**40)),
                *(
                    torch.Size([1, 2]),
                    torch.float16,
                    torch.device("cuda:0"),
                    1j,
                    range(3),
                    slice(1),
                    "é",
                    ...,
                ),
                *({(1, (2, "a")): "x", 2.5: 1, None: 2}, defaultdict(list, a=[1]), "x" * 300, b"y" * 300),
            ],
        }
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)


@ZIP_AND_LEGACY
@pytest.mark.parametrize("protocol", [2, 5])
def test_lightning(tmp_path: Path, zipped: bool, protocol: int) -> None:
    path = tmp_path / "last.ckpt"
    state = lightning_state()
    lightning(path, zipped, state, protocol)
    with pytest.raises(Exception, match=r"missing_lightning|weights_only|Weights only"):
        torch.load(path, weights_only=True)
    same(load(path), state)
    for part in ("generator", "discriminator", "flow.raft", "generator.model"):
        below = {n[len(part) + 1 :]: t for n, t in state.items() if n.startswith(part + ".")}
        same(load(path, part), below)
    there = r"there are 'discriminator', .*'flow', 'flow\.raft', 'generator'$"
    for part in ("lama", "gen", "", "generator.", "epoch"):
        refused(path, there, part)
    torch.save({"a." * 10**6 + "w": torch.ones(1), **state}, path, _use_new_zipfile_serialization=zipped)
    refused(path, r"there are 'a', 'a\.a', 'a\.a\.a', 'a\.a\.a\.a', 'discriminator'", "b")
    with pytest.raises(TypeError, match="part: expected a string or None, got int"):
        load_checkpoint(path, part=3)  # type: ignore[arg-type]


def test_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    """A storage of another part may be damaged: its bytes are never looked at."""
    path = tmp_path / "x.pt"
    torch.save({"a.w": torch.full((64,), 1.5), "b.w": torch.full((64,), 2.5)}, path)
    data = path.read_bytes()
    at = data.index(struct.pack("<f", 2.5) * 64)
    path.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    assert load(path, "a")["w"].tolist() == [1.5] * 64
    refused(path, "CRC-32", "b")
    refused(path, "CRC-32")


@ZIP_AND_LEGACY
def test_tensor_of_a_missing_subclass_becomes_plain(tmp_path: Path, zipped: bool) -> None:
    with missing_module():
        value = torch.randn(3).as_subclass(Subclass)
        torch.save({"a": value}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    same(load(tmp_path / "x.pt"), {"a": value.as_subclass(torch.Tensor)})


# ---- What is not a state dict of dense tensors -----------------------------------------------------


@ZIP_AND_LEGACY
def test_unsupported_content(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.pt"

    def check(content: Any, match: str) -> None:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        refused(path, match)

    check({"a": torch.eye(3).to_sparse()}, "'a': sparse tensors are not supported")
    check({"a": torch.eye(3).to_sparse_csr()}, "'a': sparse tensors are not supported")
    check({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "'a': quantised")
    check({"a": torch.ones(2, device="meta")}, "'a': meta")
    check({"a": torch.ones(2, dtype=torch.complex64).conj()}, "'a': .*conjugated")
    check({"a": torch.ones(2, dtype=torch.complex64).conj().imag}, "'a': .*negated")
    check({"a": torch.ones(2), "epoch": 3}, "'epoch': expected a tensor, got int")
    check({"a": torch.ones(2), 3: torch.ones(2)}, "must be strings, got int")
    check({"a": {"b": torch.ones(2)}}, "'a': expected a tensor, got dict")
    check({"a": [torch.ones(2)]}, "'a': expected a tensor, got list")
    check({"a": torch.ones(2).untyped_storage()}, "'a': expected a tensor, got a storage")
    check({"state_dict": [1]}, "state_dict, got list")
    check({"state_dict": argparse.Namespace()}, "state_dict, got an object")
    check({"state_dict": {}}, "holds no tensors")
    check({}, "holds no tensors")
    check(torch.ones(2), "got a tensor")
    check([torch.ones(2)], "got list")
    check(torch.nn.Linear(2, 2), "an object of 'torch.nn.modules.linear.Linear'")
    # The same beside the state dict does no harm.
    content = {"state_dict": {"a": torch.ones(2)}, "x": [torch.eye(3).to_sparse(), torch.nn.Linear(2, 2)]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert list(load(path)) == ["a"]


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="is a directory"):
        load_checkpoint(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is no regular file"):
        load_checkpoint(tmp_path / "pipe")
    path = tmp_path / "x.ckpt"
    others = {
        b"": "is empty",
        b"P": "no checkpoint",
        b"epoch: 3\n": r"begins with b'epoch: 3",
        b"<!DOCTYPE html><html>": "begins with b'<!DOCTYPE html>",
        b"version https://git-lfs.github.com/spec/v1\n": "begins with",
        b"\x89PNG\r\n\x1a\n" + bytes(100): "no checkpoint",
        b"\xff\xd8\xff\xe0" + bytes(100): "no checkpoint",
        b"\x00" * 1000: "no checkpoint",
        b"\x57\xfb\x80\x8b\x24\x75\x47\xdb" + bytes(40): "no checkpoint",  # a table of TensorFlow
        b"model_checkpoint_path: 'model.ckpt-1'": "no checkpoint",
        pickle.dumps({"a": 1}): "not one of torch.save",
        pickle.dumps(3, 0): "no checkpoint",
        b"PK\x05\x06" + bytes(18): "no checkpoint",  # an empty archive
        b"PK\x03\x04" + bytes(10): "ends too early",
    }
    for data, match in others.items():
        path.write_bytes(data)
        refused(path, match)
    assert issubclass(CheckpointError, ValueError) and issubclass(CheckpointError, InputError)


def test_other_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    refused(path, "TorchScript")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<x/>")
    refused(path, "0 records named data.pkl")


# ---- Files made by hand ----------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(number(v) for v in values) + b"t"


def storage(key: bytes, count: int, kind: bytes = b"FloatStorage", module: bytes = b"torch") -> bytes:
    place = b"X\x03\0\0\0cpu"
    return b"(X\x07\0\0\0storagec" + module + b"\n" + kind + b"\n" + key + place + number(count) + b"tQ"


def tensor(
    key: bytes,
    count: int = 4,
    offset: int = 0,
    size: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    kind: bytes = b"FloatStorage",
) -> bytes:
    described = storage(key, count, kind) + number(offset) + numbers(size) + numbers(stride)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + described + b"\x89ccollections\nOrderedDict\n)RtR"


def state(entry: bytes, **others: bytes) -> bytes:
    """A program for ``{"state_dict": {"a": entry}, **others}``."""
    items = b"".join(text(name) + value for name, value in others.items())
    return b"\x80\x02}(" + text("state_dict") + b"}(" + text("a") + entry + b"u" + items + b"u."


GOOD = tensor(text("0"))


def floats(count: int) -> bytes:
    return struct.pack(f"<{count}f", *range(count))


def write_zip(path: Path, program: bytes, storages: dict[str, int], **records: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program)
        for name, content in records.items():
            archive.writestr(f"x/{name}", content)
        for key, count in storages.items():
            archive.writestr(f"x/data/{key}", floats(count))


def write_legacy(path: Path, program: bytes, storages: dict[str, int], little: Any = True) -> None:
    file = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": little}):
        pickle.dump(value, file, protocol=2)
    file.write(program)
    pickle.dump(list(storages), file, protocol=2)
    for count in storages.values():
        file.write(struct.pack("<q", count) + floats(count))
    path.write_bytes(file.getvalue())


Write = Callable[..., None]
BOTH = pytest.mark.parametrize("write", [write_zip, write_legacy], ids=["zip", "legacy"])


@BOTH
def test_made_by_hand(tmp_path: Path, write: Write) -> None:
    """The programs of the tests below are right where they are not meant to be wrong."""
    path = tmp_path / "x.pt"
    write(path, state(GOOD), {"0": 4})
    assert load(path)["a"].tolist() == [0, 1, 2, 3]
    write(path, state(tensor(text("0"), 4, 1, (2,), (2,))), {"0": 4})
    assert load(path)["a"].tolist() == [1, 3]


LIES = {
    "storage_longer": (tensor(text("0"), 5, size=(5,)), "its pickle says"),
    "storage_shorter": (tensor(text("0"), 3, size=(3,)), "its pickle says"),
    "storage_enormous": (tensor(text("0"), 2**47, size=(2**40,)), "bytes in a file of"),
    "storage_too_large": (tensor(text("0"), 2**62), "without key or size"),
    "storage_negative": (tensor(text("0"), -4), "without key or size"),
    "storage_itemsize": (tensor(text("0"), 4, kind=b"DoubleStorage"), "its pickle says"),
    "storage_unknown": (tensor(text("0"), 4, kind=b"SystemStorage"), "unknown type"),
    "storage_absent": (tensor(text("1")), "missing"),
    "storage_elsewhere": (tensor(text("../../../../etc/passwd")), "missing"),
    "storage_key": (tensor(number(0)), "without key"),
    "storage_quantised": (tensor(text("0"), 16, kind=b"QInt8Storage"), "quantised"),
    "too_long": (tensor(text("0"), size=(5,)), "ends at element 5 of a storage of 4"),
    "offset": (tensor(text("0"), offset=1), "ends at element 5 of a storage of 4"),
    "offset_only": (tensor(text("0"), offset=5, size=(0,)), "ends at element 5"),
    "offset_negative": (tensor(text("0"), offset=-1), "expected an offset"),
    "stride": (tensor(text("0"), size=(2,), stride=(4,)), "ends at element 5"),
    "stride_negative": (tensor(text("0"), offset=3, stride=(-1,)), "strides must be"),
    "size_negative": (tensor(text("0"), size=(-1,)), "sizes must be"),
    "wraps": (tensor(text("0"), size=(2**33, 2**33), stride=(2**31, 2**31)), "too large"),
    "wraps_64": (tensor(text("0"), size=(2**32 + 1, 2), stride=(2**32, 1)), "ends at element"),
    "overflow": (tensor(text("0"), size=(2**63,)), "sizes must be"),
    "hollow": (tensor(text("0"), size=(2**47, 2**47, 0), stride=(1, 1, 1)), "too large"),
    "bomb": (tensor(text("0"), size=(2**40,), stride=(0,)), "bytes in a file of"),
    "ranks": (tensor(text("0"), size=(2, 2)), "as many strides as sizes"),
    "rank": (tensor(text("0"), size=(1,) * 65, stride=(1,) * 65), "at most 64"),
    "two_kinds": (
        b"(" + tensor(text("0")) + tensor(text("0"), kind=b"IntStorage") + b"t",
        "in two ways",
    ),
    "two_sizes": (b"(" + tensor(text("0")) + tensor(text("0"), 3) + b"t", "in two ways"),
    "no_arguments": (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "without storage"),
    "no_storage": (b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR", "without storage"),
    "none": (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(text("0"), 4) + b"NNN\x89NtR",
        "expected an offset",
    ),
    "bools": (
        b"ctorch._utils\n_rebuild_tensor\n(" + storage(text("0"), 4) + b"K\0(\x88t(K\x01ttR",
        "sizes must be",
    ),
    "v3_dtype": (
        b"ctorch._utils\n_rebuild_tensor_v3\n("
        + storage(text("0"), 16, b"UntypedStorage")
        + b"K\0(K\x04t(K\x01t\x89Nctorch\nbool\ntR",
        "expected a dtype of torch",
    ),
    "v3_length": (
        b"ctorch._utils\n_rebuild_tensor_v3\n("
        + storage(text("0"), 16, b"UntypedStorage")
        + b"K\0(K\x05t(K\x01t\x89Nctorch\nuint32\ntR",
        "ends at element 5 of a storage of 4",
    ),
}


@BOTH
@pytest.mark.parametrize("name", LIES)
def test_tensors_that_lie(tmp_path: Path, write: Write, name: str) -> None:
    entry, match = LIES[name]
    write(tmp_path / "x.pt", state(entry), {"0": 4})
    # Where each storage says its own size, that is compared first.
    refused(tmp_path / "x.pt", match if write is write_zip else f"{match}|pickle says|not fit|too early")


def test_persistent_ids(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    view = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04(K\0K\0K\0ttQ"
    )
    for program, match in {
        view: "within storages",
        text("0") + b"Q": "expected a storage's description",
        b")Q": "expected a storage's description",
        b"(" + text("file") + text("/etc/passwd") + b"tQ": "no storage",
        b"P0\n": "by text",
        b"(" + text("module") + GOOD + b"NNtQ0" + b"K\x03": "expected a tensor, got int",
    }.items():
        write_zip(path, state(program), {"0": 4})
        refused(path, match)


# ---- Programs meant to run something ---------------------------------------------------------------


def hostile(command: str) -> dict[str, bytes]:
    """Pickles, without protocol and end, that run a command when Python's own unpickler reads them."""
    run = text(command)
    code = text(f"__import__('os').system({command!r})")
    return {
        "reduce": b"cos\nsystem\n" + run + b"\x85R",
        "stack_global": text("os") + text("system") + b"\x93" + run + b"\x85R",
        "eval": b"cbuiltins\neval\n" + code + b"\x85R",
        "exec": b"cbuiltins\nexec\n" + code + b"\x85R",
        "inst": b"(" + run + b"ios\nsystem\n",
        "obj": b"(csubprocess\nPopen\n(" + text("sh") + text("-c") + run + b"lo",
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n"
        + text("os")
        + b"\x85R"
        + text("system")
        + b"tR"
        + run
        + b"\x85R",
        "map": b"cbuiltins\nlist\n(cbuiltins\nmap\n(cos\nsystem\n(" + run + b"ltRtR",
        "partial": b"cfunctools\npartial\n(cos\nsystem\n" + run + b"tR)R",
        "apply": b"coperator\nmethodcaller\n("
        + text("system")
        + run
        + b"tR(cimportlib\nimport_module\n("
        + text("os")
        + b"tRtR",
        "setstate": b"ctypes\nSimpleNamespace\n)R}" + text("__setstate__") + b"cos\nsystem\nsb" + run + b"b",
        "attribute": b"ctypes\nSimpleNamespace\n)R}(" + text("append") + b"cos\nsystem\nub" + run + b"a",
        "appends": b"ctypes\nSimpleNamespace\n)R}(" + text("append") + b"cos\nsystem\nub(" + run + b"e",
        "extension": b"\x82\xf0" + run + b"\x85R",
        "extension_2": b"\x83\xf1\x00" + run + b"\x85R",
        "extension_4": b"\x84\xf2\x00\x00\x00" + run + b"\x85R",
    }


# Programs that are harmless to Python's unpickler here, or not meant for it, but try other doors.
def doors(command: str) -> dict[str, bytes]:
    run = text(command)
    return {
        "newobj": b"csubprocess\nPopen\n((" + text("sh") + text("-c") + run + b"lt\x81",
        "newobj_ex": b"csubprocess\nPopen\n((" + text("sh") + text("-c") + run + b"lt}\x92",
        "hub": b"ctorch.hub\nload\n(" + text("a/b") + text("c") + b"tR",
        "load": b"ctorch.serialization\nload\n(" + text("/etc/passwd") + b"tR",
        "import": b"cantigravity\nfly\n",
        "rebuild_from_type": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n("
        + run
        + b"tNtR",
        "rebuild_nested": b"ctorch._tensor\n_rebuild_from_type_v2\n"
        b"(ctorch._tensor\n_rebuild_from_type_v2\nN(cos\nsystem\nN(" + run + b"tNtNtR",
        "parameter": b"ctorch._utils\n_rebuild_parameter\n(cos\nsystem\n" + run + b"\x85R\x89NtR",
        "default_factory": b"ccollections\ndefaultdict\n(cos\nsystem\ntR",
        "ordered": b"ccollections\nOrderedDict\n(cos\nsystem\n" + run + b"\x85RtR",
        "storage_type": storage(text("0"), 4, b"system", b"os"),
        "storage_called": b"cos\nsystem\n" + storage(text("0"), 4) + b"\x85R",
        "dict_setstate": b"}}" + text("__setstate__") + b"cos\nsystem\nsb" + run + b"b",
        "ordered_setstate": b"ccollections\nOrderedDict\n)R}(" + text("items") + b"cos\nsystem\nub",
        "tensor_setstate": GOOD + b"}(" + text("set_") + b"cos\nsystem\nub",
        "class_change": b"ctypes\nSimpleNamespace\n)RN}" + text("__class__") + b"cos\nsystem\ns\x86b",
        "key": b"}cos\nsystem\n" + run + b"\x85RNs",
        "size": b"ctorch\nSize\n(cos\nsystem\n" + run + b"\x85RtR",
        "buffer": b"\x97\x98",
        "names": b"c../../../tmp\n/etc\n",
        "dtype": b"ctorch._utils\n_rebuild_tensor_v3\n("
        + storage(text("9"), 0, b"UntypedStorage")
        + b"K\0))\x89Ncos\nsystem\ntR",
    }


@pytest.fixture
def extensions() -> Iterator[None]:
    """Extension codes that stand for os.system, also in the cache that find_class never sees."""
    codes = {0xF0: ("os", "system"), 0xF1: ("posix", "system"), 0xF2: ("subprocess", "getoutput")}
    for code, (module, name) in codes.items():
        copyreg.add_extension(module, name, code)
        copyreg._extension_cache[code] = os.system  # type: ignore[attr-defined]
    yield
    for code, (module, name) in codes.items():
        copyreg.remove_extension(module, name, code)


def test_the_programs_are_hostile(tmp_path: Path, extensions: None) -> None:
    mark = tmp_path / "mark"
    for name, program in hostile(f"touch {mark}").items():
        mark.unlink(missing_ok=True)
        try:
            made = pickle.loads(b"\x80\x02" + program + b".")
            if isinstance(made, subprocess.Popen):
                made.wait()
        except Exception:  # after the deed
            pass
        assert mark.exists(), name


@BOTH
@pytest.mark.parametrize("name", [*hostile(""), *doors("")])
def test_nothing_is_run(tmp_path: Path, write: Write, extensions: None, name: str) -> None:
    path, mark = tmp_path / "x.pt", tmp_path / "mark"
    program = {**hostile(f"touch {mark}"), **doors(f"touch {mark}")}[name]
    before = set(sys.modules)
    # As a whole, as a state dict, as an entry of one, as its name.
    for content in (
        b"\x80\x02" + program + b".",
        b"\x80\x02}" + text("state_dict") + program + b"s.",
        state(program),
        b"\x80\x02}" + program + GOOD + b"s.",
    ):
        write(path, content, {"0": 4})
        refused(path, None)
    # Beside the state dict it is passed over.
    if name != "storage_type":
        write(path, state(GOOD, callbacks=program), {"0": 4})
        if name != "dtype" or write is write_zip:
            assert load(path)["a"].tolist() == [0, 1, 2, 3]
    assert not mark.exists()
    assert set(sys.modules) == before


# ---- Bombs -----------------------------------------------------------------------------------------

DEEP = 300_000
BOMBS: dict[str, tuple[bytes, str]] = {
    "deep_tuple": (b")" + b"\x85" * DEEP, "expected a tensor, got tuple"),
    "deep_tuple_as_key": (b"})" + b"\x85" * DEEP + b"Ns", "expected a tensor, got dict"),
    "wide_tuple_as_key": (b"})" + b"2\x86" * 100 + b"Ns", "expected a tensor, got dict"),
    "deep_list": (b"]" * DEEP + b"a" * (DEEP - 1), "expected a tensor, got list"),
    "deep_dict": (b"}N" * DEEP + b"N" + b"s" * DEEP, "expected a tensor, got dict"),
    "deep_marks": (b"(" * DEEP, "empty stack"),
    "deep_calls": (b"cx\ny\n" + b")R" * DEEP, "an object"),
    "deep_tensors": (
        b"ctorch._utils\n_rebuild_tensor\nq\x00" + b"h\x00" * (DEEP - 1) + b")" + b"R\x85" * DEEP,
        "expected a tensor, got tuple",
    ),
    "long_names": (
        text("m" * 1_000_000) + b"q\x00" + text("n") + b"\x93q\x010" + b"h\x01)R0" * 500_000 + b"h\x01)R",
        "an object of 'mmm",
    ),
    "long_names_as_keys": (
        b"}" + text("m" * 1_000_000) + text("n") + b"\x93q\x01" + b"0(" + b"h\x01N" * 500_000 + b"u",
        "expected a tensor, got dict",
    ),
    "long_sizes": (
        b"("
        + b"K\x01" * 1_000_000
        + b"tq\x000"
        + storage(text("0"), 4)
        + b"q\x010"
        + b"ctorch._utils\n_rebuild_tensor\n(h\x01K\0h\x00h\x00tR",
        "at most 64",
    ),
    "deep_set": (b"(" * DEEP + b"\x91" * DEEP, "a set"),
    "own_item": (b"]q\x00h\x00a", "expected a tensor, got list"),
    "own_value": (b"}q\x00" + text("a") + b"h\x00s", "expected a tensor, got dict"),
    "memo_large": (b"Nr\xff\xff\xff\xff", "expected a tensor, got None"),
    "memo_huge": (b"Np99999999999999\n", "out of range"),
    "memo_negative": (b"Np-1\n", "out of range"),
    "memo_text": (b"Npx\n", "for a number"),
    "memo_absent": (b"h\x07", "recalls"),
    "colliding_keys": (
        b"}(" + b"".join(number((2**61 - 1) * i) + b"N" for i in range(DEEP)) + b"u",
        "expected a tensor, got dict",
    ),
    "operations": (b"N0" * 2_100_000 + b"N", "more than 4000000 operations"),
    "doubled_pairs": (
        b"]("
        + b"".join(text(f"{i:6}") + b"N\x86" for i in range(100_000))
        + b"eq\x00"
        + b"0ccollections\nOrderedDict\nh\x00\x85R" * 1000,
        "more than 4000000 operations",
    ),
    "bytes_8": (b"\x8e" + struct.pack("<Q", 2**63) + b"x", "ends too early"),
    "bytes_8_wraps": (b"\x8e" + b"\xff" * 8, "ends too early"),
    "bytearray_8": (b"\x96" + struct.pack("<Q", 2**40) + b"x", "ends too early"),
    "text_8": (b"\x8d" + struct.pack("<Q", 2**40) + b"x", "ends too early"),
    "text_4": (b"X\xff\xff\xff\xffx", "ends too early"),
    "text_bad": (b"X\x02\0\0\0\xff\xff", "not UTF-8"),
    "string_negative": (b"T\xff\xff\xff\xff", "negative length"),
    "long_4": (b"\x8b\xff\xff\xff\x7f", "ends too early"),
    "long_negative": (b"\x8b\xff\xff\xff\xff", "negative length"),
    "long_decimal": (b"L" + b"9" * 4000 + b"L\n", "a long number"),
    "long_line": (b"L" + b"9" * 1_000_000 + b"L\n", "does not end"),
    "no_number": (b"I1x\n", "for a number"),
    "no_name": (b"c\xff\n\xff\n", "not UTF-8"),
    "frame": (b"\x95" + b"\xff" * 8 + b"N", "got None"),
    "protocol": (b"\x80\x06N", "protocol 6"),
    "unknown": (b"\xfeN", "unknown operation"),
    "underflow": (b"0" * 100, "empty stack"),
    "underflow_tuple": (b"(\x87", "empty stack"),
    "underflow_mark": (b"t" * 100, "empty stack"),
    "obj_of_nothing": (b"(o", "empty stack"),
    "odd_items": (b"}(Nu", "key without a value"),
    "append_to_none": (b"NNa", "appends to None"),
    "set_on_list": (b"]NNs", "sets items of list"),
    "early_end": (b".", "expected a dict"),
    "name_of_numbers": (b"NN\x93", "no string"),
}


@BOTH
@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path: Path, write: Write, name: str) -> None:
    program, match = BOMBS[name]
    write(tmp_path / "x.pt", state(program), {})
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "x.pt")
    assert write is write_legacy or match in str(caught.value)


def test_unfinished(tmp_path: Path) -> None:
    write_zip(tmp_path / "x.pt", state(GOOD)[:-1], {"0": 4})
    refused(tmp_path / "x.pt", "ends too early")


# ---- Archives that lie -----------------------------------------------------------------------------


def test_archives_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    write_zip(path, state(GOOD), {"0": 4})
    good = path.read_bytes()

    def patched(at: int, new: bytes) -> None:
        path.write_bytes(good[:at] + new + good[at + len(new) :])

    entry = good.index(b"PK\x01\x02", good.index(b"PK\x01\x02") + 1)  # of storage 0 in the directory
    local = good.index(b"PK\x03\x04", 1)
    end = good.index(b"PK\x05\x06")
    for at, new, match in (
        (entry + 16, b"\0\0\0\0", "CRC-32"),
        (entry + 8, b"\x01", "encrypted"),
        (entry + 10, b"\x08", "compressed"),
        (entry + 20, struct.pack("<II", 1 << 31, 1 << 31), r"2147483648 bytes"),
        (entry + 20, struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF), "no size"),
        (entry + 20, struct.pack("<I", 15), "compressed"),
        (entry + 28, struct.pack("<H", 999), "damaged directory"),
        (entry + 42, struct.pack("<I", 0), r"does not lie|another name"),
        (entry + 42, struct.pack("<I", 0xFFFFFFF0), r"does not lie|ends too early"),
        (entry, b"PK\x09\x09", "damaged directory"),
        (local, b"PK\x09\x09", "does not lie"),
        (local + 26, struct.pack("<H", 0xFFFF), "does not lie"),
        (local + 28, struct.pack("<H", 0xFFFF), "does not lie"),
        (local + 30, b"y", "another name"),
        (end + 4, b"\x01", "within"),
        (end + 10, b"\x09", "says it has"),
        (end + 10, b"\xff\xff", r"cannot be found"),
        (end + 12, struct.pack("<I", 1 << 30), "within"),
        (end + 16, struct.pack("<I", 1 << 30), "within"),
        (end + 16, struct.pack("<I", 0xFFFFFFFF), "cannot be found"),
        (end + 20, b"\x05\0", "directory is missing"),
        (good.index(floats(4)), b"\x01", "CRC-32"),
    ):
        patched(at, new)
        refused(path, match)
    path.write_bytes(good + b"x")
    refused(path, "directory is missing")


def test_no_memory_is_taken_for_bytes_that_are_not_there(tmp_path: Path) -> None:
    """Pickle and directory agree on a storage of 128 TiB."""
    path = tmp_path / "x.pt"
    write_zip(path, state(tensor(text("0"), 2**45)), {"0": 4})
    data = path.read_bytes()
    entry, end = data.rindex(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    (length,) = struct.unpack_from("<I", data, end + 12)
    sizes = struct.pack("<2H2Q", 1, 16, 2**47, 2**47)
    made = bytearray(data[:end] + sizes + data[end:])
    made[entry + 20 : entry + 28] = b"\xff" * 8
    made[entry + 30 : entry + 32] = struct.pack("<H", len(sizes))
    made[end + len(sizes) + 12 : end + len(sizes) + 16] = struct.pack("<I", length + len(sizes))
    path.write_bytes(made)
    refused(path, "'a': record b'x/data/0' does not lie")


def test_records_that_overlap(tmp_path: Path) -> None:
    """Many records on the same bytes would be a bomb: each storage would be read anew."""
    path = tmp_path / "x.pt"
    entries = b"".join(text(f"k{i}") + tensor(text(str(i))) for i in range(3))
    write_zip(path, b"\x80\x02}(" + entries + b"u.", {str(i): 4 for i in range(3)})
    data = bytearray(path.read_bytes())
    assert len(load(path)) == 3
    places = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    for place in places[2:]:
        data[place + 42 : place + 46] = data[places[1] + 42 : places[1] + 46]
    path.write_bytes(data)
    refused(path, r"does not lie|another name")


def test_archive_records(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    write_zip(path, state(GOOD), {"0": 4}, byteorder=b"big")
    refused(path, "byte order b'big'")
    write_zip(path, state(GOOD), {"0": 4}, byteorder=b"x" * 17)
    refused(path, "17 bytes")
    write_zip(path, state(GOOD), {"0": 4}, byteorder=b"little", version=b"3")
    assert load(path)["a"].tolist() == [0, 1, 2, 3]
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x/data.pkl", b"N.")
    refused(path, "two records named")
    write_zip(path, state(GOOD), {"0": 4})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y/data.pkl", b"N.")
    refused(path, "2 records named data.pkl")
    write_zip(path, state(GOOD), {"0": 4})
    with zipfile.ZipFile(path, "a") as archive:  # no name is ever used as a path
        archive.writestr("../../escaped", b"")
        archive.writestr("/tmp/escaped", b"")
    assert load(path)["a"].tolist() == [0, 1, 2, 3]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(50_000_000))
    refused(path, "compressed")


def test_large_archives(tmp_path: Path) -> None:
    """More records than 16 bits count: sizes and places then stand elsewhere (zip64)."""
    path = tmp_path / "x.pt"
    write_zip(path, state(GOOD), {"0": 4})
    with zipfile.ZipFile(path, "a") as archive:
        with archive.open("x/data/large", "w", force_zip64=True) as record:
            record.write(floats(4))
        for i in range(66_000):
            archive.writestr(f"x/{i}", b"")
    assert load(path)["a"].tolist() == [0, 1, 2, 3]


def test_archives_beyond_32_bits(tmp_path: Path) -> None:
    """A storage that lies behind the first 4 GiB of a file with a hole."""
    path = tmp_path / "x.pt"
    write_zip(path, state(GOOD), {})
    with zipfile.ZipFile(path, "a") as archive:
        archive.start_dir = 5 << 30  # type: ignore[attr-defined]
        archive.writestr("x/data/0", floats(4))
    assert path.stat().st_size > 5 << 30
    assert load(path)["a"].tolist() == [0, 1, 2, 3]


def test_legacy_frames(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    write_legacy(path, state(GOOD), {"0": 4}, little=False)
    refused(path, "byte order")
    write_legacy(path, state(GOOD), {"0": 4}, little=None)
    refused(path, "byte order")
    write_legacy(path, state(GOOD), {"0": 5})
    refused(path, "has 5 elements, its pickle says 4")
    write_legacy(path, state(GOOD), {"0": 4, "1": 4})
    refused(path, "does not fit")
    write_legacy(path, state(GOOD), {})
    refused(path, "goes|missing")
    write_legacy(path, state(GOOD), {"0": 4})
    good = path.read_bytes()
    path.write_bytes(good + b"\0")
    refused(path, "goes on behind")
    twice = good.replace(pickle.dumps(["0"], 2), pickle.dumps(["0", "0"], 2))
    path.write_bytes(twice + struct.pack("<q", 4) + floats(4))
    refused(path, "listed twice")
    path.write_bytes(good[:-1])
    refused(path, "ends too early")
    path.write_bytes(good.replace(struct.pack("<q", 4) + floats(4), struct.pack("<q", -4) + floats(4)))
    refused(path, "has -4 elements")
    path.write_bytes(good.replace(b"M\xe9\x03", b"M\xe8\x03"))
    refused(path, "protocol 1001")


# ---- safetensors -----------------------------------------------------------------------------------


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {f"module.{n}": t for n, t in every_dtype().items() if not n.startswith("complex128")}
    tensors["module.scalar"] = torch.tensor(2.5)
    tensors["module.empty"] = torch.zeros(3, 0, 2)
    safetensors_torch.save_file(tensors, path, {"format": "pt"})
    expected = safetensors_torch.load_file(path)
    loaded = load(path)
    assert set(loaded) == {n.removeprefix("module.") for n in tensors}
    same(dict(sorted(loaded.items())), {n.removeprefix("module."): t for n, t in sorted(expected.items())})
    loaded["scalar"].add_(1)
    assert list(load(path, "bool")) == ["weight"]
    path.write_bytes(path.read_bytes() + b"\0")
    refused(path, "goes on behind")


def entry(shape: Any = (4,), begin: Any = 0, end: Any = 16, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": entry(), "b": entry()}, "begins at byte 0, expected 16"),
        ({"a": entry(), "b": entry((2,), 12, 20)}, "begins at byte 12, expected 16"),
        ({"a": entry((3,), 4, 16)}, "begins at byte 4, expected 0"),
        ({"a": entry((3,), 0, 12)}, "goes on behind"),
        ({"a": entry((5,), 0, 20)}, "ends too early"),
        ({"a": entry((5,))}, "'a': has 16 bytes, its shape and dtype need 20"),
        ({"a": entry((4,), 16, 0)}, "has -16 bytes"),
        ({"a": entry((2**40, 2**40), 0, 16)}, "too large"),
        ({"a": entry((2**40, 2**40, 0), 0, 0)}, "too large"),
        ({"a": entry((-4,))}, "expected a shape"),
        ({"a": entry((4.0,))}, "expected a shape"),
        ({"a": entry((True, 4))}, "expected a shape"),
        ({"a": entry(4)}, "expected a shape"),
        ({"a": entry((1,) * 65)}, "expected a shape"),
        ({"a": entry((4,), "0")}, "two data_offsets"),
        ({"a": {**entry(), "data_offsets": [0]}}, "two data_offsets"),
        ({"a": {**entry(), "data_offsets": 0}}, "two data_offsets"),
        ({"a": entry(dtype="F4")}, "dtype 'F4' is not supported"),
        ({"a": entry(dtype=["F32"])}, "is not supported"),
        ({"a": {"dtype": "F32"}}, "expected dtype, shape and data_offsets"),
        ({"a": {**entry(), "more": 1}}, "expected dtype, shape and data_offsets"),
        ({"a": 3}, "expected dtype, shape and data_offsets"),
        ({}, "goes on behind"),
        (b'{"a":1,"a":2}', "a name twice"),
        (b'{"a":' + b"9" * 5000 + b"}", "number too large"),
        (b'{"a":' + b"[" * 100_000, "damaged safetensors header"),
        (b'{"\xff":1}', "damaged safetensors header"),
        (b"{", "damaged safetensors header"),
    ],
    ids=str,
)
def test_safetensors_that_lie(tmp_path: Path, header: Any, match: str) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + floats(4))
    refused(tmp_path / "x", match)


def test_safetensors_header_sizes(tmp_path: Path) -> None:
    for size, match in ((2**63, "expected at most"), (2**25, "expected at most"), (2**20, "ends too early")):
        (tmp_path / "x").write_bytes(struct.pack("<Q", size) + b"{}" + floats(4))
        refused(tmp_path / "x", match)


# ---- Damage ----------------------------------------------------------------------------------------


def samples(folder: Path) -> list[Path]:
    """A valid file of each format."""
    paths = [folder / name for name in ("zip", "legacy", "zip_lightning", "legacy_lightning", "safetensors")]
    torch.save({"a": torch.randn(3, 4).t(), "b": torch.tensor([True])}, paths[0])
    content = {"a": torch.randn(3, 4).t(), "b": torch.tensor([1])}
    torch.save(content, paths[1], _use_new_zipfile_serialization=False)
    lightning(paths[2], True)
    lightning(paths[3], False)
    safetensors_torch.save_file({"a": torch.randn(3, 4), "b": torch.ones(2)}, paths[4])
    return paths


def test_truncated(tmp_path: Path) -> None:
    for path in samples(tmp_path):
        data = path.read_bytes()
        load(path)
        for length in {
            *(len(data) * i // 16 for i in range(16)),
            *range(20),
            *range(len(data) - 70, len(data)),
        }:
            path.write_bytes(data[:length])
            refused(path, None)


def usable(path: Path) -> None:
    """A file may load or be refused; tensors that come out can be read to the last element."""
    try:
        tensors = load(path)
    except CheckpointError:
        return
    for value in tensors.values():
        assert value.clone().numel() * value.element_size() <= path.stat().st_size


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes], list[bytes]]:
    """A place for files, valid files, and valid programs."""
    folder = tmp_path_factory.mktemp("fuzz")
    paths = samples(folder)
    programs = []
    for path in (paths[0], paths[2]):
        with zipfile.ZipFile(path) as archive:
            programs.append(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
    return folder / "x", [path.read_bytes() for path in paths], [state(GOOD), *programs]


def damage(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for at, removed, new in changes:
        at %= len(data) + 1
        data = data[:at] + new + data[at + removed :]
    return data


changes = st.lists(
    st.tuples(st.integers(0, 2**16), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=5
)
single = st.tuples(st.integers(0, 2**16), st.just(1), st.binary(min_size=1, max_size=1)).map(lambda c: [c])


@settings(max_examples=600, deadline=None)
@given(which=st.integers(0, 4), edits=changes | single)
def test_damaged_files(originals: Any, which: int, edits: list[tuple[int, int, bytes]]) -> None:
    path, files, _ = originals
    path.write_bytes(damage(files[which], edits))
    usable(path)


@settings(max_examples=600, deadline=None)
@given(which=st.integers(0, 2), edits=changes | single, zipped=st.booleans())
def test_damaged_programs(originals: Any, which: int, edits: Any, zipped: bool) -> None:
    """Damage that no checksum finds."""
    path, _, programs = originals
    write = write_zip if zipped else write_legacy
    write(path, damage(programs[which], edits), {"0": 4, "1": 1})
    usable(path)


operations = st.sampled_from([bytes([i]) for i in range(256)])
pieces = st.sampled_from(
    [text("a"), GOOD, storage(text("0"), 4), b"ctorch._utils\n_rebuild_parameter\n", b"(", b"t"]
)


@settings(max_examples=400, deadline=None)
@given(parts=st.lists(operations | pieces | pieces, max_size=30))
def test_random_programs(originals: Any, parts: list[bytes]) -> None:
    path = originals[0]
    write_zip(path, b"\x80\x02" + b"".join(parts) + b".", {"0": 4})
    usable(path)


# ---- Memory ----------------------------------------------------------------------------------------

MEASURE = """
import resource, sys, torch
from gi_model.checkpoints import load_checkpoint
path, part = sys.argv[1:3]
torch.empty(0).set_(torch.UntypedStorage(4), 0, (1,), (1,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    tensors = load_checkpoint(path, part=part or None)
except ValueError as error:
    print(error, file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def growth(path: Path, part: str = "") -> int:
    """Bytes by which the peak of a process grows that loads a file."""
    command = [sys.executable, "-c", MEASURE, str(path), part]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout) * 1024


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    tensors = {f"{part}.{i}": torch.randn(2**22) for part in "ab" for i in range(4)}
    if kind == "safetensors":
        safetensors_torch.save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=kind == "zip")
    half = 4 * 2**24
    assert growth(path) < 1.2 * 2 * half
    assert growth(path, "a") < 1.2 * half


def test_memory_of_bombs(tmp_path: Path) -> None:
    write_zip(tmp_path / "x", state(b"}" * 5_000_000), {})
    assert growth(tmp_path / "x") < 600 * 2**20
