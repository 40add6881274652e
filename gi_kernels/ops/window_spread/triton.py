"""``window_spread`` on the GPU, by the kernels of ``window_pool``."""

from __future__ import annotations

import torch

from gi_kernels.ops.window_pool.triton import dots, gather, spread


def window_spread(logits: torch.Tensor, latents: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """``gi_triton::window_spread``."""
    (B, _, H, W), C = logits.shape, latents.shape[3]
    channels_last = logits.is_contiguous(memory_format=torch.channels_last) and not logits.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((B, C, H, W), dtype=latents.dtype, device=latents.device, memory_format=memory_format)
    spread(logits, latents, out, rows, columns, None)
    return out


def window_spread_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    latents: torch.Tensor,
    rows: int,
    columns: int,
    need_logits: bool,
    need_latents: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``gi_triton::window_spread_backward``."""
    grad_logits, grad_latents = logits.new_empty(0), latents.new_empty(0)
    if need_logits:
        grad_logits = torch.empty_like(logits)
        dots(logits, latents, grad, grad_logits, rows, columns, sigmoid=True)
    if need_latents:
        grad_latents = latents.new_empty(latents.shape)
        gather(logits, grad, grad_latents, rows, columns, softmax=False)
    return grad_logits, grad_latents
