"""What can be known of the CUDA kernels without a GPU: how they are launched and what they compile to.

That they compute the right numbers is tested by the contract suite on a build that runs their bodies on
the CPU (``make emulate``).
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

import gi_kernels  # noqa: F401  registers the operators
from gi_kernels import dispatch, doctor, native

CSRC = Path(__file__).parents[1] / "csrc"
KERNELS = sorted(CSRC.glob("*/cuda.cu"))
BINDINGS = sorted(CSRC.glob("*/bind_cuda.cpp"))
#: Operators whose GPU kernels are Triton's, or that only serve the CPU.
NOT_IN_CUDA = {
    *("batch_norm", "fourier", "fourier_inverse", "fused_convolution", "fused_convolution_pack"),
    *("global_attention", "pixel_projection", "projected_aggregation", "reflect_pad", "relayout"),
    "window_query",
}
BUILD = importlib.util.spec_from_file_location("cuda_build", CSRC / "tests" / "cuda_build.py")
cuda_build = importlib.util.module_from_spec(BUILD)
BUILD.loader.exec_module(cuda_build)


def registered(binding: Path) -> dict[str, str]:
    """The C++ functions that a binding registers, by operator."""
    return dict(re.findall(r'm\.impl\("(\w+)", (\w+)\)', binding.read_text()))


def body_of(function: str, source: str) -> str:
    """The text of a function at namespace level."""
    found = re.search(rf"^[\w:<>, ]+ {function}\(.*?^}}", source, re.MULTILINE | re.DOTALL)
    assert found, function
    return found[0]


# ---- launches ----


def test_every_operator_has_its_kernel() -> None:
    schemas = re.findall(r'm\.def\("(\w+)\(', (CSRC / "registration.cpp").read_text())
    names = {n for binding in BINDINGS for n in registered(binding)}
    assert names == {s for s in schemas if s.removesuffix("_backward") not in NOT_IN_CUDA}
    assert [k.parent for k in KERNELS] == [b.parent for b in BINDINGS]


def test_launches_are_on_the_given_stream_and_checked() -> None:
    """There is one place that launches; its launches name the stream and are followed by a check."""
    for source in CSRC.rglob("*"):
        if source.suffix in (".h", ".cu", ".cpp") and source != CSRC / "common" / "device.h":
            assert "<<<" not in source.read_text(), source
    text = (CSRC / "common" / "device.h").read_text()
    launches = re.findall(r"<<<(.*?)>>>\s*\([^;]*\);\n([^\n]*)\n", text, re.DOTALL)
    assert len(launches) == text.count("<<<") == 2
    for arguments, following in launches:
        assert "static_cast<cudaStream_t>(stream.handle)" in arguments
        assert following.strip() == "check_launch(Body::kName);"
    assert "cudaGetLastError()" in text


@pytest.mark.parametrize("binding", BINDINGS, ids=lambda b: b.parent.name)
def test_operators_look_at_the_device_first(binding: Path) -> None:
    """A stream comes from a DeviceScope only, which has looked at every tensor that came in."""
    source = binding.read_text()
    for function in registered(binding).values():
        body = body_of(function, source)
        signature, lines = body.split(" {\n", 1)
        scope = re.match(r"\s*const DeviceScope scope\(\s*\{(.*?)\}\);", lines, re.DOTALL)
        assert scope, f"{function} does not begin with a DeviceScope"
        named = {n.strip() for n in scope[1].split(",")}
        assert named == set(re.findall(r"(?:at::Tensor&|at::TensorList) (\w+)", signature)), function
    assert not re.search(r"\bStream\{|getDefaultCUDAStream|Stream stream\b", source)


@pytest.mark.parametrize("source", KERNELS, ids=lambda k: k.parent.name)
def test_kernels_know_nothing_of_torch(source: Path) -> None:
    for file in (source, source.with_name("cuda.h")):
        assert not re.search(r"#include [<\"](ATen|torch|c10)", file.read_text()), file
    assert not re.search(r"cudaMalloc|cudaMemcpy|cudaDeviceSynchronize|atomicAdd", source.read_text())
    names = re.findall(r'kName = "(\w+)"', source.read_text())
    assert len(names) == len(set(names))


# ---- what they compile to ----


def test_record_is_of_these_sources() -> None:
    record = json.loads(cuda_build.RECORD.read_text())
    assert record["sources"] == cuda_build.digest(), "the CUDA kernels were changed: run `make cuda-record`"


def test_kernels_keep_to_their_budget() -> None:
    """No local memory on any architecture; registers per body."""
    record = json.loads(cuda_build.RECORD.read_text())["kernels"]
    assert all(set(architectures) == {"80", "90", "100", "120"} for architectures in record.values())
    assert cuda_build.judge(record) == []


def test_excess_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what ptxas prints to the verdict."""
    symbol = "_ZN2gi6device11team_kernelINS0_10EmptyListsIfEEEEvT_lli"
    log = (
        "[1/2] Building CUDA object CMakeFiles/gi_cuda.dir/csrc/flow_warp/cuda.cu.o\n"
        f"ptxas info    : Compiling entry function '{symbol}' for 'sm_90'\n"
        f"ptxas info    : Function properties for {symbol}\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 14 registers, used 0 barriers\n"
    )
    kernels = cuda_build.parse(log)
    assert kernels == {"flow_warp/EmptyLists<float>": {"90": [14, 8, 4, 12]}}
    monkeypatch.setattr(cuda_build, "BUDGET", tmp_path / "budget.json")
    cuda_build.BUDGET.write_text('{"flow_warp/EmptyLists": 12, "flow_warp/Gone": 16}')
    assert cuda_build.judge(kernels) == [
        "flow_warp/EmptyLists<float>: sm_90: 8 bytes of stack, 4 and 12 of spills",
        "flow_warp/EmptyLists: 14 registers, allowed are 12",
        "flow_warp/Gone: None registers, allowed are 16",
    ]
    kernels["flow_warp/EmptyLists<float>"]["90"] = [12, 0, 0, 0]
    cuda_build.BUDGET.write_text('{"flow_warp/EmptyLists": 12}')
    assert cuda_build.judge(kernels) == []


# ---- dispatch and doctor ----

BUILT = {"version": "13.0", "torch": "13.0", "architectures": "80 90 100 120+PTX", "operators": ["warp"]}


def test_dispatch_knows_which_kernels_there_are() -> None:
    names = {n for binding in BINDINGS for n in registered(binding) if not n.endswith("_backward")}
    assert names == dispatch.CUDA


def test_dispatch_offers_the_kernels_where_they_were_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "PROBLEM", None)
    monkeypatch.setattr(native, "RECEIPT", {"built": True, "cuda": BUILT, "cuda_reason": ""})
    for name in dispatch.CUDA:
        assert dispatch.available_backends(name, "cuda")[0] == "cuda"
        assert "cuda" not in dispatch.available_backends(name, "cpu")
        implementations = dispatch.OPERATORS[name].implementations
        assert implementations["cuda"] is implementations["cpp"]
    assert "cuda" not in dispatch.available_backends("global_attention", "cuda")


def test_dispatch_says_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "PROBLEM", None)
    monkeypatch.setattr(native, "RECEIPT", {"built": True, "cuda": None, "cuda_reason": "nvcc was not found"})
    reason = dispatch._refusal_on(dispatch.OPERATORS["flow_warp"], "cuda", "cuda")
    assert reason == "built without CUDA: nvcc was not found"


def test_doctor_says_what_was_compiled() -> None:
    text = doctor._cuda_kernels({"cuda": BUILT})
    assert text == "1 operators by nvcc 13.0 for sm_80, sm_90, sm_100, sm_120+PTX"
    text = doctor._cuda_kernels({"cuda": None, "cuda_reason": "nvcc was not found"})
    assert text == "left out: nvcc was not found"


@pytest.mark.parametrize(
    ("reason", "mend"),
    [
        ("torch 2.13.0+cpu has no CUDA", "install a torch with CUDA"),
        ("nvcc was not found", "install the CUDA toolkit"),
        ("torch 2.11.0 is built for CUDA 12.6, but nvcc is of CUDA 13.0", "install the CUDA toolkit"),
        ("GI_KERNELS_CUDA=0 left them out", "GI_KERNELS_CUDA=1 "),
        ("they could not be compiled: nvcc failed", "GI_KERNELS_CUDA=1 "),
    ],
)
def test_doctor_mends_a_build_without_cuda(reason: str, mend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._mend_cuda(reason).startswith(mend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    receipt = {**native.RECEIPT, "built": True, "cuda": None, "cuda_reason": reason}
    monkeypatch.setattr(native, "RECEIPT", receipt)
    report = doctor.Report()
    doctor._judge_environment(report)
    assert any(f"no CUDA kernels: {reason}; to have them: {mend}" in note for note in report.notes)


def test_doctor_tries_the_operators_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def available(operator: str, device: str) -> list[str]:
        asked.append((operator, device))
        return ["reference"]

    monkeypatch.setattr(doctor, "_devices", lambda: ["cpu", "cpu:0"])
    monkeypatch.setattr(dispatch, "available_backends", available)
    report = doctor.Report()
    doctor._try_operators(report)
    assert report.healthy
    assert {d for operator, d in asked if operator == "flow_warp"} == {"cpu", "cpu:0"}
