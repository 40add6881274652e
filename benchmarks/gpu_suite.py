"""Everything that only a GPU can tell: ``python -m benchmarks.gpu_suite [--part NAME ...] [--out FOLDER]``.

Parts, in the order in which they run, what is worth most first; each ends within eight minutes:
    build        the package in place, CUDA kernels for this GPU
    machine      versions, what serves each operator, ceilings: a large copy, a large bfloat16 product
    compile      every Triton kernel of the samples, on all cores, into Triton's cache
    contract     values and gradients of every sample against the definition in float64, by the specs' rule,
                 in every dtype and three layouts, with fresh memory full of NaN
    speed        the operators' targets: kernels and competitors, warm and cold caches, peak memory
    graphs       capture, replay on other numbers after poisoning the results; a side stream
    steps        whole steps against the published ones in eager PyTorch
    determinism  the same bits every time, and what they cost
    large        tensors of more than 2^31 elements
    sanitizer    compute-sanitizer (memcheck, initcheck, racecheck) over the small samples
    compiled     whole steps against the published ones under torch.compile(mode="max-autotune")
    report       summary.md and roofline.png; always made

Every part is a list of checks and runs in a process of its own. A check that fails does not stop the next
one. Where one breaks the device or the process, or does not answer, that is its failure, and a new process
goes on behind it. FOLDER/gpu_suite.json, by default in benchmarks/results/<device>/, is written as results
come in; parts of an earlier run that are not run again stay in it. The exit code is 1 if anything differs
or was not run. Needs what the tests need and nothing that is installed on the way.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Most seconds of a part, and of one of its checks.
LIMITS: dict[str, tuple[float, float]] = {
    "build": (300, 300),
    "machine": (90, 60),
    "compile": (240, 200),
    "contract": (460, 60),
    "speed": (460, 90),
    "graphs": (240, 60),
    "steps": (300, 120),
    "determinism": (150, 60),
    "large": (150, 60),
    "sanitizer": (460, 200),
    "compiled": (470, 460),
    "report": (90, 60),
}
#: A line that starts with it is a record of the process that runs a part; others are shown.
MARK = "#record "
#: Exit code of a process whose device does not work any more.
BROKEN = 17
MOST_PROCESSES = 12
SHOWN = 20


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that are asked for; 1 if anything differs or is missing."""
    options = parser().parse_args(arguments)
    if options.child:
        from benchmarks import gpu_checks

        return gpu_checks.run(options)
    device = describe(options.device)
    if device is None:
        print("gpu_suite: torch sees no CUDA device", file=sys.stderr)
        return 2
    options.out = (options.out or ROOT / "benchmarks" / "results" / device).resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "gpu_suite.json")
    end = time.monotonic() + options.seconds
    asked = [p for p in LIMITS if p in (options.part or LIMITS)]
    for part in [*asked, *(["report"] if "report" not in asked else [])]:
        print(f"== {part}", flush=True)
        results.begin(part)
        run_part(part, options, results, end)
        show(part, results.parts[part])
    wrong = [p for p in asked if results.parts[p]["failures"] or not results.parts[p]["complete"]]
    print(f"gpu_suite: {'wrong or missing in ' + ', '.join(wrong) if wrong else 'everything agrees'}")
    return 1 if wrong else 0


def parser() -> argparse.ArgumentParser:
    """The options, also those of the processes that run a part."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__.split("\n")[0])
    operators = sorted(f.parent.name for f in ROOT.glob("gi_kernels/ops/*/spec.py"))
    made.add_argument("--part", action="append", choices=list(LIMITS), help="may be repeated; all")
    made.add_argument("--out", type=Path, help="folder of the results")
    made.add_argument("--operator", action="append", choices=operators, help="only this one")
    made.add_argument("--backend", action="append", choices=("triton", "cuda"), help="only this one")
    made.add_argument("--seconds", type=float, default=1e9, help="for everything; what is left is not run")
    made.add_argument("--device", default="cuda", help="cpu: under TRITON_INTERPRET=1, to try the script")
    made.add_argument("--child", choices=[*LIMITS, "samples"], help=argparse.SUPPRESS)
    made.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    return made


class Results:
    """``gpu_suite.json``: every part's checks as they come in."""

    def __init__(self, file: Path) -> None:
        self.file, self.saved = file, 0.0
        known = json.loads(file.read_text()) if file.exists() else {}
        self.parts: dict[str, dict[str, Any]] = known.get("parts", {})

    def begin(self, part: str) -> None:
        """Forget what an earlier run found."""
        self.parts[part] = {"complete": False, "checked": 0, "failures": [], "seconds": 0.0, "checks": []}

    def add(self, part: str, name: str, failure: str | None, result: Any, seconds: float) -> None:
        """One check; written at most every two seconds."""
        into = self.parts[part]
        into["checked"] += 1
        if failure is not None:
            into["failures"].append(f"{name}: {failure}")
        if result is not None:
            into["checks"].append({"name": name, "seconds": round(seconds, 3), **result})
        if time.monotonic() - self.saved > 2:
            self.save()

    def save(self) -> None:
        """Replace the file."""
        self.saved = time.monotonic()
        fresh = self.file.with_name(self.file.name + ".new")
        fresh.write_text(json.dumps({"parts": self.parts}, indent=1, default=str) + "\n")
        fresh.replace(self.file)


def run_part(part: str, options: argparse.Namespace, results: Results, end: float) -> None:
    """Run a part's checks in as many processes as it takes, until its time is up."""
    begin, (limit, patience) = time.monotonic(), LIMITS[part]
    deadline = min(end, begin + limit)
    into, skip = results.parts[part], 0
    try:
        for _ in range(MOST_PROCESSES):
            if time.monotonic() >= deadline:
                into["failures"].append(
                    f"not run or not finished: the time of {limit:.0f} s, or of all, was up"
                )
                return
            state = _one_process(part, skip, options, results, deadline, patience)
            if state.ended:
                into["complete"] = True
                return
            if state.running is None and state.code != BROKEN:
                into["failures"].append(f"{state.why}\n{state.tail}")
                return
            if state.running is not None:
                results.add(part, state.running, f"{state.why}\n{state.tail}", None, 0.0)
            skip = state.done
        into["failures"].append(f"stopped: {MOST_PROCESSES} processes broke")
    finally:
        into["seconds"] = round(time.monotonic() - begin, 1)
        results.save()


@dataclass
class State:
    """How far a process has come."""

    done: int  # checks of the part, those of earlier processes included
    running: str | None = None
    ended: bool = False
    code: int | None = None
    why: str = ""
    tail: str = ""  # the last lines that it printed


def _one_process(
    part: str, skip: int, options: argparse.Namespace, results: Results, deadline: float, patience: float
) -> State:
    state, last = State(skip), []
    for line in watch(command_of(part, skip, options), deadline, patience, state):
        if not line.startswith(MARK):
            print(line, flush=True)
            last = [*last[-14:], line]
            continue
        record = json.loads(line.removeprefix(MARK))
        if "start" in record:
            state.running = record["start"]
        elif "end" in record:
            state.ended = True
        else:
            results.add(part, *(record[k] for k in ("name", "failure", "result", "seconds")))
            state.done, state.running = state.done + 1, None
    if state.running is not None:
        state.done += 1
    state.tail = "\n".join(last)
    return state


def command_of(part: str, skip: int, options: argparse.Namespace) -> list[str]:
    """The process that runs the checks of a part from number ``skip`` on."""
    command = [sys.executable, "-u", "-m", "benchmarks.gpu_suite", "--child", part, "--skip", str(skip)]
    command += ["--out", str(options.out), "--device", options.device]
    for flag in ("operator", "backend"):
        for value in getattr(options, flag) or []:
            command += [f"--{flag}", value]
    return command


def watch(command: list[str], deadline: float, patience: float, state: State) -> Iterator[str]:
    """Lines of a process, which is ended at the deadline, or if it is silent for longer than ``patience``."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    try:
        while True:
            left = min(patience, deadline - time.monotonic())
            try:
                line = lines.get(timeout=max(left, 0.01))
            except queue.Empty:
                state.why = f"no answer for {left:.0f} s: ended"
                return
            if line is None:
                state.code = process.wait()
                state.why = f"the process ended with exit code {state.code}"
                return
            yield line
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own processes too
        process.wait()


def environment() -> dict[str, str]:
    """Tools beside the interpreter and of CUDA on the path; deterministic products."""
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    package = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return os.environ | {
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": package,
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
    }


def describe(device: str) -> str | None:
    """The device as a folder's name (``h200``), asked of a process of its own; None if there is none."""
    code = f"from benchmarks.gpu_speed import device_name; print('device', device_name({device!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    names = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("device ")]
    if not names:
        print(done.stderr[-1000:], file=sys.stderr)
    return names[0] if names else None


def show(part: str, found: dict[str, Any]) -> None:
    """A part's counts and first failures."""
    state = "" if found["complete"] else ", not finished"
    print(
        f"{part}: {found['checked']} checked, {len(found['failures'])} differ{state}, "
        f"{found['seconds']:.0f} s",
        flush=True,
    )
    for failure in found["failures"][:SHOWN]:
        print("  " + str(failure)[-600:].replace("\n", "\n    "), flush=True)


if __name__ == "__main__":
    sys.exit(main())
