"""Every operator of the specs against its published formulation, compiled, and PyTorch's nearest."""

from __future__ import annotations

import pytest

from benchmarks.cases import lookup_cases, operator_cases, pyramid_cases


@pytest.mark.parametrize("case", [*operator_cases(), *lookup_cases(), *pyramid_cases()], ids=lambda c: c.id)
def test_operator(case, contest):
    contest(case)
