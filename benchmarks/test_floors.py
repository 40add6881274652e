"""The floors, by the latest results of this device: ``pytest benchmarks/test_floors.py -m floors``."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.floors import FLOORS, Floor, judge
from gi_kernels.testing import machine


@pytest.mark.floors
@pytest.mark.parametrize("floor", FLOORS, ids=lambda f: f"{f.case}-{f.kind}-{f.against}")
def test_floor(floor: Floor, request: pytest.FixtureRequest) -> None:
    device = request.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    file = request.config.getoption("--results") / machine.slug(device) / "results.json"
    if not file.exists():
        pytest.skip(f"no results in {file}: run `pytest benchmarks/ --benchmark-only` first")
    verdict = next(v for v in judge(json.loads(file.read_text())) if v.floor == floor)
    assert verdict.reached, str(verdict)
