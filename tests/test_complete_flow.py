"""The points that the definition of flow completion draws."""

from __future__ import annotations

import numpy as np
import torch

from gi_kernels.ops.complete_flow import reference


def passed_over(counts: np.ndarray) -> np.ndarray:
    """How many of the definition's numbers NumPy passes over, for each count."""
    found = np.zeros_like(counts)
    for number in reference.RAW:
        found += ((number * counts) & 0xFFFFFFFF) < (2**32 - counts) % counts
    return found


def test_points_are_those_of_numpy():
    few = np.arange(1, 400)
    large = np.random.default_rng(3).integers(400, 2**23, 400)
    # Counts for which NumPy passes over a number are rare.
    rare = np.arange(2**21, 2**21 + 2**17)
    rare = rare[passed_over(rare) > 0][:200]
    assert len(rare) == 200
    counts = np.concatenate([few, large, rare])
    found = reference.choice(torch.from_numpy(counts)[:, None]).numpy()
    for count, points in zip(counts, found, strict=True):
        assert np.array_equal(points, np.random.default_rng(1).choice(count, reference.POINTS)), count


def test_there_are_numbers_enough():
    """For every rim that 16 million pixels can have: at most every other pixel is on it."""
    spare = len(reference.RAW) - reference.POINTS
    for start in range(1, 2**23, 2**20):
        assert passed_over(np.arange(start, start + 2**20)).max() <= spare


def test_no_rim_draws_the_first_pixel():
    rims = torch.zeros(2, 4, 5, dtype=torch.bool)
    rims[1, 2, 3] = True
    assert reference.drawn(rims).tolist() == [[0] * reference.POINTS, [13] * reference.POINTS]
