"""``flow_warp`` on the GPU: a program gathers the channels of a few pixels at taps found once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gi_kernels.jit.along_flow import readers, resized, resized_backward, sum_readers
from gi_kernels.jit.device import blend, cell, four_taps, narrow, slope, widen
from gi_kernels.jit.launch import index_type, launch, sums, tiling


def flow_warp(input: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """``gi_triton::flow_warp``."""
    B, C, H, W = input.shape
    out = torch.empty_like(input)
    if out.numel() == 0:
        return out
    flow = resized(flow, H, W, flow=True)
    cut = tiling(input)
    launch(
        _forward, cut.pixel_blocks * cut.splits * B, input, flow, out, C, H, W,
        cut.channels, cut.splits, cut.pixel_blocks, *input.stride(), *out.stride(),
        ACC=sums(input), INDEX=index_type(input, out), **cut.options,
    )  # fmt: skip
    return out


def flow_warp_backward(
    grad: torch.Tensor, input: torch.Tensor, flow: torch.Tensor, need_input: bool, need_flow: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``gi_triton::flow_warp_backward``."""
    B, C, H, W = input.shape
    h, w = flow.shape[2:]
    if input.numel() == 0:
        grad_input = torch.empty_like(input) if need_input else input.new_empty(0)
        return grad_input, flow.new_zeros(flow.shape if need_flow else 0)
    flow = resized(flow, H, W, flow=True)
    grad_input = input.new_empty(0)
    if need_input:
        grad_input = torch.empty_like(input)
        sum_readers(grad, readers(flow), grad_input)
    if not need_flow:
        return grad_input, flow.new_empty(0)
    grad_flow = torch.empty_like(flow)
    cut = tiling(input, split=False)
    launch(
        _backward_flow, cut.pixel_blocks * B, grad, input, flow, grad_flow, C, H, W, cut.pixel_blocks,
        *grad.stride(), *input.stride(), ACC=sums(input), INDEX=index_type(grad, input), **cut.options,
    )  # fmt: skip
    return grad_input, resized_backward(grad_flow, h, w, flow=True)


@triton.jit
def _forward(
    input, flow, out, C, H, W, channels, splits, pixel_blocks, isb, isc, isy, isx, osb, osc, osy, osx,
    P: tl.constexpr, CB: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = (program // pixel_blocks) % splits
    b = (program // pixel_blocks // splits).to(tl.int64)
    size = tl.cast(H, INDEX) * W
    p = (program % pixel_blocks).to(INDEX) * P + tl.arange(0, P)
    valid = p < size
    u = tl.load(flow + b * 2 * size + p, mask=valid, other=0.0)
    v = tl.load(flow + (b * 2 + 1) * size + p, mask=valid, other=0.0)
    near, x0, y0, fx, fy = cell((p % W).to(ACC) + u, (p // W).to(ACC) + v, H, W)
    near = near & valid
    to = (p // W) * osy + (p % W) * osx
    for c0 in range(split * channels, tl.minimum((split + 1) * channels, C), CB):
        c = (c0 + tl.arange(0, CB)).to(INDEX)
        in_channels = c < C
        taps = four_taps(input + b * isb, near, x0, y0, c * isc, in_channels, H, W, isy, isx, ACC, INDEX)
        value = blend(taps[0], taps[1], taps[2], taps[3], fx, fy)
        address = out + b * osb + to[:, None] + (c * osc)[None, :]
        tl.store(address, narrow(value, out.dtype.element_ty), mask=valid[:, None] & in_channels[None, :])


@triton.jit
def _backward_flow(
    grad, input, flow, grad_flow, C, H, W, pixel_blocks, gsb, gsc, gsy, gsx, isb, isc, isy, isx,
    P: tl.constexpr, CB: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b = (program // pixel_blocks).to(tl.int64)
    size = tl.cast(H, INDEX) * W
    p = (program % pixel_blocks).to(INDEX) * P + tl.arange(0, P)
    valid = p < size
    u = tl.load(flow + b * 2 * size + p, mask=valid, other=0.0)
    v = tl.load(flow + (b * 2 + 1) * size + p, mask=valid, other=0.0)
    near, x0, y0, fx, fy = cell((p % W).to(ACC) + u, (p // W).to(ACC) + v, H, W)
    near = near & valid
    from_grad = (p // W) * gsy + (p % W) * gsx
    along_x = tl.zeros([P, CB], ACC)
    along_y = tl.zeros([P, CB], ACC)
    for c0 in range(0, C, CB):
        c = (c0 + tl.arange(0, CB)).to(INDEX)
        in_channels = c < C
        taps = four_taps(input + b * isb, near, x0, y0, c * isc, in_channels, H, W, isy, isx, ACC, INDEX)
        dx, dy = slope(taps[0], taps[1], taps[2], taps[3], fx, fy)
        address = grad + b * gsb + from_grad[:, None] + (c * gsc)[None, :]
        g = widen(tl.load(address, mask=valid[:, None] & in_channels[None, :], other=0.0), ACC)
        along_x += g * dx
        along_y += g * dy
    x_slope, y_slope = tl.sum(along_x, axis=1), tl.sum(along_y, axis=1)
    tl.store(grad_flow + b * 2 * size + p, tl.where(near, x_slope, 0.0), mask=valid)
    tl.store(grad_flow + (b * 2 + 1) * size + p, tl.where(near, y_slope, 0.0), mask=valid)
