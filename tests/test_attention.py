"""``global_attention`` where sums cancel: what the contract suite's random numbers rarely meet."""

from __future__ import annotations

import pytest
import torch

from gi_kernels import global_attention
from gi_kernels.ops.global_attention import reference
from gi_kernels.testing.errors import largest_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
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
    tensors = [t.to(dtype).requires_grad_() for t in (query, key, other_key, value, other_value)]

    def gradients(function, tensors):
        query, *rest = tensors
        out = function(query, rest[:2], rest[2:])
        return torch.autograd.grad(out, tensors, grad.to(out.dtype))

    expected = gradients(reference.global_attention, [t.detach().double().requires_grad_() for t in tensors])
    for actual, wanted in zip(gradients(global_attention, tensors), expected, strict=True):
        assert largest_error(actual, wanted) < 2 * torch.finfo(dtype).eps * wanted.abs().max().item()
