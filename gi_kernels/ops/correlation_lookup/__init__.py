"""RAFT's correlation lookup, from a stored volume or computed on demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from gi_kernels import checks, dispatch, native
from gi_kernels.ops.correlation_lookup import reference
from gi_kernels.precision import accumulation_dtype, autocast

Mode = Literal["auto", "dense", "on_demand"]

#: With ``mode="auto"``, volumes of at most this many bytes (all levels) are stored.
DENSE_LIMIT = 256 * 2**20


def correlation_lookup(
    features1: torch.Tensor,
    features2: torch.Tensor,
    coords: torch.Tensor,
    levels: int = 4,
    radius: int = 4,
    mode: Mode = "auto",
) -> torch.Tensor:
    """One lookup: ``CorrelationPyramid(features1, features2, levels, radius, mode).lookup(coords)``.

    Build the pyramid once where there are several lookups. Arguments, result and errors:
    :class:`CorrelationPyramid`.
    """
    checks.shapes(  # of the coordinates too, before the pyramid is built
        ("features1", features1, "B C H1 W1"),
        ("features2", features2, "B C H2 W2"),
        ("coords", coords, "B 2 H1 W1"),
    )
    return CorrelationPyramid(features1, features2, levels, radius, mode).lookup(coords)


class CorrelationPyramid:
    r"""Correlation of every pixel of one feature map with windows of another, at several scales.

    .. math:: volume_0[b, p, q] = \langle features1[b, :, p], features2[b, :, q] \rangle / \sqrt{C}

    Level ``l`` is the 2x2 average of level ``l-1`` over ``q`` (an odd last row or column is dropped;
    a level may shrink to nothing and then reads zeros). A lookup reads, per pixel ``p`` and level, a
    window of ``(2r+1)^2`` bilinear samples around ``coords(p) / 2^l``, zeros outside. The outer
    offset of the window moves x, the inner one y.

    Args:
        features1: ``[B, C, H1, W1]``, float32, float64, bfloat16 or float16.
        features2: ``[B, C, H2, W2]``, the same dtype.
        levels: number of levels, at least 1.
        radius: of the window, at least 1.
        mode: ``dense`` stores the volumes, ``H1*W1*H2*W2*4/3`` numbers per batch item, in the
            features' dtype; ``on_demand`` keeps the features and computes what a lookup reads;
            ``auto`` is ``dense`` up to ``DENSE_LIMIT`` bytes.

    Differentiable once in both feature maps and in ``coords``, in both modes. Under autocast the
    features are cast to its dtype. The volumes of the dense mode and their gradients are PyTorch
    matrix products.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size, dtype or device.

    Source: Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", 2020.
    """

    def __init__(
        self,
        features1: torch.Tensor,
        features2: torch.Tensor,
        levels: int = 4,
        radius: int = 4,
        mode: Mode = "auto",
    ) -> None:
        features1, features2 = autocast(features1=features1, features2=features2)
        size = checks.shapes(("features1", features1, "B C H1 W1"), ("features2", features2, "B C H2 W2"))
        checks.same_dtype(("features1", features1), ("features2", features2))
        checks.nonempty("features1", features1, 1)
        checks.positive("levels", levels)
        checks.positive("radius", radius)
        self.radius = radius
        self.mode = _chosen(mode, features1, features2)
        self.size = size
        self.features1 = features1
        #: Volumes [B,H1*W1,H,W] (dense) or features [B,C,H,W] (on demand), finest level first.
        self.pyramid: Sequence[torch.Tensor]
        if self.mode == "dense":
            self.pyramid = reference.volume_pyramid(features1, features2, levels)
        else:
            self.pyramid = reference.pool_pyramid(features2, levels)

    @classmethod
    def both_ways(
        cls,
        features1: torch.Tensor,
        features2: torch.Tensor,
        levels: int = 4,
        radius: int = 4,
        mode: Mode = "auto",
    ) -> CorrelationPyramid:
        """Pyramid of the ``B`` given pairs and, behind them in the batch, of the same pairs swapped.

        Like ``CorrelationPyramid(cat([features1, features2]), cat([features2, features1]), ...)``, but
        a swapped pair's volume is the transpose of the given one's and is not computed again. ``mode``
        ``auto`` counts the bytes of all ``2B``.

        Args:
            features1, features2: ``[B, C, H, W]``, of one size; else as for the class.
        """
        features1, features2 = autocast(features1=features1, features2=features2)
        checks.shapes(("features1", features1, "B C H W"), ("features2", features2, "B C H W"))
        checks.same_dtype(("features1", features1), ("features2", features2))
        checks.positive("levels", levels)
        first, second = torch.cat([features1, features2]), torch.cat([features2, features1])
        if _chosen(mode, first, second) == "on_demand":
            return cls(first, second, levels, radius, "on_demand")
        pyramid = cls(features1, features2, 1, radius, "dense")
        volume = pyramid.pyramid[0].flatten(2)  # [B,HW,HW]
        both = torch.cat([volume, volume.transpose(1, 2)]).unflatten(2, features1.shape[2:])
        pyramid.pyramid = reference.pool_pyramid(both, levels)
        pyramid.features1 = first
        pyramid.size["B"] *= 2
        return pyramid

    def lookup(self, coords: torch.Tensor) -> torch.Tensor:
        """Windows around ``coords``.

        Args:
            coords: ``[B, 2, H1, W1]``, x first, in pixels of ``features2``; any floating dtype, used
                in float32 (float64 for float64 features).

        Returns:
            ``[B, levels*(2r+1)^2, H1, W1]`` in the features' dtype, channels-last in memory.
        """
        checks.shapes(("coords", coords, "B 2 H1 W1"))
        expected = (self.size["B"], 2, self.size["H1"], self.size["W1"])
        if tuple(coords.shape) != expected:
            raise ValueError(
                f"coords: expected shape {list(expected)} like features1, got {list(coords.shape)}"
            )
        if coords.device != self.features1.device:
            raise ValueError(
                f"coords: expected a tensor on {self.features1.device} like features1, got {coords.device}"
            )
        coords = coords.to(accumulation_dtype(self.features1.dtype))
        if self.mode == "dense":
            return dispatch.run(DENSE, self.pyramid, coords, self.radius)
        return dispatch.run(ON_DEMAND, self.features1, self.pyramid, coords, self.radius)


def _chosen(mode: Mode, features1: torch.Tensor, features2: torch.Tensor) -> Mode:
    """``mode``, and what ``auto`` comes to."""
    if mode not in ("auto", "dense", "on_demand"):
        raise ValueError(f"mode: expected 'auto', 'dense' or 'on_demand', got {mode!r}")
    if mode != "auto":
        return mode
    B, _, H1, W1 = features1.shape
    H2, W2 = features2.shape[2:]
    numbers = B * H1 * W1 * H2 * W2 * 4 // 3
    return "dense" if numbers * features1.element_size() <= DENSE_LIMIT else "on_demand"


def _cpp(volumes: Sequence[torch.Tensor], coords: torch.Tensor, radius: int) -> torch.Tensor:
    return torch.ops.gi.correlation_lookup(volumes, coords, radius)


def _cpp_on_demand(
    features1: torch.Tensor, features2: Sequence[torch.Tensor], coords: torch.Tensor, radius: int
) -> torch.Tensor:
    return torch.ops.gi.correlation_lookup_on_demand(features1, features2, coords, radius)


def _triton(volumes: Sequence[torch.Tensor], coords: torch.Tensor, radius: int) -> torch.Tensor:
    return torch.ops.gi_triton.correlation_lookup(volumes, coords, radius)


DENSE = dispatch.Operator(
    "correlation_lookup", {"triton": _triton, "cpp": _cpp, "reference": reference.lookup}
)


def _triton_on_demand(
    features1: torch.Tensor, features2: Sequence[torch.Tensor], coords: torch.Tensor, radius: int
) -> torch.Tensor:
    return torch.ops.gi_triton.correlation_lookup_on_demand(features1, features2, coords, radius)


ON_DEMAND = dispatch.Operator(
    "correlation_lookup_on_demand",
    {"triton": _triton_on_demand, "cpp": _cpp_on_demand, "reference": reference.lookup_on_demand},
)


def _empty_output(like, levels, coords, radius):
    B, _, H1, W1 = coords.shape
    shape = (B, levels * (2 * radius + 1) ** 2, H1, W1)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _fake(volumes, coords, radius):
    return _empty_output(volumes[0], len(volumes), coords, radius)


def _fake_backward(grad, volumes, coords, radius, need_volumes, need_coords):
    return (
        [v.new_empty(v.shape if need_volumes else 0) for v in volumes],
        coords.new_empty(coords.shape if need_coords else 0),
    )


def _setup_context(ctx, inputs, output):
    volumes, coords, ctx.radius = inputs
    ctx.save_for_backward(coords, *volumes)


def _backward(ops, ctx, grad):
    coords, *volumes = ctx.saved_tensors
    needs = ctx.needs_input_grad
    need_volumes, need_coords = _any(needs[0]), needs[1]
    grad_volumes, grad_coords = ops.correlation_lookup_backward(
        grad, volumes, coords, ctx.radius, need_volumes, need_coords
    )
    return (
        grad_volumes if need_volumes else [None] * len(volumes),
        grad_coords if need_coords else None,
        None,
    )


native.register(
    "correlation_lookup",
    _fake,
    _setup_context,
    _backward,
    triton="(Tensor[] volumes, Tensor coords, int radius) -> Tensor",
)
native.register(
    "correlation_lookup_backward",
    _fake_backward,
    triton="(Tensor grad, Tensor[] volumes, Tensor coords, int radius, bool need_volumes, bool need_coords) "
    "-> (Tensor[], Tensor)",
)


def _fake_on_demand(features1, features2, coords, radius):
    return _empty_output(features1, len(features2), coords, radius)


def _fake_on_demand_backward(
    grad, features1, features2, coords, radius, need_features1, need_features2, need_coords
):
    return (
        torch.empty_like(features1) if need_features1 else features1.new_empty(0),
        [torch.empty_like(f) if need_features2 else f.new_empty(0) for f in features2],
        coords.new_empty(coords.shape if need_coords else 0),
    )


def _setup_context_on_demand(ctx, inputs, output):
    features1, features2, coords, ctx.radius = inputs
    ctx.save_for_backward(features1, coords, *features2)


def _backward_on_demand(ops, ctx, grad):
    features1, coords, *features2 = ctx.saved_tensors
    needs = ctx.needs_input_grad
    need_features1, need_features2, need_coords = needs[0], _any(needs[1]), needs[2]
    grad_features1, grad_features2, grad_coords = ops.correlation_lookup_on_demand_backward(
        grad, features1, features2, coords, ctx.radius, need_features1, need_features2, need_coords
    )
    return (
        grad_features1 if need_features1 else None,
        grad_features2 if need_features2 else [None] * len(features2),
        grad_coords if need_coords else None,
        None,
    )


def _any(needs: bool | Sequence[bool]) -> bool:
    """Whether a list argument needs a gradient: autograd says so for each of its tensors."""
    return needs if isinstance(needs, bool) else any(needs)


native.register(
    "correlation_lookup_on_demand",
    _fake_on_demand,
    _setup_context_on_demand,
    _backward_on_demand,
    triton="(Tensor features1, Tensor[] features2, Tensor coords, int radius) -> Tensor",
)
native.register(
    "correlation_lookup_on_demand_backward",
    _fake_on_demand_backward,
    triton="(Tensor grad, Tensor features1, Tensor[] features2, Tensor coords, int radius, "
    "bool need_features1, bool need_features2, bool need_coords) -> (Tensor, Tensor[], Tensor)",
)
