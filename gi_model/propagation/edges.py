"""Continuation of edges into a hole."""

from __future__ import annotations

import cv2
import numpy as np

from gi_model.propagation.membrane import membrane

# Steps of diffusion, and after how many its directions are found anew.
STEPS, EVERY = 40, 20
# Deviation in pixels of the window in which directions are found, and how much of a pixel in the hole counts.
WINDOW, INSIDE = 3.0, 0.02
# How much of the diffusion goes across an edge.
ACROSS = 0.02
# Half the width of a hole, in pixels, that edges bridge in so many steps. Wider ones are filled at a part of
# the size.
DEPTH = 6.0
NEIGHBOURS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]


def continue_edges(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """``values`` ``[h,w,3]`` float32 where ``known`` ``[h,w]`` bool, elsewhere continued along edges.

    A membrane, then diffused along the directions that its surroundings have, by their structure tensor,
    the more so the clearer these are. Edges that meet a thin hole cross it; a wide one is as smooth as a
    membrane away from its rim. After Weickert, "Coherence-Enhancing Diffusion Filtering", 1999.
    Zero where nothing is known at all.
    """
    if known.all() or not known.any():
        return np.where(known[..., None], values, 0).astype(np.float32)
    depth = cv2.distanceTransform((~known).astype(np.uint8), cv2.DIST_L2, 3).max()
    if depth <= DEPTH or min(known.shape) < 16:
        return _diffused(membrane(values, known), known)
    height, width = known.shape
    size = -(-width // 2), -(-height // 2)
    share = cv2.resize(known.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    half = cv2.resize(np.where(known[..., None], values, 0), size, interpolation=cv2.INTER_AREA)
    half = continue_edges((half / np.maximum(share, 1e-6)[..., None]).astype(np.float32), share > 0)
    coarse = cv2.resize(half, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.where(known[..., None], values, coarse + membrane(values - coarse, known)).astype(np.float32)


def _diffused(image: np.ndarray, known: np.ndarray) -> np.ndarray:
    """``image`` ``[h,w,3]`` with what is not ``known`` diffused along its edges."""
    height, width = known.shape
    rows, columns = np.nonzero(~known)
    around = np.stack(
        [(rows + y).clip(0, height - 1) * width + (columns + x).clip(0, width - 1) for y, x in NEIGHBOURS]
    )
    inside = rows * width + columns
    flat = image.reshape(-1, 3).copy()
    for step in range(STEPS):
        if step % EVERY == 0:
            weights = _weights(flat.reshape(image.shape), known, inside)
        total = weights[0] * flat[around[0]]
        for weight, neighbour in zip(weights[1:], around[1:], strict=True):
            total += weight * flat[neighbour]
        flat[inside] = total
    return flat.reshape(image.shape)


def _weights(image: np.ndarray, known: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Weights ``[9,N,1]`` of the neighbours of the pixels ``inside`` in a step of diffusion."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    x, y = cv2.Sobel(grey, -1, 1, 0) / 8, cv2.Sobel(grey, -1, 0, 1) / 8
    trust = np.where(known, np.float32(1), np.float32(INSIDE))
    tensor = cv2.GaussianBlur(
        np.dstack([x * x, x * y, y * y, np.ones_like(x)]) * trust[..., None], (0, 0), WINDOW
    )
    xx, xy, yy, share = tensor.reshape(-1, 4)[inside].T
    xx, xy, yy = xx / share, xy / share, yy / share
    difference = np.sqrt((xx - yy) ** 2 + 4 * xy**2)
    coherence = (difference / (xx + yy + 1e-3)) ** 2
    # The diffusion tensor: one where there is no direction, else one along and ACROSS the edge.
    half = coherence * (1 - ACROSS) / 2
    both = 1 - coherence * (1 - ACROSS) + half
    turn = half / (difference + 1e-6)
    along_x, along_y, mixed = both + turn * (yy - xx), both - turn * (yy - xx), -2 * turn * xy
    diagonal = mixed / 2
    weights = np.stack(
        [diagonal, along_y, -diagonal, along_x, np.zeros_like(both), along_x, -diagonal, along_y, diagonal]
    )
    weights *= 0.475 / (along_x + along_y)  # stable below 0.5
    weights[4] = 1 - weights.sum(axis=0)
    return weights[..., None].astype(np.float32)
