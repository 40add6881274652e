"""What a measurement was taken on: the machine, the software, the source."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from gi_kernels import native
from gi_kernels.testing.timing import interleave

#: Elements of the large copy (256 MiB in float32) and the side of the matrix product, on the CPU;
#: a GPU takes larger ones.
COPY_NUMBERS, PRODUCT_SIDE = 2**26, 1024
COPY_NUMBERS_CUDA, PRODUCT_SIDE_CUDA = 2**29, 8192


def describe(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Machine, versions and commit, ready for JSON."""
    device = torch.device(device)
    about: dict[str, Any] = {
        "device": device_name(device),
        "slug": slug(device),
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernels": native.RECEIPT if native.PROBLEM is None else {"problem": native.PROBLEM},
        "commit": commit(),
    }
    if device.type == "cuda":
        about["cuda"] = torch.version.cuda
        about["gpu"] = gpu_state(device)
    return about


def slug(device: str | torch.device = "cpu") -> str:
    """The device's name for a folder, such as ``amd-epyc-9004-2-cores``."""
    device = torch.device(device)
    text = device_name(device)
    if device.type == "cpu":
        text += f" {cores()} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def device_name(device: str | torch.device = "cpu") -> str:
    """The processor's own name."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The model's name as the system states it, else the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str | None:
    """The source's commit, ``+changes`` where files differ from it; None outside a repository."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    # Results and what is made of them are written by the run itself.
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results", ":!README.md"
    )
    return head + ("+changes" if changed else "")


def gpu_state(device: str | torch.device) -> dict[str, Any]:
    """Name, clocks (MHz), memory (bytes), temperature (°C) and power (W) of a GPU by NVML.

    Without the ``nvidia-ml-py`` package the state says so.
    """
    try:
        import pynvml
    except ImportError:
        return {"missing": "nvidia-ml-py is not installed"}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"missing": f"NVML does not start: {error}"}
    try:
        handle = _nvml_handle(pynvml, torch.device(device))
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)

        def read(function: Any, *arguments: Any) -> Any:
            try:
                return function(handle, *arguments)
            except pynvml.NVMLError as error:
                return f"unknown: {error}"

        power = read(pynvml.nvmlDeviceGetPowerUsage)  # milliwatts
        return {
            "name": _text(pynvml.nvmlDeviceGetName(handle)),
            "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
            "sm_clock": read(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            "sm_clock_most": read(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM),
            "memory_clock": read(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM),
            "memory_total": int(memory.total),
            "memory_used": int(memory.used),
            "temperature": read(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
            "power": power / 1000 if isinstance(power, int) else power,
        }
    finally:
        pynvml.nvmlShutdown()


def roofline(device: str | torch.device = "cpu") -> dict[str, float]:
    """What the machine can do: bytes per second of a large copy, FLOP per second of matrix products.

    ``copy`` counts the bytes read and those written, between tensors that exist; ``clone`` is the
    same where the result is allocated first, as an operator has to. Medians.
    """
    device = torch.device(device)
    large = device.type == "cuda"
    numbers, side = (COPY_NUMBERS_CUDA, PRODUCT_SIDE_CUDA) if large else (COPY_NUMBERS, PRODUCT_SIDE)
    source = torch.ones(numbers, device=device)
    target = torch.zeros_like(source)
    float32 = torch.randn(side, side, device=device)
    bfloat16 = float32.bfloat16()
    times = interleave(
        {
            "copy": lambda: target.copy_(source),
            "clone": source.clone,
            "float32": lambda: float32 @ float32,
            "bfloat16": lambda: bfloat16 @ bfloat16,
        },
        device,
        budget=1.5,
    )
    moved, work = 2 * numbers * source.element_size(), 2 * side**3
    return {
        "copy_bytes_per_second": moved / times["copy"].median,
        "clone_bytes_per_second": moved / times["clone"].median,
        "float32_flops": work / times["float32"].median,
        "bfloat16_flops": work / times["bfloat16"].median,
    }


def _nvml_handle(pynvml: Any, device: torch.device) -> Any:
    """NVML numbers all GPUs, PyTorch only the visible ones: they meet in the identifier."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    for name in (f"GPU-{uuid}", uuid):
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(name.encode())
        except pynvml.NVMLError:
            continue
    return pynvml.nvmlDeviceGetHandleByIndex(index)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
