"""Options of the benchmarks, and the fixture that checks, times and records a case."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # last, so that an installed gi_kernels is measured, not its source
    sys.path.append(str(ROOT))

from benchmarks.cases import Case, Contest  # noqa: E402
from gi_kernels.testing import errors, machine, memory, timing  # noqa: E402

#: Seconds of timing per case, calibration not included. All together stay under four minutes.
BUDGET = {"small": 0.06, "typical": 0.4, "large": 0.3}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gi-kernels benchmarks")
    group.addoption("--device", help="cpu or cuda; by default cuda where there is one")
    group.addoption("--threads", type=int, help="of PyTorch; by default one per core of this process")
    group.addoption("--effort", type=float, default=1.0, help="factor on the timing budget of each case")
    group.addoption(
        "--compile-all",
        action="store_true",
        help="run the torch.compile contender in every case, not only forward in float32 at the typical size",
    )
    group.addoption(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "floors: the speed that must be reached, by the latest results")
    torch.set_num_threads(config.getoption("--threads") or machine.cores())
    chosen = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    config.stash[_RESULTS] = {"device": torch.device(chosen), "cases": [], "deselected": 0}


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash[_RESULTS]["deselected"] += len(items)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write what was measured.

    ``results.json`` for a whole run that passed, ``end_to_end.json`` for one of the steps, else
    ``partial.json``.
    """
    state = session.config.stash[_RESULTS]
    if not state["cases"]:
        return
    whole = exitstatus == 0 and not state["deselected"] and _is_whole(session.config)
    device = state["device"]
    about = state["machine"]
    if device.type == "cuda":
        about["gpu_after"] = machine.gpu_state(device)
    found = {
        "machine": about,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "effort": session.config.getoption("--effort"),
        "roofline": state["roofline"],
        "cases": state["cases"],
    }
    folder = session.config.getoption("--results") / about["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    steps = exitstatus == 0 and all(case["suite"] == "end_to_end" for case in state["cases"])
    file = folder / ("results.json" if whole else "end_to_end.json" if steps else "partial.json")
    file.write_text(json.dumps(found, indent=1) + "\n")
    state["file"] = file


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    file = config.stash[_RESULTS].get("file")
    if file is not None:
        terminalreporter.write_line(f"results: {file} (python -m benchmarks.report makes table and plot)")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the cases run."""
    return request.config.stash[_RESULTS]["device"]


@pytest.fixture
def contest(request: pytest.FixtureRequest, benchmark: Any, device: torch.device) -> Callable[[Case], None]:
    """Check a case, time its contenders in turns, measure their memory, and record it all.

    ``benchmark`` times ours; in the setup of each of its rounds the others run and are timed by the
    same clock, so that a disturbance of the machine meets all of them.
    """
    state = request.config.stash[_RESULTS]
    if "machine" not in state:
        state["machine"] = machine.describe(device)
        state["roofline"] = machine.roofline(device)
    effort = request.config.getoption("--effort")
    compile_all = request.config.getoption("--compile-all")

    def run(case: Case) -> None:
        kind = (case.size, case.dtype, case.layout, case.training)
        compiled = compile_all or kind == ("typical", "float32", "contiguous", False)
        made = case.build(case, device, compiled)
        error = made.verify()
        calls = {
            name: contender.training() if case.training else contender.forward()
            for name, contender in made.contenders.items()
        }
        peaks, expected = _first_calls(case, calls, device)
        times = _time(benchmark, case, calls, expected, device, BUDGET[case.size] * effort)
        entry = _entry(case, made, error, times, state["roofline"])
        for name, peak in peaks.items():
            entry["contenders"][name]["peak_bytes"] = peak
        if device.type == "cuda":
            gpu = machine.gpu_state(device)
            entry["gpu"] = {k: gpu[k] for k in ("sm_clock", "temperature") if k in gpu}
        benchmark.extra_info.update(entry)
        state["cases"].append(entry)

    return run


def _first_calls(
    case: Case, calls: dict[str, Callable[[], Any]], device: torch.device
) -> tuple[dict[str, int], dict[str, float]]:
    """Peak memory of one call of each contender, which warms it up too, and about how long it takes."""
    peaks, expected, gradients = {}, {}, {}
    for name, call in calls.items():
        kept: list[Any] = []

        def once(call: Callable[[], Any] = call, kept: list[Any] = kept) -> None:
            kept.append(call())

        if device.type == "cuda" or name == "compiled":
            call()  # compiles, and allocates workspaces that stay
        begin = time.perf_counter()
        peaks[name] = memory.peak_extra_bytes(once, device)
        expected[name] = time.perf_counter() - begin
        if expected[name] < 0.1:  # mostly the profiler's own time
            kept.clear()
            expected[name] = timing.seconds(once, device)
        gradients[name] = kept[0]
    if case.training and case.dtype == "float32" and "published" in calls:
        _check_gradients(gradients["ours"], gradients["published"])
    return peaks, expected


def _check_gradients(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor | None]) -> None:
    """Ours point where the published ones do: at every size, for inputs and parameters alike."""
    largest = max(float(g.norm()) for g in theirs if g is not None)
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if other is None or float(other.norm()) < 1e-4 * largest:  # zero but for rounding
            continue
        similarity = errors.cosine(mine, other)
        assert similarity > 0.99, f"gradient {i}: cosine {similarity:.4f} with the published one"


def _time(
    benchmark: Any,
    case: Case,
    calls: dict[str, Callable[[], object]],
    expected: dict[str, float],
    device: torch.device,
    budget: float,
) -> dict[str, timing.Times]:
    taken: dict[str, list[float]] = {name: [] for name in calls}

    def others() -> None:
        for name, call in calls.items():
            if name != "ours":
                taken[name].append(timing.warm_seconds(call, device, expected[name]))
        if expected["ours"] < timing.SHORT:
            calls["ours"]()

    benchmark.group = case.id
    benchmark.pedantic(
        lambda: taken["ours"].append(timing.seconds(calls["ours"], device)),
        setup=others,
        rounds=timing.rounds_for(expected, budget, fewest=2 if case.size == "large" else 3),
    )
    return {name: timing.Times(tuple(t)) for name, t in taken.items()}


def _entry(
    case: Case, made: Contest, error: float, times: dict[str, timing.Times], roofline: dict[str, float]
) -> dict[str, Any]:
    ours = times["ours"].median
    entry: dict[str, Any] = {
        "id": case.id,
        **{k: getattr(case, k) for k in ("suite", "name", "sample", "size", "layout", "dtype", "training")},
        "backend": made.backend,
        "relative_error": error,
        "contenders": {
            name: {
                "median": t.median,
                "fastest": min(t.seconds),
                "spread": t.spread,
                "rounds": len(t.seconds),
            }
            for name, t in times.items()
        },
        **made.notes,
    }
    if made.flops is not None and made.bytes is not None and not case.training:
        least = max(
            made.bytes / roofline["copy_bytes_per_second"], made.flops / roofline[f"{case.dtype}_flops"]
        )
        entry |= {"flops": made.flops, "bytes": made.bytes, "roofline_fraction": least / ours}
    return entry


def _is_whole(config: pytest.Config) -> bool:
    """Whether all files of the folder were asked for."""
    here = Path(__file__).parent
    return all("::" not in a and (ROOT / a).resolve() in (here, ROOT) for a in config.args)


_RESULTS: pytest.StashKey[dict[str, Any]] = pytest.StashKey()
