"""Which backend ``auto`` prefers on a GPU: rules and the measurements beside them."""

from __future__ import annotations

import pytest
import torch

import gi_kernels
from gi_kernels import dispatch
from gi_kernels.rules import RULES, Rule, preferred

SMALL, LARGE = torch.zeros(10), torch.zeros(1000)


def test_the_first_rule_that_fits_decides() -> None:
    rules = (
        Rule("warp", ("triton", "cuda"), dtypes=(torch.bfloat16,)),
        Rule("warp", ("triton", "cuda"), least=100, below=2000),
        Rule("*", ("cuda", "triton")),
    )
    assert preferred("warp", [SMALL.bfloat16()], rules) is rules[0]
    assert preferred("warp", [SMALL, LARGE], rules) is rules[1]  # the largest tensor counts
    assert preferred("warp", [SMALL], rules) is rules[2]
    assert preferred("warp", [torch.zeros(2000)], rules) is rules[2]
    assert preferred("pool", [LARGE], rules) is rules[2]
    assert preferred("pool", [], rules) is rules[2]
    with pytest.raises(LookupError, match="pool: no rule fits"):
        preferred("pool", [LARGE], rules[:2])


def test_every_rule_names_its_measurement() -> None:
    for rule in RULES:
        assert rule.operator == "*" or rule.operator in dispatch.OPERATORS
        assert sorted(rule.order) == ["cuda", "triton"]
        assert rule.numbers and (rule.measured_on or rule.numbers.startswith("not measured yet"))
    last = RULES[-1]
    assert last.operator == "*" and not last.dtypes and last.least == 0 and last.below is None


def test_a_gpu_goes_by_the_rules(monkeypatch) -> None:
    """Calls and explanations, with tensors that stand for a GPU's."""
    ran = []
    names = ("cuda", "triton", "cpp", "reference")
    operator = dispatch.Operator("test_rules", {n: lambda *_, n=n: ran.append(n) for n in names})
    monkeypatch.setattr(dispatch, "_device", lambda _: "cuda")
    monkeypatch.setattr(dispatch, "_refusal_on", lambda o, name, d: "cannot" if name == "cpp" else None)
    try:
        for order in (("cuda", "triton"), ("triton", "cuda")):
            rule = Rule("*", order, measured_on="H200", numbers="1.2 times as fast")
            monkeypatch.setattr(dispatch.rules, "preferred", lambda *_, rule=rule: rule)
            dispatch.run(operator, SMALL)
            assert ran[-1] == order[0]
            found = gi_kernels.explain("test_rules", SMALL)
            assert found.chosen == order[0]
            assert found.refused[order[1]] == f"{order[0]} is preferred (H200: 1.2 times as fast)"
            assert found.refused["reference"] == f"{order[0]} is preferred"
            with gi_kernels.backend(order[1]):
                dispatch.run(operator, SMALL)
            assert ran[-1] == order[1]
    finally:
        del dispatch.OPERATORS["test_rules"]


def test_a_cpu_does_not(monkeypatch) -> None:
    monkeypatch.setattr(dispatch.rules, "preferred", lambda *_: pytest.fail("asked"))
    assert gi_kernels.explain("flow_consistency", torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)).chosen
