"""Batch norm by the statistics of its input, and the ReLU that follows it, in one.

PyTorch's batch norm of channels-last maps sums up in a way that loses digits; this one does not. For the
gradient only the input is kept: what the ReLU let through is computed again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels import native
from gi_kernels.precision import accumulation_dtype


def batch_norm(x: torch.Tensor, norm: nn.Module, relu: bool = False) -> torch.Tensor:
    """``norm(x)`` of a map [B,C,H,W], through a ReLU if ``relu``, in the layout of ``x``.

    A plain ``nn.BatchNorm2d`` in training mode runs on the kernel on the CPU, in float32, float64, bfloat16
    and float16 (sums in float32, float64 for float64); it updates its running statistics, and is
    differentiable once in ``x``, weight and bias. Any other module is called.

    Raises:
        ValueError: no more than one number per channel to take statistics of.
    """
    if not _runs_on_kernel(x, norm):
        y = norm(x)
        return F.relu(y, inplace=True) if relu else y
    assert isinstance(norm, nn.BatchNorm2d)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if count < 2:
        raise ValueError(f"x: expected more than one pixel in the batch when training, got {count}")
    dtype = accumulation_dtype(x.dtype)
    weight, bias = (p.to(dtype) for p in (norm.weight, norm.bias))
    y, mean, variance = torch.ops.gi.batch_norm(x, weight, bias, norm.eps, relu)
    track(norm, mean, variance, count)
    return y


@torch.no_grad()
def track(norm: nn.BatchNorm2d, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
    """Let a batch norm's running statistics follow those of ``count`` numbers per channel."""
    if not norm.track_running_stats or norm.running_mean is None:
        return
    assert norm.running_var is not None and norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked.double()
    for running, new in ((norm.running_mean, mean), (norm.running_var, variance * (count / (count - 1)))):
        running.copy_(running + (new.to(running.dtype) - running) * share)


def _runs_on_kernel(x: torch.Tensor, norm: nn.Module) -> bool:
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and native.PROBLEM is None
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.is_floating_point()
    )


def _fake(x, weight, bias, eps, relu):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _fake_backward(grad, x, weight, bias, mean, variance, eps, relu):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.eps, ctx.relu = inputs
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.save_for_backward(x, weight, bias, mean, variance)


def _backward(ops, ctx, grad, *_):
    gradients = ops.batch_norm_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.relu)
    return *gradients, None, None


native.register("batch_norm", _fake, _setup_context, _backward)
native.register("batch_norm_backward", _fake_backward)
