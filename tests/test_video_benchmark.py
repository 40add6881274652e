"""The benchmark of video: a tiny case runs, its table is written, its floors are judged."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cv2", reason="the [video] extra is not installed")
pytest.importorskip("av", reason="the [video] extra is not installed")

# Last, so that the package under test stays the installed one.
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import bench_propagation, floors, report


@pytest.fixture(scope="module")
def case():
    return bench_propagation.measure(bench_propagation.Size("480p", 64, 48, 4))


def test_a_case_is_measured(case):
    assert case["id"] == "propagate-480p" and case["frames"] == 4
    assert case["frames_per_second"] > 0 and case["peak_bytes"] > 50 * 2**20
    assert {"decode", "encode"} < set(case["stages"])


def test_the_table_has_it(case):
    lines = report.propagation({"propagation": [case]})
    (row,) = [line for line in lines if line.startswith("| 480p (64x48) | 4 |")]
    assert "MiB" in row and "%" in row
    assert report.propagation({}) == []


def test_floors_are_judged(case):
    slow, large = {**case, "frames_per_second": 2.9}, {"id": "propagate-1080p", "peak_bytes": 2**31 + 1}
    verdicts = [v for v in floors.judge({"cases": [], "propagation": [slow, large]}) if v.value]
    assert [str(v) for v in verdicts] == [
        "FAIL  propagate-480p: 2.9 frames per second (at least 3)",
        "FAIL  propagate-1080p: 2.15e+09 bytes at the peak (at most 2.15e+09)",
    ]
    kept = {**slow, "frames_per_second": 3.0}, {**large, "peak_bytes": 2**31}
    assert all(v.reached for v in floors.judge({"cases": [], "propagation": kept}) if v.value)


def test_the_camera_moves():
    frames = list(bench_propagation.pan(bench_propagation.Size("x", 400, 60, 3)))
    step = round(bench_propagation.SPEED * 400)
    assert all(np.array_equal(a[:, step:], b[:, :-step]) for a, b in itertools.pairwise(frames))


def test_the_poster_stays_on_the_picture():
    size = bench_propagation.Size("x", 400, 60, 3, (0, 2))
    frames = list(bench_propagation.pan(size))
    first, last = (bench_propagation.with_poster(frames[i], size, i) for i in (0, 2))
    step = 2 * round(bench_propagation.SPEED * 400)
    assert np.array_equal(first[:, step:], last[:, :-step])
    assert 0.06 < (first != frames[0]).any(axis=2).mean() < 0.08
    assert not np.array_equal(frames[0], first)
