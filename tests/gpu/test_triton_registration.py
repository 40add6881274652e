"""When the Triton kernels are on offer, what they cost those who do not use them, and their declarations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gi_kernels
from gi_kernels import dispatch, jit, native

INPUT, FLOW = torch.randn(1, 3, 4, 5), torch.randn(1, 2, 4, 5)


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, gi_kernels, gi_kernels.spec as s; s.all_specs(); print('triton' in sys.modules)"
    assert _python(code).stdout.split() == ["False"]


def test_without_triton_everything_else_works(tmp_path: Path) -> None:
    """A finder that knows no triton: the reason is told, and calls run as before."""
    code = (
        "import sys\n"
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch, gi_kernels\n"
        "from gi_kernels import dispatch\n"
        "x, f = torch.ones(1, 1, 2, 2), torch.zeros(1, 2, 2, 2)\n"
        "print(gi_kernels.flow_warp(x, f).sum().item())\n"
        "print(gi_kernels.explain('flow_warp', x, f).refused['triton'])\n"
        "print(dispatch._refusal_on(dispatch.OPERATORS['flow_warp'], 'triton', 'cuda'))\n"
    )
    missing = "triton is not installed: pip install triton"
    elsewhere = "triton kernels run on a CUDA device, the tensors are on cpu"
    for interpret, on_cpu in (("0", elsewhere), ("1", missing)):
        done = _python(code, TRITON_INTERPRET=interpret)
        assert done.stdout.splitlines() == ["4.0", on_cpu, missing], done.stderr


@pytest.mark.skipif(jit.PROBLEM is not None or jit.INTERPRETED, reason="for kernels that are compiled")
def test_compiled_kernels_need_a_gpu() -> None:
    reason = "triton kernels run on a CUDA device, the tensors are on cpu"
    assert gi_kernels.explain("flow_warp", INPUT, FLOW).refused["triton"] == reason
    with gi_kernels.backend("triton"), pytest.raises(RuntimeError, match=reason):
        gi_kernels.flow_warp(INPUT, FLOW)


@pytest.mark.skipif(jit.PROBLEM is not None, reason=str(jit.PROBLEM))
def test_the_interpreter_runs_only_what_it_is_asked_for() -> None:
    code = (
        "import torch, gi_kernels\n"
        "x, f = torch.ones(1, 1, 2, 2), torch.zeros(1, 2, 2, 2)\n"
        "e = gi_kernels.explain('flow_warp', x, f)\n"
        "print(e.chosen != 'triton', gi_kernels.available_backends('flow_warp')[-1])\n"
        "print(\"Triton's interpreter is slow\" in e.refused['triton'])\n"
        "with gi_kernels.backend('triton'):\n"
        "    print(gi_kernels.explain('flow_warp', x, f).chosen, gi_kernels.flow_warp(x, f).sum().item())\n"
    )
    done = _python(code, TRITON_INTERPRET="1")
    assert done.stdout.split() == ["True", "triton", "True", "triton", "4.0"], done.stderr


@pytest.mark.skipif(native.PROBLEM is not None, reason=f"no compiled kernels: {native.PROBLEM}")
@pytest.mark.parametrize("name", sorted(jit.IMPLEMENTATIONS))
def test_both_namespaces_declare_the_same(name: str) -> None:
    """One call serves both: arguments and results of ``gi::name`` and ``gi_triton::name`` agree."""
    compiled = getattr(torch.ops.gi, name).default._schema
    ours = getattr(torch.ops.gi_triton, name).default._schema
    assert str(ours) == str(compiled).replace("gi::", "gi_triton::")


def test_too_wide_a_head_is_refused_with_the_reason(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "_refusal_on", lambda *_: None)
    query = torch.randn(1, 1, 2, 300)
    refused = gi_kernels.explain("global_attention", query, query, query).refused
    assert refused["triton"] == "heads of at most 256 numbers fit a block, these have 300"


@pytest.mark.skipif(jit.PROBLEM is not None, reason=str(jit.PROBLEM))
def test_every_declared_kernel_exists() -> None:
    import importlib

    for name in jit.IMPLEMENTATIONS:
        folder = name.removesuffix("_backward").removesuffix("_on_demand")
        assert hasattr(importlib.import_module(f"gi_kernels.ops.{folder}.triton"), name), name


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    package = str(Path(gi_kernels.__file__).parents[1])
    path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH")) if p)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
