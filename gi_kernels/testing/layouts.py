"""The same numbers in other memory layouts."""

from __future__ import annotations

from collections.abc import Callable

import torch


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Row-major."""
    return tensor.contiguous()


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """Dimension -3 innermost: channels-last for maps [B,C,H,W] and stacks of maps [B,T,C,H,W]."""
    if tensor.dim() < 3:
        return tensor.contiguous()
    return tensor.movedim(-3, -1).contiguous().movedim(-1, -3)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Dimensions 1 and 2 swapped in memory, as after splitting heads off a linear layer."""
    if tensor.dim() < 3:
        return tensor.contiguous()
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(tensor: torch.Tensor) -> torch.Tensor:
    """A window of a larger tensor: an odd storage offset, gaps in every dimension, NaN around."""
    larger = tensor.new_full([size + 3 for size in tensor.shape], float("nan"))
    window = larger[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return window.copy_(tensor)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Every second element of the last dimension of a larger tensor, NaN between."""
    larger = tensor.new_full([*tensor.shape[:-1], 2 * tensor.shape[-1] + 1], float("nan"))
    window = larger[..., 1::2]
    return window.copy_(tensor)


def expanded_batch(tensor: torch.Tensor) -> torch.Tensor:
    """The first item of dimension 0 throughout, with stride 0."""
    return tensor[:1].clone().expand(tensor.shape) if tensor.shape[0] else tensor


def expanded_map(tensor: torch.Tensor) -> torch.Tensor:
    """The first element of each trailing map throughout, with stride 0 in the last two dimensions."""
    if tensor.dim() < 2 or tensor.numel() == 0:
        return tensor
    return tensor[..., :1, :1].clone().expand(tensor.shape)


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    """One element throughout, with stride 0: what a sum's backward pass hands down."""
    return (
        tensor.flatten()[:1].clone().view([1] * tensor.dim()).expand(tensor.shape)
        if tensor.numel()
        else tensor
    )


#: By name. The expanded ones change the numbers, the others keep them.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    f.__name__: f
    for f in (
        contiguous,
        channels_last,
        transposed,
        sliced,
        strided,
        expanded_batch,
        expanded_map,
        expanded,
    )
}
