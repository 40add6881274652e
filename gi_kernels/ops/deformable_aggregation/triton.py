"""``deformable_aggregation`` on the GPU: one pass over the references gathers, weighs and sums.

The softmax over the references goes on from one to the next; nothing of the size of the keys is written
by the forward pass. The backward pass writes the gradients of the samples once, in the storage type, and
sums those that flow to one pixel of a reference by the lists of ``along_flow``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gi_kernels.jit.along_flow import Readers, readers, resized, resized_backward, sum_readers
from gi_kernels.jit.device import blend, cell, four_taps, inside_frame, narrow, widen
from gi_kernels.jit.launch import TILE, Tiling, index_type, launch, sums, tiling


def deformable_aggregation(
    features: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    flows: torch.Tensor,
    errors: torch.Tensor,
    key_error_weight: torch.Tensor,
    value_error_weight: torch.Tensor,
    value_bias: torch.Tensor,
) -> torch.Tensor:
    """``gi_triton::deformable_aggregation``."""
    B, T, C, H, W = keys.shape
    out = torch.empty_like(features)
    if out.numel() == 0:
        return out
    flows, errors = _maps(flows, errors, H, W)
    cut = _tiling(keys)
    launch(
        _forward, cut.pixel_blocks * cut.splits * B, features, keys, values, flows, errors,
        key_error_weight.contiguous(), value_error_weight.contiguous(), value_bias.contiguous(), out,
        T, C, H, W, cut.splits, cut.pixel_blocks,
        *features.stride(), *keys.stride(), *values.stride(), *out.stride(),
        ACC=sums(keys), INDEX=index_type(features, keys, values, out), **cut.options,
    )  # fmt: skip
    return out


def deformable_aggregation_backward(
    grad: torch.Tensor,
    features: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    flows: torch.Tensor,
    errors: torch.Tensor,
    key_error_weight: torch.Tensor,
    value_error_weight: torch.Tensor,
    value_bias: torch.Tensor,
    need_sources: bool,
    need_maps: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``gi_triton::deformable_aggregation_backward``: of keys, values, flows, errors, the weights [3,C]."""
    B, T, C, H, W = keys.shape
    if keys.numel() == 0:
        empty = keys.new_empty(0)
        return (
            torch.empty_like(keys) if need_sources else empty,
            torch.empty_like(values) if need_sources else empty,
            flows.new_zeros(flows.shape if need_maps else 0),
            errors.new_zeros(errors.shape if need_maps else 0),
            flows.new_zeros(3, C),
        )
    resized_flows, resized_errors = _maps(flows, errors, H, W)
    cut = _tiling(keys, TILE // 2)
    programs = cut.pixel_blocks * cut.splits * B
    # Samples' gradients [B,T,H,W,C], channels innermost as the sums read them.
    samples = [
        keys.new_empty((B, T, H, W, C) if need_sources else 0).movedim(-1, 2 if need_sources else 0)
        for _ in range(2)
    ]
    map_parts = flows.new_empty((cut.splits, B, T, 3, H, W) if need_maps else 0)
    weight_parts = flows.new_empty(B * cut.pixel_blocks, 3, C)
    launch(
        _backward, programs, grad, keys, values, resized_flows, resized_errors,
        key_error_weight.contiguous(), value_error_weight.contiguous(), *samples, map_parts, weight_parts,
        B, T, C, H, W, cut.splits, cut.pixel_blocks,
        *grad.stride(), *keys.stride(), *values.stride(),
        SOURCES=need_sources, MAPS=need_maps,
        ACC=sums(keys), INDEX=index_type(grad, keys, values, *samples), **cut.options,
    )  # fmt: skip
    grad_keys = grad_values = keys.new_empty(0)
    if need_sources:
        lists = readers(resized_flows.view(B * T, 2, H, W))
        grad_keys, grad_values = (
            _summed(s, lists, like) for s, like in zip(samples, (keys, values), strict=True)
        )
    grad_flows = grad_errors = flows.new_empty(0)
    if need_maps:
        grad_maps = map_parts.sum(0).flatten(0, 1)  # [BT,3,H,W]
        grad_flows = resized_backward(grad_maps[:, :2], flows.shape[3], flows.shape[4], True).view(
            flows.shape
        )
        grad_errors = resized_backward(grad_maps[:, 2:], errors.shape[3], errors.shape[4], False).view(
            errors.shape
        )
    return grad_keys, grad_values, grad_flows, grad_errors, weight_parts.sum(0)


def _maps(flows: torch.Tensor, errors: torch.Tensor, H: int, W: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous flows [B,T,2,H,W] and errors [B,T,1,H,W]."""
    B, T = flows.shape[:2]
    return (
        resized(flows.flatten(0, 1), H, W, flow=True).view(B, T, 2, H, W),
        resized(errors.flatten(0, 1), H, W, flow=False).view(B, T, 1, H, W),
    )


def _tiling(keys: torch.Tensor, numbers: int = TILE) -> Tiling:
    """One block of channels per program: its sums over the references stay in registers."""
    return tiling(keys[:, 0], one_block=True, numbers=numbers)


def _summed(samples: torch.Tensor, lists: Readers, like: torch.Tensor) -> torch.Tensor:
    """Gradient laid out as ``like`` [B,T,C,H,W]."""
    out = torch.empty_like(like)
    one_batch = out.shape[0] == 1 or out.shape[1] == 1 or out.stride(0) == out.shape[1] * out.stride(1)
    target = out if one_batch else torch.empty_like(samples)
    sum_readers(samples.flatten(0, 1), lists, target.flatten(0, 1))
    return out if one_batch else out.copy_(target)


@triton.jit
def _landing(flows, errors, frame, size, p, py, px, valid, H, W, ACC: tl.constexpr):
    """Errors [P,1] of pixels [P] in a reference, and where their flows lead, as ``cell`` says."""
    u = tl.load(flows + frame * 2 * size + p, mask=valid, other=0.0)
    v = tl.load(flows + (frame * 2 + 1) * size + p, mask=valid, other=0.0)
    e = tl.load(errors + frame * size + p, mask=valid, other=0.0)[:, None]
    near, x0, y0, fx, fy = cell(px.to(ACC) + u, py.to(ACC) + v, H, W)
    return e, near & valid, x0, y0, fx, fy


@triton.jit
def _softmax(
    keys, values, flows, errors, key_error, value_error, b, T, H, W, size,
    p, py, px, valid, c, in_channels, kst, ksc, ksy, ksx, vst, vsc, vsy, vsx,
    P: tl.constexpr, CB: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Over the references of an item: the largest logits, the sums of weights and of weighted contents."""
    largest = tl.full([P, CB], float("-inf"), ACC)
    total = tl.zeros([P, CB], ACC)
    mean = tl.zeros([P, CB], ACC)
    for t in range(T):
        e, near, x0, y0, fx, fy = _landing(flows, errors, b * T + t, size, p, py, px, valid, H, W, ACC)
        key = keys + t * kst
        value = values + t * vst
        k0, k1, k2, k3 = four_taps(key, near, x0, y0, c * ksc, in_channels, H, W, ksy, ksx, ACC, INDEX)
        v0, v1, v2, v3 = four_taps(value, near, x0, y0, c * vsc, in_channels, H, W, vsy, vsx, ACC, INDEX)
        logit = blend(k0, k1, k2, k3, fx, fy) + e * key_error[None, :]
        content = blend(v0, v1, v2, v3, fx, fy) + e * value_error[None, :]
        now = tl.maximum(largest, logit)
        reference = tl.where(now == float("-inf"), 0.0, now)  # only infinitely small logits so far
        keep = tl.exp(largest - reference)
        weight = tl.exp(logit - reference)
        total = total * keep + weight
        mean = mean * keep + weight * content
        largest = now
    return largest, total, mean


@triton.jit
def _forward(
    features, keys, values, flows, errors, key_error_weight, value_error_weight, value_bias, out,
    T, C, H, W, splits, pixel_blocks,
    fsb, fsc, fsy, fsx, ksb, kst, ksc, ksy, ksx, vsb, vst, vsc, vsy, vsx, osb, osc, osy, osx,
    P: tl.constexpr, CB: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = (program // pixel_blocks) % splits
    b = (program // pixel_blocks // splits).to(tl.int64)
    size = tl.cast(H, INDEX) * W
    p = (program % pixel_blocks).to(INDEX) * P + tl.arange(0, P)
    valid = p < size
    py, px = p // W, p % W
    c = (split * CB + tl.arange(0, CB)).to(INDEX)
    in_channels = c < C
    key_error = tl.load(key_error_weight + c, mask=in_channels, other=0.0)
    value_error = tl.load(value_error_weight + c, mask=in_channels, other=0.0)
    largest, total, mean = _softmax(
        keys + b * ksb, values + b * vsb, flows, errors, key_error, value_error, b, T, H, W, size,
        p, py, px, valid, c, in_channels, kst, ksc, ksy, ksx, vst, vsc, vsy, vsx, P, CB, ACC, INDEX,
    )  # fmt: skip
    mask = valid[:, None] & in_channels[None, :]
    address = features + b * fsb + (py * fsy + px * fsx)[:, None] + (c * fsc)[None, :]
    own = widen(tl.load(address, mask=mask, other=0.0), ACC)
    bias = tl.load(value_bias + c, mask=in_channels, other=0.0)[None, :]
    address = out + b * osb + (py * osy + px * osx)[:, None] + (c * osc)[None, :]
    tl.store(address, narrow(own + bias + mean / total, out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad, keys, values, flows, errors, key_error_weight, value_error_weight,
    key_samples, value_samples, map_parts, weight_parts, B, T, C, H, W, splits, pixel_blocks,
    gsb, gsc, gsy, gsx, ksb, kst, ksc, ksy, ksx, vsb, vst, vsc, vsy, vsx,
    SOURCES: tl.constexpr, MAPS: tl.constexpr,
    P: tl.constexpr, CB: tl.constexpr, ACC: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program % pixel_blocks
    split = (program // pixel_blocks) % splits
    b = (program // pixel_blocks // splits).to(tl.int64)
    size = tl.cast(H, INDEX) * W
    p = block.to(INDEX) * P + tl.arange(0, P)
    valid = p < size
    py, px = p // W, p % W
    c = (split * CB + tl.arange(0, CB)).to(INDEX)
    in_channels = c < C
    mask = valid[:, None] & in_channels[None, :]
    key_error = tl.load(key_error_weight + c, mask=in_channels, other=0.0)
    value_error = tl.load(value_error_weight + c, mask=in_channels, other=0.0)
    address = grad + b * gsb + (py * gsy + px * gsx)[:, None] + (c * gsc)[None, :]
    g = widen(tl.load(address, mask=mask, other=0.0), ACC)
    # First the softmax and its mean, then the references once more, mostly out of the cache.
    largest, total, mean = _softmax(
        keys + b * ksb, values + b * vsb, flows, errors, key_error, value_error, b, T, H, W, size,
        p, py, px, valid, c, in_channels, kst, ksc, ksy, ksx, vst, vsc, vsy, vsx, P, CB, ACC, INDEX,
    )  # fmt: skip
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    mean = mean / total
    key_error_sum = tl.zeros([CB], ACC)
    value_error_sum = tl.zeros([CB], ACC)
    for t in range(T):
        frame = b * T + t
        e, near, x0, y0, fx, fy = _landing(flows, errors, frame, size, p, py, px, valid, H, W, ACC)
        key = keys + b * ksb + t * kst
        value = values + b * vsb + t * vst
        k0, k1, k2, k3 = four_taps(key, near, x0, y0, c * ksc, in_channels, H, W, ksy, ksx, ACC, INDEX)
        logit = blend(k0, k1, k2, k3, fx, fy) + e * key_error[None, :]
        weight = tl.exp(logit - largest) / total
        grad_value = g * weight
        v0, v1, v2, v3 = four_taps(value, near, x0, y0, c * vsc, in_channels, H, W, vsy, vsx, ACC, INDEX)
        content = blend(v0, v1, v2, v3, fx, fy) + e * value_error[None, :]
        grad_key = grad_value * (content - mean)
        key_error_sum += tl.sum(tl.where(mask, grad_key * e, 0.0), axis=0)
        value_error_sum += tl.sum(tl.where(mask, grad_value * e, 0.0), axis=0)
        if SOURCES:
            target = (frame * size + p)[:, None] * C + c[None, :]
            tl.store(key_samples + target, narrow(grad_key, key_samples.dtype.element_ty), mask=mask)
            tl.store(value_samples + target, narrow(grad_value, value_samples.dtype.element_ty), mask=mask)
        if MAPS:
            # Tap by tap, so that infinities meet as they do in the definition.
            x1, y1 = x0 + 1, y0 + 1
            dot0 = tl.sum(grad_key * k0 + grad_value * v0, axis=1)
            dot1 = tl.sum(grad_key * k1 + grad_value * v1, axis=1)
            dot2 = tl.sum(grad_key * k2 + grad_value * v2, axis=1)
            dot3 = tl.sum(grad_key * k3 + grad_value * v3, axis=1)
            dot0 = tl.where(inside_frame(near, x0, y0, H, W), dot0, 0.0)
            dot1 = tl.where(inside_frame(near, x1, y0, H, W), dot1, 0.0)
            dot2 = tl.where(inside_frame(near, x0, y1, H, W), dot2, 0.0)
            dot3 = tl.where(inside_frame(near, x1, y1, H, W), dot3, 0.0)
            along_x = (dot1 - dot0) * (1 - fy) + (dot3 - dot2) * fy
            along_y = (dot2 - dot0) * (1 - fx) + (dot3 - dot1) * fx
            along_e = tl.sum(grad_key * key_error[None, :] + grad_value * value_error[None, :], axis=1)
            target = map_parts + ((split * B + b) * T + t) * 3 * size + p
            tl.store(target, along_x, mask=valid)
            tl.store(target + size, along_y, mask=valid)
            tl.store(target + 2 * size, along_e, mask=valid)
    target = weight_parts + (b * pixel_blocks + block) * 3 * C + c
    tl.store(target, key_error_sum, mask=in_channels)
    tl.store(target + C, value_error_sum, mask=in_channels)
    tl.store(target + 2 * C, tl.sum(tl.where(mask, g, 0.0), axis=0), mask=in_channels)
