"""Declaration of ``pixel_projection``."""

from __future__ import annotations

from typing import Any

from gi_kernels.ops.pixel_projection import pixel_projection, reference
from gi_kernels.spec import Argument, Invalid, OperatorSpec, Sample, Size, tensor_bytes


def _sample(name: str, shape: tuple[int, int, int, int], channels: int, kind: Size = "small") -> Sample:
    weight = 1 / max(shape[1], 1) ** 0.5  # results of order one
    return Sample(name, kind, {"input": Argument(shape), "weight": Argument((channels, shape[1]), weight)})


def _flops(a: dict[str, Any]) -> int:
    return 2 * a["input"].numel() * a["weight"].shape[0]


def _bytes(a: dict[str, Any]) -> int:
    N, _, H, W = a["input"].shape
    out = N * a["weight"].shape[0] * H * W * a["input"].element_size()
    return tensor_bytes(a["input"], a["weight"]) + out


SPEC = OperatorSpec(
    name="pixel_projection",
    function=pixel_projection,
    reference=reference.pixel_projection,
    summary="the same linear map of the channels at every pixel",
    samples=(
        _sample("wider", (2, 5, 9, 11), 34),
        _sample("narrower", (1, 33, 4, 5), 7),
        _sample("two_depths", (2, 530, 11, 13), 25),
        _sample("many_rows", (1, 9, 23, 29), 16),
        _sample("one_channel", (1, 1, 3, 4), 1),
        _sample("one_pixel", (3, 8, 1, 1), 8),
        _sample("no_batch", (0, 3, 4, 5), 2),
        _sample("no_channel", (1, 0, 4, 5), 3),
        _sample("no_result", (1, 3, 4, 5), 0),
        _sample("no_row", (1, 3, 0, 5), 2),
        _sample("square_512", (1, 512, 64, 64), 512, "typical"),
        _sample("480p_512", (2, 512, 60, 107), 1024, "large"),
    ),
    invalid=(
        Invalid("input_none", lambda a: {**a, "input": None}, TypeError, "input: .*got NoneType"),
        Invalid("weight_list", lambda a: {**a, "weight": [1.0]}, TypeError, "weight: .*Tensor, got list"),
        Invalid("input_rank", lambda a: {**a, "input": a["input"][0]}, ValueError, "input: .*4 dim.*got 3"),
        Invalid(
            "weight_of_convolution",
            lambda a: {**a, "weight": a["weight"][..., None, None]},
            ValueError,
            "weight: .*2 dim.*got 4",
        ),
        Invalid(
            "channels",
            lambda a: {**a, "weight": a["weight"][:, 1:]},
            ValueError,
            r"weight: .*\(C\).*got 4",
        ),
        Invalid("int", lambda a: {**a, "weight": a["weight"].int()}, TypeError, "weight: .*got torch.int32"),
        Invalid(
            "mixed", lambda a: {**a, "weight": a["weight"].double()}, TypeError, "weight: .*got torch.float64"
        ),
        Invalid(
            "device", lambda a: {**a, "weight": a["weight"].to("meta")}, ValueError, "weight: .*cpu.*meta"
        ),
    ),
    autocast=True,
    differentiable=("input", "weight"),
    flops=_flops,
    bytes=_bytes,
)
