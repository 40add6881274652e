"""Definition of ``deformable_aggregation``."""

from __future__ import annotations

import torch

from gi_kernels.ops.flow_warp.reference import flow_warp, resize


def deformable_aggregation(
    features: torch.Tensor,  # [B,C,H,W]
    keys: torch.Tensor,  # [B,T,C,H,W]
    values: torch.Tensor,  # [B,T,C,H,W]
    flows: torch.Tensor,  # [B,T,2,h,w]
    errors: torch.Tensor,  # [B,T,1,h,w]
    key_error_weight: torch.Tensor,  # [C]
    value_error_weight: torch.Tensor,  # [C]
    value_bias: torch.Tensor,  # [C]
) -> torch.Tensor:
    """Features plus the softmax-weighted sum of warped references; see the public doc."""
    B, T, C, H, W = keys.shape
    flows = flows.flatten(0, 1)
    error = errors.flatten(0, 1)  # [BT,1,h,w]
    if error.shape[2:] != (H, W):
        error = resize(error, H, W)
    error = error.view(B, T, 1, H, W).to(features.dtype)

    def per_channel(weight: torch.Tensor) -> torch.Tensor:
        return weight[:, None, None].to(features.dtype)

    logits = flow_warp(keys.flatten(0, 1), flows).view_as(keys) + error * per_channel(key_error_weight)
    content = flow_warp(values.flatten(0, 1), flows).view_as(values) + error * per_channel(value_error_weight)
    return features + per_channel(value_bias) + (logits.softmax(dim=1) * content).sum(dim=1)
