"""torch.compile, opcheck and gradcheck."""

from __future__ import annotations

import pytest
import torch
from cases import Case, cases, first
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

import gi_kernels
from gi_kernels import jit
from gi_kernels.spec import Sample
from gi_kernels.testing.calls import Outcome, evaluate, map_tensors
from gi_kernels.testing.layouts import channels_last


def typical_modes(spec) -> list[Sample]:
    """One sample, or one per way in which the operator is served."""
    small = first(99)(spec)
    return list({s.served_by: s for s in reversed(small)}.values())


@cases(typical_modes)
def test_full_graph(case: Case) -> None:
    """One graph, forward and backward, equal to eager; a second call needs no other."""
    arguments = case.sample.make(torch.float32)
    expected = case.run(arguments)
    compiled = _compiled(case, backend="aot_eager")
    _assert_close(_run(case, compiled, arguments), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        _assert_close(_run(case, compiled, arguments), expected)


@cases(typical_modes, compiled_only=True)
def test_full_graph_with_changing_sizes(case: Case) -> None:
    """With ``dynamic=True``, other samples of the operator run through the same compiled function."""
    compiled = _compiled(case, backend="aot_eager", dynamic=True)
    others = [s for s in first(3)(case.spec) if s.served_by == case.sample.served_by]
    for sample in [case.sample, *others]:
        arguments = sample.make(torch.float32)
        _assert_close(_run(case, compiled, arguments), case.run(arguments))


@cases(typical_modes, compiled_only=True)
def test_full_graph_in_other_layouts_and_dtypes(case: Case) -> None:
    """The fake kernels tell the strides and dtypes that the kernels give."""
    for dtype in (torch.float32, torch.bfloat16):
        arguments = map_tensors(lambda _, t: channels_last(t), case.sample.make(dtype))
        torch._dynamo.reset()
        value = _run(case, _compiled(case, backend="aot_eager"), arguments)
        expected = case.run(arguments)
        _assert_close(value, expected)
        assert value.value.stride() == expected.value.stride()


@cases(typical_modes, compiled_only=True)
def test_inductor(case: Case) -> None:
    """The default compiler, with element-wise work around the operator for it to fuse."""

    def function(**arguments):
        return case.spec.function(**arguments) * 2 + 1

    arguments = case.sample.make(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    with gi_kernels.backend(case.backend):
        expected = evaluate(function, arguments, case.differentiable)
        _assert_close(evaluate(compiled, arguments, case.differentiable), expected)


@cases(typical_modes, compiled_only=True)
def test_compiled_under_autocast(case: Case) -> None:
    arguments = case.sample.make(torch.float32)

    def function(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return case.spec.function(**arguments)

    torch._dynamo.reset()
    with gi_kernels.backend(case.backend):
        expected = evaluate(function, arguments, case.differentiable)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        actual = evaluate(compiled, arguments, case.differentiable)
    assert actual.value.dtype == expected.value.dtype
    _assert_close(actual, expected)


@cases(lambda spec: {s.name: s for s in [*first(2)(spec), *typical_modes(spec)]}.values(), compiled_only=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(case: Case, layout: str) -> None:
    """Schema, fake kernel and autograd of every operator of this package that the call goes through."""
    arguments = case.sample.make(torch.float32)
    if layout == "channels_last":
        arguments = map_tensors(lambda _, t: channels_last(t), arguments)
    recorder = Recorder()
    with recorder:
        case.run(arguments)
    if (case.spec.name, case.backend) == ("pixel_projection", "triton"):
        pytest.skip("PyTorch's own product serves it")
    assert recorder.calls, "the call went through no compiled operator"
    for op, args, kwargs in recorder.calls:
        differentiable = bool(case.differentiable) and not op._opname.endswith("_backward")
        library.opcheck(op, _fresh(args, differentiable), _fresh(kwargs, differentiable))


@cases(
    lambda spec: {s.name: s for s in [*first(3)(spec), *typical_modes(spec)]}.values(),
    where=lambda s: s.differentiable,
)
def test_gradcheck(case: Case) -> None:
    """Gradients against finite differences in float64; undefined incoming gradients too."""
    arguments = case.sample.make(torch.float64)
    names, leaves = [], []

    def track(path: str, tensor: torch.Tensor) -> torch.Tensor:
        if path.split("/")[0] in case.differentiable:
            names.append(path)
            leaves.append(tensor.requires_grad_())
        return tensor

    map_tensors(track, arguments)

    def function(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return case.spec.function(**map_tensors(lambda path, t: given.get(path, t), arguments))

    with gi_kernels.backend(case.backend):
        # A step of 1e-7 keeps positions off the integers, where the derivative jumps.
        assert torch.autograd.gradcheck(function, leaves, eps=1e-7, atol=1e-5, fast_mode=True)


class Recorder(TorchDispatchMode):
    """Records the calls of this package's operators, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("gi", jit.NAMESPACE):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _compiled(case: Case, **options):
    torch._dynamo.reset()
    return torch.compile(case.spec.function, fullgraph=True, **options)


def _run(case: Case, function, arguments: dict) -> Outcome:
    with gi_kernels.backend(case.backend):
        return evaluate(function, arguments, case.differentiable)


def _assert_close(actual: Outcome, expected: Outcome) -> None:
    """Equal but for the order of sums, which a compiler may change."""
    for (name, got), (_, wanted) in zip(actual.items(), expected.items(), strict=True):
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(got, wanted, msg=message)


def _fresh(value, differentiable: bool):
    """A detached copy with the same strides; floating tensors ask for a gradient if told so."""
    if isinstance(value, torch.Tensor):
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value.detach())
        return copy.detach().requires_grad_(differentiable and value.is_floating_point())
    if isinstance(value, list | tuple):
        return type(value)(_fresh(v, differentiable) for v in value)
    if isinstance(value, dict):
        return {k: _fresh(v, differentiable) for k, v in value.items()}
    return value
