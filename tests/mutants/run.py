"""Compiles each seeded fault into a copy of the tree and runs the tests that must catch it.

    python tests/mutants/run.py [WORD ...]     only mutants with one of the words in name or file

Prints the score. Exit code 1 when a mutant survives, does not apply or does not compile, or when the
tests fail without any fault. One build folder per variant; variants that this CPU lacks are left out,
which is printed. Faults in CUDA kernels are compiled into a build that runs these on the CPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from mutants import ATTENTION, EMULATED, MUTANTS, NORMS, Mutant

ROOT = Path(__file__).parents[2]
TREE = ROOT / "build" / "mutants" / "tree"
BUILD = ROOT / "build" / "mutants" / "build"
COPIED = (
    *("csrc", "gi_kernels", "CMakeLists.txt", "pyproject.toml"),
    *("tests/contract", "tests/conftest.py", "tests/test_attention.py"),
    *("tests/test_fourier.py", "tests/test_layout.py", "tests/test_norms.py"),
)
SECONDS = 300  # a test run that takes longer hangs, which is a way of being caught


def main() -> int:
    words = sys.argv[1:]
    chosen = [m for m in MUTANTS if not words or any(w in m.name or w in m.file for w in words)]
    started = time.monotonic()
    copy_tree()
    verdicts = []
    for variant in sorted({m.kernels for m in chosen}):
        mutants = [m for m in chosen if m.kernels == variant]
        failure = build(variant)
        if not failure and not runs(variant):
            print(f"{len(mutants)} mutants left out: this machine does not run the variant {variant}")
            continue
        failure = failure or baseline(variant, mutants)
        if failure:
            print(f"Without a fault: {failure}")
            return 1
        for mutant in mutants:
            verdict = judge(mutant)
            print(f"{mutant.file}: {mutant.name}: {verdict}", flush=True)
            verdicts.append(verdict)
    caught = sum(v.startswith("caught") for v in verdicts)
    print(f"\n{caught} of {len(verdicts)} mutants caught in {time.monotonic() - started:.0f} s")
    return 0 if caught == len(verdicts) else 1


def judge(mutant: Mutant) -> str:
    """Build and test one mutant; restores the file."""
    path = TREE / "csrc" / mutant.file
    original = path.read_text()
    if original.count(mutant.old) != 1:
        return "does not apply"
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        failure = build(mutant.kernels)
        if failure:
            return f"does not compile: {failure}"
        return test(mutant.kernels, mutant.tests, mutant.select)
    finally:
        path.write_text(original)


def baseline(variant: str, chosen: list[Mutant]) -> str | None:
    """Run what the mutants' tests select, unchanged: it must pass, or being caught means nothing."""
    for tests in sorted({m.tests for m in chosen}):
        select = " or ".join(sorted({f"({m.select})" for m in chosen if m.tests == tests}))
        verdict = test(variant, tests, select)
        if verdict != "survived":
            return f"{' '.join(tests)} -k '{select}' does not pass: {verdict}"
    return None


def test(variant: str, tests: tuple[str, ...], select: str) -> str:
    """Whether the selected tests notice something."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--hypothesis-seed=1"]
    named = tests not in ((ATTENTION,), (NORMS,))  # by backend: then the kernels only
    command += [*tests, "-k", f"({select}) and cpp" if named else select]
    try:
        done = subprocess.run(
            command, cwd=TREE, env=environment(variant), capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return "caught (hangs)"
    if done.returncode < 0:
        return "caught (crash)"
    if done.returncode == 1:
        return f"caught by {re.findall(r'^FAILED .*::(.*?)(?: - .*)?$', done.stdout, re.MULTILINE)[0]}"
    return "survived" if done.returncode == 0 else f"no verdict: {done.stdout[-500:]}{done.stderr[-500:]}"


def environment(variant: str) -> dict[str, str]:
    """Of a process that runs a variant of the copied tree's kernels."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GI_KERNELS_")}
    capability = "portable" if variant == EMULATED else variant
    return {**kept, "PYTHONPATH": str(TREE), "GI_KERNELS_CPU_CAPABILITY": capability}


def runs(variant: str) -> bool:
    """Whether this machine runs a variant."""
    command = [sys.executable, "-c", "from gi_kernels import _C; print(_C.cpu_capability())"]
    done = subprocess.run(command, cwd=TREE, env=environment(variant), capture_output=True, text=True)
    return done.stdout.split() == [environment(variant)["GI_KERNELS_CPU_CAPABILITY"]]


def build(variant: str) -> str | None:
    """Compile the tree, nothing but the portable variant if that is enough; the first error, or None."""
    folder, portable = BUILD / variant, "ON" if variant in ("portable", EMULATED) else "OFF"
    configure = ["cmake", "-S", TREE, "-B", folder, "-G", "Ninja", f"-DCMAKE_INSTALL_PREFIX={TREE}"]
    configure += [f"-DGI_EMULATE_CUDA={'ON' if variant == EMULATED else 'OFF'}"]
    configure += [f"-DGI_PYTHON={sys.executable}", f"-DGI_PORTABLE_ONLY={portable}", "-DGI_TESTS=OFF"]
    configure += ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1"]  # compiles faster
    steps = [configure] if not (folder / "build.ninja").exists() else []
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    for step in [*steps, ["cmake", "--build", folder, "-j", jobs], ["cmake", "--install", folder]]:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stdout + done.stderr).splitlines()
            return next((line for line in lines if "error" in line.lower()), lines[-1])
    return None


def copy_tree() -> None:
    """Bring the copy up to date; files that did not change keep their time, so little is rebuilt."""
    wanted = set()
    for name in COPIED:
        top = ROOT / name
        files = [top] if top.is_file() else [p for p in top.rglob("*") if p.is_file()]
        for source in files:
            if source.suffix in (".so", ".pyc"):
                continue
            target = TREE / source.relative_to(ROOT)
            wanted.add(target)
            if not target.exists() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
    for path in TREE.rglob("*"):
        if path.is_file() and path not in wanted and path.suffix not in (".so", ".pyc"):
            path.unlink()


if __name__ == "__main__":
    sys.exit(main())
