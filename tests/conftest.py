"""Says at the start of a run what is under test and with which seed."""

from __future__ import annotations

import os
import secrets

import pytest
import torch

from gi_kernels import native


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give Hypothesis a seed that can be printed, unless one was asked for."""
    if config.getoption("hypothesisseed", None) is None:
        config.option.hypothesisseed = str(secrets.randbits(32))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Which kernels run, and the seed of the fuzz tests."""
    wanted = os.environ.get("GI_KERNELS_CPU_CAPABILITY", "the machine's best")
    return [
        f"gi_kernels: {native.PROBLEM or 'C++ kernels loaded, variant: ' + wanted}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        f"fuzzing: --hypothesis-seed={config.option.hypothesisseed}",
    ]
