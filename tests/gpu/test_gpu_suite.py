"""The suite for GPUs as far as a CPU can try it: its processes, its parts on stand-ins, its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fake_cuda
import pytest
import torch

import gi_kernels
from gi_kernels import native
from gi_kernels.spec import Argument, all_specs
from gi_model.testing import steps

sys.path.append(str(Path(__file__).parents[2]))  # last: the package under test may be an installed one
from benchmarks import gpu_checks, gpu_report, gpu_speed, gpu_suite

KERNEL = "reference" if native.PROBLEM else "cpp"


def options(tmp_path: Path, *more: str):
    found = gpu_suite.parser().parse_args(["--device", "cpu", "--out", str(tmp_path), *more])
    found.seconds = 60.0
    return found


def run(part: str, given) -> dict[str, str | None]:
    """The checks of a part in this process, and what each of them found."""
    found = {}
    for name, check in gpu_checks.PARTS[part](given):
        try:
            check()
            found[name] = None
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture
def stand_ins(monkeypatch):
    """The CPU's kernels for those under test, and recordings for CUDA graphs."""
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(gpu_checks, "kernels", lambda *_: [KERNEL])


# ---- the process that watches ----------------------------------------------------------------------


def test_without_a_gpu_it_says_so(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_suite.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--part", "all"], ["--operator", "warp"], ["--backend", "cpp"]])
def test_wrong_options(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(wrong)


def test_limits_and_parts_agree() -> None:
    assert list(gpu_suite.LIMITS) == list(gpu_checks.PARTS)
    assert all(whole < 480 and one <= whole for whole, one in gpu_suite.LIMITS.values())


#: A part of five checks: the second breaks the device, the third the process, the fourth never ends.
BREAKING = """
import json, os, sys, time
def tell(**record): print("#record " + json.dumps(record), flush=True)
for i in range(int(sys.argv[1]), 5):
    tell(start=f"check {i}")
    if i == 2: print("about to die", flush=True); os.abort()
    if i == 3: time.sleep(60)
    tell(name=f"check {i}", failure="CUDA error" if i == 1 else None, result={"x": i}, seconds=0.1)
    if i == 1: sys.exit(17)
tell(end=True)
"""


def test_what_breaks_does_not_hide_what_follows(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        gpu_suite, "command_of", lambda part, skip, _: [sys.executable, "-c", BREAKING, str(skip)]
    )
    monkeypatch.setitem(gpu_suite.LIMITS, "large", (30, 1.5))
    monkeypatch.setitem(gpu_suite.LIMITS, "report", (30, 1.5))
    assert gpu_suite.main(["--device", "cpu", "--out", str(tmp_path), "--part", "large"]) == 1
    found = json.loads((tmp_path / "gpu_suite.json").read_text())["parts"]["large"]
    assert found["complete"] and found["checked"] == 5
    assert [c["x"] for c in found["checks"]] == [0, 1, 4]
    broken, died, silent = found["failures"]
    assert broken == "check 1: CUDA error"
    assert died.startswith("check 2: the process ended with exit code -6") and "about to die" in died
    assert silent.startswith("check 3: no answer for")
    assert "large: 5 checked, 3 differ" in capsys.readouterr().out


def test_time_that_is_up_is_a_failure(tmp_path) -> None:
    assert (
        gpu_suite.main(["--device", "cpu", "--out", str(tmp_path), "--part", "machine", "--seconds", "0"])
        == 1
    )
    found = json.loads((tmp_path / "gpu_suite.json").read_text())["parts"]["machine"]
    assert not found["complete"] and "was up" in found["failures"][0]


def test_a_process_that_cannot_start_is_a_failure(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_suite, "command_of", lambda *_: [sys.executable, "-c", "import no_such_module"])
    given, results = options(tmp_path), gpu_suite.Results(tmp_path / "gpu_suite.json")
    results.begin("large")
    gpu_suite.run_part("large", given, results, 1e18)
    assert "No module named 'no_such_module'" in results.parts["large"]["failures"][0]


def test_a_part_in_its_process(tmp_path, capfd) -> None:
    """From end to end, and the results of an earlier run stay."""
    (tmp_path / "gpu_suite.json").write_text(json.dumps({"parts": {"large": {"complete": True, "checked": 3,
        "failures": [], "seconds": 1.0, "checks": []}}}))  # fmt: skip
    assert gpu_suite.main(["--device", "cpu", "--out", str(tmp_path), "--part", "machine"]) == 0
    parts = json.loads((tmp_path / "gpu_suite.json").read_text())["parts"]
    assert parts["machine"]["complete"] and parts["large"]["checked"] == 3
    assert "| large | 3 | 0 |" in (tmp_path / "summary.md").read_text()
    assert "machine: 3 checked, 0 differ" in capfd.readouterr().out


# ---- the parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["contract", "determinism", "graphs", "large", "speed"])
def test_parts_run(part: str, tmp_path, stand_ins) -> None:
    """Every check of a part on the CPU's kernels; graphs and streams are stand-ins."""
    found = run(part, options(tmp_path, "--operator", "flow_warp"))
    assert len(found) >= 1 and not any(found.values()), found


def test_a_wrong_kernel_is_found(tmp_path, stand_ins, monkeypatch) -> None:
    evaluate, step = gpu_checks.evaluate, gpu_speed.step

    def off(*args, **kwargs):
        outcome = evaluate(*args, **kwargs)
        outcome.value.mul_(1.01)
        return outcome

    monkeypatch.setattr(gpu_checks, "evaluate", off)
    given = options(tmp_path, "--operator", "flow_consistency")
    assert any("largest error" in str(f) for f in run("contract", given).values())
    calls = iter(range(10**6))
    monkeypatch.setattr(
        gpu_speed, "step", lambda *a: gpu_speed.Outcome(step(*a).value + next(calls) % 2 * 1e-3, {})
    )
    assert all("other bits" in str(f) for f in run("determinism", given).values())


def test_a_kernel_that_is_not_recorded_is_found(tmp_path, stand_ins, monkeypatch) -> None:
    """What a graph left out keeps its poison."""
    monkeypatch.setattr(fake_cuda.Graph, "replay", lambda self: None)
    found = run("graphs", options(tmp_path, "--operator", "flow_warp"))
    assert all("other bits" in str(f) for n, f in found.items() if n.endswith("graph"))


def test_wrong_kernels_get_no_time(tmp_path, stand_ins, monkeypatch) -> None:
    monkeypatch.setattr(gpu_speed, "cosine", lambda *_: 0.5)
    found = run("speed", options(tmp_path, "--operator", "flow_warp"))
    assert all("is wrong: cosine" in str(f) for f in found.values())


@pytest.mark.parametrize("against_compiled, wanted", [(False, 10.0), (True, 2.0)])
def test_steps_are_checked_and_judged(against_compiled: bool, wanted: float, monkeypatch) -> None:
    """The step itself is stood for: it takes seconds on a CPU."""
    asked = []

    class Steps:
        off = 0.0

        def __init__(self, *_) -> None: ...

        def whole(self, dtype, compiled: bool = False) -> steps.Pair:
            asked.append(compiled)
            return steps.Pair(lambda: torch.ones(2), lambda: torch.ones(2) + self.off)

    monkeypatch.setattr(steps, "Steps", Steps)
    row = gpu_speed.step_row(1, 4, torch.float32, against_compiled, "cpu")["step"]
    assert row["wanted"] == wanted and row["error"] == 0 and row["faster"] > 0
    assert asked == [False] + [True] * against_compiled
    assert "wanted" not in gpu_speed.step_row(8, 4, torch.float32, False, "cpu")["step"]
    Steps.off = 0.1
    with pytest.raises(AssertionError, match=r"relative error 0\.09"):
        gpu_speed.step_row(1, 4, torch.float32, False, "cpu")


def test_missing_backends_are_a_failure(tmp_path, monkeypatch) -> None:
    given = options(tmp_path)
    given.device = "cuda"
    monkeypatch.setattr(native, "PROBLEM", "for this test")
    with pytest.raises(AssertionError, match=r"cuda serves not: .*flow_warp.*for this test"):
        gpu_checks._backends(given)


CLEAN = "========= COMPUTE-SANITIZER\nsamples: 7 of 9 calls\n========= ERROR SUMMARY: 0 errors\n"
LIBRARY = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel<(int)512>+0x70
=========     by thread (0,0,0) in block (0,0,0)
samples: 9 of 9 calls
========= ERROR SUMMARY: 1 error
"""
OURS = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void gi::device::team_kernel<gi::device::Forward>+0x70
=========     by thread (0,0,0) in block (0,0,0)
samples: 9 of 9 calls
========= ERROR SUMMARY: 1 error
"""


def test_what_a_sanitizer_says() -> None:
    assert gpu_checks.judge_sanitizer(CLEAN, 0)["calls"] == 7
    assert gpu_checks.judge_sanitizer(LIBRARY, 9)["reports of libraries"] == 1
    with pytest.raises(AssertionError, match="Invalid __global__ read of size"):
        gpu_checks.judge_sanitizer(OURS, 9)
    with pytest.raises(RuntimeError, match=r"did not get to the end[\s\S]*Device not supported"):
        gpu_checks.judge_sanitizer("========= Error: Device not supported\n", 1)
    with pytest.raises(RuntimeError, match="exit code 1"):
        gpu_checks.judge_sanitizer(CLEAN, 1)


def test_samples_for_the_sanitizer(tmp_path, stand_ins, capsys) -> None:
    given = options(tmp_path, "--operator", "flow_consistency")
    assert gpu_checks.samples(given) == 0
    count = len(all_specs()["flow_consistency"].of_size("small"))
    assert f"samples: {count} of {count} calls" in capsys.readouterr().out


# ---- cases and report ------------------------------------------------------------------------------


def test_cases_are_well_formed() -> None:
    """Every case names an operator and can be drawn and run, smaller than it is."""
    names = [case.name for case in gpu_speed.cases()]
    assert len(set(names)) == len(names)
    assert {case.operator for case in gpu_speed.cases()} == set(all_specs()) - {"pixel_projection"}
    for case in gpu_speed.cases():
        assert case.target in ("copy", "best", "none")
        assert (case.target == "none") == (max(case.wanted) == 0) or case.served_by
        assert case.competitors
        arguments = gpu_speed.shrunk(case).make("cpu")
        if case.operator not in ("correlation_lookup", "fused_convolution"):
            with torch.no_grad():
                value = all_specs()[case.operator].function(**arguments)
            assert value.isfinite().all()


def test_measure_and_report(tmp_path) -> None:
    """A small case through timing, table, plot and rules."""
    pytest.importorskip("matplotlib")
    arguments = {"input": Argument((1, 8, 6, 6)), "flow": Argument((1, 2, 6, 6), storage=False)}
    case = gpu_speed.Case(
        "small", "flow_warp", arguments,
        {"grid_sample": gpu_speed.published.published_flow_warp, "refuses": _refuse},
        "copy", (0.85, 0.6),
    )  # fmt: skip
    ceilings = {"copy": 1e11, "product": 1e12}
    rows = [gpu_speed.measure(case, t, ["reference"], ceilings, "cpu") for t in (False, True)]
    assert rows[0]["bytes"] == 2 * 8 * 36 * 2 + 2 * 36 * 4
    assert rows[1]["bytes"] > 2 * rows[0]["bytes"] and rows[1]["backend"] == "reference"
    assert rows[0]["refused"] == {"refuses": "serves no such call"} and rows[0]["copy"] > 0
    assert rows[0]["seconds"]["reference"]["peak"] > 0
    results = gpu_suite.Results(tmp_path / "gpu_suite.json")
    results.begin("speed")
    for row in rows:
        results.add("speed", "small", None, {"row": row, "ceilings": ceilings}, 1.0)
    results.save()
    assert gpu_report.write(tmp_path) == ["summary.md", "roofline.png"]
    text = (tmp_path / "summary.md").read_text()
    assert "| small | forward |" in text and "| machine | not run |" in text


def _refuse(**_):
    raise RuntimeError("serves no such call")


def test_rules_that_measurements_support() -> None:
    def row(case: str, cuda: float, triton: float) -> dict:
        seconds = {"cuda": {"cold": cuda}, "triton": {"cold": triton}}
        about = {"case": case, "operator": case.split()[0], "training": False, "numbers": 9}
        return about | {"seconds": seconds}

    text = "\n".join(
        gpu_report.supported(
            [row("warp 1", 1, 2), row("warp 2", 1, 1.01), row("pool 1", 2, 1), row("mix 1", 1, 2),
             row("mix 2", 2, 1)]
        )
    )  # fmt: skip
    assert "warp: Rule('warp', ('cuda', 'triton')), by" in text
    assert "pool: Rule('pool', ('triton', 'cuda')), by" in text
    assert "mix: cuda and triton take turns" in text
    assert "nothing" in gpu_report.supported([])[0]


def test_the_definition_is_not_under_test(tmp_path) -> None:
    assert gi_kernels.available_backends("flow_warp")[-1:] != []
    assert all(b in ("triton", "cuda") for b in gpu_checks._wanted(options(tmp_path)))
