"""Declaration of ``window_pool``."""

from __future__ import annotations

from typing import Any

from gi_kernels.ops.window_pool import reference, window_pool
from gi_kernels.spec import Argument, Invalid, OperatorSpec, Sample, Size, tensor_bytes


def _sample(
    name: str, shape: tuple[int, int, int, int], heads: int, windows: tuple[int, int], kind: Size = "small"
) -> Sample:
    B, _, H, W = shape
    arguments = {
        "logits": Argument((B, heads, H, W), 2.0),
        "features": Argument(shape),
        "windows": windows,
    }
    return Sample(name, kind, arguments)


def _flops(a: dict[str, Any]) -> int:
    B, C, H, W = a["features"].shape
    return B * a["logits"].shape[1] * H * W * (2 * C + 5)  # weighted sum; softmax


def _bytes(a: dict[str, Any]) -> int:
    B, C = a["features"].shape[:2]
    result = B * a["windows"][0] * a["windows"][1] * a["logits"].shape[1] * C
    return tensor_bytes(a["logits"], a["features"]) + result * a["features"].element_size()


SPEC = OperatorSpec(
    name="window_pool",
    function=window_pool,
    reference=reference.window_pool,
    summary="softmax-weighted mean of the features per window and head",
    samples=(
        _sample("square", (2, 5, 8, 12), 3, (4, 4)),
        _sample("uneven", (1, 17, 6, 10), 2, (2, 5)),
        _sample("eight_heads", (1, 32, 8, 8), 8, (2, 2)),
        _sample("one_window", (1, 4, 5, 7), 1, (1, 1)),
        _sample("worked_on_in_parts", (1, 250, 9, 64), 2, (1, 1)),
        _sample("one_pixel_windows", (1, 3, 4, 6), 2, (4, 6)),
        _sample("one_pixel", (2, 3, 1, 1), 2, (1, 1)),
        _sample("no_batch", (0, 3, 4, 4), 2, (2, 2)),
        _sample("no_channel", (1, 0, 4, 4), 2, (2, 2)),
        _sample("no_head", (1, 3, 4, 4), 0, (2, 2)),
        _sample("square_512", (1, 512, 64, 64), 8, (16, 16), "typical"),
        _sample("480p_512", (1, 512, 64, 112), 8, (16, 16), "large"),
    ),
    invalid=(
        Invalid("logits_none", lambda a: {**a, "logits": None}, TypeError, "logits: .*got NoneType"),
        Invalid("features_list", lambda a: {**a, "features": []}, TypeError, "features: .*got list"),
        Invalid(
            "rank", lambda a: {**a, "features": a["features"][0]}, ValueError, "features: .*4 dim.*got 3"
        ),
        Invalid(
            "sizes",
            lambda a: {**a, "features": a["features"][..., 4:]},
            ValueError,
            r"features: .*\(W\).*got 8",
        ),
        Invalid(
            "batches", lambda a: {**a, "logits": a["logits"][:1]}, ValueError, r"features: .*\(B\).*got 2"
        ),
        Invalid("rows", lambda a: {**a, "windows": (3, 4)}, ValueError, "windows: .*divide.*height 8, got 3"),
        Invalid(
            "columns", lambda a: {**a, "windows": (4, 5)}, ValueError, "windows: .*divide.*width 12, got 5"
        ),
        Invalid(
            "too_many", lambda a: {**a, "windows": (16, 4)}, ValueError, "windows: .*divide.*height 8, got 16"
        ),
        Invalid("zero", lambda a: {**a, "windows": (0, 4)}, ValueError, "windows: .*at least 1, got 0"),
        Invalid(
            "windows_float", lambda a: {**a, "windows": (2.0, 4)}, TypeError, "windows: .*int, got float"
        ),
        Invalid("windows_int", lambda a: {**a, "windows": 4}, TypeError, "windows: .*pair of ints.*got 4"),
        Invalid("windows_three", lambda a: {**a, "windows": (2, 2, 2)}, TypeError, "windows: .*pair of ints"),
        Invalid(
            "int", lambda a: {**a, "features": a["features"].int()}, TypeError, "features: .*got torch.int32"
        ),
        Invalid(
            "device",
            lambda a: {**a, "features": a["features"].to("meta")},
            ValueError,
            "features: .*cpu.*meta",
        ),
    ),
    autocast=True,
    differentiable=("logits", "features"),
    flops=_flops,
    bytes=_bytes,
)
