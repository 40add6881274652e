"""Declaration of ``deformable_aggregation``."""

from __future__ import annotations

from typing import Any

from gi_kernels.ops.deformable_aggregation import deformable_aggregation, reference
from gi_kernels.spec import Argument, Invalid, OperatorSpec, Sample, Size, tensor_bytes

#: The tensors that are as large as a feature map, and the rest.
MAPS = ("features", "keys", "values")
REST = ("flows", "errors", "key_error_weight", "value_error_weight", "value_bias")


def _sample(
    name: str,
    shape: tuple[int, int, int, int, int],
    flow: tuple[int, int],
    scale: float,
    kind: Size = "small",
    error: tuple[int, int] | None = None,
) -> Sample:
    B, T, C, H, W = shape
    arguments = {
        "features": Argument((B, C, H, W)),
        "keys": Argument(shape),
        "values": Argument(shape),
        "flows": Argument((B, T, 2, *flow), scale, storage=False),
        "errors": Argument((B, T, 1, *(error or flow)), 1.0, "uniform", storage=False),
        "key_error_weight": Argument((C,), storage=False),
        "value_error_weight": Argument((C,), storage=False),
        "value_bias": Argument((C,), storage=False),
    }
    return Sample(name, kind, arguments, condition=max(1.0, scale / 4))


def _flops(a: dict[str, Any]) -> int:
    B, T, C, H, W = a["keys"].shape
    per_reference = 2 * 7 + 2 * 2 + 5  # two samples, two error terms, softmax and weighted sum
    return B * H * W * (T * (C * per_reference + 12) + 3 * C)


def _bytes(a: dict[str, Any]) -> int:
    return tensor_bytes(*(a[name] for name in MAPS + REST), a["features"])


SPEC = OperatorSpec(
    name="deformable_aggregation",
    function=deformable_aggregation,
    reference=reference.deformable_aggregation,
    summary="features plus references, selected per channel and sampled along their flows",
    samples=(
        _sample("two_references", (2, 2, 5, 6, 7), (12, 28), 6.0),
        _sample("one_reference", (1, 1, 17, 5, 6), (5, 6), 2.0),
        _sample("four_references", (1, 4, 16, 6, 5), (24, 20), 8.0),
        _sample("five_references", (1, 5, 3, 4, 5), (8, 10), 4.0),
        _sample("many_channels", (1, 2, 1040, 3, 4), (6, 8), 2.0),
        _sample("error_size_differs", (1, 2, 4, 5, 6), (5, 6), 2.0, error=(3, 4)),
        _sample("far", (1, 2, 3, 6, 6), (12, 12), 60.0),
        _sample("one_pixel", (2, 2, 3, 1, 1), (1, 1), 0.5),
        _sample("no_batch", (0, 2, 3, 4, 5), (8, 10), 1.0),
        _sample("no_channel", (1, 2, 0, 4, 5), (4, 5), 1.0),
        _sample("no_row", (1, 2, 3, 0, 5), (4, 5), 1.0),
        _sample("square_512", (1, 4, 512, 64, 64), (256, 256), 16.0, "typical"),
        _sample("480p_512", (1, 4, 512, 60, 107), (480, 854), 32.0, "large"),
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
        Invalid("keys_rank", lambda a: {**a, "keys": a["keys"][:, 0]}, ValueError, "keys: .*5 dim.*got 4"),
        Invalid(
            "references", lambda a: {**a, "keys": a["keys"][:, :1]}, ValueError, r"values: .*\(T\).*got 2"
        ),
        Invalid(
            "flows_of_one", lambda a: {**a, "flows": a["flows"][:, :1]}, ValueError, r"flows: .*\(T\).*got 1"
        ),
        Invalid(
            "channels",
            lambda a: {**a, "values": a["values"][:, :, 1:]},
            ValueError,
            r"values: .*\(C\).*got 4",
        ),
        Invalid(
            "weight_size",
            lambda a: {**a, "key_error_weight": a["key_error_weight"][1:]},
            ValueError,
            r"key_error_weight: .*\(C\).*got 4",
        ),
        Invalid(
            "weight_rank",
            lambda a: {**a, "value_error_weight": a["value_error_weight"][:, None]},
            ValueError,
            "value_error_weight: .*1 dim.*got 2",
        ),
        Invalid(
            "no_reference",
            lambda a: {**a, **{k: a[k][:, :0] for k in ("keys", "values", "flows", "errors")}},
            ValueError,
            "keys: .*at least 1.*dimension 1",
        ),
        Invalid(
            "flow_empty", lambda a: {**a, "flows": a["flows"][..., :0]}, ValueError, "flows: .*at least 1"
        ),
        Invalid(
            "error_empty", lambda a: {**a, "errors": a["errors"][..., :0]}, ValueError, "errors: .*at least 1"
        ),
        Invalid("keys_int", lambda a: {**a, "keys": a["keys"].long()}, TypeError, "keys: .*got torch.int64"),
        Invalid(
            "errors_bool", lambda a: {**a, "errors": a["errors"] > 0}, TypeError, "errors: .*got torch.bool"
        ),
        Invalid(
            "mixed", lambda a: {**a, "values": a["values"].double()}, TypeError, "values: .*got torch.float64"
        ),
        Invalid(
            "device", lambda a: {**a, "errors": a["errors"].to("meta")}, ValueError, "errors: .*cpu.*meta"
        ),
    ),
    autocast=True,
    positions={"flows": "keys"},
    differentiable=MAPS + REST,
    flops=_flops,
    bytes=_bytes,
)
