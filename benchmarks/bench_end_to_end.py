"""One step of propagation: flow stage and generator for targets and their references at 256x256.

    pytest benchmarks/bench_end_to_end.py --benchmark-only

``gi_model.testing.steps`` says what ours and published are. On a GPU (``--device cuda``, the default
where there is one) the whole step is also measured for a batch of 8 and for two references, and in
float32 against the published step under ``torch.compile(mode="max-autotune")``.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks.cases import DTYPES, Case, Contender, Contest
from gi_kernels.testing.errors import largest_error, magnitude
from gi_model import build_generator
from gi_model.generator import TwoStreamGenerator
from gi_model.testing.published_generator import published_generator
from gi_model.testing.steps import Call, Pair, Steps, blanked

#: Largest error relative to the largest magnitude: of the published formulation, not of float64.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
#: Samples of a GPU's cases: too much work for a CPU.
GPU_ONLY = ("t2_256", "t2_b8_256", "t4_b8_256")


@lru_cache(maxsize=1)
def steps(batch: int, references: int, device: torch.device) -> Steps:
    """Kept for the next case, which often is of the same sizes."""
    return Steps(batch, references, 256, device)


def flow_stage(case: Case, device: torch.device, compiled: bool) -> Contest:
    """All references of one target, their encodings kept."""
    return _contest(case, steps(1, 4, device).flow_stage(DTYPES[case.dtype]))


def generator(case: Case, device: torch.device, compiled: bool) -> Contest:
    """One target, its references encoded."""
    return _contest(case, steps(1, 4, device).generation(DTYPES[case.dtype]))


def step(case: Case, device: torch.device, compiled: bool) -> Contest:
    """Flow and generator for new targets, everything of the references kept."""
    batch = 8 if "_b8" in case.sample else 1
    made = steps(batch, int(case.sample[1]), device)
    contest = _contest(case, made.whole(DTYPES[case.dtype]))
    if compiled and device.type == "cuda":  # on a CPU it takes longer than all else
        autotuned = made.whole(DTYPES[case.dtype], compiled=True).published
        contest.contenders["compiled"] = Contender(autotuned, {})  # type: ignore[index]
    return contest


def training(case: Case, device: torch.device, compiled: bool) -> Contest:
    """Forward and backward of the generator, two references, a batch of two."""
    made = steps(1, 4, device)
    target, sources = blanked(made.target), blanked(made.sources)
    batch = [t[:, :2].repeat(2, *[1] * (t.dim() - 1)) for t in (sources, *made.flows)]
    model = build_generator("ours").to(device).train()
    assert isinstance(model, TwoStreamGenerator)
    baseline = published_generator(model)
    target = target.repeat(2, 1, 1, 1)

    def run(module: torch.nn.Module) -> torch.Tensor:
        with torch.enable_grad():
            loss = (module(target, *batch) - target[:, :3]).abs().mean()
            torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
        return loss.detach()

    return _contest(case, Pair(lambda: run(model), lambda: run(baseline)))


def _contest(case: Case, pair: Pair) -> Contest:
    def verify() -> float:
        with _exact_convolutions():
            mine, published = pair.ours(), pair.published()
        error = largest_error(mine, published) / magnitude(published)
        assert error <= TOLERANCE[case.dtype], f"relative error {error:.3g}"
        return error

    def contender(call: Call) -> Contender:
        return Contender(call, {})

    return Contest({"ours": contender(pair.ours), "published": contender(pair.published)}, verify)


def _exact_convolutions() -> Any:
    """GPUs round what float32 convolutions multiply to ten bits, unless told otherwise."""
    if not torch.backends.cudnn.is_available():
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


CASES = [
    Case("end_to_end", name, sample, "typical", dtype, False, "contiguous", build)
    for name, samples, build, dtypes in (
        ("flow_stage", ("t4_256",), flow_stage, DTYPES),
        ("generator", ("t4_256",), generator, DTYPES),
        ("step", ("t4_256", *GPU_ONLY), step, DTYPES),
        ("training_step", ("t2_b2_256",), training, ("float32",)),
    )
    for sample in samples
    for dtype in dtypes
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_end_to_end(case, contest, device):
    if case.sample in GPU_ONLY and device.type != "cuda":
        pytest.skip("a GPU's case: --device cuda")
    contest(case)
