"""What is installed, what runs, and how to mend it: ``python -m gi_kernels.doctor``.

Exit code 0 when nothing is wrong, 1 otherwise. Kernels that were left out on request are not wrong.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import gi_kernels
from gi_kernels import dispatch, native

#: Builds the kernels anew: in the source tree if that is what runs, else by installing from it.
REINSTALL = (
    "python setup.py build_ext --inplace"
    if (Path(gi_kernels.__file__).parents[1] / "setup.py").exists()
    else "pip install --force-reinstall --no-deps ."
)
#: Versions of torch that the package is made for: at least the first, below the second.
TORCH_FROM, TORCH_BELOW = (2, 11), (2, 16)


@dataclass(frozen=True)
class Problem:
    """What is wrong, and the one line that mends it."""

    what: str
    mend: str


@dataclass
class Report:
    """What ``diagnose`` finds; ``str`` lays it out for a terminal."""

    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        lines = []
        for title, rows in self.sections.items():
            width = max(len(name) for name, _ in rows)
            lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
        lines += [f"note: {note}" for note in self.notes]
        for problem in self.problems:
            lines += [f"wrong: {problem.what}", f" mend: {problem.mend}"]
        return "\n".join(lines + (["Nothing is wrong."] if self.healthy else []))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: prints the report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="gi-kernels", description=__doc__.splitlines()[0])
    parser.add_argument(
        "command", nargs="?", choices=["doctor"], default="doctor", help="say what is installed"
    )
    parser.parse_args(arguments)
    report = diagnose()
    print(report)
    return 0 if report.healthy else 1


def diagnose() -> Report:
    """Look at the build, the versions, the machine and every operator."""
    report = Report()
    report.sections["Built"] = _built()
    report.sections["Running"] = _running()
    report.sections["Backends"] = _backends()
    _judge_kernels(report)
    _judge_torch(report)
    _judge_environment(report)
    _try_operators(report)
    return report


def _built() -> list[tuple[str, str]]:
    receipt = native.RECEIPT
    rows = [("gi-kernels", f"{gi_kernels.__version__} in {Path(gi_kernels.__file__).parent}")]
    if not receipt["built"]:
        return [*rows, ("kernels", f"none: {receipt['reason']}")]
    rows += [
        ("kernels", "C++ for the CPU" + (", with sanitizers" if receipt["sanitize"] else "")),
        ("torch", receipt["torch"]),
        ("python", receipt.get("python", "not recorded")),
        ("compiler", receipt["compiler"]),
        ("variants", receipt["variants"]),
        ("CUDA", _cuda_kernels(receipt)),
        ("date", receipt["date"]),
    ]
    return rows


def _cuda_kernels(receipt: dict[str, Any]) -> str:
    cuda = receipt["cuda"]
    if not cuda:
        return f"left out: {receipt['cuda_reason']}"
    architectures = f"sm_{', sm_'.join(cuda['architectures'].split())}"
    return f"{len(cuda['operators'])} operators by nvcc {cuda['version']} for {architectures}"


def _running() -> list[tuple[str, str]]:
    rows = [
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("numpy", _version("numpy")),
        ("triton", _version("triton")),
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads"),
        ("variant", _capability() or "none: there are no compiled kernels"),
    ]
    if torch.cuda.is_available():
        rows.append(("CUDA", f"{torch.version.cuda}, {torch.cuda.get_device_name()}"))
    else:
        built = torch.version.cuda
        rows.append(("CUDA", f"torch has CUDA {built}, but no device" if built else "torch has none"))
    return rows


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _backends() -> list[tuple[str, str]]:
    return [
        (name, "; ".join(f"{d}: {', '.join(dispatch.available_backends(name, d))}" for d in _devices()))
        for name in sorted(dispatch.OPERATORS)
    ]


def _judge_kernels(report: Report) -> None:
    receipt = native.RECEIPT
    if native.PROBLEM is None:
        if receipt["sanitize"]:
            report.notes.append("this build checks every memory access and is slow")
        if receipt.get("emulate"):
            report.notes.append("this build runs CUDA kernels on the CPU, thread by thread: for tests")
        return
    if receipt["built"]:
        report.problems.append(Problem(native.PROBLEM, REINSTALL))
        return
    reason = receipt["reason"]
    if "GI_KERNELS_CPP=0" in reason:
        report.notes.append(f"the kernels were left out on request; to build them: {REINSTALL}")
    else:
        report.problems.append(Problem(native.PROBLEM, _mend_build(reason)))


def _mend_build(reason: str) -> str:
    """The command that gets kernels built where ``reason`` stopped it."""
    others = [p.name for p in Path(native.__file__).parent.glob("_C.*.so")]
    if "compiler" in reason:
        return f"install a C++20 compiler (Debian: apt install g++), then {REINSTALL}"
    if "was not found" in reason:  # only where build isolation is off
        return f"pip install cmake ninja pybind11, then {REINSTALL}"
    if "torch" in reason and "failed" not in reason:
        return f"pip install torch, then {REINSTALL}"
    if "failed" in reason:
        return "pip install -v --force-reinstall --no-deps .  (shows the compiler's messages)"
    if others:  # the receipt could not be imported, though there is one
        return f"{REINSTALL}  (there is {', '.join(others)}, of another Python)"
    return f"{REINSTALL}  (this folder holds sources that were never built)"


def _mend_cuda(reason: str) -> str:
    """The command that gets CUDA kernels built where ``reason`` left them out."""
    if "has no CUDA" in reason:
        return f"install a torch with CUDA (pytorch.org), then {REINSTALL}"
    if "nvcc" in reason and "failed" not in reason:
        return f"install the CUDA toolkit {torch.version.cuda} with nvcc on the PATH, then {REINSTALL}"
    return f"GI_KERNELS_CUDA=1 {REINSTALL}  (says what is in the way)"


def _judge_torch(report: Report) -> None:
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found and not TORCH_FROM <= (int(found[1]), int(found[2])) < TORCH_BELOW:
        wanted = f"torch>={'.'.join(map(str, TORCH_FROM))},<{'.'.join(map(str, TORCH_BELOW))}"
        problem = f"torch {torch.__version__} is not one this version is made for ({wanted})"
        report.problems.append(Problem(problem, f"pip install '{wanted}', then {REINSTALL}"))


def _judge_environment(report: Report) -> None:
    wanted, used = os.environ.get("GI_KERNELS_CPU_CAPABILITY"), _capability()
    if wanted and used and wanted != used:
        problem = f"GI_KERNELS_CPU_CAPABILITY={wanted} is not known or not to be had here; {used} runs"
        report.problems.append(Problem(problem, "unset GI_KERNELS_CPU_CAPABILITY"))
    elif wanted and used:
        report.notes.append(f"GI_KERNELS_CPU_CAPABILITY={wanted} fixes the variant")
    backend = os.environ.get("GI_KERNELS_BACKEND", "auto")
    if backend != "auto":
        report.notes.append(f"GI_KERNELS_BACKEND={backend} fixes the backend")
    if torch.cuda.is_available() and native.RECEIPT["built"] and not native.RECEIPT["cuda"]:
        reason = native.RECEIPT["cuda_reason"]
        report.notes.append(f"there are no CUDA kernels: {reason}; to have them: {_mend_cuda(reason)}")


def _try_operators(report: Report) -> None:
    """Run one small call of every operator on every backend and device against the definition."""
    from gi_kernels.spec import all_specs
    from gi_kernels.testing.calls import map_tensors

    for name, spec in all_specs().items():
        sample = spec.of_size("small")[0]
        expected = spec.reference(**map_tensors(lambda _, t: t.double(), sample.make(torch.float32)))
        allowed = spec.tolerance[torch.float32] * max(1.0, expected.abs().max().item()) * sample.condition
        for device in _devices():
            arguments = sample.make(torch.float32, device)
            for backend in dispatch.available_backends(sample.served_by or name, device):
                try:
                    with dispatch.backend(backend):
                        error = (spec.function(**arguments).cpu() - expected).abs().max().item()
                except Exception as failure:  # whatever a broken build does is to be reported
                    error, why = float("inf"), f"raises {type(failure).__name__}: {failure}"
                else:
                    why = f"is off by {error:.2g}"
                if not error <= allowed:
                    where = "" if device == "cpu" else f" on {device}"
                    report.problems.append(Problem(f"{name} on {backend}{where} {why}", REINSTALL))


def _capability() -> str | None:
    if not native.RECEIPT["built"]:
        return None
    from gi_kernels import _C

    return _C.cpu_capability()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
