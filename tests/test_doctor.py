"""The doctor names what is wrong and the line that mends it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gi_kernels
from gi_kernels import dispatch, doctor, native

BUILT = pytest.mark.skipif(native.PROBLEM is not None, reason=f"needs the compiled kernels: {native.PROBLEM}")

#: Runs the doctor with something changed before gi_kernels is imported.
UPGRADED = "import torch; torch.__version__ = '9.9.9+cpu'"
UNBUILT = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "gi_kernels._C":
            raise ImportError("No module named 'gi_kernels._C'")
sys.meta_path.insert(0, Hide())
"""


def run_doctor(before: str = "", **environment: str) -> tuple[int, str]:
    """Exit code and output of the doctor in a new process, after the code ``before``."""
    code = f"{before}\nimport sys\nfrom gi_kernels.doctor import main\nsys.exit(main([]))"
    package = str(Path(gi_kernels.__file__).parents[1])  # the one under test, installed or not
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": package} | environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@BUILT
def test_healthy() -> None:
    report = doctor.diagnose()
    assert report.problems == []
    text = str(report)
    assert "Nothing is wrong." in text
    for word in (
        gi_kernels.__version__,
        torch.__version__,
        native.RECEIPT["compiler"],
        native.RECEIPT["date"],
    ):
        assert word in text
    variants = native.RECEIPT["variants"].split(", ")
    assert dict(report.sections["Running"])["variant"].removesuffix("_bf16") in variants
    table = dict(report.sections["Backends"])
    assert set(table) == set(dispatch.OPERATORS)
    assert all("cpu: " in backends and "reference" in backends for backends in table.values())


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["doctor"]) == (0 if doctor.diagnose().healthy else 1)
    assert "Backends" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        doctor.main(["nurse"])


@BUILT
def test_torch_upgraded_after_the_build() -> None:
    code, text = run_doctor(UPGRADED)
    assert code == 1
    assert f"built for torch {native.RECEIPT['torch']}, but torch 9.9.9+cpu is running" in text
    assert f"mend: {doctor.REINSTALL}" in text
    assert re.search(r"flow_warp +cpu: reference\n", text)  # it still works
    assert "torch 9.9.9+cpu is not one this version is made for" in text


@BUILT
def test_kernels_of_other_sources() -> None:
    """An operator that the library lacks turns the kernels off; nothing fails half-way."""
    before = "from gi_kernels import native\nnative.register('no_such_operator', None)"
    code, text = run_doctor(before)
    assert code == 1
    assert "built from other sources, without gi::no_such_operator" in text
    assert f"mend: {doctor.REINSTALL}" in text
    assert text.count("cpu: reference\n") == len(dispatch.OPERATORS)


def test_no_compiled_part() -> None:
    code, text = run_doctor(UNBUILT)
    assert code == 1
    assert "the C++ kernels were not built" in text
    assert doctor.REINSTALL in text
    assert text.count("cpu: reference\n") == len(dispatch.OPERATORS)


@pytest.mark.parametrize(
    ("reason", "mend"),
    [
        ("no C++ compiler was found (c++, g++, clang++)", "apt install g++"),
        ("cmake was not found", "pip install cmake"),
        ("no torch was found to build against", "pip install torch"),
        ("`cmake --build ...` failed: error: no such thing", "pip install -v"),
    ],
)
def test_mend_of_a_build_that_failed(monkeypatch: pytest.MonkeyPatch, reason: str, mend: str) -> None:
    monkeypatch.setattr(native, "RECEIPT", {"built": False, "reason": reason})
    monkeypatch.setattr(native, "PROBLEM", f"the C++ kernels were not built: {reason}")
    report = doctor.diagnose()
    assert [mend in p.mend for p in report.problems] == [True]
    assert reason in report.problems[0].what


def test_left_out_on_request_is_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "GI_KERNELS_CPP=0 left them out"
    monkeypatch.setattr(native, "RECEIPT", {"built": False, "reason": reason})
    monkeypatch.setattr(native, "PROBLEM", f"the C++ kernels were not built: {reason}")
    report = doctor.diagnose()
    assert report.healthy
    assert doctor.REINSTALL in report.notes[0]


@BUILT
def test_variant_that_this_machine_lacks() -> None:
    code, text = run_doctor(GI_KERNELS_CPU_CAPABILITY="sve9")
    assert code == 1
    assert "GI_KERNELS_CPU_CAPABILITY=sve9 is not known" in text
    assert "unset GI_KERNELS_CPU_CAPABILITY" in text
    code, text = run_doctor(GI_KERNELS_CPU_CAPABILITY="portable")
    assert code == 0
    assert "fixes the variant" in text


@BUILT
def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = dispatch.OPERATORS["flow_warp"]
    monkeypatch.setitem(operator.implementations, "cpp", lambda input, flow: input + 1)
    report = doctor.diagnose()
    assert [p.what.split(" is off")[0] for p in report.problems] == ["flow_warp on cpp"]
