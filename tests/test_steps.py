"""The steps that benchmarks and the demo time: both styles compute the same; the benchmarks are collected."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from gi_kernels.testing.errors import largest_error, magnitude
from gi_kernels.testing.timing import Times
from gi_model import demo, step_times
from gi_model.step_times import StepTimes
from gi_model.testing.steps import Steps

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def steps():
    return Steps(batch=1, references=2, size=128, iterations=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", ["flow_stage", "generation", "whole"])
def test_both_styles_agree(steps, part, dtype):
    pair = getattr(steps, part)(dtype)
    ours, published = pair.ours(), pair.published()
    assert ours.dtype == published.dtype == torch.float32
    assert published.std() > 1e-3 * magnitude(published)  # there is something to compare
    allowed = 1e-3 if dtype == torch.float32 else 5e-2
    assert largest_error(ours, published) <= allowed * magnitude(published)


def test_whole_benchmark_of_steps_is_collected():
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_end_to_end.py", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for sample in ("t4_256", "t2_256", "t2_b8_256", "t4_b8_256"):
        for dtype in ("float32", "bfloat16"):
            assert f"[step-{sample}-contiguous-{dtype}-forward]" in done.stdout


def test_a_step_of_the_benchmark_runs(monkeypatch, steps):
    """A GPU's case, smaller, as far as a CPU can run it."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import bench_end_to_end as benchmark

    monkeypatch.setattr(benchmark, "steps", lambda B, T, device: steps)
    case = next(c for c in benchmark.CASES if (c.sample, c.dtype) == ("t2_256", "float32"))
    contest = case.build(case, torch.device("cpu"), True)
    assert list(contest.contenders) == ["ours", "published"]
    assert contest.verify() < 1e-3
    for contender in contest.contenders.values():
        assert contender.forward()().shape == (1, 3, 128, 128)


def quick(steps):
    """Times of calls that take a millisecond; the calls themselves are tested above."""
    times = StepTimes(steps)
    times.calls = {name: lambda: time.sleep(1e-3) for name in times.calls}
    return times


@pytest.mark.parametrize("low", [False, True])
def test_table_of_times(monkeypatch, steps, low):
    monkeypatch.setattr(step_times, "gains_by_bfloat16", lambda: low)
    times = quick(steps)
    assert len(list(times)) == len(times) == 4 * 3 * (2 + low)
    assert all(len(seconds) == 3 for seconds in times.seconds.values())
    heading, empty, styles, *parts = str(times).splitlines()
    assert heading.startswith("One step of 1 at 128 x 128 with 2 references") and not empty
    assert [s.strip() for s in styles.split("  ") if s.strip()] == [
        "published",
        "ours",
        *(["ours, bfloat16"] if low else []),
    ]
    assert [line.split("  ")[0] for line in parts] == ["flow stage", "generator", "whole step"]
    for line in parts:
        assert re.fullmatch(r".*  \d+\.\d\d s" + r" +\d+\.\d\d s \(\d+\.\dx\)" * (1 + low), line), line
    assert len({len(line) for line in parts}) == 1


def test_bfloat16_is_timed_where_it_is_faster(monkeypatch):
    def interleave(contenders, budget):
        assert contenders["low"]().dtype == torch.bfloat16
        return {name: Times((seconds[name],)) for name in contenders}

    monkeypatch.setattr(step_times.timing, "interleave", interleave)
    for low, expected in ((0.5, True), (1.5, False)):
        seconds = {"exact": 1.0, "low": low}
        assert step_times.gains_by_bfloat16() is expected


def test_an_interrupted_second_act_says_what_is_there(monkeypatch, tmp_path, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "harm", lambda clip, folder: 0)
    monkeypatch.setattr(demo.cli, "main", lambda command: 0)
    monkeypatch.setattr(demo, "show_times", interrupted)
    assert demo.main(["-o", str(tmp_path)]) == demo.cli.INTERRUPTED
    assert f"demo: interrupted; the repaired clip is in {tmp_path}" in capsys.readouterr().err


def test_the_demo_shows_the_table(monkeypatch, steps, capsys):
    monkeypatch.setattr("gi_model.testing.steps.Steps", lambda references: steps)
    monkeypatch.setattr(step_times, "StepTimes", quick)
    assert demo.show_times() == 0
    shown = capsys.readouterr().out
    assert "whole step" in shown and "--checkpoint ours.ckpt" in shown
