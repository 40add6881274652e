"""Definition of ``global_attention``."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def global_attention(
    query: torch.Tensor,  # [B,h,N,d]
    keys: Sequence[torch.Tensor],  # of [B,h,N_i,d]
    values: Sequence[torch.Tensor],  # of [B,h,N_i,d]
) -> torch.Tensor:
    """Attention over the concatenation of the segments; see the public doc."""
    key, value = torch.cat(list(keys), dim=2), torch.cat(list(values), dim=2)  # [B,h,M,d]
    scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5  # [B,h,N,M]
    return scores.softmax(dim=3) @ value
