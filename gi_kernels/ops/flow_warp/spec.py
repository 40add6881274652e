"""Declaration of ``flow_warp``."""

from __future__ import annotations

from typing import Any

import torch

from gi_kernels.ops.flow_warp import flow_warp, reference
from gi_kernels.spec import Argument, Invalid, OperatorSpec, Sample, Size, tensor_bytes


def _sample(
    name: str, shape: tuple[int, int, int, int], flow: tuple[int, int], scale: float, size: Size = "small"
) -> Sample:
    arguments = {
        "input": Argument(shape),
        "flow": Argument((shape[0], 2, *flow), scale, storage=False),
    }
    return Sample(name, size, arguments, condition=max(1.0, scale / 4))


def _flops(a: dict[str, Any]) -> int:
    B, C, H, W = a["input"].shape
    return B * H * W * (7 * C + 12)  # four products and three sums per channel; position and weights


def _bytes(a: dict[str, Any]) -> int:
    return tensor_bytes(a["input"], a["flow"], a["input"])


SPEC = OperatorSpec(
    name="flow_warp",
    function=flow_warp,
    reference=reference.flow_warp,
    summary="bilinear sampling along a flow that is resized on the way",
    samples=(
        _sample("resized", (2, 5, 9, 11), (18, 33), 6.0),
        _sample("same_size", (1, 17, 8, 10), (8, 10), 2.0),
        _sample("enlarged", (1, 32, 7, 9), (3, 4), 1.0),
        _sample("many_channels", (1, 1040, 3, 4), (6, 8), 2.0),
        _sample("far", (1, 3, 8, 8), (16, 16), 60.0),
        _sample("one_channel", (2, 1, 5, 6), (5, 6), 2.0),
        _sample("one_pixel", (2, 3, 1, 1), (1, 1), 0.5),
        _sample("one_row", (1, 4, 1, 9), (2, 5), 2.0),
        _sample("one_flow_vector", (1, 4, 5, 6), (1, 1), 2.0),
        _sample("no_batch", (0, 3, 4, 5), (4, 5), 1.0),
        _sample("no_channel", (2, 0, 4, 5), (8, 5), 1.0),
        _sample("no_row", (1, 3, 0, 5), (4, 5), 1.0),
        _sample("square_512", (4, 512, 64, 64), (64, 64), 4.0, "typical"),
        _sample("480p_512", (4, 512, 60, 107), (480, 854), 32.0, "large"),
    ),
    invalid=(
        Invalid("input_list", lambda a: {**a, "input": [1.0]}, TypeError, "input: .*Tensor, got list"),
        Invalid("flow_none", lambda a: {**a, "flow": None}, TypeError, "flow: .*Tensor, got NoneType"),
        Invalid("input_rank", lambda a: {**a, "input": a["input"][0]}, ValueError, "input: .*4 dim.*got 3"),
        Invalid("flow_rank", lambda a: {**a, "flow": a["flow"][None]}, ValueError, "flow: .*4 dim.*got 5"),
        Invalid(
            "batches", lambda a: {**a, "flow": a["flow"][:1]}, ValueError, r"flow: .*size 2 .*\(B\).*got 1"
        ),
        Invalid("components", lambda a: {**a, "flow": a["flow"][:, :1]}, ValueError, "flow: .*size 2.*got 1"),
        Invalid(
            "input_int", lambda a: {**a, "input": a["input"].int()}, TypeError, "input: .*got torch.int32"
        ),
        Invalid("flow_int", lambda a: {**a, "flow": a["flow"].long()}, TypeError, "flow: .*got torch.int64"),
        Invalid(
            "input_complex",
            lambda a: {**a, "input": a["input"].to(torch.complex64)},
            TypeError,
            "input: .*got torch.complex64",
        ),
        Invalid(
            "flow_device", lambda a: {**a, "flow": a["flow"].to("meta")}, ValueError, "flow: .*cpu.*meta"
        ),
        Invalid(
            "input_device", lambda a: {**a, "input": a["input"].to("meta")}, ValueError, "flow: .*meta.*cpu"
        ),
        Invalid(
            "flow_empty",
            lambda a: {**a, "flow": a["flow"][:, :, :0]},
            ValueError,
            "flow: .*at least 1.*dimension 2",
        ),
    ),
    positions={"flow": "input"},
    differentiable=("input", "flow"),
    flops=_flops,
    bytes=_bytes,
)
