"""A convolution of maps side by side, with the sum and the activation that follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch

from gi_kernels import checks, dispatch, jit, native
from gi_kernels.ops.fused_convolution import reference
from gi_kernels.precision import accumulation_dtype, autocast

Activation = Literal["none", "relu", "sigmoid", "tanh"]
Padding = Literal["zeros", "reflect"]

#: Sizes of the kernels that are served.
KERNELS = ((3, 3), (1, 5), (5, 1))
MOST_INPUTS = 4
#: Pairs of channels from which on the products of a tile outweigh its transforms.
LEAST_PRODUCTS = 48 * 48


def fused_convolution(
    inputs: torch.Tensor | Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    activation: Activation = "none",
    padding: Padding = "zeros",
) -> torch.Tensor:
    r"""One convolution: ``FusedConvolution(weight, bias, padding)(*inputs, addend=addend, ...)``.

    Make the object once where there are several calls with one weight. Arguments, result and errors:
    :class:`FusedConvolution`.
    """
    maps = checks.tensor_sequence("inputs", inputs)
    return FusedConvolution(weight, bias, padding)(*maps, addend=addend, activation=activation)


class FusedConvolution:
    r"""A convolution of maps side by side that keeps their size, with what follows it in one pass.

    .. math:: out = f(weight * [input_1; \dots; input_n] + bias + addend)

    The inputs are not concatenated; nothing but the result is written. Of 3x3 kernels a 4x4 tile of
    results is computed with 36 products per pair of channels instead of 144, of 1x5 and 5x1 kernels
    four results with 8 instead of 20, in low precision eight with 12 instead of 40 (minimal filtering).
    The weight is transformed once, when the object is made, and is not looked at again. Transformed it
    has up to four times as many numbers, in float32 (float64 for float64). A number that is not finite
    makes all results of a tile undefined if it makes one so. On a GPU the convolution is PyTorch's, which
    obeys ``torch.backends.cudnn.allow_tf32``; joining the inputs is a pass before it, and what follows
    the convolution one behind it.

    Args:
        weight: ``[O, C, h, w]`` of 3x3, 1x5 or 5x1, float32, float64, bfloat16 or float16.
        bias: ``[O]`` of the same dtype, or None.
        padding: what is outside the frame: ``zeros``, or ``reflect`` for the frame mirrored at its
            outermost pixels.

    Called with:
        inputs: one to four maps ``[N, C_i, H, W]`` with C channels together, the dtype of ``weight``.
            Read in place where channels are contiguous in memory (channels-last, or a part of such a
            map), else copied.
        addend: ``[N, O, H, W]`` of the same dtype, or None.
        activation: ``none``, ``relu``, ``sigmoid`` or ``tanh``.

    Returns ``[N, O, H, W]`` in the dtype of ``weight``, channels-last. Sums are float32 (float64 for
    float64) and rounded once; in float32 the error is about five times that of the direct form. Under
    autocast all tensors are cast to its dtype.

    Not differentiable by the compiled kernel (a backward pass raises ``NotImplementedError``);
    ``gi_kernels.backend("reference")`` is, in everything.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size, dtype or device.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, padding: Padding = "zeros"
    ) -> None:
        named = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        weight, *rest = autocast(**named)
        bias = rest[0] if rest else None
        checks.shapes(("weight", weight, "O C h w"), *(("bias", b, "O") for b in rest))
        checks.same_dtype(("weight", weight), *(("bias", b) for b in rest))
        if tuple(weight.shape[2:]) not in KERNELS:
            sizes = " or ".join(f"{h}x{w}" for h, w in KERNELS)
            raise ValueError(f"weight: expected a kernel of {sizes}, got {weight.shape[2]}x{weight.shape[3]}")
        checks.nonempty("weight", weight, 0, 1)
        checks.one_of("padding", padding, get_args(Padding))
        self.weight, self.bias, self.padding = weight, bias, padding
        #: What each backend makes of the weight, by its name.
        self._packed: dict[str, torch.Tensor] = {}
        if weight.device.type == "cpu" and native.PROBLEM is None:
            self._packed["cpp"] = torch.ops.gi.fused_convolution_pack(weight, bias)
        if weight.device.type != "cpu" or jit.INTERPRETED:
            self._packed["triton"] = _side_by_side(weight, bias)

    @staticmethod
    def pays(weight: torch.Tensor) -> bool:
        """Whether there is a kernel for a convolution with ``weight`` that is faster than PyTorch's."""
        outputs, channels, *kernel = weight.shape
        served = weight.device.type == "cpu" and native.PROBLEM is None and tuple(kernel) in KERNELS
        return served and outputs * channels >= LEAST_PRODUCTS

    def __call__(
        self,
        *inputs: torch.Tensor,
        addend: torch.Tensor | None = None,
        activation: Activation = "none",
    ) -> torch.Tensor:
        if not 1 <= len(inputs) <= MOST_INPUTS:
            raise ValueError(f"inputs: expected one to {MOST_INPUTS} maps, got {len(inputs)}")
        named = {f"inputs[{i}]": x for i, x in enumerate(inputs)}
        if addend is not None:
            named["addend"] = addend
        tensors = autocast(**named)
        maps = tensors[: len(inputs)]
        addend = None if addend is None else tensors[-1]
        checks.shapes(
            ("weight", self.weight, "O C h w"),
            *((f"inputs[{i}]", x, f"N C{i} H W") for i, x in enumerate(maps)),
            *(("addend", t, "N O H W") for t in tensors[len(inputs) :]),
        )
        checks.same_dtype(("weight", self.weight), *zip(named, tensors, strict=True))
        channels = sum(x.shape[1] for x in maps)
        if channels != self.weight.shape[1]:
            raise ValueError(
                f"inputs: expected {self.weight.shape[1]} channels together like weight, got {channels}"
            )
        checks.nonempty("inputs[0]", maps[0], 2, 3)
        if self.padding == "reflect" and any(
            n <= k // 2 for n, k in zip(maps[0].shape[2:], self.weight.shape[2:], strict=True)
        ):
            raise ValueError(
                "inputs[0]: expected more rows and columns than are reflected on a side, "
                f"got shape {list(maps[0].shape)}"
            )
        checks.one_of("activation", activation, get_args(Activation))
        return dispatch.run(
            OPERATOR, maps, self.weight, self.bias, addend, activation, self.padding, self._packed
        )


def _side_by_side(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Weight, channels-last, and bias in one tensor."""
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return torch.cat([weight.permute(0, 2, 3, 1).flatten(), bias])


def _by(name: str, namespace: str) -> Callable[..., torch.Tensor]:
    """The backend ``name``, whose operator is in ``namespace``."""

    def run(
        inputs: Sequence[torch.Tensor],
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        addend: torch.Tensor | None,
        activation: Activation,
        padding: Padding,
        packed: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        outputs, _, *kernel = weight.shape
        number = get_args(Activation).index(activation)
        operator = getattr(torch.ops, namespace).fused_convolution
        return operator(inputs, packed[name], outputs, kernel, addend, number, padding == "reflect")

    return run


def _reference(
    inputs: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    addend: torch.Tensor | None,
    activation: Activation,
    padding: Padding,
    packed: dict[str, torch.Tensor],
) -> torch.Tensor:
    return reference.fused_convolution(inputs, weight, bias, addend, activation, padding)


OPERATOR = dispatch.Operator(
    "fused_convolution",
    {"triton": _by("triton", "gi_triton"), "cpp": _by("cpp", "gi"), "reference": _reference},
)


def _fake_pack(weight, bias):
    outputs, channels, *kernel = weight.shape
    accumulation = accumulation_dtype(weight.dtype)
    line = 8 if weight.dtype == accumulation else 12  # numbers that a tile is transformed to
    positions = 36 if kernel[0] == kernel[1] else line
    return weight.new_empty((positions * channels + 1) * ((outputs + 31) // 32 * 32), dtype=accumulation)


def _fake(inputs, packed, channels, kernel, addend, activation, reflect):
    N, _, H, W = inputs[0].shape
    return inputs[0].new_empty(N, H, W, channels).permute(0, 3, 1, 2)


native.register("fused_convolution_pack", _fake_pack)
native.register(
    "fused_convolution",
    _fake,
    triton="(Tensor[] inputs, Tensor packed, int channels, int[2] kernel, Tensor? addend, "
    "int activation, bool reflect) -> Tensor",
)
