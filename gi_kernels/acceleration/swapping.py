"""Giving a module another class, and its own back.

A module is accelerated by exchanging its class for a subclass of it with another ``forward``.
Parameters, buffers, hooks, training mode and the keys of its state dict are not touched, and it
remains an instance of its class. Copies and pickles keep the acceleration: they name the original
class and the replacement, and need this package to be loaded.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gi_kernels.products import Linear, Pointwise

#: How attributes begin in which a replacement remembers what it computed; never copied.
MEMORY = "_gi_memory_"


class Replacement(nn.Module):
    """A ``forward`` for modules of some class.

    A subclass is mixed with the class it replaces: its ``__init__`` is never called, its methods find
    the attributes that the other's made.
    """

    #: What is reported.
    operator: str
    #: Name of the class that it can replace.
    replaces: str
    #: Whether it calls linear layers and 1x1 convolutions, which then get a faster forward too.
    multiplies = False
    #: How often a training step calls the module with the same inputs.
    passes = 1

    @classmethod
    def refuse(cls, module: Any) -> str | None:
        """Why ``module``, of a class with the right name, cannot be replaced; None if it can."""
        raise NotImplementedError

    def forget(self) -> None:
        """Forget what was computed for the last inputs."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        state = reduced[2]
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if not name.startswith(MEMORY)}
        return _revive, (original_class(self), replacement_of(self)), state


def swap(module: nn.Module, replacement: type[Replacement]) -> None:
    """Exchange the class of ``module``, and of the products in it, in place."""
    module.__class__ = _mixed(type(module), replacement)
    if replacement.multiplies:
        for child in module.modules():
            if type(child) is nn.Linear:
                child.__class__ = Linear
            elif type(child) is nn.Conv2d and _is_pointwise(child):
                child.__class__ = Pointwise


def restore(module: nn.Module, clear: bool = True) -> None:
    """Give ``module`` its own class back, in place, and clear what its replacement remembers."""
    if is_swapped(module):
        if replacement_of(module).multiplies:
            for child in module.modules():
                child.__class__ = {Linear: nn.Linear, Pointwise: nn.Conv2d}.get(type(child), type(child))
        module.__class__ = original_class(module)
    if clear:
        for name in [n for n in module.__dict__ if n.startswith(MEMORY)]:
            del module.__dict__[name]


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a swapped module before it was."""
    return type(module).__bases__[0]


def replacement_of(module: nn.Module) -> type[Replacement]:
    """The replacement that a swapped module was given."""
    return type(module).__bases__[1]


def is_swapped(module: nn.Module) -> bool:
    """Whether ``swap`` was applied."""
    return isinstance(module, Replacement)


def _is_pointwise(layer: nn.Conv2d) -> bool:
    sizes = (layer.kernel_size, layer.stride, layer.padding, layer.groups)
    return sizes == ((1, 1), (1, 1), (0, 0), 1)


def _mixed(original: type[nn.Module], replacement: type[Replacement]) -> type[nn.Module]:
    """The same class for the same two, so that copies of a module have one class."""
    key = (original, replacement)
    if key not in _MIXED:
        # Python lets an object change its class only for one whose first base has the same layout, which
        # of classes that begin with an ABC, as Lightning's do, only they themselves have. So the original
        # comes first, and a metaclass lets methods be looked up as if it came last.
        kind: Any = type(original)
        names = {"__module__": replacement.__module__, "__doc__": replacement.__doc__}
        order = kind("", key[::-1], {}).__mro__[1:]
        mixing = type(kind.__name__, (kind,), {"mro": lambda cls: (cls, *order)})
        _MIXED[key] = mixing(f"Accelerated{original.__name__}", key, names)
    return _MIXED[key]


_MIXED: dict[tuple[type[nn.Module], type[Replacement]], type[nn.Module]] = {}


def _revive(original: type[nn.Module], replacement: type[Replacement]) -> nn.Module:
    mixed = _mixed(original, replacement)
    return mixed.__new__(mixed)
