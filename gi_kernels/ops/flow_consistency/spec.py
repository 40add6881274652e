"""Declaration of ``flow_consistency``."""

from __future__ import annotations

from typing import Any

from gi_kernels.ops.flow_consistency import flow_consistency, reference
from gi_kernels.spec import Argument, Invalid, OperatorSpec, Sample, Size, tensor_bytes


def _sample(name: str, batch: int, size: tuple[int, int], scale: float, kind: Size = "small") -> Sample:
    shape = (batch, 2, *size)
    arguments = {"flow": Argument(shape, scale), "flow_backward": Argument(shape, scale)}
    return Sample(name, kind, arguments, condition=max(1.0, scale / 4))


def _flops(a: dict[str, Any]) -> int:
    B, _, H, W = a["flow"].shape
    return B * H * W * (12 + 2 * 7 + 6)  # position and weights; two samples; sums, magnitudes, mean


def _bytes(a: dict[str, Any]) -> int:
    return tensor_bytes(a["flow"], a["flow_backward"]) + tensor_bytes(a["flow"]) // 2


SPEC = OperatorSpec(
    name="flow_consistency",
    function=flow_consistency,
    reference=reference.flow_consistency,
    summary="forward-backward error of a pair of flows",
    samples=(
        _sample("wide", 2, (9, 17), 3.0),
        _sample("far", 1, (8, 8), 60.0),
        _sample("one_pixel", 2, (1, 1), 0.5),
        _sample("one_column", 1, (11, 1), 2.0),
        _sample("no_batch", 0, (4, 5), 1.0),
        _sample("no_column", 1, (4, 0), 1.0),
        _sample("square_256", 4, (256, 256), 8.0, "typical"),
        _sample("480p", 4, (480, 854), 16.0, "large"),
    ),
    invalid=(
        Invalid("flow_text", lambda a: {**a, "flow": "flow"}, TypeError, "flow: .*Tensor, got str"),
        Invalid(
            "backward_none",
            lambda a: {**a, "flow_backward": None},
            TypeError,
            "flow_backward: .*got NoneType",
        ),
        Invalid("rank", lambda a: {**a, "flow": a["flow"][0]}, ValueError, "flow: .*4 dim.*got 3"),
        Invalid(
            "sizes",
            lambda a: {**a, "flow_backward": a["flow_backward"][..., 1:]},
            ValueError,
            r"flow_backward: .*size 17 .*\(W\).*got 16",
        ),
        Invalid("components", lambda a: {**a, "flow": a["flow"][:, :1]}, ValueError, "flow: .*size 2.*got 1"),
        Invalid("int", lambda a: {**a, "flow": a["flow"].int()}, TypeError, "flow: .*got torch.int32"),
        Invalid(
            "mixed",
            lambda a: {**a, "flow_backward": a["flow_backward"].half()},
            TypeError,
            "flow_backward: .*float32 like flow, got torch.float16",
        ),
        Invalid(
            "device",
            lambda a: {**a, "flow_backward": a["flow_backward"].to("meta")},
            ValueError,
            "flow_backward: .*cpu.*meta",
        ),
    ),
    positions={"flow": "flow_backward"},
    differentiable=(),
    flops=_flops,
    bytes=_bytes,
)
