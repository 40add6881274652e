"""Giving a module another class, and its own back.

A module is accelerated by exchanging its class for a subclass of it with another ``forward``.
Parameters, buffers, hooks, training mode and the keys of its state dict are not touched, and it
remains an instance of its class. Copies and pickles keep the acceleration: they name the original
class and the replacement, and need this package to be loaded.
"""

from __future__ import annotations

from typing import Any

from torch import nn

#: How attributes begin in which a replacement remembers what it computed; neither copied nor kept.
MEMORY = "_gi_memory_"


class Replacement(nn.Module):
    """A ``forward`` for modules of some class.

    A subclass is mixed with the class it replaces: its ``__init__`` is never called, its methods find
    the attributes that the other's made.
    """

    #: What is reported.
    operator: str
    #: Names of the classes that it can replace.
    replaces: tuple[str, ...]

    @classmethod
    def refuse(cls, module: Any) -> str | None:
        """Why ``module``, of a class with the right name, cannot be replaced; None if it can."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if not name.startswith(MEMORY)}
        return _revive, (original_class(self), replacement_of(self)), state


def swap(module: nn.Module, replacement: type[Replacement]) -> None:
    """Exchange the class of ``module``, in place."""
    module.__class__ = _mixed(type(module), replacement)


def restore(module: nn.Module) -> None:
    """Give ``module`` its own class back, in place."""
    module.__class__ = original_class(module)
    for name in [n for n in module.__dict__ if n.startswith(MEMORY)]:
        del module.__dict__[name]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a swapped module before it was."""
    return type(module).__bases__[-1]


def replacement_of(module: nn.Module) -> type[Replacement]:
    """The replacement that a swapped module was given."""
    return type(module).__bases__[0]


def is_swapped(module: nn.Module) -> bool:
    """Whether ``swap`` was applied."""
    return isinstance(module, Replacement)


def _mixed(original: type[nn.Module], replacement: type[Replacement]) -> type[nn.Module]:
    """The same class for the same two, so that copies of a module have one class."""
    key = (original, replacement)
    if key not in _MIXED:
        names = {"__module__": replacement.__module__, "__doc__": replacement.__doc__}
        _MIXED[key] = type(f"Accelerated{original.__name__}", key[::-1], names)
    return _MIXED[key]


_MIXED: dict[tuple[type[nn.Module], type[Replacement]], type[nn.Module]] = {}


def _revive(original: type[nn.Module], replacement: type[Replacement]) -> nn.Module:
    mixed = _mixed(original, replacement)
    return mixed.__new__(mixed)
