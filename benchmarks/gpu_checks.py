"""The parts of ``gpu_suite``: each a list of named checks, which raise where something differs."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import gi_kernels
from benchmarks import gpu_report, gpu_speed
from benchmarks.gpu_suite import BROKEN, MARK, ROOT, environment
from gi_kernels import dispatch, native
from gi_kernels.spec import OperatorSpec, Sample, all_specs
from gi_kernels.testing import errors
from gi_kernels.testing.calls import Outcome, evaluate, map_tensors, oracle, tensors
from gi_kernels.testing.layouts import LAYOUTS, channels_last
from gi_kernels.testing.timing import seconds

TOOLS = ("memcheck", "initcheck", "racecheck")
LOW = (torch.bfloat16, torch.float16)
#: Seconds of one sanitizer's process; calls that do not fit are counted.
SANITIZED = 140.0

#: What a sanitizer says that is not a fault of a kernel.
REMARKS = re.compile(
    r"COMPUTE-SANITIZER|\w+ SUMMARY|Program hit|Target application|Saved host|(Warning|Error): (?!Race)"
)
#: Kernels of PyTorch and of the libraries that it calls.
LIBRARIES = re.compile(r"at::|cub::|thrust::|cublas|cudnn|cutlass|nvjet|xmma|gemm|splitK|elementwise_kernel")

#: A name, and what raises where something differs; it may return something to be kept.
Check = tuple[str, Callable[[], dict[str, Any] | None]]


def run(options: argparse.Namespace) -> int:
    """Run the checks of a part from number ``skip`` on, in this process; tell the parent of each."""
    if options.child == "samples":
        return samples(options)
    torch.backends.cudnn.allow_tf32 = False  # products of float32 are to be those of the definition
    for name, check in itertools.islice(PARTS[options.child](options), options.skip, None):
        _tell(start=name)
        failure = result = None
        begin = time.monotonic()
        try:
            result = check()
            _settle(options.device)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        _tell(name=name, failure=failure, result=result, seconds=time.monotonic() - begin)
        if failure is not None and _broken(options.device):
            return BROKEN
    _tell(end=True)
    return 0


def _tell(**record: Any) -> None:
    print(MARK + json.dumps(record, default=str), flush=True)


def _settle(device: str) -> None:
    """Wait for the GPU, so that an error belongs to the check that made it."""
    if device == "cuda":
        torch.cuda.synchronize()


def _broken(device: str) -> bool:
    """Whether the device is of no use to this process any more."""
    try:
        _settle(device)
        torch.ones(1, device=device).sum().item()
    except Exception:
        return True
    return False


# ---- what must be there ----------------------------------------------------------------------------


def build(options: argparse.Namespace) -> Iterator[Check]:
    """The package in place, as it is checked out."""

    def in_place() -> dict[str, Any]:
        settings = environment() | {"GI_KERNELS_CPP": "1"}
        if options.device == "cuda" and "cuda" in _wanted(options):
            major, minor = torch.cuda.get_device_capability()
            settings |= {"GI_KERNELS_CUDA": "1", "GI_KERNELS_CUDA_ARCHITECTURES": f"{major}{minor}"}
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode:
            errors_in_log = [x for x in done.stdout.splitlines() if "error" in x.lower()]
            raise RuntimeError("\n".join([*errors_in_log[:5], *done.stdout.splitlines()[-15:]]))
        return {"took": time.monotonic() - begin}

    yield "build_ext --inplace", in_place


def machine(options: argparse.Namespace) -> Iterator[Check]:
    """Versions, backends and ceilings."""
    yield "versions", lambda: versions(options.device)
    yield "backends", partial(_backends, options)
    yield "ceilings", lambda: gpu_speed.ceilings(options.device)


def versions(device: str) -> dict[str, Any]:
    """What it runs on."""
    report: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    report["kernels"] = native.RECEIPT if native.PROBLEM is None else native.PROBLEM
    try:
        report["triton"] = __import__("triton").__version__
    except ImportError as error:
        report["triton"] = str(error)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        report |= {"device": properties.name, "multiprocessors": properties.multi_processor_count}
        report |= {"memory": properties.total_memory, "cuda": torch.version.cuda}
    return report


def _backends(options: argparse.Namespace) -> dict[str, Any]:
    """Every operator that has a kernel of a backend under test can run on it."""
    found = {n: gi_kernels.available_backends(n, options.device) for n in sorted(dispatch.OPERATORS)}
    if options.device == "cuda":
        for backend in _wanted(options):
            missing = {
                n: dispatch._refusal_on(o, backend, "cuda")
                for n, o in dispatch.OPERATORS.items()
                if backend in o.implementations and backend not in found[n]
            }
            assert not missing, f"{backend} serves not: {missing}"
    return {"backends": found}


def compile(options: argparse.Namespace) -> Iterator[Check]:
    """Triton kernels, on all cores at once: in the parts that follow they come out of Triton's cache."""
    from concurrent.futures import Future, ProcessPoolExecutor
    from multiprocessing import get_context

    if "triton" not in _wanted(options):
        return
    major, minor = torch.cuda.get_device_capability() if options.device == "cuda" else (9, 0)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the workers, which do not need it
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        jobs: dict[str, list[Future[int]]] = {}
        for spec in _specs(options):
            if "triton" in dispatch.OPERATORS[spec.name].implementations:
                jobs[spec.name] = [
                    pool.submit(gpu_speed.compile_sample, spec.name, s.name, dtype, 10 * major + minor)
                    for s in (*spec.of_size("small"), *spec.of_size("typical"))
                    for dtype in (spec.dtypes if s.size == "small" else (torch.bfloat16,))
                ]
        for name, own in jobs.items():
            yield name, lambda: {"calls": len(own), "kernels": sum(job.result() for job in own)}  # noqa: B023


# ---- what must be right ----------------------------------------------------------------------------


def contract(options: argparse.Namespace) -> Iterator[Check]:
    """Every small sample in every dtype and three layouts, the typical ones in bfloat16."""
    for spec, sample, backend in _calls(options, "small"):
        for dtype in spec.dtypes:
            known: dict[torch.dtype, tuple[Outcome, Outcome | None]] = {}
            for layout in ("contiguous", "channels_last", "sliced"):
                name = f"{spec.name} {sample.name} {backend} {_short(dtype)} {layout}"
                yield name, partial(_hold, options, spec, sample, backend, dtype, LAYOUTS[layout], known)
    for spec, sample, backend in _calls(options, "typical"):
        name = f"{spec.name} {sample.name} {backend} bfloat16"
        yield name, partial(_hold, options, spec, sample, backend, torch.bfloat16, channels_last, {})


def _hold(
    options: argparse.Namespace,
    spec: OperatorSpec,
    sample: Sample,
    backend: str,
    dtype: torch.dtype,
    arrange: Callable[[torch.Tensor], torch.Tensor],
    known: dict[torch.dtype, tuple[Outcome, Outcome | None]],
) -> None:
    """Raise unless a call keeps the operator's rule. ``known`` keeps what the definition gave."""
    arguments = _arguments(sample, dtype, options.device, arrange)
    with gi_kernels.backend(backend), deterministic(fill=True):
        actual = evaluate(spec.function, arguments, spec.differentiable)
    if dtype not in known:
        # Small samples are computed on the CPU, so that nothing but the kernel is under test.
        where = "cpu" if sample.size == "small" else actual.value.device
        there = map_tensors(lambda _, t: t.detach().to(where), arguments)
        raw = evaluate(spec.reference, there, spec.differentiable) if dtype in LOW else None
        known[dtype] = (oracle(spec, there, actual.value.dtype), raw)
    expected, raw = known[dtype]
    actual = _to(actual, expected.value.device)
    errors.check(spec, actual, expected, raw, sample.condition, backend not in spec.composed)


def graphs(options: argparse.Namespace) -> Iterator[Check]:
    """CUDA graphs and side streams: the kernels run where PyTorch says, and ask the host nothing."""
    for spec, sample, backend in _calls(options, "small", first=True):
        for dtype in (torch.bfloat16, torch.float32):
            name = f"{spec.name} {sample.name} {backend} {_short(dtype)}"
            yield f"{name} graph", partial(_replayed, spec, sample, backend, dtype, options.device)
            yield f"{name} side stream", partial(_aside, spec, sample, backend, dtype, options.device)


def _replayed(spec: OperatorSpec, sample: Sample, backend: str, dtype: torch.dtype, device: str) -> None:
    arguments = sample.make(dtype, device)
    with gi_kernels.backend(backend):
        run = lambda: gpu_speed.step(spec.function, arguments, spec.differentiable)  # noqa: E731
        graph, captured = gpu_speed.capture(run)
        for tensor in tensors(arguments).values():
            tensor.mul_(0.75)  # other numbers at the same place
        for _, tensor in captured.items():
            tensor.fill_(float("nan"))
        graph.replay()
        _settle(device)
        expected = run()
    _same_bits(captured, expected)


def _aside(spec: OperatorSpec, sample: Sample, backend: str, dtype: torch.dtype, device: str) -> None:
    arguments = sample.make(dtype, device)
    with gi_kernels.backend(backend):
        expected = gpu_speed.step(spec.function, arguments, spec.differentiable)
        late = map_tensors(lambda _, t: torch.full_like(t, float("nan")), arguments)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if device == "cuda":
                torch.cuda._sleep(20_000_000)  # cycles; a kernel on another stream would read NaN
            for path, tensor in tensors(late).items():
                tensor.copy_(tensors(arguments)[path])
            actual = gpu_speed.step(spec.function, late, spec.differentiable)
        torch.cuda.current_stream().wait_stream(stream)
        _settle(device)
    _same_bits(actual, expected)


def large(options: argparse.Namespace) -> Iterator[Check]:
    """Some channels of results and arguments of 2^31 and more elements against those channels alone."""
    C, side = (2**15 + 8, 256) if options.device == "cuda" else (24, 16)
    some = [0, 1, C // 2, C - 2, C - 1]
    made: dict[str, torch.Tensor] = {}

    def maps(layout: str) -> torch.Tensor:
        if layout not in made:
            made.clear()  # they take gigabytes
            shape = (1, side, side, C) if layout == "channels last" else (1, C, side, side)
            drawn = torch.empty(shape, dtype=torch.bfloat16, device=options.device)
            for part in drawn.view(-1).split(2**28):
                part.normal_()
            made[layout] = drawn.movedim(-1, 1) if layout == "channels last" else drawn
        return made[layout]

    flow = 4 * torch.randn(1, 2, side, side, device=options.device)
    logits = torch.randn(1, 2, side, side, device=options.device).to(torch.bfloat16)

    def warp(m: torch.Tensor) -> torch.Tensor:
        return gi_kernels.flow_warp(m, flow)

    def warp_backward(m: torch.Tensor) -> torch.Tensor:
        m = m.detach().requires_grad_()
        return torch.autograd.grad(gi_kernels.flow_warp(m, flow), m, m.detach())[0]

    def pool(m: torch.Tensor) -> torch.Tensor:
        return gi_kernels.window_pool(logits, m, (8, 8)).movedim(3, 1)

    def compare(call: Callable[[torch.Tensor], torch.Tensor], layout: str, backend: str) -> dict[str, Any]:
        whole = maps(layout)
        with gi_kernels.backend(backend):
            result = call(whole)[:, some]
            alone = call(whole[:, some].contiguous())
        torch.testing.assert_close(result, alone, rtol=0.02, atol=0.02)
        return {"elements": whole.numel()}

    calls = {"flow_warp": (warp, warp_backward), "window_pool": (pool,)}
    for layout in ("contiguous", "channels last"):
        for operator, functions in calls.items():
            for call in functions if not options.operator or operator in options.operator else ():
                for backend in kernels(operator, options):
                    name = f"{operator} {call.__name__} {layout} {backend}"
                    yield name, partial(compare, call, layout, backend)


def determinism(options: argparse.Namespace) -> Iterator[Check]:
    """Typical samples: the same bits every time, in both modes, and the price of the deterministic one."""
    for spec, sample, backend in _calls(options, "typical"):
        yield f"{spec.name} {sample.name} {backend}", partial(_repeated, options, spec, sample, backend)


def _repeated(
    options: argparse.Namespace, spec: OperatorSpec, sample: Sample, backend: str
) -> dict[str, Any]:
    arguments = _arguments(sample, torch.bfloat16, options.device, channels_last)
    with gi_kernels.backend(backend):
        run = lambda: gpu_speed.step(spec.function, arguments, spec.differentiable)  # noqa: E731
        plain, first = _times(run, options.device), run()
        for _ in range(3):
            _same_bits(run(), first)
        with deterministic():
            first, price = run(), _times(run, options.device)
            for _ in range(3):
                _same_bits(run(), first)
    return {"plain": plain, "deterministic": price}


def sanitizer(options: argparse.Namespace) -> Iterator[Check]:
    """The small samples under compute-sanitizer, without PyTorch's pool of memory."""
    for tool in TOOLS:
        yield tool, partial(_sanitized, tool, options)


def _sanitized(tool: str, options: argparse.Namespace) -> dict[str, Any]:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    assert Path(program).exists(), "compute-sanitizer was not found"
    command = [program, "--tool", tool, "--error-exitcode", "9"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []  # PyTorch tries and looks
    command += [sys.executable]
    command += ["-m", "benchmarks.gpu_suite", "--child", "samples", "--device", options.device]
    command += ["--seconds", str(SANITIZED)]
    for flag in ("operator", "backend"):
        for value in getattr(options, flag) or []:
            command += [f"--{flag}", value]
    settings = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return judge_sanitizer(done.stdout, done.returncode)


def judge_sanitizer(log: str, code: int) -> dict[str, Any]:
    """What a sanitizer said; raises if one of our kernels is at fault, or if it did not get to the end.

    Kernels of libraries are told apart by their names: theirs are counted.
    """
    finished = re.search(r"samples: (\d+) of (\d+) calls", log)
    reports = re.split(r"^========= (?=\S)", log, flags=re.MULTILINE)[1:]
    faults = [r for r in reports if not REMARKS.match(r)]
    ours = [r for r in faults if not LIBRARIES.search(r)]
    if ours:
        raise AssertionError(f"{len(ours)} reports, the first: {ours[0][:1500]}")
    if not finished:
        raise RuntimeError(f"did not get to the end, exit code {code}:\n{log[-1500:]}")
    if code not in (0, 9) or (code == 9 and not faults):
        raise RuntimeError(f"exit code {code}:\n{log[-1500:]}")
    return {"calls": int(finished[1]), "of": int(finished[2]), "reports of libraries": len(faults)}


def samples(options: argparse.Namespace) -> int:
    """The small samples forward and backward, unchecked: what the sanitizer watches. First samples first."""
    end = time.monotonic() + options.seconds
    numbered = [
        (spec.of_size("small").index(sample), spec, sample, backend)
        for spec, sample, backend in _calls(options, "small")
    ]
    numbered.sort(key=lambda call: call[0])
    count = 0
    for _, spec, sample, backend in numbered:
        if time.monotonic() > end:
            break
        with gi_kernels.backend(backend):
            arguments = _arguments(sample, torch.bfloat16, options.device, channels_last)
            evaluate(spec.function, arguments, spec.differentiable)
        _settle(options.device)
        count += 1
    print(f"samples: {count} of {len(numbered)} calls", flush=True)
    return 0


# ---- what must be fast -----------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> Iterator[Check]:
    """Times of the operators. A wrong kernel gets none."""
    ceilings: dict[str, float] = {}

    def row(case: gpu_speed.Case, training: bool) -> dict[str, Any]:
        if not ceilings:
            ceilings.update(gpu_speed.ceilings(options.device))
        found = kernels(case.served_by or case.operator, options)
        measured = gpu_speed.measure(case, training, found, ceilings, options.device)
        print("  " + gpu_report.line(measured), flush=True)
        return {"row": measured, "ceilings": ceilings}

    for case in gpu_speed.cases():
        if options.operator and case.operator not in options.operator:
            continue
        if options.device != "cuda":
            case = gpu_speed.shrunk(case)
        for training in (False, True)[: 1 + case.training]:
            yield f"{case.name}{' training' if training else ''}", partial(row, case, training)


def steps(options: argparse.Namespace) -> Iterator[Check]:
    """Whole steps against the published ones in eager PyTorch."""
    for batch, references in ((1, 4), (1, 2), (8, 4), (8, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"step B{batch} T{references} 256x256 {_short(dtype)}"
            yield name, partial(gpu_speed.step_row, batch, references, dtype, False, options.device)


def compiled(options: argparse.Namespace) -> Iterator[Check]:
    """The step of the target against the published one under ``torch.compile``, tuned: takes minutes."""
    yield (
        "step B1 T4 256x256 against compiled",
        partial(gpu_speed.step_row, 1, 4, torch.bfloat16, True, options.device),
    )


def report(options: argparse.Namespace) -> Iterator[Check]:
    """Markdown and plot."""
    yield "summary and plot", lambda: {"written": gpu_report.write(options.out)}


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Check]]] = {
    f.__name__: f
    for f in (
        *(build, machine, compile, contract, speed, graphs),
        *(steps, determinism, large, sanitizer, compiled, report),
    )
}  # fmt: skip


# ---- helpers ---------------------------------------------------------------------------------------


def _wanted(options: argparse.Namespace) -> tuple[str, ...]:
    return tuple(options.backend or ("triton", "cuda"))


def _specs(options: argparse.Namespace) -> list[OperatorSpec]:
    return [s for s in all_specs().values() if not options.operator or s.name in options.operator]


def _calls(
    options: argparse.Namespace, size: str, first: bool = False
) -> Iterator[tuple[OperatorSpec, Sample, str]]:
    """Samples of a size, or the first per way of serving, on every backend with a kernel for them."""
    for spec in _specs(options):
        served = set()
        for sample in spec.of_size(size):  # type: ignore[arg-type]
            if first and sample.served_by in served:
                continue
            served.add(sample.served_by)
            for backend in kernels(sample.served_by or spec.name, options):
                yield spec, sample, backend


def kernels(operator: str, options: argparse.Namespace) -> list[str]:
    """The backends under test that can run an operator."""
    return [b for b in gi_kernels.available_backends(operator, options.device) if b in _wanted(options)]


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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
