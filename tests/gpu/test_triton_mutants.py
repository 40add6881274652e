"""Faults seeded into the Triton kernels: the rule that the contract suite holds them to must catch each.

Runs in Triton's interpreter, ``make interpret``. What is exchanged is a copy of a module's source. No fault
may lead out of a tensor: the interpreter has no guards.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import gi_kernels
from gi_kernels import jit
from gi_kernels.spec import all_specs
from gi_kernels.testing import errors
from gi_kernels.testing.calls import evaluate, oracle

pytestmark = pytest.mark.skipif(not jit.INTERPRETED or jit.PROBLEM is not None, reason="for the interpreter")


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new``, once, in a module; the named samples of the operator must show it."""

    name: str
    module: str  # behind gi_kernels.
    old: str
    new: str
    operator: str
    samples: tuple[str, ...] = ()  # the first three that are not empty, if none is named


MUTANTS = (
    Mutant("slopes exchanged", "ops.flow_warp.triton", "along_y += g * dy", "along_y += g * dx", "flow_warp"),
    Mutant(
        "taps transposed", "jit.along_flow",
        "x, y = x0 + k % 2, y0 + k // 2", "x, y = x0 + k // 2, y0 + k % 2",
        "flow_warp",
    ),
    Mutant(
        "weights of the other side", "jit.along_flow", "weight = tl.where(k % 2 == 1, fx, 1 - fx)",
        "weight = tl.where(k % 2 == 0, fx, 1 - fx)", "flow_warp",
    ),
    Mutant(
        "sums of the softmax not kept in step", "ops.deformable_aggregation.triton",
        "total = total * keep + weight", "total = total + weight", "deformable_aggregation",
    ),
    Mutant(
        "blocks of keys not kept in step", "ops.global_attention.triton",
        "sums = product(weights, v, sums * keep[:, None], DTYPE)", "sums = product(weights, v, sums, DTYPE)",
        "global_attention",
    ),
    Mutant(
        "mean of a softmax's gradient left out", "ops.window_pool.triton", "* (change - mean[:, None])",
        "* change", "window_pool",
    ),
    Mutant(
        "the gate's sign", "ops.window_pool.triton", "1 / (1 + tl.exp(-x))", "1 / (1 + tl.exp(x))",
        "window_spread",
    ),
    Mutant(
        "windows transposed", "ops.correlation_lookup.triton",
        "dx, dy = s // SIDE - RADIUS, s % SIDE - RADIUS", "dx, dy = s % SIDE - RADIUS, s // SIDE - RADIUS",
        "correlation_lookup",
    ),
    Mutant(
        "the box around the patches ends early", "ops.correlation_lookup.triton",
        "tl.max(tl.where(reaches, top + N, 0), 0), H)", "tl.max(tl.where(reaches, top + N - 1, 0), 0), H)",
        "correlation_lookup", ("on_demand_part",),
    ),
    Mutant(
        "components exchanged", "ops.complete_flow.triton", "sum_v += weight * widen(tl.load(there + fsc",
        "sum_v += weight * widen(tl.load(there", "complete_flow",
    ),
    Mutant(
        "the edge mirrored twice", "ops.fused_convolution.triton", "2 * (size - 1) - i", "2 * size - 1 - i",
        "fused_convolution", ("reflected", "column"),
    ),
    Mutant(
        "a bias for all channels", "ops.fused_convolution.triton", "bias + i % C", "bias + 0 * i",
        "fused_convolution",
    ),
    Mutant(
        "a small tanh's sign", "ops.fused_convolution.triton", "x < 0, -(1 - e)", "x > 0, -(1 - e)",
        "fused_convolution", ("candidate",),
    ),
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "_"))
def test_is_caught(mutant: Mutant, tmp_path: Path, monkeypatch) -> None:
    target = f"gi_kernels.{mutant.module}"
    kernels = f"gi_kernels.ops.{mutant.operator}.triton"
    _exchange(target, mutant, tmp_path, monkeypatch)
    if target != kernels:  # what imports from the exchanged module does so anew
        monkeypatch.delitem(sys.modules, kernels, raising=False)
    try:
        assert _differs(mutant), f"{mutant.name}: not caught"
    finally:
        sys.modules.pop(kernels, None)


def _exchange(target: str, mutant: Mutant, folder: Path, monkeypatch) -> None:
    source = Path(importlib.util.find_spec(target).origin).read_text()
    assert source.count(mutant.old) >= 1, f"{mutant.name}: {target} has no {mutant.old!r}"
    file = folder / "mutant.py"
    file.write_text(source.replace(mutant.old, mutant.new, 1))
    spec = importlib.util.spec_from_file_location(target, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, target, module)
    spec.loader.exec_module(module)


def _differs(mutant: Mutant) -> bool:
    spec = all_specs()[mutant.operator]
    small = [s for s in spec.of_size("small") if s.name in mutant.samples or not mutant.samples]
    for sample in small if mutant.samples else small[:3]:
        arguments = sample.make(torch.float32)
        with gi_kernels.backend("triton"):
            actual = evaluate(spec.function, arguments, spec.differentiable)
        try:
            errors.check(spec, actual, oracle(spec, arguments, torch.float32), None, sample.condition)
        except AssertionError:
            return True
    return False
