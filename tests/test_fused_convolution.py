"""The object of a fused convolution: made once, called often; and where a caller should take it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from gi_kernels import FusedConvolution, backend, native

built = pytest.mark.skipif(native.PROBLEM is not None, reason=f"no kernels: {native.PROBLEM}")


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(memory_format=torch.channels_last)


def test_one_object_serves_many_calls():
    torch.manual_seed(0)
    weight, bias = torch.randn(40, 12, 3, 3), torch.randn(40)
    convolve = FusedConvolution(weight, bias)
    for size in ((9, 7), (4, 12)):
        a, b, addend = channels_last(2, 5, *size), channels_last(2, 7, *size), channels_last(2, 40, *size)
        plain = F.conv2d(torch.cat([a, b], dim=1), weight, bias, padding=1)
        torch.testing.assert_close(convolve(a, b), plain, atol=1e-4, rtol=0)
        found = convolve(a, b, addend=addend, activation="relu")
        torch.testing.assert_close(found, F.relu(plain + addend), atol=1e-4, rtol=0)
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_compute_the_same(duplicate):
    convolve, x = FusedConvolution(torch.randn(8, 8, 1, 5), padding="reflect"), torch.randn(1, 8, 4, 6)
    assert torch.equal(duplicate(convolve)(x), convolve(x))


@built
def test_parts_of_a_map_are_read_where_they_are():
    whole, convolve = channels_last(2, 48, 6, 5), FusedConvolution(torch.randn(16, 32, 3, 3))
    part = whole[:, 16:]
    assert torch.equal(convolve(part), convolve(part.clone(memory_format=torch.channels_last)))
    assert torch.equal(convolve(whole[:, 16:32], whole[:, 32:]), convolve(part))


@built
def test_gradients_are_refused_and_not_forgotten():
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    out = FusedConvolution(weight)(torch.randn(1, 3, 4, 4))
    with pytest.raises(NotImplementedError, match="backend\\('reference'\\)"):
        out.sum().backward()
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="fused_convolution has no derivative"):
        FusedConvolution(weight.detach())(x).sum().backward()
    with backend("reference"):
        FusedConvolution(weight)(x).sum().backward()
    assert weight.grad is not None and x.grad is not None


@built
def test_a_weight_cast_in_place_is_noticed():
    """What was made of a weight does not fit it any more: an error, not numbers beyond the memory's end."""
    layer = torch.nn.Conv2d(8, 8, 3)
    convolve = FusedConvolution(layer.weight)
    layer.double()
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"packed: expected 9248 numbers.*got 9248 of Float"),
    ):
        convolve(torch.randn(1, 8, 4, 4, dtype=torch.float64))


@built
def test_where_it_pays():
    pays = FusedConvolution.pays
    assert pays(torch.empty(64, 64, 3, 3)) and pays(torch.empty(128, 256, 5, 1))
    assert not pays(torch.empty(64, 64, 7, 7)) and not pays(torch.empty(64, 64, 1, 1))
    assert not pays(torch.empty(2, 256, 3, 3)), "few outputs: the transforms take longer than the products"
    assert not pays(torch.empty(64, 64, 3, 3, device="meta"))
