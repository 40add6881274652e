"""Builds the kernels with CMake and Ninja against the torch of the environment.

Environment variables:
    GI_KERNELS_CPP   1 requires the C++ kernels, 0 leaves them out; by default they are built where
                     there is a compiler, and left out with a note where there is none.
    GI_KERNELS_CUDA  1 requires CUDA kernels, 0 leaves them out; by default they are built where there
                     are nvcc and a torch with CUDA of one major version.
    GI_KERNELS_CUDA_ARCHITECTURES  of the CUDA kernels, as CMAKE_CUDA_ARCHITECTURES has them: 90, say.
    GI_KERNELS_EMULATE_CUDA=1  lets loops over the CUDA kernels' bodies serve the CPU: for tests.
    GI_KERNELS_SANITIZE=1  builds with the address and undefined-behaviour sanitizers.
    GI_KERNELS_PORTABLE=1  builds no variants for newer instruction sets.
    MAX_JOBS         parallel compilations; by default limited by cores and memory.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.dist import Distribution

ROOT = Path(__file__).parent
TORCH = "torch>=2.11,<2.16"
GIB_PER_JOB = 2.0  # torch headers need about this much memory per compiler


def environment_torch() -> str | None:
    """Directory of the torch to build against.

    The environment's own interpreter is asked, isolated (-I), so that a build environment's path
    does not hide its packages. Only if it has none is the build environment's torch taken.
    """
    code = (
        "import importlib.util as u; s = u.find_spec('torch');"
        "print(s.submodule_search_locations[0] if s else '')"
    )
    for flags in (["-I"], []):
        found = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
        if found.returncode == 0 and found.stdout.strip():
            return found.stdout.strip()
    return None


def version() -> str:
    """The package's version, from its source."""
    text = (ROOT / "gi_kernels" / "__init__.py").read_text()
    return re.search(r'__version__ = "(.+)"', text)[1]


def jobs() -> int:
    """Parallel compilations that fit into cores and memory."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    try:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        memory = GIB_PER_JOB
    return max(1, min(os.cpu_count() or 1, int(memory / GIB_PER_JOB)))


class BuildKernels(build_ext):
    """Runs CMake; a failure leaves a note for the doctor unless the kernels were required."""

    def run(self) -> None:
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        note = target / "gi_kernels" / "build_failure.txt"
        note.unlink(missing_ok=True)
        try:
            self.build(target)
        except RefusedError as reason:
            for required in ("GI_KERNELS_CUDA", "GI_KERNELS_CPP"):
                if os.environ.get(required) == "1":
                    raise SystemExit(f"gi-kernels: {required}=1, but {reason}") from None
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{reason}\n")
            print(f"gi-kernels: installing without C++ kernels: {reason}", file=sys.stderr)

    def build(self, target: Path) -> None:
        """Configure, compile and install below ``target``; raise ``RefusedError`` with the reason."""
        if os.environ.get("GI_KERNELS_CPP") == "0":
            raise RefusedError("GI_KERNELS_CPP=0 left them out")
        torch = environment_torch()
        if torch is None:
            raise RefusedError("no torch was found to build against")
        compiler = os.environ.get("CXX") or next(
            (c for c in ("c++", "g++", "clang++") if shutil.which(c)), None
        )
        if compiler is None or shutil.which(compiler.split()[0]) is None:
            raise RefusedError(f"no C++ compiler was found ({compiler or 'c++, g++, clang++'})")
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RefusedError("cmake was not found")
        ninja = shutil.which("ninja")
        if ninja is None:
            raise RefusedError("ninja was not found")
        try:
            import pybind11
        except ImportError:
            raise RefusedError("pybind11 was not found") from None

        kind = "sanitize" if flag("SANITIZE") else "release"
        kind += ("_portable" if flag("PORTABLE") else "") + ("_emulate" if flag("EMULATE_CUDA") else "")
        work = Path(self.build_temp).resolve() / kind
        configure = [
            cmake, "-S", str(ROOT), "-B", str(work), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",  # an isolated build's is at another place every time
            f"-DCMAKE_CXX_COMPILER={compiler}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DGI_PYTHON={sys.executable}",
            f"-DGI_TORCH={torch}",
            f"-DGI_PYBIND11_INCLUDE={pybind11.get_include()}",
            f"-DGI_SANITIZE={'ON' if flag('SANITIZE') else 'OFF'}",
            f"-DGI_PORTABLE_ONLY={'ON' if flag('PORTABLE') else 'OFF'}",
            f"-DGI_EMULATE_CUDA={'ON' if flag('EMULATE_CUDA') else 'OFF'}",
            "-DGI_TESTS=OFF",
            f"-DGI_CUDA_ARCHITECTURES={os.environ.get('GI_KERNELS_CUDA_ARCHITECTURES', '')}",
        ]  # fmt: skip
        cuda = {"1": "ON", "0": "OFF"}.get(os.environ.get("GI_KERNELS_CUDA", ""), "AUTO")
        left_out = work / "cuda_left_out.txt"
        left_out.unlink(missing_ok=True)
        try:
            run([*configure, f"-DGI_CUDA={cuda}", "-DGI_CUDA_OFF_REASON=GI_KERNELS_CUDA=0 left them out"])
        except RefusedError:
            if cuda == "ON" and left_out.exists() and left_out.read_text():
                raise RefusedError(left_out.read_text()) from None
            raise
        compile_all = [cmake, "--build", str(work), "-j", str(jobs())]
        try:
            run(compile_all)
        except RefusedError as reason:
            if cuda != "AUTO" or not left_out.exists() or left_out.read_text():
                raise
            # The CPU kernels are not to be lost with those for CUDA.
            print(f"gi-kernels: building without CUDA kernels: {reason}", file=sys.stderr)
            why = re.sub(r"[^-\w .,:/'()]", "", f"they could not be compiled: {reason}")
            run([*configure, "-DGI_CUDA=OFF", f"-DGI_CUDA_OFF_REASON={why}"])
            run(compile_all)
        run([cmake, "--install", str(work)])


class RefusedError(Exception):
    """Why the kernels are not built."""


class BinaryDistribution(Distribution):
    """A wheel with kernels serves one platform and Python, also where only CMake knows of them."""

    def has_ext_modules(self) -> bool:
        return True


def flag(name: str) -> bool:
    """Whether ``GI_KERNELS_name=1``."""
    return os.environ.get(f"GI_KERNELS_{name}") == "1"


def run(command: list[str]) -> None:
    """Run and print a command of the build; ``RefusedError`` with what it says where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode:
        raise RefusedError(f"`{' '.join(command[:2])} ...` failed: {last_error(done.stdout)}")


def last_error(output: str) -> str:
    """The line of a build log that says most."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no output"])[0].strip()


setup(
    version=version(),
    packages=[
        str(p.parent.relative_to(ROOT)).replace(os.sep, ".")
        for top in ("gi_kernels", "gi_model")
        for p in sorted((ROOT / top).rglob("__init__.py"))
    ],
    package_data={"gi_kernels": ["py.typed", "_C.pyi"], "gi_model": ["assets/*", "configs/*.yaml"]},
    install_requires=[TORCH, "numpy>=1.24"],
    # Required by the build only where the environment has no torch.
    setup_requires=[] if environment_torch() else [TORCH],
    ext_modules=[Extension("gi_kernels._C", [])],
    cmdclass={"build_ext": BuildKernels},
    distclass=BinaryDistribution,
)
