"""The suite for GPUs as far as a CPU can try it: its options, its cases, its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # last: the package under test may be an installed one
from benchmarks import gpu_speed, gpu_suite


def test_without_a_gpu_it_says_so(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_suite.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--part", "all"], ["--operator", "warp"], ["--backend", "cpp"]])
def test_wrong_options(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(wrong)


def test_cases_are_well_formed() -> None:
    """Every case can be drawn (not at its size), names an operator, and has a target."""
    names = [case.name for case in gpu_speed.cases()]
    assert len(set(names)) == len(names)
    for case in gpu_speed.cases():
        assert case.operator in gpu_suite.all_specs()
        assert case.target in ("copy", "best") and all(w > 0 for w in case.wanted)
        assert case.target == "copy" or case.competitors


def test_a_failure_is_reported(tmp_path, monkeypatch, capsys) -> None:
    """A part that breaks or differs makes the exit code 1, and the others still run."""

    def broken(options):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(
        gpu_suite,
        "PARTS",
        {
            "machine": broken,
            "large": lambda o: {"checked": 2, "failures": ["one"]},
            "report": gpu_suite.report,
        },
    )
    assert gpu_suite.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "no such thing" in json.loads((tmp_path / "machine.json").read_text())["failures"][0]
    assert "large: 2 checked, 1 differ" in capsys.readouterr().out
    assert "| large | 2 | 1 |" in (tmp_path / "summary.md").read_text()


def test_contract_and_speed_find_a_wrong_kernel(tmp_path, monkeypatch) -> None:
    """On the CPU's own kernels: they pass, and a result that is off does not."""
    options = ["--device", "cpu", "--out", str(tmp_path), "--operator", "flow_consistency"]
    monkeypatch.setattr(gpu_suite, "_kernels", lambda *_: ["reference"])
    assert gpu_suite.main([*options, "--part", "contract", "--part", "determinism"]) == 0
    report = json.loads((tmp_path / "contract.json").read_text())
    assert report["checked"] > 20
    evaluate = gpu_suite.evaluate

    def off(*args, **kwargs):
        outcome = evaluate(*args, **kwargs)
        outcome.value.mul_(1.01)
        return outcome

    monkeypatch.setattr(gpu_suite, "evaluate", off)
    assert gpu_suite.main([*options, "--part", "contract"]) == 1


def test_measure_and_report(tmp_path) -> None:
    """A small case through timing, table and plot."""
    pytest.importorskip("matplotlib")
    from gi_kernels.spec import Argument

    arguments = {"input": Argument((1, 8, 6, 6)), "flow": Argument((1, 2, 6, 6), storage=False)}
    case = gpu_speed.Case(
        "small", "flow_warp", arguments, {"grid_sample": gpu_speed.published.published_flow_warp},
        "copy", (0.85, 0.6),
    )  # fmt: skip
    ceilings = {"copy": 1e11, "product": 1e12}
    rows = [gpu_speed.measure(case, t, ["reference"], ceilings, "cpu") for t in (False, True)]
    assert rows[0]["bytes"] == 2 * 8 * 36 * 2 + 2 * 36 * 4
    assert rows[1]["bytes"] > 2 * rows[0]["bytes"] and rows[1]["backend"] == "reference"
    speed = {"checked": 2, "rows": rows, "ceilings": ceilings}
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    assert gpu_speed.write_report(tmp_path, ["machine", "speed"]) == ["summary.md", "roofline.png"]
    text = (tmp_path / "summary.md").read_text()
    assert "| small | forward |" in text and "| machine | not run |" in text
