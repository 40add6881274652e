"""Compiles and links the CUDA kernels without a GPU: ``make cuda-build``, ``make cuda-record``.

Fetches a torch with CUDA (headers and libraries; nothing is installed), builds the library for all
architectures against it, and holds what ptxas says of every kernel against ``cuda_budget.json``. With
``--record`` that is written to ``cuda_build.json``, which ``tests/test_cuda.py`` holds against the budget
and the sources, so that it cannot go stale.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "cuda"
RECORD = HERE / "cuda_build.json"
BUDGET = HERE / "cuda_budget.json"  # most registers of each body, over all types and architectures
TORCH = "2.11.0"
LIBRARIES = ("libc10.so", "libc10_cuda.so", "libtorch_cpu.so", "libtorch_cuda.so", "libgomp.so.1")
DEVICE_HEADERS = ("bilinear", "contributors", "device", "device_windows", "numbers", "platform")


def main() -> int:
    """Fetch, build, judge, record; the exit code."""
    if shutil.which("nvcc") is None:
        print("cuda-build: nvcc was not found; install the CUDA toolkit")
        return 1
    torch = fetch()
    sources = digest()
    started = time.monotonic()
    log = build(torch)
    seconds = time.monotonic() - started
    kernels = parse(log)
    record = {
        "nvcc": re.search(r"release ([\d.]+)", output("nvcc", "--version"))[1],
        "torch": re.search(r"__version__ = '(.+)'", (torch / "version.py").read_text())[1],
        "seconds": round(seconds),
        "processors": os.cpu_count(),
        "sources": sources,
        "kernels": kernels,
    }
    if "--record" in sys.argv[1:]:
        RECORD.write_text(layout(record))
    faults = judge(kernels)
    print(f"cuda-build: compiled and linked {len(kernels)} kernels in {seconds:.0f} s", *faults, sep="\n")
    return 1 if faults else 0


def judge(kernels: dict[str, dict[str, list[int]]]) -> list[str]:
    """What is wrong: local memory, too many registers, a body that one of budget and build lacks."""
    budget = json.loads(BUDGET.read_text())
    faults, used = [], {}
    for name, architectures in kernels.items():
        body = name.split("<")[0]
        for architecture, (registers, stack, stores, loads) in architectures.items():
            used[body] = max(used.get(body, 0), registers)
            if stack or stores or loads:
                faults.append(
                    f"{name}: sm_{architecture}: {stack} bytes of stack, {stores} and {loads} of spills"
                )
    for body in sorted(set(used) | set(budget)):
        if not used.get(body, 999) <= budget.get(body, 0):
            faults.append(f"{body}: {used.get(body)} registers, allowed are {budget.get(body)}")
    return faults


def fetch() -> Path:
    """The torch package of a wheel with CUDA: what compiling and linking need of it."""
    torch = WORK / f"torch-{TORCH}" / "torch"
    if (torch / "complete").exists():
        return torch
    download = WORK / "wheel"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"torch=={TORCH}", "-d", download],
        check=True,
    )
    (wheel,) = download.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            library = name.startswith("torch/lib/") and Path(name).name in LIBRARIES
            if library or name.startswith("torch/include/") or name == "torch/version.py":
                archive.extract(name, torch.parent)
    wheel.unlink()
    (torch / "complete").touch()
    return torch


def build(torch: Path) -> str:
    """Configure and build from nothing; the log."""
    import pybind11

    tree = WORK / "build"
    shutil.rmtree(tree, ignore_errors=True)
    configure = [
        "cmake", "-S", ROOT, "-B", tree, "-G", "Ninja", f"-DGI_PYTHON={sys.executable}",
        f"-DGI_TORCH={torch}", f"-DGI_PYBIND11_INCLUDE={pybind11.get_include()}",
        "-DGI_CUDA=ON", "-DGI_CUDA_RESOURCES=ON", "-DGI_PORTABLE_ONLY=ON", "-DGI_TESTS=OFF",
        "-DCMAKE_SHARED_LINKER_FLAGS=-Wl,--no-undefined",  # linking is to say what is missing
    ]  # fmt: skip
    return output(*configure) + output("cmake", "--build", tree, "-j", os.cpu_count() or 1)


def parse(log: str) -> dict[str, dict[str, list[int]]]:
    """Per kernel and architecture: registers, bytes of stack, bytes of spill stores and loads."""
    kernels: dict[str, dict[str, list[int]]] = {}
    local = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
    operator = name = architecture = ""
    frame = [0, 0, 0]
    for line in output("c++filt", stdin=log).splitlines():
        if found := re.search(r"csrc/(\w+)/cuda\.cu", line):
            operator = found[1]
        elif found := re.search(r"Compiling entry function '(.+)' for 'sm_(\d+)'", line):
            name, architecture = short(found[1]), found[2]
        elif found := local.search(line):
            frame = [int(n) for n in found.groups()]
        elif found := re.search(r"Used (\d+) registers", line):
            kernels.setdefault(f"{operator}/{name}", {})[architecture] = [int(found[1]), *frame]
    return dict(sorted(kernels.items()))


def short(kernel: str) -> str:
    """A body's name and its template arguments."""
    body = re.search(r"(?:team|column)_kernel<(.+?) ?>\(", kernel)[1]
    if "column_kernel" in kernel:
        body += " by columns"
    body = re.sub(r"gi::device::|\(anonymous namespace\)::|gi::", "", body)
    return body.replace(" >", ">").strip()


def digest() -> str:
    """Of the sources that device code is made of."""
    kernels = list(ROOT.glob("csrc/*/cuda.cu"))
    files = [*kernels, *(k.with_name(h) for k in kernels for h in ("cuda.h", "kernel.h"))]
    files += [ROOT / "csrc/correlation_lookup/place.h"]
    files += [ROOT / "csrc/common" / f"{name}.h" for name in DEVICE_HEADERS]
    text = "".join(f.relative_to(ROOT).as_posix() + f.read_text() for f in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def layout(record: dict) -> str:
    """JSON with a kernel a line."""
    kernels = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in record["kernels"].items())
    head = json.dumps({k: v for k, v in record.items() if k != "kernels"}, indent=2)
    return head[:-2] + ',\n  "kernels": {\n' + kernels + "\n  }\n}\n"


def output(*command: object, stdin: str | None = None) -> str:
    """What a command prints; its output is shown where it fails."""
    done = subprocess.run(
        [str(c) for c in command], input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        print(done.stdout)
        raise SystemExit(f"cuda-build: `{command[0]} ...` failed")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
