"""The layers of ``gi_kernels.nn`` against the published ones with the same weights."""

from __future__ import annotations

import pytest

from benchmarks.cases import layer_cases


@pytest.mark.parametrize("case", layer_cases(), ids=lambda c: c.id)
def test_layer(case, contest):
    contest(case)
