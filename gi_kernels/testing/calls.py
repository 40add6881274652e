"""Evaluating an operator's call with its gradients, by any implementation."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gi_kernels.spec import OperatorSpec


@dataclass(frozen=True)
class Outcome:
    """A call's result and the gradients of its arguments by path (``query``, ``keys/0``, ...)."""

    value: torch.Tensor
    gradients: dict[str, torch.Tensor]

    def items(self) -> list[tuple[str, torch.Tensor]]:
        """The result and every gradient, with names for messages."""
        return [("value", self.value), *((f"gradient of {k}", g) for k, g in self.gradients.items())]


def evaluate(
    function: Callable[..., torch.Tensor],
    arguments: Mapping[str, Any],
    differentiable: Sequence[str] = (),
    arrange: Callable[[torch.Tensor], torch.Tensor] = lambda cotangent: cotangent,
) -> Outcome:
    """Run ``function(**arguments)`` and its backward pass for the ``differentiable`` arguments.

    The cotangent depends on the shape and dtype of the result only; ``arrange`` may change its
    memory layout or its values.
    """
    leaves: dict[str, torch.Tensor] = {}

    def track(path: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        if path.split("/")[0] in differentiable:
            leaves[path] = tensor.requires_grad_()
        return tensor

    value = function(**map_tensors(track, arguments))
    if not leaves:
        return Outcome(value, {})
    gradients = torch.autograd.grad(value, list(leaves.values()), arrange(cotangent(value)))
    return Outcome(value.detach(), dict(zip(leaves, gradients, strict=True)))


def oracle(
    spec: OperatorSpec,
    arguments: Mapping[str, Any],
    dtype: torch.dtype,
    differentiable: Sequence[str] | None = None,
    arrange: Callable[[torch.Tensor], torch.Tensor] = lambda cotangent: cotangent,
) -> Outcome:
    """The definition in float64 on the same (rounded) numbers.

    ``dtype`` is that of the result under test: the cotangent is rounded to it.
    """
    exact = map_tensors(lambda _, t: t.detach().double().contiguous(), arguments)
    return evaluate(
        spec.reference,
        exact,
        spec.differentiable if differentiable is None else differentiable,
        lambda c: arrange(c.to(dtype)).double(),
    )


def cotangent(value: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers that depend on the shape of ``value`` only, in its dtype."""
    seed = torch.Generator().manual_seed(zlib.crc32(repr(tuple(value.shape)).encode()))
    drawn = torch.randn(value.shape, generator=seed, dtype=torch.float64)
    return drawn.to(value.device, value.dtype)


def map_tensors(
    function: Callable[[str, torch.Tensor], torch.Tensor], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """``arguments`` with each tensor, at its path, replaced by ``function(path, tensor)``."""

    def visit(path: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return function(path, value)
        if isinstance(value, list | tuple):
            return type(value)(visit(f"{path}/{i}", v) for i, v in enumerate(value))
        return value

    return {name: visit(name, value) for name, value in arguments.items()}


def tensors(arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among ``arguments`` by path."""
    found: dict[str, torch.Tensor] = {}

    def collect(path: str, tensor: torch.Tensor) -> torch.Tensor:
        found[path] = tensor
        return tensor

    map_tensors(collect, arguments)
    return found
