"""Samples at borders, on integers, far outside and nowhere: operators that read along positions."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cases import Case, cases, first

from gi_kernels.spec import Argument
from gi_kernels.testing.calls import map_tensors
from gi_kernels.testing.layouts import LAYOUTS

NAN, INF = float("nan"), float("inf")
STEP = 2.0**-10  # just off an integer, exact in float32 at the sizes in use

#: No position at all, or one no image reaches, in x (0) or y (1): samples zero, has zero gradient.
NOWHERE = [(NAN, 0), (NAN, 1), (INF, 0), (INF, 1), (-INF, 0), (-INF, 1), (1e30, 0), (-1e30, 1), (3e38, 1)]
NOWHERE += [(-3e38, 0), (2.0**31, 0), (-(2.0**31), 1), (2.0**63, 1), (-(2.0**63), 0), (1e10, 0), (-1e10, 1)]

READS_ALONG_POSITIONS = {"where": lambda spec: bool(spec.positions)}


def same_size(spec):
    """Samples whose flow is not resized: positions are as exact as what is put in."""
    return [
        s for s in first(99)(spec) if all(_is_exact(s.arguments, *item) for item in spec.positions.items())
    ]


def _is_exact(arguments, name: str, target: str) -> bool:
    position = arguments[name]
    return position.draw == "coordinates" or position.shape[-2:] == arguments[target].shape[-2:]


@cases(same_size, **READS_ALONG_POSITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])
def test_borders_and_ties(case: Case, dtype: torch.dtype) -> None:
    """On integers, at both borders, and just off them; the derivative at a tie is the one to the right."""
    for turn in range(3):  # more positions than the smallest sample has pixels
        arguments = case.sample.make(dtype)
        for name, target in case.spec.positions.items():
            H, W = arguments[target].shape[-2:]
            xs, ys = _edges(W), _edges(H)
            grid = list(product(xs, ys))
            arguments[name] = _place(arguments[name], grid[turn::3], absolute=_absolute(case, name))
        case.check(arguments, independent=False)


@cases(same_size, **READS_ALONG_POSITIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_integer_shift(case: Case, layout: str) -> None:
    """A whole shift copies pixels exactly; one beyond the map gives zeros."""
    for dx, dy in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -2), (3, -1), (-100, 0), (0, 100)):
        arguments = case.sample.make(torch.float32)
        for name in case.spec.positions:
            tensor = torch.zeros_like(arguments[name])
            if _absolute(case, name):
                tensor += _pixels(tensor)
            tensor[..., 0, :, :] += dx
            tensor[..., 1, :, :] += dy
            arguments[name] = tensor
        case.check(map_tensors(lambda _, t: LAYOUTS[layout](t), arguments), independent=False)


@cases(lambda spec: same_size(spec)[:2], **READS_ALONG_POSITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("nowhere", "component"), NOWHERE)
def test_nowhere(case: Case, dtype: torch.dtype, component: int, nowhere: float) -> None:
    """One such position samples zero, has zero gradient, and leaves the other pixels alone."""
    plain = case.sample.make(dtype)
    arguments = case.sample.make(dtype)
    for name in case.spec.positions:
        arguments[name] = arguments[name].clone()
        # Half precision storage (flow_consistency) turns large numbers into infinities: as well.
        arguments[name].select(-3, component)[..., 0, 0] = nowhere
    before, after = case.run(plain), case.check(arguments, independent=False)
    for name in case.spec.positions:
        if name in after.gradients:
            assert torch.all(after.gradients[name][..., 0, 0] == 0), name
            touched = torch.zeros_like(after.gradients[name], dtype=torch.bool)
            touched[..., 0, 0] = True
            if "deformable" not in case.spec.name:
                assert torch.equal(after.gradients[name][~touched], before.gradients[name][~touched]), name
    others = torch.ones(after.value.shape, dtype=torch.bool)
    others[..., 0, 0] = False
    assert torch.equal(after.value[others], before.value[others])
    if case.spec.name in ("flow_warp", "correlation_lookup"):
        assert torch.all(after.value[..., 0, 0] == 0)


@cases(same_size, **READS_ALONG_POSITIONS)
def test_nowhere_at_all(case: Case) -> None:
    """All positions undefined: finite gradients, zero where they belong to positions."""
    for nowhere in (NAN, INF, -1e30):
        arguments = case.sample.make(torch.float32)
        for name in case.spec.positions:
            arguments[name] = torch.full_like(arguments[name], nowhere)
        outcome = case.check(arguments)
        for path, gradient in outcome.gradients.items():
            assert gradient.isfinite().all(), path
            assert path not in case.spec.positions or torch.all(gradient == 0), path


def resized(spec):
    """Samples whose flow is resized on the way."""
    chosen = [s for s in first(99)(spec) if s not in same_size(spec)]
    return [s for s in chosen if all(s.arguments[n].shape[-2] > 1 for n in spec.positions)]


@cases(resized, **READS_ALONG_POSITIONS)
@pytest.mark.parametrize("nowhere", [NAN, INF, -INF], ids=str)
def test_nowhere_in_a_flow_that_is_resized(case: Case, nowhere: float) -> None:
    """What an undefined flow vector has weight in samples zero, what it is no tap of stays."""
    (name,) = case.spec.positions
    plain, arguments = case.sample.make(torch.float32), case.sample.make(torch.float32)
    flow = arguments[name].clone()
    flow[..., 0, 1, 1] = nowhere
    arguments[name] = flow
    before, after = case.run(plain), case.run(arguments)
    assert after.value.isfinite().all()
    for path, gradient in after.gradients.items():
        assert gradient.isfinite().all(), path
    size = before.value.shape[-2:]
    mark = torch.zeros(1, 1, *flow.shape[-2:])
    mark[..., 1, 1] = 1
    weight = F.interpolate(mark, size=size, mode="bilinear", align_corners=True)[0, 0]
    mark[..., 1, 1] = NAN
    tap = F.interpolate(mark, size=size, mode="bilinear", align_corners=True)[0, 0].isnan()
    assert torch.equal(after.value[..., ~tap], before.value[..., ~tap])
    if case.spec.name == "flow_warp":
        assert torch.all(after.value[..., weight > 1e-5] == 0)
    assert torch.all(after.gradients[name][..., 1, 1] == 0)


@cases(first(99))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
def test_undefined_number_in_an_argument(case: Case, dtype: torch.dtype, poison: float) -> None:
    """It reaches exactly the numbers that the definition says depend on it, and no others."""
    reach = case.spec.undefined_reach
    sums = case.sample.served_by or reach or case.backend in case.spec.composed
    if poison == INF and sums:  # these work on sums of features: inf - inf elsewhere
        poison = NAN
    arguments = case.sample.make(dtype)
    for path, declared in _storage(case):
        poisoned = map_tensors(lambda p, t: _poison(t, poison) if p == path else t, arguments)  # noqa: B023
        actual = case.run(poisoned)
        expected = case.expected(poisoned, actual)
        for (what, got), (_, wanted) in zip(actual.items(), expected.items(), strict=True):
            if reach:
                needed = _away_from_padding(case, path, wanted.isnan())
                assert got.isnan()[needed].all(), f"{path}: no NaN in {what}"
                near = F.max_pool2d(wanted.isnan().double(), 2 * reach + 1, 1, reach).bool()
                assert not got.isnan()[~near].any(), f"{path}: NaN far away in {what}"
            else:
                assert torch.equal(got.isnan(), wanted.isnan()), f"{path}: NaN in {what}"
        assert declared.storage


@cases(first(99), where=lambda spec: bool(spec.differentiable))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_undefined_number_in_the_incoming_gradient(case: Case, dtype: torch.dtype) -> None:
    """It reaches exactly the gradients that depend on it; a position's own even if it lies outside."""
    arguments = case.sample.make(dtype)
    poison = lambda gradient: _poison(gradient, NAN)  # noqa: E731
    actual = case.run(arguments, arrange=poison)
    expected = case.expected(arguments, actual, arrange=poison)
    middle = torch.zeros(actual.value.shape, dtype=torch.bool)
    middle.view(-1)[middle.numel() // 2] = True
    own = middle.flatten(0, -3).any(dim=0)  # [H,W]: the pixel of the undefined number
    for path, gradient in actual.gradients.items():
        wanted = expected.gradients[path].isnan()
        if path in case.spec.positions:
            if gradient.shape[-2:] == own.shape:
                assert not gradient[..., ~own].isnan().any(), path
            continue
        assert torch.equal(gradient.isnan(), wanted), path


def infinitely_far(spec):
    """Attention over several segments, whose first can be made to count for nothing."""
    return [s for s in spec.of_size("small") if s.name == "two_segments"]


@cases(infinitely_far, where=lambda spec: spec.name == "global_attention")
def test_segment_with_scores_of_minus_infinity(case: Case) -> None:
    """Its keys have no weight; where there are no others, the result is undefined as by the definition."""
    arguments = case.sample.make(torch.float32)
    arguments["query"] = arguments["query"].abs() + 0.1
    arguments["keys"] = [torch.full_like(arguments["keys"][0], -INF), *arguments["keys"][1:]]
    value = case.run(arguments, ()).value
    rest = {**arguments, "keys": arguments["keys"][1:], "values": arguments["values"][1:]}
    assert value.isfinite().all()
    torch.testing.assert_close(value, case.run(rest, ()).value)
    alone = {**arguments, "keys": arguments["keys"][:1], "values": arguments["values"][:1]}
    assert case.run(alone, ()).value.isnan().all()


def _storage(case: Case) -> list[tuple[str, Argument]]:
    found = []
    for name, declared in case.sample.arguments.items():
        parts = declared if isinstance(declared, list) else [declared]
        for i, part in enumerate(parts):
            if isinstance(part, Argument) and part.storage and 0 not in part.shape:
                found.append((f"{name}/{i}" if isinstance(declared, list) else name, part))
    return found


def _away_from_padding(case: Case, path: str, nans: torch.Tensor) -> torch.Tensor:
    """``nans`` that are sure: PyTorch's convolutions may leave out a weight's product with padding."""
    if case.backend == "cpp" or path != "weight":
        return nans
    height, width = case.sample.arguments["weight"].shape[-2:]
    rows, columns = nans.shape[-2] - 2 * (height // 2), nans.shape[-1] - 2 * (width // 2)
    sure = torch.zeros_like(nans)
    sure[..., height // 2 :, width // 2 :][..., :rows, :columns] = True
    return nans & sure


def _poison(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[tensor.numel() // 2] = value
    return tensor


def _edges(size: int) -> list[float]:
    around = (-1, 0, size - 1, size)
    near = [a + d for a in around for d in (-STEP, 0.0, STEP)]
    return sorted({*near, -2.0, -0.5, 0.5, 1.0, size - 1.5, size - 0.5, size + 1.0})


def _place(tensor: torch.Tensor, grid: list[tuple[float, float]], absolute: bool) -> torch.Tensor:
    """``tensor`` [...,2,h,w] so that its pixels look at the positions ``grid`` in turn."""
    count = tensor[..., 0, :, :].numel()
    positions = torch.tensor([grid[(7 * i) % len(grid)] for i in range(count)], dtype=torch.float64)
    shape = [*tensor.shape[:-3], *tensor.shape[-2:]]
    placed = torch.stack([positions[:, 0].view(shape), positions[:, 1].view(shape)], dim=-3)
    if not absolute:
        placed = placed - _pixels(placed)
    return placed.to(tensor.dtype)


def _pixels(tensor: torch.Tensor) -> torch.Tensor:
    """Coordinates [2,h,w] of the pixels of a map, x first."""
    h, w = tensor.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([x, y]).to(tensor.dtype)


def _absolute(case: Case, name: str) -> bool:
    return case.sample.arguments[name].draw == "coordinates"
