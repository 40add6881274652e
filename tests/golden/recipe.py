"""Inputs and weights of the golden tensors: each is a function of its name and shape.

A tensor's values come from torch's CPU generator, seeded with the CRC-32 of the name. The file
``operators.safetensors`` holds only what the published implementation made of them, as do
``generators.safetensors``, ``raft.safetensors`` and ``discriminator.npz``, and
``train_grad_norms.json`` the norms of its gradients.
"""

from __future__ import annotations

import zlib

import torch


def normal(name: str, *shape: int) -> torch.Tensor:
    """Standard normal tensor that belongs to ``name``."""
    return torch.randn(shape, generator=_generator(name))


def uniform(name: str, *shape: int) -> torch.Tensor:
    """Uniform [0, 1) tensor that belongs to ``name``."""
    return torch.rand(shape, generator=_generator(name))


def fill(module: torch.nn.Module, prefix: str) -> None:
    """Give every parameter and buffer of ``module`` the value that belongs to ``prefix`` + its key."""
    module.load_state_dict(weights(module.state_dict(), prefix))


def weights(like: dict[str, torch.Tensor], prefix: str, gain: float = 1.0) -> dict[str, torch.Tensor]:
    """A state dict of the shapes of ``like``, each entry the value that belongs to ``prefix`` + its key."""
    return {key: weight(prefix + key, value, gain) for key, value in like.items()}


def weight(name: str, like: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """The value, of the shape of ``like``, of the state-dict entry ``name``; counters are zero."""
    if not like.is_floating_point():
        return torch.zeros_like(like)
    value = normal(name, *like.shape)
    if name.endswith("running_var"):
        return value.abs() / 2 + 0.5
    if name.endswith(("running_mean", "bias")):
        return value * 0.1
    if like.dim() == 1:  # every one-dimensional weight is a norm's
        return 1 + 0.1 * value
    return gain * value / (like.numel() // like.shape[0]) ** 0.5


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) % 2**31)
