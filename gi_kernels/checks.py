"""Argument checks shared by the operators.

Every operator checks its arguments here before any kernel starts. Messages name the argument,
what was given and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def shapes(*arguments: tuple[str, torch.Tensor, str]) -> dict[str, int]:
    """Check tensors against shape patterns and return the sizes by letter.

    Each argument is ``(name, tensor, pattern)``; a pattern is a string such as ``"B 2 h w"``: a
    number must match exactly, a name must have the same size wherever it appears. All tensors must
    be floating and on one device.

    Raises:
        TypeError: not a tensor, or not of a floating dtype.
        ValueError: wrong rank or size, or another device than the first argument's.
    """
    sizes: dict[str, int] = {}
    first_name, first, _ = arguments[0]
    for name, tensor, pattern in arguments:
        floating(name, tensor)
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: expected a tensor on {first.device} like {first_name}, got {tensor.device}"
            )
        letters = pattern.split(" ")
        if tensor.dim() != len(letters):
            raise ValueError(
                f"{name}: expected {len(letters)} dimensions [{', '.join(letters)}], "
                f"got {tensor.dim()} in shape {list(tensor.shape)}"
            )
        for position, letter in enumerate(letters):
            actual = tensor.shape[position]
            wanted = int(letter) if letter.isdigit() else sizes.get(letter, actual)
            if actual != wanted:
                raise ValueError(
                    f"{name}: expected size {wanted} for dimension {position} ({letter}) of "
                    f"[{', '.join(letters)}], got {actual} in shape {list(tensor.shape)}"
                )
            if not letter.isdigit():
                sizes[letter] = actual
    return sizes


def floating(name: str, tensor: torch.Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` is a tensor of a supported floating dtype."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {tensor.dtype}")


def same_dtype(*arguments: tuple[str, torch.Tensor]) -> None:
    """Raise ``TypeError`` unless all tensors have the dtype of the first."""
    first_name, first = arguments[0]
    for name, tensor in arguments[1:]:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name}: expected dtype {first.dtype} like {first_name}, got {tensor.dtype}")


def nonempty(name: str, tensor: torch.Tensor, *dimensions: int) -> None:
    """Raise ``ValueError`` if one of ``dimensions`` of ``tensor`` has size zero."""
    for dimension in dimensions:
        if tensor.shape[dimension] == 0:
            raise ValueError(
                f"{name}: expected a size of at least 1 for dimension {dimension}, "
                f"got shape {list(tensor.shape)}"
            )


def positive(name: str, value: int) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}")


def tensor_sequence(name: str, value: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return a tensor, or a non-empty sequence of tensors, as a list."""
    if isinstance(value, torch.Tensor):
        return [value]
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name}: expected a tensor or a sequence of tensors, got {type(value).__name__}")
    if len(value) == 0:
        raise ValueError(f"{name}: expected at least one tensor, got an empty sequence")
    return list(value)
