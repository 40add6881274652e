"""Any strides, for arguments and for incoming gradients."""

from __future__ import annotations

import pytest
import torch
from cases import Case, cases

from gi_kernels.testing.calls import evaluate, map_tensors
from gi_kernels.testing.layouts import LAYOUTS, channels_last, sliced, strided

NAMES = [name for name in LAYOUTS if name != "contiguous"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@cases()
@DTYPES
@pytest.mark.parametrize("layout", NAMES)
def test_arguments(case: Case, dtype: torch.dtype, layout: str) -> None:
    arguments = map_tensors(lambda _, t: LAYOUTS[layout](t), case.sample.make(dtype))
    equal = "expanded" in layout
    case.check(arguments, independent=not equal, cancelling=equal)


@cases(where=lambda spec: bool(spec.differentiable))
@DTYPES
@pytest.mark.parametrize("layout", NAMES)
def test_incoming_gradient(case: Case, dtype: torch.dtype, layout: str) -> None:
    equal = "expanded" in layout
    case.check(case.sample.make(dtype), independent=not equal, cancelling=equal, arrange=LAYOUTS[layout])


@cases(where=lambda spec: bool(spec.differentiable))
@DTYPES
def test_channels_last_arguments_with_another_gradient(case: Case, dtype: torch.dtype) -> None:
    """The fast path of the forward pass meets gradients in any layout."""
    arguments = map_tensors(lambda _, t: channels_last(t), case.sample.make(dtype))
    for arrange in (channels_last, sliced, strided):
        case.check(arguments, arrange=arrange)


@cases()
def test_one_argument_in_another_layout(case: Case) -> None:
    """Arguments do not have to agree in layout."""
    arguments = case.sample.make(torch.float32)
    for name in arguments:
        mixed = map_tensors(lambda path, t: _arrange(path, name, t), arguments)  # noqa: B023
        case.check(mixed)


def _arrange(path: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    return channels_last(tensor) if path.split("/")[0] == name else sliced(tensor)


@pytest.mark.parametrize("name", NAMES)
def test_layouts_are_what_they_say(name: str) -> None:
    tensor = torch.randn(2, 3, 4, 5)
    other = LAYOUTS[name](tensor)
    assert other.shape == tensor.shape
    assert not other.is_contiguous()
    if not name.startswith("expanded"):
        assert torch.equal(other, tensor)
    else:
        assert 0 in other.stride()
    assert evaluate(torch.neg, {"input": other}, ["input"]).gradients["input"].shape == tensor.shape
