"""Autocast, threads, determinism, uninitialised memory, sizes beyond 32 bits."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cases import SPECS, Case, cases, first

import gi_kernels
from gi_kernels.spec import Argument
from gi_kernels.testing import errors
from gi_kernels.testing.calls import Outcome, cotangent, map_tensors, tensors
from gi_kernels.testing.layouts import channels_last


@cases(first(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("backward_inside", [False, True], ids=["outside", "inside"])
def test_autocast(case: Case, dtype: torch.dtype, backward_inside: bool) -> None:
    """Autocast equals casting the feature arguments by hand; positions keep float32."""
    leaves = map_tensors(
        lambda path, t: t.requires_grad_(_base(path) in case.differentiable), case.sample.make(torch.float32)
    )
    by_hand = map_tensors(
        lambda path, t: t.to(dtype) if case.spec.autocast and _is_storage(case, path) else t, leaves
    )
    with gi_kernels.backend(case.backend):
        expected = case.spec.function(**by_hand)
        with torch.autocast("cpu", dtype):
            value = case.spec.function(**leaves)
            inside = _gradients(value, leaves) if backward_inside else None
    assert value.dtype == expected.dtype
    assert torch.equal(value, expected)
    actual = inside if inside is not None else _gradients(value, leaves)
    for path, gradient in _gradients(expected, leaves).items():
        assert actual[path].dtype == torch.float32, path
        if backward_inside and case.backend == "reference":  # then PyTorch rounds its own products
            assert errors.cosine(actual[path], gradient) > errors.COSINE, path
        else:
            assert torch.equal(actual[path], gradient), path


@cases(first(1))
def test_autocast_leaves_float64_alone(case: Case) -> None:
    arguments = case.sample.make(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        value = case.run(arguments, []).value
    assert torch.equal(value, case.run(arguments, []).value)


@cases(first(2))
def test_two_threads_at_once(case: Case) -> None:
    """Calls that run side by side do not disturb each other."""
    variants = [
        case.sample.make(torch.float32),
        map_tensors(lambda _, t: channels_last(t), case.sample.make(torch.float32)),
        case.sample.make(torch.bfloat16),
    ]
    serial = [case.run(a) for a in variants]
    with gi_kernels.backend(case.backend), ThreadPoolExecutor(3) as pool:
        runs = [(i, pool.submit(case.run, variants[i])) for _ in range(5) for i in range(3)]
        for i, run in runs:
            _assert_equal(run.result(), serial[i])


@cases(lambda spec: spec.of_size("small"))
def test_deterministic_mode_and_repetition(case: Case) -> None:
    """Deterministic algorithms are on offer, give the same bits every time, and need no other call."""
    arguments = case.sample.make(torch.float32)
    plain = case.run(arguments)
    with deterministic():
        once, again = case.run(arguments), case.run(arguments)
    _assert_equal(once, again)
    if case.spec.deterministic and case.backend != "reference":
        _assert_equal(once, plain)


@cases(lambda spec: spec.of_size("typical"), compiled_only=True)
def test_thread_count_does_not_change_bits(case: Case) -> None:
    """With enough work for several threads, one thread gives the same bits as two."""
    arguments = map_tensors(lambda _, t: channels_last(t), case.sample.make(torch.float32))
    before = torch.get_num_threads()
    with deterministic():
        try:
            torch.set_num_threads(1)
            one = case.run(arguments)
            torch.set_num_threads(2)
            two = case.run(arguments)
        finally:
            torch.set_num_threads(before)
    _assert_equal(one, two)


@cases()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])
def test_every_element_is_written(case: Case, dtype: torch.dtype) -> None:
    """Memory from torch.empty that is full of NaN leaves no trace in results."""
    arguments = case.sample.make(dtype)
    plain = case.run(arguments)
    with deterministic(fill=True):
        assert torch.empty(5).isnan().all()  # else this test proves nothing
        filled = case.run(arguments)
        channels = case.run(map_tensors(lambda _, t: channels_last(t), arguments))
    for name, tensor in [*filled.items(), *channels.items()]:
        assert not tensor.isnan().any(), name
    if case.backend != "reference":
        _assert_equal(plain, filled)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="poisons the heap through glibc")
@pytest.mark.skipif("GI_KERNELS_POISONED_HEAP" in os.environ, reason="this is the run with a poisoned heap")
def test_nothing_depends_on_fresh_memory() -> None:
    """The value tests pass where malloc hands out memory full of large numbers."""
    poison = {
        "MALLOC_PERTURB_": "1",  # fresh memory is 0xfe: -1.7e38 in float32, NaN in float16
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
        "GI_KERNELS_POISONED_HEAP": "1",
        "PYTHONPATH": str(Path(gi_kernels.__file__).parents[1]),  # the package under test, installed or not
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["test_values.py::test_value_and_gradient"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=os.environ | poison, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@cases(first(1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_offsets_beyond_32_bits(case: Case, dtype: torch.dtype) -> None:
    """Elements of one argument lie more than 2^31 elements apart, in memory that is never touched."""
    arguments = case.sample.make(dtype)
    expected = case.run(arguments)
    for path, tensor in tensors(arguments).items():
        for dimension in range(tensor.dim()):
            if tensor.shape[dimension] == 2 and path == next(iter(tensors(arguments))):
                apart = map_tensors(lambda p, t: _far_apart(t, dimension) if p == path else t, arguments)  # noqa: B023
                actual = case.run(apart)
                for (name, got), (_, wanted) in zip(actual.items(), expected.items(), strict=True):
                    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02, msg=f"{path}: {name}")


#: Results of millions of numbers would take Triton's interpreter minutes.
FAST = [b for b in gi_kernels.available_backends("flow_warp") if b != "triton"]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])
def test_large_results(backend: str, dtype: torch.dtype) -> None:
    """Results beyond 16 MiB, which are written past the caches, into memory of results freed before."""
    spec = SPECS["flow_warp"]
    generator = torch.Generator().manual_seed(0)
    flow = torch.randn(1, 2, 130, 131, generator=generator).mul(16).round() / 4  # positions exact in float32
    flow[0, :, 5, 7] = float("nan")
    maps = torch.randn(1, 256, 130, 131, generator=generator).to(dtype)
    expected = spec.reference(maps.double(), flow.double())
    maps, flow = channels_last(maps), flow.double() if dtype == torch.float64 else flow
    with gi_kernels.backend(backend):
        freed = [spec.function(maps, flow) for _ in range(2)]
        for value in freed:
            assert errors.largest_error(value, expected) <= 2 * torch.finfo(dtype).eps * expected.abs().max()
            value.fill_(float("nan"))
        del freed, value
        first, second = spec.function(maps, flow), spec.function(maps, flow)
        with deterministic(fill=True):
            third = spec.function(maps, flow)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    second.zero_()
    assert torch.equal(first, third)
    third.resize_(1, 256, 131, 131).zero_()


@pytest.mark.slow(reason="takes a minute and 5 GB of memory: --slow")
@pytest.mark.parametrize("backend", FAST)
def test_result_of_more_than_2_31_elements(backend: str) -> None:
    """A bfloat16 result of 2^31 + 2^17 elements, from an input that is one map with stride 0."""
    if backend == "reference":
        pytest.skip("the definition would need 60 GB for its float32 intermediates")
    H, W, C = 256, 256, 2**15 + 2
    plane = torch.arange(H * W, dtype=torch.float32).remainder(251).view(1, 1, H, W).to(torch.bfloat16)
    with gi_kernels.backend(backend):
        value = gi_kernels.flow_warp(plane.expand(1, C, H, W), torch.ones(1, 2, H, W))
    assert value.numel() > 2**31
    expected = torch.zeros(H, W, dtype=torch.bfloat16)
    expected[:-1, :-1] = plane[0, 0, 1:, 1:]
    for channel in (0, 1, C // 2, C - 2, C - 1):
        assert torch.equal(value[0, channel], expected), channel


@contextmanager
def deterministic(fill: bool = False) -> Iterator[None]:
    """Deterministic algorithms, with fresh tensors filled with NaN or not; restores both settings."""
    mode, filled = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def _assert_equal(actual: Outcome, expected: Outcome) -> None:
    for (name, got), (_, wanted) in zip(actual.items(), expected.items(), strict=True):
        assert torch.equal(got, wanted), name


def _gradients(value: torch.Tensor, arguments: dict) -> dict[str, torch.Tensor]:
    leaves = {path: t for path, t in tensors(arguments).items() if t.requires_grad}
    if not leaves:
        return {}
    found = torch.autograd.grad(value, list(leaves.values()), cotangent(value))
    return dict(zip(leaves, found, strict=True))


def _base(path: str) -> str:
    return path.split("/")[0]


def _is_storage(case: Case, path: str) -> bool:
    declared = case.sample.arguments[_base(path)]
    return (declared[0] if isinstance(declared, list) else declared).storage


def _far_apart(tensor: torch.Tensor, dimension: int) -> torch.Tensor:
    """``tensor``, of size 2 in ``dimension``, with its halves 2^31 + 64 elements apart."""
    distance = 2**31 + 64
    memory = torch.empty(distance + tensor.numel(), dtype=tensor.dtype)  # the pages between stay unmapped
    strides = list(tensor.stride())
    strides[dimension] = distance
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


def test_every_operator_is_declared() -> None:
    """The folder walk finds what the package exports."""
    exported = set(gi_kernels.__all__) - {
        "CorrelationPyramid",
        "FusedConvolution",
        "accelerate",
        "available_backends",
        "backend",
        "explain",
    }
    assert set(SPECS) == exported
    for name, spec in SPECS.items():
        assert spec.function is getattr(gi_kernels, name)
        assert {s.size for s in spec.samples} == {"small", "typical", "large"}
        for sample in spec.samples:
            assert any(isinstance(a, Argument | list) for a in sample.arguments.values())
