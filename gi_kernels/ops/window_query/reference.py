"""Definition of ``window_query``."""

from __future__ import annotations

import torch

from gi_kernels.ops.window_pool.reference import window_pool


def window_query(features: torch.Tensor, queries: torch.Tensor, windows: tuple[int, int]) -> torch.Tensor:
    """Per window and query, the softmax-weighted mean of the features; see the public doc."""
    logits = torch.einsum("hc,bcyx->bhyx", queries, features)
    return window_pool(logits, features, windows)
