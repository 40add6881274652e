"""Declaration of ``correlation_lookup``."""

from __future__ import annotations

from typing import Any

from gi_kernels.ops.correlation_lookup import correlation_lookup, reference
from gi_kernels.spec import Argument, Invalid, OperatorSpec, Sample, Size, tensor_bytes


def _sample(
    name: str,
    shape: tuple[int, int, int, int],
    other: tuple[int, int],
    mode: str,
    kind: Size = "small",
    *,
    levels: int = 4,
    radius: int = 4,
    scale: float = 3.0,
) -> Sample:
    B, C, H, W = shape
    arguments = {
        "features1": Argument(shape),
        "features2": Argument((B, C, *other)),
        "coords": Argument((B, 2, H, W), scale, "coordinates", storage=False),
        "levels": levels,
        "radius": radius,
        "mode": mode,
    }
    served_by = "correlation_lookup_on_demand" if mode == "on_demand" else None
    return Sample(name, kind, arguments, served_by)


def _flops(a: dict[str, Any]) -> int:
    B, C, H, W = a["features1"].shape
    h, w = a["features2"].shape[2:]
    read = 7 * a["levels"] * (2 * a["radius"] + 1) ** 2  # bilinear samples of a pixel
    if a["mode"] == "on_demand":
        products = 2 * C * a["levels"] * (2 * a["radius"] + 2) ** 2
    else:
        products = 2 * C * h * w + 4 * h * w // 3  # one row of the volume, and its averages
    return B * H * W * (products + read)


def _bytes(a: dict[str, Any]) -> int:
    B, _, H, W = a["features1"].shape
    result = B * H * W * a["levels"] * (2 * a["radius"] + 1) ** 2 * a["features1"].element_size()
    return tensor_bytes(a["features1"], a["features2"], a["coords"]) + result


SPEC = OperatorSpec(
    name="correlation_lookup",
    function=correlation_lookup,
    reference=reference.correlation_lookup,
    summary="windows of the correlation volume of two feature maps at several scales",
    samples=(
        _sample("dense", (2, 5, 6, 7), (6, 7), "dense", levels=2, radius=2),
        _sample("on_demand", (2, 5, 6, 7), (6, 7), "on_demand", levels=2, radius=2),
        _sample("dense_raft", (1, 8, 4, 5), (9, 8), "dense"),
        _sample("on_demand_raft", (1, 17, 4, 5), (9, 8), "on_demand"),
        _sample("dense_vanishing", (1, 3, 3, 4), (3, 5), "dense", levels=5, radius=1),
        _sample("on_demand_vanishing", (1, 3, 3, 4), (3, 5), "on_demand", levels=5, radius=1),
        _sample("dense_far", (1, 3, 6, 7), (6, 5), "dense", levels=3, radius=3, scale=15.0),
        _sample("on_demand_far", (1, 3, 6, 7), (6, 5), "on_demand", levels=3, radius=3, scale=15.0),
        _sample("on_demand_part", (1, 3, 9, 10), (20, 22), "on_demand", levels=1, radius=1, scale=1.0),
        _sample("dense_one_pixel", (1, 1, 1, 1), (1, 1), "dense", levels=1, radius=1, scale=0.5),
        _sample("on_demand_one_pixel", (1, 1, 1, 1), (1, 1), "on_demand", levels=1, radius=1, scale=0.5),
        _sample("auto", (1, 4, 3, 3), (5, 4), "auto", levels=2, radius=1),
        _sample("dense_no_batch", (0, 3, 4, 4), (4, 4), "dense", levels=2, radius=1),
        _sample("on_demand_no_batch", (0, 3, 4, 4), (4, 4), "on_demand", levels=2, radius=1),
        _sample("dense_nothing_to_read", (1, 3, 2, 2), (0, 4), "dense", levels=2, radius=1),
        _sample("on_demand_nothing_to_read", (1, 3, 2, 2), (0, 4), "on_demand", levels=2, radius=1),
        _sample("dense_32", (1, 256, 32, 32), (32, 32), "dense", "typical"),
        _sample("on_demand_32", (1, 256, 32, 32), (32, 32), "on_demand", "typical"),
        _sample("dense_64", (1, 256, 64, 64), (64, 64), "dense", "large"),
        _sample("on_demand_64", (1, 256, 64, 64), (64, 64), "on_demand", "large"),
    ),
    invalid=(
        Invalid("features1_none", lambda a: {**a, "features1": None}, TypeError, "features1: .*got NoneType"),
        Invalid("coords_list", lambda a: {**a, "coords": [0]}, TypeError, "coords: .*got list"),
        Invalid(
            "rank", lambda a: {**a, "features2": a["features2"][0]}, ValueError, "features2: .*4 dim.*got 3"
        ),
        Invalid(
            "channels", lambda a: {**a, "features2": a["features2"][:, 1:]}, ValueError, r"features2: .*\(C\)"
        ),
        Invalid(
            "coords_rank", lambda a: {**a, "coords": a["coords"][0]}, ValueError, "coords: .*4 dim.*got 3"
        ),
        Invalid(
            "coords_size",
            lambda a: {**a, "coords": a["coords"][..., 1:]},
            ValueError,
            r"coords: .*\(W1\).*got 6",
        ),
        Invalid(
            "no_channel",
            lambda a: {**a, "features1": a["features1"][:, :0], "features2": a["features2"][:, :0]},
            ValueError,
            "features1: .*at least 1.*dimension 1",
        ),
        Invalid("levels_zero", lambda a: {**a, "levels": 0}, ValueError, "levels: .*at least 1, got 0"),
        Invalid("levels_float", lambda a: {**a, "levels": 2.0}, TypeError, "levels: .*int, got float"),
        Invalid("radius_zero", lambda a: {**a, "radius": 0}, ValueError, "radius: .*at least 1, got 0"),
        Invalid("radius_bool", lambda a: {**a, "radius": True}, TypeError, "radius: .*int, got bool"),
        Invalid("mode", lambda a: {**a, "mode": "sparse"}, ValueError, "mode: .*'on_demand', got 'sparse'"),
        Invalid(
            "int", lambda a: {**a, "features1": a["features1"].int()}, TypeError, "features1: .*torch.int32"
        ),
        Invalid(
            "coords_int", lambda a: {**a, "coords": a["coords"].long()}, TypeError, "coords: .*torch.int64"
        ),
        Invalid(
            "mixed",
            lambda a: {**a, "features2": a["features2"].double()},
            TypeError,
            "features2: .*float32 like features1, got torch.float64",
        ),
        Invalid(
            "device", lambda a: {**a, "features2": a["features2"].to("meta")}, ValueError, "features2: .*meta"
        ),
        Invalid(
            "coords_device",
            lambda a: {**a, "coords": a["coords"].to("meta")},
            ValueError,
            "coords: .*cpu.*meta",
        ),
    ),
    autocast=True,
    stores_intermediates=True,  # the volumes
    positions={"coords": "features2"},
    differentiable=("features1", "features2", "coords"),
    flops=_flops,
    bytes=_bytes,
)
