"""Says at the start of a run what is under test and with which seed.

Environment variables that `make` sets, so that a run cannot test something else unnoticed:
    GI_KERNELS_TEST_INSTALLED=1  the package must not be the source tree, its kernels must be loaded.
    GI_KERNELS_TEST_SANITIZED=1  the kernels must be built with sanitizers.
    GI_KERNELS_TEST_EMULATED=1   the CUDA kernels must serve the CPU.
"""

from __future__ import annotations

import importlib
import os
import secrets
from pathlib import Path

import hypothesis
import pytest
import torch

import gi_kernels
from gi_kernels import jit, native

ROOT = Path(__file__).parents[1]

# How many random calls of each operator. `make fuzz` chooses the long one; Triton's interpreter is slow.
SHORT = hypothesis.settings(max_examples=60, deadline=None, print_blob=True)
hypothesis.settings.register_profile("short", SHORT)
hypothesis.settings.register_profile("long", SHORT, max_examples=1000)
hypothesis.settings.register_profile("interpreted", SHORT, max_examples=8)
hypothesis.settings.load_profile("interpreted" if jit.INTERPRETED else "short")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give Hypothesis a seed that can be printed, unless one was asked for."""
    if config.getoption("hypothesisseed", None) is None:
        config.option.hypothesisseed = str(secrets.randbits(32))
    package = Path(gi_kernels.__file__).parents[1]
    if os.environ.get("GI_KERNELS_TEST_INSTALLED") == "1" and (package == ROOT or native.PROBLEM):
        raise pytest.UsageError(f"not the installed package with its kernels: {package}; {native.PROBLEM}")
    if os.environ.get("GI_KERNELS_TEST_SANITIZED") == "1" and not native.RECEIPT.get("sanitize"):
        raise pytest.UsageError(f"not built with sanitizers: {package}")
    if os.environ.get("GI_KERNELS_TEST_EMULATED") == "1" and not native.RECEIPT.get("emulate"):
        raise pytest.UsageError(f"not built to emulate CUDA: {package}")


@pytest.fixture(params=["cpp", "pytorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, and where there is none: of what is not an operator with backends."""
    if request.param == "pytorch":
        monkeypatch.setattr(native, "PROBLEM", "for this test")
    elif native.PROBLEM is not None:
        pytest.skip(native.PROBLEM)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--slow`` runs the tests that build the package or need much memory."""
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes, and say so."""
    if not config.getoption("--slow"):
        for item in items:
            marker = item.get_closest_marker("slow")
            if marker:
                why = marker.kwargs.get("reason", "takes minutes: --slow, or make install-ladder")
                item.add_marker(pytest.mark.skip(reason=why))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Which kernels run, and the seed of the fuzz tests."""
    kernels = native.PROBLEM
    if kernels is None:
        kernels = "C++ kernels loaded, variant " + importlib.import_module("gi_kernels._C").cpu_capability()
    return [
        f"gi_kernels in {Path(gi_kernels.__file__).parent}",
        f"gi_kernels: {kernels}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        f"fuzzing: --hypothesis-seed={config.option.hypothesisseed}",
    ]
