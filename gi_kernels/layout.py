"""Memory layouts of the layers' maps, and copies of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gi_kernels import native


def relayout(x: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """``x.contiguous(memory_format=...)`` of a map [N,C,H,W], on the CPU ten times faster than PyTorch's."""
    if x.is_contiguous(memory_format=memory_format):
        return x
    if native.PROBLEM is not None or x.device.type != "cpu" or not x.is_floating_point():
        return x.contiguous(memory_format=memory_format)
    return torch.ops.gi.relayout(x, memory_format == torch.channels_last)


def reflect_pad(x: torch.Tensor, margin: int) -> torch.Tensor:
    """``x`` [N,C,H,W] with ``margin`` pixels around it by reflection, in its layout.

    As ``F.pad`` does it; channels-last on the CPU three times faster, and without derivative there.
    """
    served = native.PROBLEM is None and x.device.type == "cpu" and is_channels_last(x)
    return torch.ops.gi.reflect_pad(x, margin) if served else F.pad(x, (margin,) * 4, mode="reflect")


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether ``x`` is channels-last and not contiguous as well, as maps of one channel or pixel are."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _fake(x, channels_last):
    return torch.empty_like(
        x, memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def _setup_context(ctx, inputs, output):
    ctx.channels_last = is_channels_last(inputs[0])


def _backward(ops, ctx, grad):
    return ops.relayout(grad, ctx.channels_last), None


def _fake_pad(x, margin):
    N, C, H, W = x.shape
    return x.new_empty(N, H + 2 * margin, W + 2 * margin, C).permute(0, 3, 1, 2)


native.register("reflect_pad", _fake_pad)
native.register("relayout", _fake, _setup_context, _backward)
