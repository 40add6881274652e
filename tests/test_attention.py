"""``global_attention`` where sums cancel, vanish or round alike: what the contract suite rarely meets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import gi_kernels
from gi_kernels import global_attention
from gi_kernels.ops.global_attention import reference
from gi_kernels.testing.errors import growth, largest_error, root_mean_square

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True, params=gi_kernels.available_backends("global_attention"))
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test on every backend that runs here."""
    with gi_kernels.backend(request.param):
        yield


@LOW
def test_gradients_with_equal_values(dtype: torch.dtype) -> None:
    """All weight on values that agree: the scores' gradients are small differences of large numbers.

    Rounding the output moves all its channels the same way, so a difference from the rounded output
    would be wrong altogether.
    """
    torch.manual_seed(0)
    query, key, other_value = (torch.randn(1, 2, n, 32) for n in (16, 20, 1))
    query = query.abs()
    other_key = torch.full((1, 2, 1, 32), -0.5)  # has about a hundredth of the weight
    value = torch.full((1, 2, 20, 32), -2.046)
    grad = torch.ones(1, 2, 16, 32).to(dtype)
    tensors = [t.to(dtype) for t in (query, key, other_key, value, other_value)]
    _check_gradients(tensors, grad)


@LOW
def test_rounding_keeps_the_size_of_gradients(dtype: torch.dtype) -> None:
    """An error of a weight moves all channels of a gradient alike: many such must not add up.

    Over many draws the mean error away from zero is of the size of its standard error.
    """
    sizes = []
    for seed in range(16):
        torch.manual_seed(seed)
        tensors = [torch.randn(1, 1, n, 130).to(dtype) for n in (35, 31, 9, 31, 9)]
        grad = torch.randn(1, 1, 35, 130).to(dtype)
        found = zip(_gradients(global_attention, tensors, grad), _expected(tensors, grad), strict=True)
        sizes.append([growth(actual, wanted) for actual, wanted in found])
    for of_one_argument in torch.tensor(sizes).unbind(1):
        assert root_mean_square(of_one_argument) < 2, of_one_argument


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiny_gradients(dtype: torch.dtype) -> None:
    """Squares of the scores' gradients are too small for float32."""
    torch.manual_seed(0)
    _check_gradients(
        [torch.randn(1, 2, n, 16).to(dtype) for n in (9, 7, 4, 7, 4)], torch.randn(1, 2, 9, 16) * 1e-25
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_far_below_zero(dtype: torch.dtype) -> None:
    """Beyond the last key, where memory holds zeros, is no weight: it would be infinite."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 16) for n in (9, 7, 7))
    key -= 6
    tensors = [query + 6, key[:, :, :3], key[:, :, 3:], value[:, :, :3], value[:, :, 3:]]
    _check_gradients([t.to(dtype) for t in tensors], torch.randn(1, 2, 9, 16), smallest=1e-4)


def _attend(function, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Of a query, two segments of keys and two of values."""
    query, *rest = tensors
    return function(query, rest[:2], rest[2:])


def _gradients(function, tensors: list[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = _attend(function, tensors)
    return torch.autograd.grad(out, tensors, grad.to(out.dtype))


def _expected(tensors: list[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _gradients(reference.global_attention, [t.double() for t in tensors], grad.to(tensors[0].dtype))


def _check_gradients(tensors: list[torch.Tensor], grad: torch.Tensor, smallest: float = 1e-5) -> None:
    """Off by no more than two units in the last place of the largest number, or by ``smallest`` of it."""
    allowed = max(2 * torch.finfo(tensors[0].dtype).eps, smallest)
    found = zip(_gradients(global_attention, tensors, grad), _expected(tensors, grad), strict=True)
    for actual, wanted in found:
        assert largest_error(actual, wanted) < allowed * wanted.abs().max().item()
