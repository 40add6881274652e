"""Definition of ``projected_aggregation``."""

from __future__ import annotations

import torch

from gi_kernels.ops.deformable_aggregation.reference import deformable_aggregation
from gi_kernels.ops.pixel_projection.reference import pixel_projection


def projected_aggregation(
    features: torch.Tensor,  # [B,C,H,W]
    references: torch.Tensor,  # [B,T,R,H,W]
    key_weight: torch.Tensor,  # [C,R]
    value_weight: torch.Tensor,  # [C,R]
    flows: torch.Tensor,  # [B,T,2,h,w]
    errors: torch.Tensor,  # [B,T,1,h,w]
    key_error_weight: torch.Tensor,  # [C]
    value_error_weight: torch.Tensor,  # [C]
    value_bias: torch.Tensor,  # [C]
) -> torch.Tensor:
    """Aggregation of projected references; see the public doc."""
    both = pixel_projection(references.flatten(0, 1), torch.cat([key_weight, value_weight]))
    keys, values = both.unflatten(0, references.shape[:2]).chunk(2, dim=2)
    return deformable_aggregation(
        features, keys, values, flows, errors, key_error_weight, value_error_weight, value_bias
    )
