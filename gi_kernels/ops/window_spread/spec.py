"""Declaration of ``window_spread``."""

from __future__ import annotations

from typing import Any

from gi_kernels.ops.window_spread import reference, window_spread
from gi_kernels.spec import Argument, Invalid, OperatorSpec, Sample, Size, tensor_bytes


def _sample(
    name: str, shape: tuple[int, int, int, int], heads: int, windows: tuple[int, int], kind: Size = "small"
) -> Sample:
    B, C, H, W = shape
    arguments = {
        "logits": Argument((B, heads, H, W), 2.0),
        "latents": Argument((B, windows[0] * windows[1], heads, C)),
        "windows": windows,
    }
    return Sample(name, kind, arguments)


def _flops(a: dict[str, Any]) -> int:
    B, h, H, W = a["logits"].shape
    return B * h * H * W * (2 * a["latents"].shape[3] + 4)  # weighted sum; sigmoid


def _bytes(a: dict[str, Any]) -> int:
    B, _, H, W = a["logits"].shape
    result = B * a["latents"].shape[3] * H * W * a["latents"].element_size()
    return tensor_bytes(a["logits"], a["latents"]) + result


SPEC = OperatorSpec(
    name="window_spread",
    function=window_spread,
    reference=reference.window_spread,
    summary="sigmoid-gated sum over heads of each pixel's window's vectors",
    samples=(
        _sample("square", (2, 5, 8, 12), 3, (4, 4)),
        _sample("uneven", (1, 17, 6, 10), 2, (2, 5)),
        _sample("eight_heads", (1, 32, 8, 8), 8, (2, 2)),
        _sample("one_window", (1, 4, 5, 7), 1, (1, 1)),
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
        Invalid("latents_list", lambda a: {**a, "latents": []}, TypeError, "latents: .*got list"),
        Invalid("rank", lambda a: {**a, "latents": a["latents"][0]}, ValueError, "latents: .*4 dim.*got 3"),
        Invalid(
            "heads",
            lambda a: {**a, "latents": a["latents"][:, :, 1:]},
            ValueError,
            r"latents: .*\(h\).*got 2",
        ),
        Invalid(
            "batches", lambda a: {**a, "logits": a["logits"][:1]}, ValueError, r"latents: .*\(B\).*got 2"
        ),
        Invalid(
            "too_few",
            lambda a: {**a, "latents": a["latents"][:, 1:]},
            ValueError,
            "latents: .*16 windows.*15",
        ),
        Invalid(
            "no_square",
            lambda a: {"logits": a["logits"], "latents": a["latents"][:, 1:]},
            ValueError,
            "windows: expected for 15 latents",
        ),
        Invalid("rows", lambda a: {**a, "windows": (3, 4)}, ValueError, "windows: .*divide.*height 8, got 3"),
        Invalid(
            "columns", lambda a: {**a, "windows": (4, 5)}, ValueError, "windows: .*divide.*width 12, got 5"
        ),
        Invalid("zero", lambda a: {**a, "windows": (4, 0)}, ValueError, "windows: .*at least 1, got 0"),
        Invalid(
            "windows_float", lambda a: {**a, "windows": (4, 4.0)}, TypeError, "windows: .*int, got float"
        ),
        Invalid("windows_int", lambda a: {**a, "windows": 16}, TypeError, "windows: .*pair of ints.*got 16"),
        Invalid("int", lambda a: {**a, "logits": a["logits"].int()}, TypeError, "logits: .*got torch.int32"),
        Invalid(
            "device", lambda a: {**a, "latents": a["latents"].to("meta")}, ValueError, "latents: .*cpu.*meta"
        ),
    ),
    autocast=True,
    differentiable=("logits", "latents"),
    flops=_flops,
    bytes=_bytes,
)
