"""Gradients of the layers in training, batches of one included, against finite differences."""

from __future__ import annotations

import pytest
import torch

from gi_kernels import nn


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=["even", "resized"])
@pytest.mark.parametrize("batch", [1, 2])
def test_write_in_training(batch: int, size: tuple[int, int], memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    layer = nn.WindowWrite(4, 2, 4).double()
    features = torch.randn(batch, 4, *size, dtype=torch.float64).contiguous(memory_format=memory_format)
    latents = torch.randn(batch, 4, 4, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def call(features: torch.Tensor, latents: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, named, (features, latents))

    inputs = [t.detach().requires_grad_() for t in (features, latents, *parameters.values())]
    assert torch.autograd.gradcheck(call, inputs, atol=1e-6, fast_mode=True)
