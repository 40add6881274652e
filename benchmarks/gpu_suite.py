"""Everything that only a GPU can tell: ``python -m benchmarks.gpu_suite [--part NAME ...] [--out FOLDER]``.

Parts, in the order in which they run; each takes under eight minutes:
    machine      versions, and the measured ceilings: a large copy, a large bfloat16 product
    contract     values and gradients of every sample against the definition in float64, by the specs' rule,
                 in every dtype and three layouts, with fresh memory full of NaN
    graphs       capture, replay on other numbers after poisoning the results; a side stream
    large        tensors of more than 2^31 elements
    determinism  the same bits every time, and what they cost
    sanitizer    compute-sanitizer (memcheck, initcheck, racecheck) over the small samples
    speed        the operators' targets: kernels and competitors, warm and cold caches
    steps        whole steps, by bench_end_to_end.py
    report       Markdown and a roofline plot from the JSON of the parts above

Each part writes FOLDER/<part>.json, by default in benchmarks/results/<device>/. The exit code is 1 if
anything differs. Needs what the tests need and nothing that is installed on the way.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: deterministic products

import torch

import gi_kernels
from benchmarks import gpu_speed
from gi_kernels import dispatch
from gi_kernels.spec import OperatorSpec, Sample, all_specs
from gi_kernels.testing import errors
from gi_kernels.testing.calls import Outcome, evaluate, map_tensors, oracle, tensors
from gi_kernels.testing.layouts import LAYOUTS, channels_last
from gi_kernels.testing.timing import seconds

HERE = Path(__file__).resolve().parent
TOOLS = ("memcheck", "initcheck", "racecheck")
LOW = (torch.bfloat16, torch.float16)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that are asked for; 1 if anything differs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--part", action="append", choices=[*PARTS, "samples"], help="may be repeated; all")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--operator", action="append", choices=sorted(all_specs()), help="only this one")
    parser.add_argument("--backend", action="append", choices=("triton", "cuda"), help="only this one")
    parser.add_argument("--device", default="cuda", help="cpu: under TRITON_INTERPRET=1, to try the script")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: torch sees no CUDA device", file=sys.stderr)
        return 2
    options.out = options.out or HERE / "results" / gpu_speed.device_name(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    wrong = 0
    for part in options.part or PARTS:
        try:
            result = PARTS[part](options) if part in PARTS else samples(options)
        except Exception:  # a part that breaks must not hide what the others find
            result = {"failures": [traceback.format_exc()]}
        failures = result.get("failures", [])
        (options.out / f"{part}.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
        print(f"{part}: {result.get('checked', 0)} checked, {len(failures)} differ", flush=True)
        for failure in failures[:20]:
            print("  " + str(failure)[-600:])
        wrong += len(failures)
    return 1 if wrong else 0


# ---- what runs -------------------------------------------------------------------------------------


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Versions and ceilings."""
    report = {"torch": torch.__version__, "python": platform.python_version(), "backends": {}}
    try:
        report["triton"] = __import__("triton").__version__
    except ImportError as error:
        report["triton"] = str(error)
    for name in sorted(dispatch.OPERATORS):
        report["backends"][name] = gi_kernels.available_backends(name, options.device)
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        report |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
        report |= {"memory": properties.total_memory, "cuda": torch.version.cuda}
    report["ceilings"] = gpu_speed.ceilings(options.device)
    report["checked"] = len(report["backends"])
    report["on the definition"] = [n for n, found in report["backends"].items() if found[0] == "reference"]
    return report


def contract(options: argparse.Namespace) -> dict[str, Any]:
    """Every small sample in every dtype and three layouts, the typical ones in bfloat16."""
    failures, checked = [], 0
    for spec, sample, backend in _calls(options, "small"):
        for dtype in spec.dtypes:
            known: dict[torch.dtype, tuple[Outcome, Outcome | None]] = {}
            for layout in ("contiguous", "channels_last", "sliced"):
                name = f"{spec.name} {sample.name} {backend} {dtype} {layout}"
                arguments = _arguments(sample, dtype, options.device, LAYOUTS[layout])
                checked += 1
                _try(failures, name, lambda: _hold(spec, sample, backend, dtype, arguments, known))  # noqa: B023
    for spec, sample, backend in _calls(options, "typical"):
        arguments = _arguments(sample, torch.bfloat16, options.device, channels_last)
        checked += 1
        name = f"{spec.name} {sample.name} {backend} bfloat16"
        _try(failures, name, lambda: _hold(spec, sample, backend, torch.bfloat16, arguments, {}))  # noqa: B023
    return {"checked": checked, "failures": failures}


def _hold(
    spec: OperatorSpec,
    sample: Sample,
    backend: str,
    dtype: torch.dtype,
    arguments: dict[str, Any],
    known: dict[torch.dtype, tuple[Outcome, Outcome | None]],
) -> None:
    """Raise unless a call keeps the operator's rule. ``known`` keeps what the definition gave."""
    with gi_kernels.backend(backend), deterministic(fill=True):
        actual = evaluate(spec.function, arguments, spec.differentiable)
    if dtype not in known:
        # Small samples are computed on the CPU, so that nothing but the kernel is under test.
        where = "cpu" if sample.size == "small" else actual.value.device
        there = map_tensors(lambda _, t: t.detach().to(where), arguments)
        raw = evaluate(spec.reference, there, spec.differentiable) if dtype in LOW else None
        known[dtype] = (oracle(spec, there, actual.value.dtype), raw)
    expected, raw = known[dtype]
    errors.check(spec, _to(actual, expected.value.device), expected, raw, sample.condition)


def graphs(options: argparse.Namespace) -> dict[str, Any]:
    """CUDA graphs and side streams: the kernels run where PyTorch says, and ask the host nothing."""
    failures, checked = [], 0
    for spec, sample, backend in _calls(options, "small", first=True):
        for dtype in (torch.bfloat16, torch.float32):
            name = f"{spec.name} {sample.name} {backend} {dtype}"
            checked += 2
            _try(failures, f"{name} graph", lambda: _replayed(spec, sample, backend, dtype))  # noqa: B023
            _try(failures, f"{name} side stream", lambda: _aside(spec, sample, backend, dtype))  # noqa: B023
    return {"checked": checked, "failures": failures}


def _replayed(spec: OperatorSpec, sample: Sample, backend: str, dtype: torch.dtype) -> None:
    arguments = sample.make(dtype, "cuda")
    with gi_kernels.backend(backend):
        run = lambda: gpu_speed.step(spec.function, arguments, spec.differentiable)  # noqa: E731
        graph, captured = gpu_speed.capture(run)
        for tensor in tensors(arguments).values():
            tensor.mul_(0.75)  # other numbers at the same place
        for _, tensor in captured.items():
            tensor.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        expected = run()
    _same_bits(captured, expected)


def _aside(spec: OperatorSpec, sample: Sample, backend: str, dtype: torch.dtype) -> None:
    arguments = sample.make(dtype, "cuda")
    with gi_kernels.backend(backend):
        expected = gpu_speed.step(spec.function, arguments, spec.differentiable)
        late = map_tensors(lambda _, t: torch.full_like(t, float("nan")), arguments)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # a kernel on another stream would read NaN
            for path, tensor in tensors(late).items():
                tensor.copy_(tensors(arguments)[path])
            actual = gpu_speed.step(spec.function, late, spec.differentiable)
        stream.synchronize()
    _same_bits(actual, expected)


def large(options: argparse.Namespace) -> dict[str, Any]:
    """Some channels of results and arguments of 2^31 and more elements against those channels alone."""
    failures, checked = [], 0
    C, H, W = 2**15 + 8, 256, 256
    some = torch.tensor([0, 1, C // 2, C - 2, C - 1], device=options.device)
    maps = torch.randn(1, 64, H, W, device=options.device).to(torch.bfloat16)
    maps = maps.repeat(1, C // 64 + 1, 1, 1)[:, :C].contiguous()
    flow = torch.randn(1, 2, H, W, device=options.device) * 4
    logits = torch.randn(1, 2, H, W, device=options.device).to(torch.bfloat16)
    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "flow_warp": lambda m: gi_kernels.flow_warp(m, flow),
        "window_pool": lambda m: gi_kernels.window_pool(logits, m, (8, 8)).movedim(3, 1),
    }
    for name, call in calls.items():
        for backend in _kernels(name, options):

            def check() -> None:
                with gi_kernels.backend(backend):  # noqa: B023
                    whole = call(maps)[:, some]  # noqa: B023
                    alone = call(maps[:, some])  # noqa: B023
                torch.testing.assert_close(whole, alone, rtol=0.02, atol=0.02)

            checked += 1
            _try(failures, f"{name} {backend}", check)
    return {"checked": checked, "failures": failures, "elements": maps.numel()}


def determinism(options: argparse.Namespace) -> dict[str, Any]:
    """Typical samples: the same bits every time, in both modes, and the price of the deterministic one."""
    failures, prices = [], {}
    for spec, sample, backend in _calls(options, "typical"):
        name = f"{spec.name} {sample.name} {backend}"
        arguments = _arguments(sample, torch.bfloat16, options.device, channels_last)

        def check() -> None:
            with gi_kernels.backend(backend):  # noqa: B023
                run = lambda: gpu_speed.step(spec.function, arguments, spec.differentiable)  # noqa: B023, E731
                plain = _times(run, options.device)
                with deterministic():
                    first, price = run(), _times(run, options.device)
                    for _ in range(5):
                        _same_bits(run(), first)
            prices[name] = {"plain": plain, "deterministic": price}  # noqa: B023

        _try(failures, name, check)
    return {"checked": len(prices) + len(failures), "failures": failures, "seconds": prices}


def sanitizer(options: argparse.Namespace) -> dict[str, Any]:
    """The small samples under compute-sanitizer, without PyTorch's pool of memory."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"checked": 0, "failures": ["compute-sanitizer was not found"]}
    failures, logs = [], {}
    for check in TOOLS:
        command = [
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "benchmarks.gpu_suite",
        ]
        command += ["--part", "samples", "--out", str(options.out)]
        for flag in ("operator", "backend"):
            for value in getattr(options, flag) or []:
                command += [f"--{flag}", value]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
        logs[check] = done.stdout[-2000:]
        if done.returncode:
            failures.append(
                f"{check}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
            )
    return {"checked": len(TOOLS), "failures": failures, "logs": logs}


def samples(options: argparse.Namespace) -> dict[str, Any]:
    """The small samples forward and backward, unchecked: what the sanitizer watches."""
    count = 0
    for spec, sample, backend in _calls(options, "small"):
        with gi_kernels.backend(backend):
            arguments = _arguments(sample, torch.bfloat16, options.device, channels_last)
            evaluate(spec.function, arguments, spec.differentiable)
        count += 1
    return {"checked": count}


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Times of the targets' cases. A wrong kernel gets none."""
    failures, rows = [], []
    ceilings = gpu_speed.ceilings(options.device)
    for case in gpu_speed.cases():
        if options.operator and case.operator not in options.operator:
            continue
        for training in (False, True)[: 1 + case.training]:
            backends = _kernels(case.operator, options)
            _try(
                failures,
                case.name,
                lambda: rows.append(gpu_speed.measure(case, training, backends, ceilings, options.device)),  # noqa: B023
            )
    return {"checked": len(rows), "failures": failures, "ceilings": ceilings, "rows": rows}


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """Whole steps."""
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/bench_end_to_end.py", "--benchmark-only"]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    failures = [done.stdout[-3000:]] if done.returncode else []
    return {"checked": 1, "failures": failures, "log": done.stdout[-3000:]}


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Markdown and plot."""
    written = gpu_speed.write_report(options.out, [p for p in PARTS if p != "report"])
    return {"checked": len(written), "written": written}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    f.__name__: f for f in (machine, contract, graphs, large, determinism, sanitizer, speed, steps, report)
}


# ---- helpers ---------------------------------------------------------------------------------------


def _calls(
    options: argparse.Namespace, size: str, first: bool = False
) -> Iterator[tuple[OperatorSpec, Sample, str]]:
    """Samples of a size, or the first per way of serving, on every backend with a kernel for them."""
    for spec in all_specs().values():
        if options.operator and spec.name not in options.operator:
            continue
        served = set()
        for sample in spec.of_size(size):
            if first and sample.served_by in served:
                continue
            served.add(sample.served_by)
            for backend in _kernels(sample.served_by or spec.name, options):
                yield spec, sample, backend


def _kernels(operator: str, options: argparse.Namespace) -> list[str]:
    """The backends under test that can run an operator."""
    wanted = options.backend or ("triton", "cuda")
    return [b for b in gi_kernels.available_backends(operator, options.device) if b in wanted]


def _arguments(
    sample: Sample, dtype: torch.dtype, device: str, arrange: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Any]:
    return map_tensors(lambda _, t: arrange(t), sample.make(dtype, device))


def _to(outcome: Outcome, device: torch.device) -> Outcome:
    return Outcome(outcome.value.to(device), {k: g.to(device) for k, g in outcome.gradients.items()})


def _same_bits(actual: Outcome, expected: Outcome) -> None:
    for (name, got), (_, wanted) in zip(actual.items(), expected.items(), strict=True):
        assert torch.equal(got, wanted), (
            f"{name}: other bits, by up to {errors.largest_error(got, wanted):.3g}"
        )


def _times(call: Callable[[], object], device: str) -> float:
    call()
    return median(seconds(call, device) for _ in range(10))


def _try(failures: list[str], name: str, check: Callable[[], object]) -> None:
    """Run a check; what it raises becomes a failure under its name."""
    try:
        check()
    except Exception as error:
        failures.append(f"{name}: {type(error).__name__}: {error}")


class deterministic:  # noqa: N801 - used like a function
    """Deterministic algorithms in a ``with`` block; ``fill`` fills fresh memory with NaN."""

    def __init__(self, fill: bool = False) -> None:
        self.fill = fill

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        self.filled = torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = self.fill

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before)
        torch.utils.deterministic.fill_uninitialized_memory = self.filled


if __name__ == "__main__":
    sys.exit(main())
