"""The benchmark of training: a tiny case runs and its table is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("cv2", reason="the [training] extra is not installed")

# Last, so that the package under test stays the installed one.
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import bench_training, report

CASE = {"device": "cpu", "batch": 1, "size": 256, "seconds": [1.0], "peak_bytes": 2**20}
LOADING = {
    "images_per_second_per_core": 10.0,
    "cores": 16,
    "batch": 8,
    "computed_images_per_second": 160.0,
    "computed_seconds_per_batch": 0.05,
}


def test_a_batch_is_drawn():
    made = bench_training.draw(batch=3, size=64)
    assert {name: tuple(values.shape) for name, values in made.items()} == {
        "image": (3, 64, 64, 3),
        "mask": (3, 64, 64, 1),
        "srcs": (3, 2, 64, 64, 3),
        "srcs_masks": (3, 2, 64, 64, 1),
    }


def test_data_loading_is_measured_on_one_thread():
    threads = torch.get_num_threads()
    found = bench_training.data_loading(seconds=0.05, photos=1)
    assert torch.get_num_threads() == threads
    assert found["computed_images_per_second"] == 16 * found["images_per_second_per_core"] > 0
    assert found["computed_seconds_per_batch"] == pytest.approx(8 / found["computed_images_per_second"])


def test_the_table():
    cases = [
        {**CASE, "style": "published", "images_per_second": 0.1},
        {**CASE, "style": "ours", "images_per_second": 0.25},
    ]
    lines = report.training({"training": {"cases": cases, "loading": LOADING}})
    assert "| ours | 0.25 | 2.50× | 1 MiB |" in lines
    assert any("not measured: 16 cores make 160, a batch of 8 in 50 ms" in line for line in lines)
    assert report.training({}) == []
