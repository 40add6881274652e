"""Declaration of ``complete_flow``."""

from __future__ import annotations

from typing import Any

from gi_kernels.ops.complete_flow import complete_flow, reference
from gi_kernels.spec import Argument, Invalid, OperatorSpec, Sample, Size, tensor_bytes


def _sample(
    name: str,
    batch: int,
    size: tuple[int, int],
    kind: Size = "small",
    *,
    draw: Any = "mask",
    scale: float = 1.0,
) -> Sample:
    arguments = {
        "flow": Argument((batch, 2, *size), 5.0),
        "mask": Argument((batch, 1, *size), scale, draw),
    }
    return Sample(name, kind, arguments)


def _flops(a: dict[str, Any]) -> int:
    # Per point of the rim: distance 5, weight 4, sums 5; per masked pixel: 20 points and the blend.
    return int((a["mask"] > 0).sum()) * (20 * (5 + 4 + 5) + 7)


def _bytes(a: dict[str, Any]) -> int:
    return tensor_bytes(a["flow"], a["mask"], a["flow"])


SPEC = OperatorSpec(
    name="complete_flow",
    function=complete_flow,
    reference=reference.complete_flow,
    summary="flow inside a mask from 20 points on its rim",
    samples=(
        _sample("disc", 2, (16, 21)),
        _sample("soft", 1, (14, 12), scale=0.75),
        _sample("faint", 1, (14, 12), scale=0.25),
        _sample("scattered", 2, (9, 11), draw="uniform"),
        _sample("empty", 1, (6, 7), scale=0.0),
        _sample("full", 1, (6, 7), draw="constant"),
        _sample("one_pixel", 1, (1, 1), draw="constant"),
        _sample("one_row", 1, (1, 7), draw="uniform"),
        _sample("no_batch", 0, (4, 5)),
        _sample("no_row", 1, (0, 5)),
        _sample("square_256", 1, (256, 256), "typical"),
        _sample("480p", 1, (480, 854), "large"),
    ),
    invalid=(
        Invalid("flow_none", lambda a: {**a, "flow": None}, TypeError, "flow: .*got NoneType"),
        Invalid("mask_list", lambda a: {**a, "mask": []}, TypeError, "mask: .*got list"),
        Invalid("rank", lambda a: {**a, "mask": a["mask"][:, 0]}, ValueError, "mask: .*4 dim.*got 3"),
        Invalid("sizes", lambda a: {**a, "mask": a["mask"][..., 1:]}, ValueError, r"mask: .*\(W\).*got 20"),
        Invalid("components", lambda a: {**a, "flow": a["flow"][:, :1]}, ValueError, "flow: .*size 2.*got 1"),
        Invalid("mask_bool", lambda a: {**a, "mask": a["mask"] > 0}, TypeError, "mask: .*got torch.bool"),
        Invalid("mixed", lambda a: {**a, "mask": a["mask"].half()}, TypeError, "mask: .*float32 like flow"),
        Invalid("device", lambda a: {**a, "mask": a["mask"].to("meta")}, ValueError, "mask: .*cpu.*meta"),
    ),
    differentiable=(),
    flops=_flops,
    bytes=_bytes,
)
