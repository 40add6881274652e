"""Every invalid call of the specs raises its error, before any kernel starts."""

from __future__ import annotations

import pytest
import torch
from cases import SPECS, backends
from torch.utils._python_dispatch import TorchDispatchMode

import gi_kernels
from gi_kernels import dispatch

CALLS = [
    pytest.param(spec, invalid, backend, id=f"{spec.name}-{invalid.name}-{backend}")
    for spec in SPECS.values()
    for invalid in spec.invalid
    for backend in backends(spec, spec.of_size("small")[0])
]


@pytest.mark.parametrize(("spec", "invalid", "backend"), CALLS)
def test_invalid_call(spec, invalid, backend, monkeypatch) -> None:
    arguments = invalid.change(spec.of_size("small")[0].make(torch.float32))

    def started(*_):
        raise AssertionError("the call was dispatched before its arguments were checked")

    monkeypatch.setattr(dispatch, "run", started)
    with (
        gi_kernels.backend(backend),
        NoProducts(),
        pytest.raises(invalid.error, match=invalid.message) as caught,
    ):
        spec.function(**arguments)
    assert type(caught.value) is invalid.error


class NoProducts(TorchDispatchMode):
    """Fails where a matrix product starts: work that checks have no need of."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("mm", "bmm", "addmm", "baddbmm"), func
        return func(*args, **(kwargs or {}))
