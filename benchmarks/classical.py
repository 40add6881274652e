"""What classical tools do without weights: the baselines of ``benchmarks.quality``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gi_kernels import complete_flow, flow_warp
from gi_model.flow import DISFlow
from gi_model.inpainting import inpaint_frame

Frames = Sequence[np.ndarray]  # [H,W,3] uint8
Masks = Sequence[np.ndarray]  # [H,W] bool


def telea(frames: Frames, masks: Masks) -> list[np.ndarray]:
    """Every frame inpainted alone (Telea, 2004)."""
    return [inpaint_frame(frame, mask) for frame, mask in zip(frames, masks, strict=True)]


def temporal_median(frames: Frames, masks: Masks) -> list[np.ndarray]:
    """The median, over the whole clip, of what is visible at a pixel; nothing is aligned.

    What is never visible is inpainted.
    """
    ever = np.any(masks, axis=0)
    seen = ~np.stack([mask[ever] for mask in masks])  # [T,N]
    values = np.stack([frame[ever] for frame in frames]).astype(np.int16)  # [T,N,3]
    values = np.sort(np.where(seen[..., None], values, 256), axis=0)  # hidden ones last
    count = seen.sum(axis=0)
    middle = [
        np.take_along_axis(values, np.maximum(i, 0)[None, :, None], axis=0)[0]
        for i in ((count - 1) // 2, count // 2)
    ]
    median = np.zeros_like(frames[0])
    median[ever] = np.round((middle[0] + middle[1]) / 2).clip(0, 255).astype(np.uint8)
    never = ever.copy()
    never[ever] = count == 0
    return [
        inpaint_frame(np.where(mask[..., None], median, frame), never & mask)
        for frame, mask in zip(frames, masks, strict=True)
    ]


def one_step(frames: Frames, masks: Masks) -> list[np.ndarray]:
    """Flow from the two neighbours, interpolated into the mask, and the mean of what they show there.

    The flow is DIS on inpainted frames, interpolated from 20 points of the mask's rim. What neither
    neighbour shows is inpainted.
    """
    estimator = DISFlow()
    filled = telea(frames, masks)
    pictures = [torch.from_numpy(f).permute(2, 0, 1)[None] for f in filled]
    results = []
    for i, (frame, mask) in enumerate(zip(filled, masks, strict=True)):
        hole = torch.from_numpy(mask)[None, None].float()
        total = torch.zeros(1, 3, *mask.shape)
        weight = torch.zeros(1, 1, *mask.shape)
        for j in (i - 1, i + 1):
            if not 0 <= j < len(frames) or not mask.any():
                continue
            flow = complete_flow(estimator(pictures[i], pictures[j]), hole)
            visible = 1 - torch.from_numpy(masks[j])[None, None].float()
            sample = flow_warp(torch.cat([pictures[j].float(), visible], dim=1), flow)
            shown = (sample[:, 3:] > 0.999).float()
            total += shown * sample[:, :3]
            weight += shown
        seen = (weight[0, 0] > 0).numpy() & mask
        colour = (total / weight.clamp(min=1)).round().clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()
        results.append(inpaint_frame(np.where(seen[..., None], colour, frame), mask & ~seen))
    return results


BASELINES = {"telea": telea, "median": temporal_median, "one-step": one_step}
