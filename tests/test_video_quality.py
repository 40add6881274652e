"""Measures of a repaired video on values known in advance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("cv2", reason="the [video] extra is not installed")
pytest.importorskip("av", reason="the [video] extra is not installed")

from moving_scene import COUNT, H, W, centre, scene

from gi_model.evaluation.lpips import LPIPS
from gi_model.evaluation.video import MARGIN, flicker, masked_lpips, motion, warp_error


def brighter(frames: list[np.ndarray], masks: list[np.ndarray], levels: list[int]) -> list[np.ndarray]:
    """Frames with levels added inside the masks."""
    return [f + (m[..., None] * n).astype(np.uint8) for f, m, n in zip(frames, masks, levels, strict=True)]


def test_flicker_of_the_truth_is_zero() -> None:
    assert flicker(scene(), scene(), centre()) == 0


def test_flicker_is_the_change_of_the_error() -> None:
    truth, masks = scene(), centre()
    assert flicker(brighter(truth, masks, [9, 9, 9, 9, 9]), truth, masks) == 0
    assert flicker(brighter(truth, masks, [0, 10, 0, 10, 0]), truth, masks) == 10
    assert flicker(brighter(truth, masks, [0, 0, 0, 6, 6]), truth, masks) == pytest.approx(6 / 4)


def test_flicker_counts_pixels_that_are_masked_in_both_frames() -> None:
    truth, masks = scene(), centre()
    masks = [m if i % 2 else np.zeros_like(m) for i, m in enumerate(masks)]
    assert math.isnan(flicker(truth, truth, masks))


def test_motion_is_that_of_the_camera() -> None:
    steps = motion(scene(step=2))
    assert len(steps) == COUNT - 1
    inner = steps[1].flow[0, :, 12:-12, 12:-12]
    assert torch.allclose(inner.mean(dim=(1, 2)), torch.tensor([-2.0, 0.0]), atol=0.1)
    assert steps[1].steady[12:-12, 12:-12].mean() > 0.99
    assert not steps[1].steady[:, :1].any()  # leaves the frame


def test_motion_marks_what_is_covered() -> None:
    frames = [f.copy() for f in scene(step=0)]
    for i, frame in enumerate(frames):
        frame[16:48, 10 + 6 * i : 34 + 6 * i] = scene(step=0)[0][16:48, 60:84][:, ::-1]
    steady = motion(frames)[1].steady
    assert steady[20:44, 41:45].mean() < 0.5  # ahead of the patch
    assert steady[:10].mean() > 0.95


def test_warp_error_of_a_still_clip() -> None:
    truth, masks = scene(step=0), centre()
    steps = motion(truth)
    assert warp_error(truth, masks, steps) == pytest.approx(0, abs=1e-10)
    blinking = brighter(truth, masks, [0, 25, 0, 25, 0])
    assert warp_error(blinking, masks, steps) == pytest.approx((25 / 255) ** 2, rel=1e-3)
    steady = brighter(truth, masks, [25] * COUNT)
    assert warp_error(steady, masks, steps) == pytest.approx(0, abs=1e-6)


def test_warp_error_follows_the_motion() -> None:
    truth, masks = scene(step=2), centre()
    steps = motion(truth)
    assert warp_error(truth, masks, steps) < 2e-5
    frozen = [np.where(m[..., None], truth[0], f) for f, m in zip(truth, masks, strict=True)]
    assert warp_error(frozen, masks, steps) > 50 * warp_error(truth, masks, steps)


def test_nothing_to_compare_is_nan() -> None:
    truth = scene()
    empty = [np.zeros((H, W), bool)] * COUNT
    assert math.isnan(warp_error(truth, empty, motion(truth)))
    assert math.isnan(flicker(truth, truth, empty))
    assert math.isnan(masked_lpips(LPIPS("alexnet"), [truth[0]], truth[0], empty[0])[0])


def test_masked_lpips_looks_at_the_mask() -> None:
    torch.manual_seed(0)
    metric = LPIPS("alexnet")
    for head in metric.heads:
        head.weight.data.abs_()  # as published ones are
    truth = np.random.default_rng(1).integers(0, 256, (160, 200, 3)).astype(np.uint8)
    mask = np.zeros((160, 200), bool)
    mask[60:90, 50:80] = True
    inside, faint, outside = truth.copy(), truth.copy(), truth.copy()
    inside[mask] = 255 - inside[mask]
    faint[mask] = (0.8 * truth[mask] + 0.2 * inside[mask]).astype(np.uint8)
    outside[:, 80 + MARGIN + 1 :] = 0
    same, far, beside, near = masked_lpips(metric, [truth, inside, outside, faint], truth, mask)
    assert same == beside == 0
    assert 0 < near < far
