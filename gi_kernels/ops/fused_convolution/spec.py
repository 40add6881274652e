"""Declaration of ``fused_convolution``."""

from __future__ import annotations

from typing import Any

from gi_kernels.ops.fused_convolution import Activation, Padding, fused_convolution, reference
from gi_kernels.spec import Argument, Invalid, OperatorSpec, Sample, Size, tensor_bytes


def _sample(
    name: str,
    size: tuple[int, int, int],  # N, H, W
    channels: tuple[int, ...],
    outputs: int,
    kernel: tuple[int, int],
    activation: Activation = "none",
    padding: Padding = "zeros",
    sums: bool = True,
    kind: Size = "small",
) -> Sample:
    N, H, W = size
    scale = (sum(channels) * kernel[0] * kernel[1]) ** -0.5  # results of order one
    arguments: dict[str, Any] = {
        "inputs": [Argument((N, c, H, W)) for c in channels],
        "weight": Argument((outputs, sum(channels), *kernel), scale),
        "bias": Argument((outputs,)) if sums else None,
        "addend": Argument((N, outputs, H, W)) if sums else None,
        "activation": activation,
        "padding": padding,
    }
    return Sample(name, kind, arguments)


def _flops(a: dict[str, Any]) -> int:
    pixels = a["inputs"][0][:, 0].numel()
    return 2 * pixels * a["weight"].numel()  # of the direct form


def _bytes(a: dict[str, Any]) -> int:
    N, _, H, W = a["inputs"][0].shape
    out = N * a["weight"].shape[0] * H * W * a["weight"].element_size()
    given = [t for t in (a["bias"], a["addend"]) if t is not None]
    return tensor_bytes(a["inputs"], a["weight"], *given) + out


SPEC = OperatorSpec(
    name="fused_convolution",
    function=fused_convolution,
    reference=reference.fused_convolution,
    summary="a convolution of several maps side by side, with the sum and the activation that follow",
    samples=(
        _sample("two_maps", (2, 9, 11), (5, 18), 34, (3, 3)),
        _sample("row", (2, 3, 10), (17, 4), 9, (1, 5), "relu"),
        _sample("column", (1, 10, 5), (3, 16, 1), 137, (5, 1), "none", "reflect"),
        _sample("reflected", (1, 6, 9), (33,), 7, (3, 3), "relu", "reflect"),
        _sample("two_by_two", (1, 2, 2), (4,), 3, (3, 3), "none", "reflect"),
        _sample("gates", (1, 5, 7), (16, 14, 2), 32, (1, 5), "sigmoid"),
        _sample("candidate", (2, 7, 4), (16, 14), 16, (5, 1), "tanh"),
        _sample("no_bias", (1, 4, 4), (16,), 16, (3, 3), sums=False),
        _sample("one_pixel", (3, 1, 1), (2, 2), 5, (3, 3), "tanh"),
        _sample("narrower_than_the_kernel", (1, 2, 2), (8,), 8, (1, 5)),
        _sample("many_tiles", (1, 70, 90), (3,), 2, (3, 3)),
        _sample("empty_map", (1, 3, 5), (0, 4), 3, (3, 3)),
        _sample("no_batch", (0, 4, 5), (3,), 2, (3, 3)),
        _sample("square_32", (8, 32, 32), (128, 128), 256, (3, 3), "relu", kind="typical"),
        _sample("gates_32", (8, 32, 32), (128, 128), 256, (1, 5), "sigmoid", kind="typical"),
        _sample("square_128", (1, 128, 128), (128,), 128, (3, 3), "relu", kind="large"),
    ),
    invalid=(
        Invalid("inputs_none", lambda a: {**a, "inputs": None}, TypeError, "inputs: .*got NoneType"),
        Invalid("no_input", lambda a: {**a, "inputs": []}, ValueError, "inputs: .*empty sequence"),
        Invalid("many", lambda a: {**a, "inputs": a["inputs"] * 3}, ValueError, "inputs: .*to 4 maps, got 6"),
        Invalid("number", lambda a: {**a, "inputs": [1, 2]}, TypeError, r"inputs\[0\]: .*got int"),
        Invalid("rank", lambda a: {**a, "inputs": [a["inputs"][0][0]]}, ValueError, r"inputs\[0\]: .*4 dim"),
        Invalid(
            "sizes",
            lambda a: {**a, "inputs": [a["inputs"][0], a["inputs"][1][..., 1:]]},
            ValueError,
            r"inputs\[1\]: .*\(W\).*got 10",
        ),
        Invalid(
            "channels",
            lambda a: {**a, "inputs": a["inputs"][:1]},
            ValueError,
            "inputs: expected 23 channels together like weight, got 5",
        ),
        Invalid(
            "no_pixel",
            lambda a: {**a, "inputs": [x[..., :0] for x in a["inputs"]], "addend": None},
            ValueError,
            r"inputs\[0\]: .*at least 1",
        ),
        Invalid(
            "nothing_to_reflect",
            lambda a: {
                **a,
                "inputs": [x[..., :1] for x in a["inputs"]],
                "addend": None,
                "padding": "reflect",
            },
            ValueError,
            r"inputs\[0\]: .*reflected",
        ),
        Invalid("weight_none", lambda a: {**a, "weight": None}, TypeError, "weight: .*got NoneType"),
        Invalid(
            "kernel", lambda a: {**a, "weight": a["weight"][..., 1:]}, ValueError, "weight: .*3x3.*got 3x2"
        ),
        Invalid(
            "no_channel", lambda a: {**a, "weight": a["weight"][:, :0]}, ValueError, "weight: .*at least 1"
        ),
        Invalid(
            "no_output",
            lambda a: {**a, "weight": a["weight"][:0], "bias": None},
            ValueError,
            "weight: .*at least 1",
        ),
        Invalid("bias", lambda a: {**a, "bias": a["bias"][1:]}, ValueError, r"bias: .*\(O\).*got 33"),
        Invalid("addend", lambda a: {**a, "addend": a["addend"][:1]}, ValueError, r"addend: .*\(N\).*got 1"),
        Invalid("mixed", lambda a: {**a, "bias": a["bias"].double()}, TypeError, "bias: .*got torch.float64"),
        Invalid(
            "mixed_maps",
            lambda a: {**a, "inputs": [a["inputs"][0], a["inputs"][1].half()]},
            TypeError,
            r"inputs\[1\]: .*got torch.float16",
        ),
        Invalid("int", lambda a: {**a, "weight": a["weight"].int()}, TypeError, "weight: .*got torch.int32"),
        Invalid(
            "device", lambda a: {**a, "addend": a["addend"].to("meta")}, ValueError, "addend: .*cpu.*meta"
        ),
        Invalid("activation", lambda a: {**a, "activation": "gelu"}, ValueError, "activation: .*got 'gelu'"),
        Invalid("padding", lambda a: {**a, "padding": "same"}, ValueError, "padding: .*got 'same'"),
    ),
    autocast=True,
    differentiable=(),
    undefined_reach=7,
    flops=_flops,
    bytes=_bytes,
)
