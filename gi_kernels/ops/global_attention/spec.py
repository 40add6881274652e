"""Declaration of ``global_attention``."""

from __future__ import annotations

from typing import Any

from gi_kernels.ops.global_attention import global_attention, reference
from gi_kernels.spec import Argument, Invalid, OperatorSpec, Sample, Size, tensor_bytes


def _sample(
    name: str, shape: tuple[int, int, int, int], segments: tuple[int, ...], kind: Size = "small"
) -> Sample:
    B, h, _, d = shape
    arguments = {
        "query": Argument(shape),
        "keys": [Argument((B, h, m, d)) for m in segments],
        "values": [Argument((B, h, m, d)) for m in segments],
    }
    return Sample(name, kind, arguments)


def _flops(a: dict[str, Any]) -> int:
    B, h, N, d = a["query"].shape
    M = sum(k.shape[2] for k in a["keys"])
    return 4 * B * h * N * M * d  # the two matrix products


def _bytes(a: dict[str, Any]) -> int:
    return tensor_bytes(a["query"], a["keys"], a["values"], a["query"])


SPEC = OperatorSpec(
    name="global_attention",
    function=global_attention,
    reference=reference.global_attention,
    summary="attention over segments of keys and values without joining them",
    samples=(
        _sample("two_segments", (2, 3, 16, 8), (16, 33)),
        _sample("one_segment", (1, 2, 9, 12), (9,)),
        _sample("three_references", (1, 2, 20, 16), (20, 20, 20, 20)),
        _sample("empty_segment", (1, 2, 7, 5), (4, 0, 6)),
        _sample("one_of_each", (1, 1, 1, 1), (1,)),
        _sample("one_key_each", (2, 1, 5, 17), (1, 1, 1)),
        _sample("wide_head", (1, 1, 70, 130), (300, 9)),
        _sample("no_batch", (0, 2, 4, 8), (4, 4)),
        _sample("no_head", (1, 0, 4, 8), (4,)),
        _sample("no_query", (1, 2, 0, 8), (4, 3)),
        _sample("four_references_b1", (1, 8, 256, 64), (256,) * 5, "typical"),
        _sample("four_references_b8", (8, 8, 256, 64), (256,) * 5, "large"),
    ),
    invalid=(
        Invalid("query_none", lambda a: {**a, "query": None}, TypeError, "query: .*got NoneType"),
        Invalid(
            "keys_none", lambda a: {**a, "keys": None}, TypeError, "keys: .*sequence of tensors, got NoneType"
        ),
        Invalid("keys_numbers", lambda a: {**a, "keys": [1, 2]}, TypeError, r"keys\[0\]: .*got int"),
        Invalid(
            "no_segment", lambda a: {**a, "keys": [], "values": []}, ValueError, "keys: .*empty sequence"
        ),
        Invalid(
            "values_missing", lambda a: {**a, "values": a["values"][:1]}, ValueError, "values: .*2 seg.*got 1"
        ),
        Invalid(
            "no_key",
            lambda a: {
                **a,
                "keys": [k[:, :, :0] for k in a["keys"]],
                "values": [v[:, :, :0] for v in a["values"]],
            },
            ValueError,
            "keys: .*at least one key",
        ),
        Invalid("query_rank", lambda a: {**a, "query": a["query"][0]}, ValueError, "query: .*4 dim.*got 3"),
        Invalid(
            "width",
            lambda a: {**a, "keys": [a["keys"][0], a["keys"][1][..., 1:]]},
            ValueError,
            r"keys\[1\]: .*\(d\).*got 7",
        ),
        Invalid(
            "no_width",
            lambda a: {
                "query": a["query"][..., :0],
                "keys": [k[..., :0] for k in a["keys"]],
                "values": [v[..., :0] for v in a["values"]],
            },
            ValueError,
            "query: .*at least 1.*dimension 3",
        ),
        Invalid(
            "segment_lengths",
            lambda a: {**a, "values": [a["values"][0], a["values"][1][:, :, 1:]]},
            ValueError,
            r"values\[1\]: .*size 33 .*got 32",
        ),
        Invalid(
            "heads",
            lambda a: {**a, "query": a["query"][:, :1]},
            ValueError,
            r"keys\[0\]: .*size 1 .*\(h\).*got 3",
        ),
        Invalid(
            "int",
            lambda a: {**a, "values": [v.int() for v in a["values"]]},
            TypeError,
            r"values\[0\]: .*int32",
        ),
        Invalid(
            "mixed",
            lambda a: {**a, "keys": [a["keys"][0], a["keys"][1].double()]},
            TypeError,
            r"keys\[1\]: .*float32 like query, got torch.float64",
        ),
        Invalid(
            "device",
            lambda a: {**a, "keys": [k.to("meta") for k in a["keys"]]},
            ValueError,
            r"keys\[0\]: .*meta",
        ),
    ),
    autocast=True,
    differentiable=("query", "keys", "values"),
    flops=_flops,
    bytes=_bytes,
)
