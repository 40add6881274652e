"""Correlation of pairs in both directions."""

from __future__ import annotations

import pytest
import torch

import gi_kernels.ops.correlation_lookup as operator
from gi_kernels import CorrelationPyramid


def features(seed: int, height: int = 9, width: int = 7, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 16, height, width, generator=generator).to(dtype)


def coords(batch: int = 4, height: int = 9, width: int = 7) -> torch.Tensor:
    return torch.rand(batch, 2, height, width, generator=torch.Generator().manual_seed(3)) * 10 - 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["dense", "on_demand"])
def test_both_ways_is_a_batch_of_pairs_and_swapped_pairs(mode, dtype):
    a, b = features(1, dtype=dtype), features(2, dtype=dtype)
    both = CorrelationPyramid.both_ways(a, b, 4, 3, mode)
    plain = CorrelationPyramid(torch.cat([a, b]), torch.cat([b, a]), 4, 3, mode)
    assert both.mode == plain.mode == mode
    found, expected = both.lookup(coords()), plain.lookup(coords())
    assert found.shape == expected.shape and found.dtype == dtype
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_swapped_volumes_are_transposed():
    a, b = features(1), features(2)
    given, swapped = CorrelationPyramid.both_ways(a, b, mode="dense").pyramid[0].flatten(2).chunk(2)
    assert torch.equal(swapped, given.transpose(1, 2))


def test_gradients_reach_both_feature_maps():
    a, b = (features(seed, dtype=torch.float64).requires_grad_() for seed in (1, 2))
    found = torch.autograd.grad(CorrelationPyramid.both_ways(a, b).lookup(coords()).square().sum(), (a, b))
    plain = CorrelationPyramid(torch.cat([a, b]), torch.cat([b, a])).lookup(coords())
    for got, expected in zip(found, torch.autograd.grad(plain.square().sum(), (a, b)), strict=True):
        torch.testing.assert_close(got, expected)


def test_auto_counts_both_directions(monkeypatch):
    a, b = features(1), features(2)
    one_way = 2 * 63 * 63 * 4 // 3 * 4  # bytes
    monkeypatch.setattr(operator, "DENSE_LIMIT", one_way)
    assert CorrelationPyramid(a, b).mode == "dense"
    assert CorrelationPyramid.both_ways(a, b).mode == "on_demand"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features2": features(2, 8)}, ValueError, "features2: expected size 9"),
        ({"features2": features(2).double()}, TypeError, "features2: expected dtype torch.float32"),
        ({"features1": None}, TypeError, "features1: .*NoneType"),
        ({"levels": 0}, ValueError, "levels: expected at least 1, got 0"),
        ({"radius": 0}, ValueError, "radius: expected at least 1, got 0"),
        ({"mode": "sparse"}, ValueError, "mode: expected 'auto', 'dense' or 'on_demand', got 'sparse'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        CorrelationPyramid.both_ways(**{"features1": features(1), "features2": features(2)} | change)
