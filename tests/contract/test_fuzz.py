"""Random shapes, values, strides and flows against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import SPECS, Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gi_kernels
from gi_kernels.spec import Sample
from gi_kernels.testing.calls import map_tensors
from gi_kernels.testing.layouts import LAYOUTS

SETTINGS = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
BACKENDS = [
    pytest.param(name, backend, id=f"{name}-{backend}")
    for name in SPECS
    for backend in gi_kernels.available_backends(name)
]

sizes = st.integers(1, 9)
channels = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33]))
seeds = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
@SETTINGS
@given(data=st.data())
def test_random_call(name: str, backend: str, data: st.DataObject) -> None:
    spec = SPECS[name]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), "dtype")
    arguments, served_by = data.draw(CALLS[name], "call")
    if backend not in gi_kernels.available_backends(served_by or name):
        return
    kinds = st.sampled_from(list(LAYOUTS))
    layouts = {path: data.draw(kinds, f"layout of {path}") for path in sorted(_paths(arguments))}
    incoming = data.draw(kinds, "layout of the incoming gradient")
    equal = any("expanded" in kind for kind in [incoming, *layouts.values()])
    seed, exact = data.draw(seeds, "seed"), data.draw(st.booleans(), "exactly representable")
    made = _fill(arguments, torch.Generator().manual_seed(seed), exact)
    made = map_tensors(lambda path, t: t.to(_dtype(spec, path, dtype)), made)
    made = map_tensors(lambda path, t: LAYOUTS[layouts[path]](t), made)
    case = Case(spec, Sample("fuzz", "small", {}, served_by, condition=16.0), backend)
    case.check(made, independent=False, cancelling=equal, arrange=LAYOUTS[incoming])


class Drawn(tuple):
    """A shape and the kind of numbers in it, to be filled later."""


def _tensor(*shape: int, kind: str = "normal") -> Drawn:
    return Drawn((shape, kind))


@st.composite
def warp(draw) -> tuple[dict[str, Any], None]:
    B, C, H, W = draw(st.integers(0, 3)), draw(channels), draw(sizes), draw(sizes)
    h, w = draw(st.sampled_from([(H, W), (2 * H, 2 * W), (4 * H, 4 * W), (1, 1), (H + 1, W)]))
    return {
        "input": _tensor(B, C, H, W),
        "flow": _tensor(B, 2, h, w, kind=_flow(draw, (h, w) == (H, W))),
    }, None


@st.composite
def consistency(draw) -> tuple[dict[str, Any], None]:
    shape = (draw(st.integers(0, 3)), 2, draw(sizes), draw(sizes))
    kind = _flow(draw, True)
    return {"flow": _tensor(*shape, kind=kind), "flow_backward": _tensor(*shape, kind=kind)}, None


@st.composite
def aggregation(draw) -> tuple[dict[str, Any], None]:
    B, T, C = draw(st.integers(0, 2)), draw(st.integers(1, 6)), draw(channels)
    H, W = draw(sizes), draw(sizes)
    h, w = draw(st.sampled_from([(H, W), (4 * H, 4 * W), (1, 1), (H + 2, W)]))
    e = draw(st.sampled_from([(H, W), (h, w), (1, 1), (3, 5)]))
    return {
        "features": _tensor(B, C, H, W),
        "keys": _tensor(B, T, C, H, W),
        "values": _tensor(B, T, C, H, W),
        "flows": _tensor(B, T, 2, h, w, kind=_flow(draw, (h, w) == (H, W))),
        "errors": _tensor(B, T, 1, *e),
        "key_error_weight": _tensor(C),
        "value_error_weight": _tensor(C),
        "value_bias": _tensor(C),
    }, None


@st.composite
def projection(draw) -> tuple[dict[str, Any], None]:
    N, C = draw(st.integers(0, 3)), draw(channels)
    return {"input": _tensor(N, C, draw(sizes), draw(sizes)), "weight": _tensor(draw(channels), C)}, None


@st.composite
def projected(draw) -> tuple[dict[str, Any], None]:
    arguments, _ = draw(aggregation())
    C, R = arguments["value_bias"][0][0], draw(channels)
    (B, T, _, H, W), _ = arguments.pop("keys")
    del arguments["values"]
    first = {
        "features": arguments.pop("features"),
        "references": _tensor(B, T, R, H, W),
        "key_weight": _tensor(C, R),
        "value_weight": _tensor(C, R),
    }
    return first | arguments, None


@st.composite
def convolution(draw) -> tuple[dict[str, Any], None]:
    N, H, W = draw(st.integers(0, 3)), draw(sizes), draw(sizes)
    maps, outputs = draw(st.lists(channels, min_size=1, max_size=4)), draw(channels)
    h, w = draw(st.sampled_from([(3, 3), (1, 5), (5, 1)]))
    reflects = h // 2 < H and w // 2 < W and draw(st.booleans())
    return {
        "inputs": [_tensor(N, c, H, W) for c in maps],
        "weight": _tensor(outputs, sum(maps), h, w),
        "bias": draw(st.sampled_from([None, _tensor(outputs)])),
        "addend": draw(st.sampled_from([None, _tensor(N, outputs, H, W)])),
        "activation": draw(st.sampled_from(["none", "relu", "sigmoid", "tanh"])),
        "padding": "reflect" if reflects else "zeros",
    }, None


@st.composite
def attention(draw) -> tuple[dict[str, Any], None]:
    B, h, N, d = draw(st.integers(0, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 40)), draw(channels)
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any))
    return {
        "query": _tensor(B, h, N, d),
        "keys": [_tensor(B, h, m, d) for m in lengths],
        "values": [_tensor(B, h, m, d) for m in lengths],
    }, None


@st.composite
def windows(draw, spread: bool) -> tuple[dict[str, Any], None]:
    B, h, C = draw(st.integers(0, 2)), draw(st.integers(1, 9)), draw(channels)
    r, s, a, b = (draw(st.integers(1, 5)) for _ in range(4))
    logits = _tensor(B, h, r * a, s * b)
    if spread:
        return {"logits": logits, "latents": _tensor(B, r * s, h, C), "windows": (r, s)}, None
    return {"logits": logits, "features": _tensor(B, C, r * a, s * b), "windows": (r, s)}, None


@st.composite
def queried_windows(draw) -> tuple[dict[str, Any], None]:
    arguments, _ = draw(windows(spread=False))
    (_, heads, _, _), _ = arguments.pop("logits")
    features, grid = arguments["features"], arguments["windows"]
    (_, C, _, _), _ = features
    return {"features": features, "queries": _tensor(heads, C), "windows": grid}, None


@st.composite
def correlation(draw) -> tuple[dict[str, Any], str | None]:
    B, C = draw(st.integers(0, 2)), draw(channels)
    H1, W1, H2, W2 = (draw(st.integers(1, 7)) for _ in range(4))
    mode = draw(st.sampled_from(["dense", "on_demand"]))
    return {
        "features1": _tensor(B, C, H1, W1),
        "features2": _tensor(B, C, H2, W2),
        "coords": _tensor(B, 2, H1, W1, kind=_flow(draw, True)),
        "levels": draw(st.integers(1, 5)),
        "radius": draw(st.integers(1, 5)),
        "mode": mode,
    }, "correlation_lookup_on_demand" if mode == "on_demand" else None


@st.composite
def upsample(draw) -> tuple[dict[str, Any], None]:
    B, h, w = draw(st.integers(0, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return {"flow": _tensor(B, 2, h, w), "mask": _tensor(B, 576, h, w)}, None


@st.composite
def completion(draw) -> tuple[dict[str, Any], None]:
    B, H, W = draw(st.integers(0, 2)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    return {"flow": _tensor(B, 2, H, W), "mask": _tensor(B, 1, H, W, kind="mask")}, None


def _flow(draw, as_is: bool) -> str:
    """Kind of flow. A resized one must not hit integers by rounding: the derivative jumps there."""
    return draw(st.sampled_from(["near", "far", "grid"] if as_is else ["resized near", "resized far"]))


CALLS: dict[str, st.SearchStrategy] = {
    "flow_warp": warp(),
    "flow_consistency": consistency(),
    "deformable_aggregation": aggregation(),
    "pixel_projection": projection(),
    "projected_aggregation": projected(),
    "fused_convolution": convolution(),
    "global_attention": attention(),
    "window_pool": windows(spread=False),
    "window_query": queried_windows(),
    "window_spread": windows(spread=True),
    "correlation_lookup": correlation(),
    "convex_upsample": upsample(),
    "complete_flow": completion(),
}


def test_every_operator_is_fuzzed() -> None:
    assert set(CALLS) == set(SPECS)


def _fill(value: Any, random: torch.Generator, exact: bool) -> Any:
    if isinstance(value, Drawn):
        shape, kind = value
        return _numbers(shape, kind, random, exact)
    if isinstance(value, list):
        return [_fill(v, random, exact) for v in value]
    if isinstance(value, dict):
        return {k: _fill(v, random, exact) for k, v in value.items()}
    return value


def _numbers(shape: tuple[int, ...], kind: str, random: torch.Generator, exact: bool) -> torch.Tensor:
    """float64 numbers; ``exact`` ones are small multiples of a power of two."""
    normal = torch.randn(shape, generator=random, dtype=torch.float64)
    if kind == "mask":
        return (normal * 8).round().clamp(0, 8) / 8 if exact else (normal > 0.3).double()
    if kind == "grid":  # on integers and halves, in and around the frame
        return (normal * 8).round() / 2
    scale = {"normal": 1.0, "near": 1.5, "far": 40.0}[kind.split()[-1]]
    if exact and not kind.startswith("resized"):
        return (normal * scale * 4).round() / 4
    return normal * scale


def _dtype(spec, path: str, dtype: torch.dtype) -> torch.dtype:
    declared = spec.samples[0].arguments[path.split("/")[0]]
    storage = (declared[0] if isinstance(declared, list) else declared).storage
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return dtype if storage else wide


def _paths(arguments: dict[str, Any]) -> list[str]:
    return [
        f"{key}/{i}" if isinstance(value, list) else key
        for key, value in arguments.items()
        for i in range(len(value) if isinstance(value, list) else 1)
        if isinstance(value, Drawn | list)
    ]
