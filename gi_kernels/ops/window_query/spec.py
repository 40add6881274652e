"""Declaration of ``window_query``."""

from __future__ import annotations

from typing import Any

from gi_kernels.ops.window_query import reference, window_query
from gi_kernels.spec import Argument, Invalid, OperatorSpec, Sample, Size, tensor_bytes


def _sample(
    name: str, shape: tuple[int, int, int, int], heads: int, windows: tuple[int, int], kind: Size = "small"
) -> Sample:
    C = shape[1]
    arguments = {
        "features": Argument(shape),
        "queries": Argument((heads, C), 2 / max(C, 1) ** 0.5),  # logits of a size that spreads the weights
        "windows": windows,
    }
    return Sample(name, kind, arguments)


def _flops(a: dict[str, Any]) -> int:
    B, C, H, W = a["features"].shape
    return B * a["queries"].shape[0] * H * W * (4 * C + 5)  # logits and weighted sum; softmax


def _bytes(a: dict[str, Any]) -> int:
    B, C = a["features"].shape[:2]
    result = B * a["windows"][0] * a["windows"][1] * a["queries"].shape[0] * C
    return tensor_bytes(a["features"], a["queries"]) + result * a["features"].element_size()


SPEC = OperatorSpec(
    name="window_query",
    function=window_query,
    reference=reference.window_query,
    summary="attention of queries over the pixels of each window, pooling the features",
    samples=(
        _sample("square", (2, 5, 8, 12), 3, (4, 4)),
        _sample("uneven", (1, 17, 6, 10), 2, (2, 5)),
        _sample("eight_heads", (1, 32, 8, 8), 8, (2, 2)),
        _sample("worked_on_in_parts", (1, 1040, 3, 64), 2, (1, 1)),
        _sample("several_pieces", (2, 32, 6, 80), 9, (3, 20)),
        _sample("more_pieces_than_sums", (1, 5, 70, 2), 2, (70, 1)),
        _sample("one_pixel_windows", (1, 3, 4, 6), 2, (4, 6)),
        _sample("no_batch", (0, 3, 4, 4), 2, (2, 2)),
        _sample("no_channel", (1, 0, 4, 4), 2, (2, 2)),
        _sample("no_query", (1, 3, 4, 4), 0, (2, 2)),
        _sample("square_512", (1, 512, 64, 64), 8, (16, 16), "typical"),
        _sample("480p_512", (1, 512, 64, 112), 8, (16, 16), "large"),
    ),
    invalid=(
        Invalid("features_none", lambda a: {**a, "features": None}, TypeError, "features: .*got NoneType"),
        Invalid("queries_list", lambda a: {**a, "queries": []}, TypeError, "queries: .*got list"),
        Invalid(
            "rank", lambda a: {**a, "features": a["features"][0]}, ValueError, "features: .*4 dim.*got 3"
        ),
        Invalid(
            "weight_of_convolution",
            lambda a: {**a, "queries": a["queries"][..., None, None]},
            ValueError,
            "queries: .*2 dim.*got 4",
        ),
        Invalid(
            "channels",
            lambda a: {**a, "queries": a["queries"][:, 1:]},
            ValueError,
            r"queries: .*\(C\).*got 4",
        ),
        Invalid("rows", lambda a: {**a, "windows": (3, 4)}, ValueError, "windows: .*divide.*height 8, got 3"),
        Invalid("windows_int", lambda a: {**a, "windows": 4}, TypeError, "windows: .*pair of ints.*got 4"),
        Invalid(
            "int", lambda a: {**a, "features": a["features"].int()}, TypeError, "features: .*got torch.int32"
        ),
        Invalid(
            "mixed",
            lambda a: {**a, "queries": a["queries"].double()},
            TypeError,
            "queries: .*got torch.float64",
        ),
        Invalid(
            "device", lambda a: {**a, "queries": a["queries"].to("meta")}, ValueError, "queries: .*cpu.*meta"
        ),
    ),
    autocast=True,
    differentiable=("features", "queries"),
    composed=frozenset({"cuda", "triton"}),
    flops=_flops,
    bytes=_bytes,
)
