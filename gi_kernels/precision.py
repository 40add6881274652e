"""The dtype rules that all operators share."""

from __future__ import annotations

import torch

from gi_kernels.checks import floating


def accumulation_dtype(storage: torch.dtype) -> torch.dtype:
    """Dtype of coordinates, softmax statistics and sums for tensors stored as ``storage``."""
    return torch.float64 if storage == torch.float64 else torch.float32


def autocast(**tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast, the named tensors in its dtype (float64 is left alone); else as they are.

    Applied to arguments that carry features. Flows, errors and coordinates are never passed here:
    they stay float32.

    Raises:
        TypeError: an argument is not a floating tensor.
    """
    for name, tensor in tensors.items():
        floating(name, tensor)
    values = tuple(tensors.values())
    device = values[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return values
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in values)
