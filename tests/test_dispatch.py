"""Which backend runs, and why: backend(), explain(), available_backends(), GI_KERNELS_BACKEND."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import gi_kernels
from gi_kernels import dispatch, native

INPUT, FLOW = torch.randn(1, 3, 4, 5), torch.randn(1, 2, 4, 5)


@pytest.fixture
def recorded(monkeypatch):
    """An operator ``probe`` with two backends that both run here; returns what ran."""
    ran: list[str] = []

    def implementation(name):
        def run(tensor):
            ran.append(name)
            return tensor + {"cpp": 1, "reference": 2}[name]

        return run

    operators = dict(dispatch.OPERATORS)
    monkeypatch.setattr(dispatch, "OPERATORS", operators)
    monkeypatch.setattr(native, "PROBLEM", None)
    operator = dispatch.Operator("probe", {name: implementation(name) for name in ("cpp", "reference")})
    return operator, ran


def test_auto_takes_the_best(recorded) -> None:
    operator, ran = recorded
    dispatch.run(operator, torch.zeros(2))
    assert ran == ["cpp"]
    assert gi_kernels.available_backends("probe") == ["cpp", "reference"]


def test_an_explicit_choice_runs(recorded) -> None:
    operator, ran = recorded
    for name in ("reference", "cpp", "auto"):
        with gi_kernels.backend(name):
            dispatch.run(operator, torch.zeros(2))
    assert ran == ["reference", "cpp", "cpp"]


def test_nesting_and_exceptions_restore(recorded) -> None:
    operator, ran = recorded
    with gi_kernels.backend("reference"):
        with pytest.raises(KeyError), gi_kernels.backend("auto"):
            dispatch.run(operator, torch.zeros(2))
            raise KeyError
        dispatch.run(operator, torch.zeros(2))
    dispatch.run(operator, torch.zeros(2))
    assert ran == ["cpp", "reference", "cpp"]


def test_overlapping_contexts_in_threads_leave_nothing_behind() -> None:
    barrier = Barrier(2)

    def work(name: str) -> None:
        for _ in range(50):
            with gi_kernels.backend(name):
                barrier.wait(timeout=30)

    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(work, "reference"), pool.submit(work, "auto")]:
            job.result()
    assert dispatch._overrides == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cuda", "cuda kernels run on a CUDA device, the tensors are on cpu"),
        ("triton", "triton kernels run on a CUDA device, the tensors are on cpu"),
    ],
)
def test_an_explicit_choice_that_cannot_run_raises_the_reason(name: str, reason: str) -> None:
    with gi_kernels.backend(name), pytest.raises(RuntimeError, match=f"flow_warp: .*'{name}'.*{reason}"):
        gi_kernels.flow_warp(INPUT, FLOW)


def test_kernels_that_were_not_built(monkeypatch) -> None:
    """Automatic choice falls back in silence; an explicit one, and explain, say what is wrong."""
    monkeypatch.setattr(native, "PROBLEM", "no compiler was found")
    assert torch.equal(gi_kernels.flow_warp(INPUT, FLOW), _by_reference())
    assert gi_kernels.available_backends("flow_warp") == ["reference"]
    assert gi_kernels.explain("flow_warp", INPUT, FLOW).refused["cpp"] == "no compiler was found"
    with gi_kernels.backend("cpp"), pytest.raises(RuntimeError, match="no compiler was found"):
        gi_kernels.flow_warp(INPUT, FLOW)


@pytest.mark.parametrize("name", ["", "CPP", "numpy", None])
def test_unknown_backend(name) -> None:
    with (
        pytest.raises(ValueError, match=r"backend: expected auto, .*reference, got"),
        gi_kernels.backend(name),
    ):
        pass


@pytest.mark.parametrize("op", ["warp", "", lambda x: x])
def test_unknown_operator(op) -> None:
    for ask in (gi_kernels.explain, gi_kernels.available_backends):
        with pytest.raises(ValueError, match=r"op: expected one of .*flow_warp.*, got"):
            ask(op)


def test_explain_names_every_backend(recorded) -> None:
    explanation = gi_kernels.explain("probe", torch.zeros(2))
    assert explanation.chosen == "cpp"
    assert explanation.refused["reference"] == "cpp is preferred"
    assert {explanation.chosen, *explanation.refused} == set(dispatch.BACKENDS)
    assert str(explanation).startswith("probe: cpp\n  not cuda: cuda kernels run on a CUDA device")


def test_explain_under_a_choice(recorded) -> None:
    with gi_kernels.backend("reference"):
        explanation = gi_kernels.explain("probe", torch.zeros(2))
    assert (explanation.chosen, explanation.refused["cpp"]) == ("reference", "reference was asked for")
    with gi_kernels.backend("cuda"):
        explanation = gi_kernels.explain("probe", torch.zeros(2))
    assert explanation.chosen == "none (cuda kernels run on a CUDA device, the tensors are on cpu)"


def test_explain_by_function_and_device() -> None:
    by_function = gi_kernels.explain(gi_kernels.flow_warp, INPUT, flow=FLOW)
    assert by_function == gi_kernels.explain("flow_warp", INPUT, FLOW)
    assert by_function.chosen == gi_kernels.available_backends(gi_kernels.flow_warp)[0]
    elsewhere = gi_kernels.explain("flow_warp", INPUT.to("meta"), FLOW.to("meta"))
    assert elsewhere.chosen == "reference"
    assert elsewhere.refused["cpp"] == "the C++ kernels run on the CPU, the tensors are on meta"


def test_explain_agrees_with_what_runs() -> None:
    """For each public operator and each choice: a refusal in explain is a refusal of the call."""
    from gi_kernels.spec import all_specs

    for name, spec in all_specs().items():
        arguments = spec.of_size("small")[0].make(torch.float32)
        for choice in dispatch.BACKENDS:
            with gi_kernels.backend(choice):
                explanation = gi_kernels.explain(name, *arguments.values())
                if explanation.chosen == choice:
                    spec.function(**arguments)
                else:
                    with pytest.raises(RuntimeError, match="cannot run"):
                        spec.function(**arguments)


@pytest.mark.parametrize("choice", ["reference", "auto"])
def test_environment_variable(choice: str) -> None:
    code = (
        "import torch, gi_kernels\n"
        "e = gi_kernels.explain('flow_warp', torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2, 2))\n"
        "with gi_kernels.backend('reference'):\n"
        "    inner = gi_kernels.explain('flow_warp', torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2, 2))\n"
        "print(e.chosen, inner.chosen)"
    )
    done = _python(code, GI_KERNELS_BACKEND=choice)
    best = "reference" if choice == "reference" else gi_kernels.available_backends("flow_warp")[0]
    assert done.stdout.split() == [best, "reference"], done.stderr


def test_environment_variable_with_an_unknown_name() -> None:
    done = _python("import gi_kernels", GI_KERNELS_BACKEND="fast")
    assert done.returncode != 0
    assert "GI_KERNELS_BACKEND: expected auto, " in done.stderr and "got 'fast'" in done.stderr


def test_a_changed_choice_is_traced_again() -> None:
    """Compiled code does not keep the backend of its first call."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(gi_kernels.flow_warp, backend=counter, fullgraph=True)
    compiled(INPUT, FLOW)
    compiled(INPUT, FLOW)
    assert counter.frame_count == 1
    with gi_kernels.backend("reference"):
        assert torch.allclose(compiled(INPUT, FLOW), _by_reference())
        assert counter.frame_count == 2
        compiled(INPUT, FLOW)
        assert counter.frame_count == 2
    compiled(INPUT, FLOW)
    assert counter.frame_count == 2
    with gi_kernels.backend("cuda"), pytest.raises(Exception, match="cannot run: cuda kernels run on"):
        compiled(INPUT, FLOW)


def test_a_choice_inside_compiled_code() -> None:
    torch._dynamo.reset()

    def function(input, flow):
        with gi_kernels.backend("reference"):
            return gi_kernels.flow_warp(input, flow)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.allclose(compiled(INPUT, FLOW), _by_reference())
    assert dispatch._overrides == []


def test_the_reference_is_rounded_once() -> None:
    """In low precision the definition runs in float32 and its result takes the storage dtype."""
    input = INPUT.bfloat16()
    with gi_kernels.backend("reference"):
        value = gi_kernels.flow_warp(input, FLOW)
        expected = gi_kernels.flow_warp(input.float(), FLOW).bfloat16()
    assert value.dtype == torch.bfloat16
    assert torch.equal(value, expected)


@pytest.mark.skipif(native.PROBLEM is not None, reason=f"no compiled kernels: {native.PROBLEM}")
def test_the_variant_that_was_asked_for_runs() -> None:
    """GI_KERNELS_CPU_CAPABILITY chooses the instruction set, where this machine has it."""
    from gi_kernels import _C

    wanted = os.environ.get("GI_KERNELS_CPU_CAPABILITY")
    assert wanted is None or _C.cpu_capability() == wanted
    variants = native.RECEIPT["variants"].split(", ")  # from the oldest on
    for variant in variants[: variants.index(_C.cpu_capability()) + 1]:
        done = _python(
            "from gi_kernels import _C; print(_C.cpu_capability())", GI_KERNELS_CPU_CAPABILITY=variant
        )
        assert done.stdout.split() == [variant], done.stderr


def _by_reference() -> torch.Tensor:
    with gi_kernels.backend("reference"):
        return gi_kernels.flow_warp(INPUT, FLOW)


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    package = str(Path(gi_kernels.__file__).parents[1])  # the one under test, installed or not
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": package} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
