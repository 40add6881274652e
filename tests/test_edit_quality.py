"""The table of carried edits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2", reason="the [video] extra is not installed")
pytest.importorskip("av", reason="the [video] extra is not installed")

# After the installed package, which is what is tested.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import edit_quality


def test_psnr_is_that_inside_the_mask():
    image = np.full((20, 20, 3), 100, np.uint8)
    truth = image.copy()
    truth[:10] += 10
    upper = np.arange(20)[:, None].repeat(20, 1) < 10
    assert edit_quality.psnr(image, truth, upper) == pytest.approx(20 * np.log10(25.5))
    assert edit_quality.psnr(image, truth, ~upper) == 99
    assert np.isnan(edit_quality.psnr(image, truth, upper & ~upper))


def test_the_table():
    row = {"case": "pan", "keyframes": (0,), "psnr": [99.0, *[31.25] * 59], "unedited": 6.0, "beside": 50.0}
    row["flicker"] = 0.5
    row["psnr"][20] = float("nan")
    lines = edit_quality.report([row]).splitlines()
    assert (
        "| pan | 0 | 31.2 | 31.2 | 31.2 | hidden | 31.2 | 31.2 | 31.2 | 31.2 | 6.0 | 50.0 | 0.50 |" in lines
    )


def test_the_camera_of_the_plane_moves_smoothly():
    cameras = [edit_quality._camera(t, (810, 1440)) for t in range(edit_quality.COUNT)]
    middle = np.array([[720.0, 405.0, 1.0]]).T
    places = np.hstack([camera @ middle for camera in cameras])
    steps = np.linalg.norm(np.diff(places), axis=0)
    assert 0 < steps.max() < 12
    assert abs(places[0] - edit_quality.WIDTH / 2).max() < 120
