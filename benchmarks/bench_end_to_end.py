"""One step of propagation: flow stage and generator for a target and its references at 256x256.

    pytest benchmarks/bench_end_to_end.py --benchmark-only

Random weights. Published: eager PyTorch in float32, pair by pair, everything recomputed for each
target. Ours keeps what belongs to the references, as between the frames of a video.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks.cases import Case, Contender, Contest
from benchmarks.published_flow import published_flow_stage
from benchmarks.published_generator import published_generator
from gi_kernels.testing.errors import largest_error, magnitude
from gi_model import build_generator
from gi_model.flow import RAFT, FlowStage

SIZE, REFERENCES = 256, 4
#: Largest error relative to the largest magnitude: of the published formulation, not of float64.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


@lru_cache(maxsize=1)
def frames() -> tuple[torch.Tensor, torch.Tensor]:
    """Target [1,4,H,W] and sources [1,T,4,H,W]: smooth noise that moves, and a box to be filled."""
    torch.manual_seed(0)
    coarse = torch.rand(1, 3, SIZE // 8, SIZE // 8)
    image = torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)
    moved = [image.roll((2 * t, 3 * t), (2, 3)) for t in range(REFERENCES + 1)]
    masks = torch.zeros(REFERENCES + 1, 1, 1, SIZE, SIZE)
    masks[0, :, :, 96:160, 80:176] = 1
    rgba = [torch.cat([m, k], dim=1) for m, k in zip(moved, masks, strict=True)]
    return rgba[0], torch.stack(rgba[1:], dim=1)


def blanked(rgba: torch.Tensor) -> torch.Tensor:
    """Frames with their holes set to zero, as the generator wants them."""
    colours, mask = rgba.split([3, 1], dim=-3)
    return torch.cat([colours * (1 - mask), mask], dim=-3)


@lru_cache(maxsize=1)
def networks() -> tuple[RAFT, Any]:
    """The flow network and the generator, with weights of a size that keeps activations alive."""
    torch.manual_seed(1)
    raft, generator = RAFT(), build_generator("ours").eval()
    for module in (*raft.modules(), *generator.modules()):
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.6 / module.weight[0].numel() ** 0.5)
    return raft, generator


def _autocast(dtype: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


def flow_stage(case: Case, *_: Any) -> Contest:
    """All references of one target, their encodings kept."""
    target, sources = frames()
    raft, _ = networks()
    ours, theirs = FlowStage(raft), published_flow_stage(raft)
    with torch.no_grad(), _autocast(case.dtype):
        kept = [ours.encode(s) for s in sources.unbind(1)]

    def run() -> torch.Tensor:
        with torch.no_grad(), _autocast(case.dtype):
            return torch.cat(ours(target, kept), dim=2)

    return _contest(case, run, lambda: torch.cat(theirs(target, sources), dim=2))


def generator(case: Case, *_: Any) -> Contest:
    """One target, its references encoded."""
    target, sources = (blanked(f) for f in frames())
    _, model = networks()
    flows, errors = _flows()
    baseline = published_generator(model)
    fast = model.for_inference(torch.bfloat16 if case.dtype == "bfloat16" else None)
    with torch.no_grad():
        references = fast.encode_references(sources)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return fast(target, references=references, flows=flows, flow_errs=errors)

    def published() -> torch.Tensor:
        with torch.no_grad():
            return baseline(target, sources, flows, errors)

    return _contest(case, run, published)


def step(case: Case, *_: Any) -> Contest:
    """Flow and generator for a new target, everything of the references kept."""
    target, sources = frames()
    raft, model = networks()
    stage, flow_baseline, baseline = FlowStage(raft), published_flow_stage(raft), published_generator(model)
    fast = model.for_inference(torch.bfloat16 if case.dtype == "bfloat16" else None)
    with torch.no_grad(), _autocast(case.dtype):
        kept = [stage.encode(s) for s in sources.unbind(1)]
    with torch.no_grad():
        references = fast.encode_references(blanked(sources))

    def run() -> torch.Tensor:
        with torch.no_grad():
            with _autocast(case.dtype):
                flows, errors = stage(target, kept)
            return fast(blanked(target), references=references, flows=flows, flow_errs=errors)

    def published() -> torch.Tensor:
        with torch.no_grad():
            flows, errors = flow_baseline(target, sources)
            return baseline(blanked(target), blanked(sources), flows, errors)

    return _contest(case, run, published)


def training(case: Case, *_: Any) -> Contest:
    """Forward and backward of the generator, two references, a batch of two."""
    target, sources = (blanked(f) for f in frames())
    flows, errors = _flows()
    batch = [t[:, :2].repeat(2, *[1] * (t.dim() - 1)) for t in (sources, flows, errors)]
    model = build_generator("ours").train()
    baseline = published_generator(model)
    target = target.repeat(2, 1, 1, 1)

    def run(module: torch.nn.Module) -> torch.Tensor:
        with torch.enable_grad():
            loss = (module(target, *batch) - target[:, :3]).abs().mean()
            torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
        return loss.detach()

    return _contest(case, lambda: run(model), lambda: run(baseline))


@lru_cache(maxsize=1)
def _flows() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    shape = (1, REFERENCES, 2, SIZE, SIZE)
    return 4 * torch.randn(shape), torch.rand(1, REFERENCES, 1, SIZE, SIZE)


def _contest(case: Case, ours: Callable[[], torch.Tensor], theirs: Callable[[], torch.Tensor]) -> Contest:
    def verify() -> float:
        mine, published = ours(), theirs()
        error = largest_error(mine, published) / magnitude(published)
        assert error <= TOLERANCE[case.dtype], f"relative error {error:.3g}"
        return error

    return Contest({"ours": Contender(ours, {}), "published": Contender(theirs, {})}, verify)


CASES = [
    Case("end_to_end", name, sample, "typical", dtype, False, "contiguous", build)
    for name, sample, build, dtypes in (
        ("flow_stage", "t4_256", flow_stage, ("float32", "bfloat16")),
        ("generator", "t4_256", generator, ("float32", "bfloat16")),
        ("step", "t4_256", step, ("float32", "bfloat16")),
        ("training_step", "t2_b2_256", training, ("float32",)),
    )
    for dtype in dtypes
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_end_to_end(case, contest):
    contest(case)
