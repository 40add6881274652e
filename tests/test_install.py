"""Installing: what a build makes, what it refuses, and what it says when something is missing.

The tests marked slow build the package; ``make install-ladder`` runs them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import gi_kernels
from gi_kernels import native

ROOT = Path(__file__).parents[1]
INSTALLED = os.environ.get("GI_KERNELS_TEST_INSTALLED") == "1"
slow = pytest.mark.slow


def run(*command: object, expect: int | None = 0, cwd: Path = ROOT, **environment: str) -> str:
    """Output of a command that must exit with ``expect``; no setting of this run leaks into it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("GI_KERNELS_", "PYTHONPATH", "CXX"))}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=clean | environment, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert expect is None or done.returncode == expect, output[-4000:]
    return output


def build(target: Path, expect: int = 0, **environment: str) -> str:
    """Builds the compiled part into ``target``, in a build folder of its own."""
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        target,
        "--build-temp",
        f"{target}-temp",
    ]
    return run(*command, expect=expect, **environment)


def doctor(site: Path, expect: int) -> str:
    """The doctor's report on a package in ``site``."""
    code = "import sys; from gi_kernels.doctor import main; sys.exit(main([]))"
    return run(sys.executable, "-c", code, expect=expect, cwd=site, PYTHONPATH=str(site))


def bin_without_compiler(folder: Path) -> str:
    """A PATH that has everything this process finds except compilers."""
    folder.mkdir()
    for directory in os.environ["PATH"].split(os.pathsep):
        for tool in Path(directory).glob("*") if Path(directory).is_dir() else []:
            if not re.search(r"(^|-)(c\+\+|g\+\+|clang\+\+|cc|gcc|clang|c89|c99)(-|$)", tool.name):
                link = folder / tool.name
                if not link.is_symlink():
                    link.symlink_to(tool)
    return str(folder)


# ---- what is installed in this environment ----


@pytest.mark.skipif(not INSTALLED, reason="looks at the installed package: run by make unit")
def test_metadata() -> None:
    about = metadata.metadata("gi-kernels")
    assert about["Version"] == gi_kernels.__version__
    assert about["Requires-Python"] == ">=3.10"
    requires = metadata.requires("gi-kernels") or []
    assert {"torch<2.16,>=2.11", "numpy>=1.24"} <= set(requires)
    assert {"video", "test", "bench"} <= set(about.get_all("Provides-Extra"))
    commands = {e.name: e.value for e in metadata.distribution("gi-kernels").entry_points}
    assert commands == {"gi-kernels": "gi_kernels.doctor:main", "gi-model": "gi_model.cli:main"}


@pytest.mark.skipif(not INSTALLED, reason="looks at the installed package: run by make unit")
def test_installed_files() -> None:
    names = {str(f) for f in metadata.files("gi-kernels") or []}
    assert any(re.fullmatch(r"gi_kernels/_C\..*\.so", n) for n in names)
    assert {"gi_kernels/lib/libgi_kernels.so", "gi_kernels/py.typed"} <= names
    assert any(n.startswith("gi_model/assets/") for n in names)
    assert {f"gi_kernels/ops/{name}/spec.py" for name in ("flow_warp", "window_pool")} <= names
    assert not any(n.startswith(("tests/", "benchmarks/", "csrc/", "build/")) for n in names)
    assert Path(gi_kernels.__file__).parents[1] != ROOT


@pytest.mark.skipif(not INSTALLED, reason="looks at the installed package: run by make unit")
def test_command_is_installed() -> None:
    command = Path(sys.executable).with_name("gi-kernels")
    assert "Nothing is wrong." in run(command, "doctor", cwd=Path(sys.executable).parent)


@pytest.mark.skipif(native.PROBLEM is not None, reason=f"needs the compiled kernels: {native.PROBLEM}")
def test_kernels_bring_no_torch_and_no_thread_pool_of_their_own() -> None:
    """Symbols of torch come from the torch that runs; OpenMP is the one that torch loaded."""
    with open("/proc/self/maps") as maps:
        loaded = {line.split()[-1] for line in maps if ".so" in line}
    assert any(path.endswith("libgi_kernels.so") for path in loaded)
    for library in ("libtorch_cpu", "libc10", "libgomp", "libiomp"):
        assert len({p for p in loaded if Path(p).name.startswith(f"{library}.so")}) <= 1, library


# ---- refusals, which need no build ----


def test_no_compiler(tmp_path: Path) -> None:
    site = tmp_path / "site"
    text = build(site, CXX="/nonexistent/c++")
    assert "installing without C++ kernels: no C++ compiler was found (/nonexistent/c++)" in text
    shutil.copytree(ROOT / "gi_kernels", site / "gi_kernels", dirs_exist_ok=True, ignore=_compiled)
    report = doctor(site, expect=1)
    assert "no C++ compiler was found" in report
    assert "mend: install a C++20 compiler (Debian: apt install g++), then pip install --force" in report
    code = "import torch, gi_kernels; x = torch.ones(1, 2, 2, 2); print(gi_kernels.flow_warp(x, 0 * x).sum())"
    assert "tensor(8.)" in run(sys.executable, "-c", code, cwd=site, PYTHONPATH=str(site))


def test_no_compiler_on_the_path(tmp_path: Path) -> None:
    path = bin_without_compiler(tmp_path / "bin")
    assert "no C++ compiler was found (c++, g++, clang++)" in build(tmp_path / "site", PATH=path)


def test_compiler_that_fails(tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: out of paper' >&2\nexit 1\n")
    broken.chmod(0o755)
    text = build(tmp_path / "site", CXX=str(broken))
    assert "installing without C++ kernels: `" in text
    assert (tmp_path / "site/gi_kernels/build_failure.txt").exists()


def test_kernels_are_required(tmp_path: Path) -> None:
    text = build(tmp_path / "site", expect=1, GI_KERNELS_CPP="1", CXX="/nonexistent/c++")
    assert "gi-kernels: GI_KERNELS_CPP=1, but no C++ compiler was found" in text


def test_kernels_are_left_out(tmp_path: Path) -> None:
    site = tmp_path / "site"
    build(site, GI_KERNELS_CPP="0")
    shutil.copytree(ROOT / "gi_kernels", site / "gi_kernels", dirs_exist_ok=True, ignore=_compiled)
    assert "note: the kernels were left out on request" in doctor(site, expect=0)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_is_required_of_a_torch_without(tmp_path: Path) -> None:
    text = build(tmp_path / "site", expect=1, GI_KERNELS_CUDA="1")
    assert f"gi-kernels: GI_KERNELS_CUDA=1, but torch {torch.__version__} has no CUDA" in text


def test_cuda_is_required_without_kernels(tmp_path: Path) -> None:
    text = build(tmp_path / "site", expect=1, GI_KERNELS_CUDA="1", GI_KERNELS_CPP="0")
    assert "gi-kernels: GI_KERNELS_CUDA=1, but GI_KERNELS_CPP=0 left them out" in text


# A torch as far as configuring looks at it, a compiler for CUDA as far as it is asked for its version.
@pytest.mark.parametrize(
    ("cuda", "asked", "reason"),
    [
        ("12.6", "AUTO", "is built for CUDA 12.6, but nvcc is of CUDA 13.0"),
        ("12.6", "ON", "is built for CUDA 12.6, but nvcc is of CUDA 13.0"),
        ("13.0", "OFF", "GI_KERNELS_CUDA=0 left them out"),
        (None, "AUTO", "torch 2.12.0 has no CUDA"),
        (None, "ON", "torch 2.12.0 has no CUDA"),
    ],
)
def test_why_cuda_is_left_out(tmp_path: Path, cuda: str | None, asked: str, reason: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text(f"__version__ = '2.12.0'\ncuda: Optional[str] = {cuda!r}\n")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", f"-DGI_PYTHON={sys.executable}"]
    command += [f"-DGI_TORCH={tmp_path / 'torch'}", f"-DGI_CUDA={asked}", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    text = run(*command, "-DGI_PORTABLE_ONLY=ON", expect=1 if asked == "ON" else 0)
    assert reason in (tmp_path / "build/cuda_left_out.txt").read_text()
    assert f"CUDA kernels are {'required, but' if asked == 'ON' else 'left out'}" in " ".join(text.split())


def test_torch_is_required_of_the_build_only_where_there_is_none(tmp_path: Path) -> None:
    code = "import setuptools.build_meta as b; print(b.get_requires_for_build_wheel())"
    assert "torch" not in run(sys.executable, "-c", code)
    bare = tmp_path / "bare"
    run(sys.executable, "-m", "venv", "--without-pip", bare)
    setuptools = str(Path(__import__("setuptools").__file__).parents[1])
    # The bare environment sees this one's setuptools, as a build environment would, but not its torch.
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        if (Path(setuptools) / name).exists():
            (packages / name).symlink_to(Path(setuptools) / name)
    requires = run(bare / "bin/python", "-c", code, PYTHONPATH=str(packages))
    assert "'torch>=2.11,<2.16'" in requires


# ---- whole installations ----


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, built in isolation."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, ROOT, GI_KERNELS_CPP="1")
    (built,) = folder.glob("*.whl")
    return built


@slow
def test_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.fullmatch(r"gi_kernels/_C\..*\.so", n) for n in names)
    assert "gi_kernels/lib/libgi_kernels.so" in names
    assert any(n.startswith("gi_model/assets/") for n in names)
    assert "none-any" not in wheel.name


@slow
def test_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "site", wheel)
    report = doctor(tmp_path / "site", expect=0)
    assert f"torch       {torch.__version__}" in report
    assert re.search(r"flow_warp +cpu: cpp, reference", report)


@slow
def test_pip_install_without_a_compiler(tmp_path: Path) -> None:
    site = tmp_path / "site"
    path = bin_without_compiler(tmp_path / "bin")
    tree = tmp_path / "tree"  # where nothing has been compiled before
    built = shutil.ignore_patterns("build", ".venv", ".git", "*.so", "*.egg-info", "build_failure.txt")
    shutil.copytree(ROOT, tree, ignore=built)
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, tree, PATH=path)
    assert "mend: install a C++20 compiler" in doctor(site, expect=1)


@slow
def test_second_isolated_build_in_the_same_tree(wheel: Path, tmp_path: Path) -> None:
    """The first build's tools are gone; the second finds its own."""
    text = run(
        sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path, ROOT, GI_KERNELS_CPP="1"
    )
    assert "without C++ kernels" not in text


def _compiled(_: str, names: list[str]) -> set[str]:
    return {n for n in names if n.endswith(".so") or n in ("lib", "__pycache__", "build_failure.txt")}
