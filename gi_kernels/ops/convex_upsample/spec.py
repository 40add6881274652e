"""Declaration of ``convex_upsample``."""

from __future__ import annotations

from typing import Any

from gi_kernels.ops.convex_upsample import convex_upsample, reference
from gi_kernels.spec import Argument, Invalid, OperatorSpec, Sample, Size, tensor_bytes


def _sample(name: str, batch: int, size: tuple[int, int], kind: Size = "small") -> Sample:
    arguments = {
        "flow": Argument((batch, 2, *size), 4.0, storage=False),
        "mask": Argument((batch, 576, *size)),
    }
    return Sample(name, kind, arguments)


def _flops(a: dict[str, Any]) -> int:
    B, _, h, w = a["flow"].shape
    return B * 64 * h * w * 9 * (4 + 2 * 2)  # per fine pixel and neighbour: softmax, two weighted sums


def _bytes(a: dict[str, Any]) -> int:
    return tensor_bytes(a["flow"], a["mask"]) + 64 * tensor_bytes(a["flow"])


SPEC = OperatorSpec(
    name="convex_upsample",
    function=convex_upsample,
    reference=reference.convex_upsample,
    summary="RAFT's eightfold upsampling by learned convex combinations",
    samples=(
        _sample("odd", 2, (3, 5)),
        _sample("square", 1, (4, 4)),
        _sample("one_pixel", 1, (1, 1)),
        _sample("one_row", 1, (1, 4)),
        _sample("wide", 1, (2, 19)),
        _sample("no_batch", 0, (2, 3)),
        _sample("no_row", 1, (0, 3)),
        _sample("square_32", 1, (32, 32), "typical"),
        _sample("square_64", 1, (64, 64), "large"),
    ),
    invalid=(
        Invalid("flow_none", lambda a: {**a, "flow": None}, TypeError, "flow: .*got NoneType"),
        Invalid("mask_list", lambda a: {**a, "mask": []}, TypeError, "mask: .*got list"),
        Invalid("rank", lambda a: {**a, "flow": a["flow"][0]}, ValueError, "flow: .*4 dim.*got 3"),
        Invalid(
            "mask_channels",
            lambda a: {**a, "mask": a["mask"][:, :144]},
            ValueError,
            "mask: .*size 576.*got 144",
        ),
        Invalid("components", lambda a: {**a, "flow": a["flow"][:, :1]}, ValueError, "flow: .*size 2.*got 1"),
        Invalid("sizes", lambda a: {**a, "flow": a["flow"][..., 1:]}, ValueError, r"flow: .*\(w\).*got 4"),
        Invalid("batches", lambda a: {**a, "flow": a["flow"][:1]}, ValueError, r"flow: .*\(B\).*got 1"),
        Invalid("mask_bool", lambda a: {**a, "mask": a["mask"] > 0}, TypeError, "mask: .*got torch.bool"),
        Invalid("flow_int", lambda a: {**a, "flow": a["flow"].int()}, TypeError, "flow: .*got torch.int32"),
        Invalid("device", lambda a: {**a, "flow": a["flow"].to("meta")}, ValueError, "flow: .*cpu.*meta"),
    ),
    differentiable=("flow", "mask"),
    flops=_flops,
    bytes=_bytes,
)
