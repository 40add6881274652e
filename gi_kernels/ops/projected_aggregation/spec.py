"""Declaration of ``projected_aggregation``."""

from __future__ import annotations

from typing import Any

from gi_kernels.ops.deformable_aggregation import spec as aggregation
from gi_kernels.ops.projected_aggregation import projected_aggregation, reference
from gi_kernels.spec import Argument, Invalid, OperatorSpec, Sample, Size, tensor_bytes

#: The tensors in the storage dtype, and the rest.
STORED = ("features", "references", "key_weight", "value_weight")
REST = aggregation.REST


def _sample(
    name: str,
    shape: tuple[int, int, int, int, int],
    channels: int,
    flow: tuple[int, int],
    scale: float,
    kind: Size = "small",
) -> Sample:
    B, T, R, H, W = shape
    weight = 1 / max(R, 1) ** 0.5  # keys and values of order one
    arguments = {
        "features": Argument((B, channels, H, W)),
        "references": Argument(shape),
        "key_weight": Argument((channels, R), weight),
        "value_weight": Argument((channels, R), weight),
        "flows": Argument((B, T, 2, *flow), scale, storage=False),
        "errors": Argument((B, T, 1, *flow), 1.0, "uniform", storage=False),
        "key_error_weight": Argument((channels,), storage=False),
        "value_error_weight": Argument((channels,), storage=False),
        "value_bias": Argument((channels,), storage=False),
    }
    return Sample(name, kind, arguments, condition=max(1.0, scale / 4))


def _aggregation(a: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the aggregation alone, in as far as its costs depend on them."""
    B, T, _, H, W = a["references"].shape
    keys = a["references"].new_empty(1).expand(B, T, a["features"].shape[1], H, W)
    return {**a, "keys": keys, "values": keys}


def _flops(a: dict[str, Any]) -> int:
    B, T, R, H, W = a["references"].shape
    products = 2 * 2 * B * T * H * W * R * a["features"].shape[1]
    return products + aggregation.SPEC.flops(_aggregation(a))


def _bytes(a: dict[str, Any]) -> int:
    return tensor_bytes(*(a[name] for name in STORED + REST), a["features"])


SPEC = OperatorSpec(
    name="projected_aggregation",
    function=projected_aggregation,
    reference=reference.projected_aggregation,
    summary="deformable aggregation of references that are projected to keys and values on the way",
    samples=(
        _sample("two_references", (2, 2, 5, 6, 7), 6, (12, 28), 6.0),
        _sample("one_reference", (1, 1, 17, 5, 6), 17, (5, 6), 2.0),
        _sample("four_references", (1, 4, 16, 6, 5), 16, (24, 20), 8.0),
        _sample("three_blocks", (1, 2, 520, 5, 7), 300, (10, 14), 4.0),
        _sample("one_pixel", (2, 2, 3, 1, 1), 4, (1, 1), 0.5),
        _sample("one_channel", (1, 2, 1, 4, 5), 1, (4, 5), 1.0),
        _sample("no_batch", (0, 2, 3, 4, 5), 3, (8, 10), 1.0),
        _sample("no_channel", (1, 2, 3, 4, 5), 0, (4, 5), 1.0),
        _sample("no_reference_channel", (1, 2, 0, 4, 5), 3, (4, 5), 1.0),
        _sample("no_row", (1, 2, 3, 0, 5), 3, (4, 5), 1.0),
        _sample("square_512", (1, 2, 512, 64, 64), 512, (256, 256), 16.0, "typical"),
        _sample("480p_512", (1, 2, 512, 60, 107), 512, (480, 854), 32.0, "large"),
    ),
    invalid=(
        Invalid("features_none", lambda a: {**a, "features": None}, TypeError, "features: .*got NoneType"),
        Invalid("bias_float", lambda a: {**a, "value_bias": 1.0}, TypeError, "value_bias: .*got float"),
        Invalid(
            "features_rank",
            lambda a: {**a, "features": a["features"][0]},
            ValueError,
            "features: .*4 dim.*got 3",
        ),
        Invalid(
            "references_rank",
            lambda a: {**a, "references": a["references"][:, 0]},
            ValueError,
            "references: .*5 dim.*got 4",
        ),
        Invalid(
            "weight_of_convolution",
            lambda a: {**a, "key_weight": a["key_weight"][..., None, None]},
            ValueError,
            "key_weight: .*2 dim.*got 4",
        ),
        Invalid(
            "weight_transposed",
            lambda a: {**a, "value_weight": a["value_weight"].t()},
            ValueError,
            r"value_weight: .*\(C\).*got 5",
        ),
        Invalid(
            "map_size",
            lambda a: {**a, "references": a["references"][..., 1:]},
            ValueError,
            r"references: .*\(W\).*got 6",
        ),
        Invalid(
            "flows_of_one", lambda a: {**a, "flows": a["flows"][:, :1]}, ValueError, r"flows: .*\(T\).*got 1"
        ),
        Invalid(
            "vector_size",
            lambda a: {**a, "key_error_weight": a["key_error_weight"][1:]},
            ValueError,
            r"key_error_weight: .*\(C\).*got 5",
        ),
        Invalid(
            "no_reference",
            lambda a: {**a, **{k: a[k][:, :0] for k in ("references", "flows", "errors")}},
            ValueError,
            "references: .*at least 1.*dimension 1",
        ),
        Invalid(
            "flow_empty", lambda a: {**a, "flows": a["flows"][..., :0]}, ValueError, "flows: .*at least 1"
        ),
        Invalid(
            "error_empty", lambda a: {**a, "errors": a["errors"][..., :0]}, ValueError, "errors: .*at least 1"
        ),
        Invalid(
            "references_int",
            lambda a: {**a, "references": a["references"].long()},
            TypeError,
            "references: .*got torch.int64",
        ),
        Invalid(
            "mixed",
            lambda a: {**a, "value_weight": a["value_weight"].double()},
            TypeError,
            "value_weight: .*got torch.float64",
        ),
        Invalid(
            "device", lambda a: {**a, "errors": a["errors"].to("meta")}, ValueError, "errors: .*cpu.*meta"
        ),
    ),
    autocast=True,
    stores_intermediates=True,  # keys and values
    composed=frozenset({"cuda", "triton"}),
    positions={"flows": "references"},
    differentiable=STORED + REST,
    flops=_flops,
    bytes=_bytes,
)
