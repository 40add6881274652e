"""How an operator is declared: once, in its ``spec.py``, for tests, benchmarks, tables and doctor."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from gi_kernels.checks import FLOATING
from gi_kernels.precision import accumulation_dtype

Size = Literal["small", "typical", "large"]


@dataclass(frozen=True)
class Argument:
    """A tensor argument of a sample: its shape and how it is drawn.

    ``storage`` arguments take the dtype under test; the others (flows, errors, coordinates) take
    the accumulation dtype. ``draw`` is ``normal`` (times ``scale``), ``uniform`` (in [0, scale)),
    ``coordinates`` (the pixel grid plus ``normal``), ``mask`` (a disc of ``scale`` in zeros) or
    ``constant`` (``scale`` everywhere).
    """

    shape: tuple[int, ...]
    scale: float = 1.0
    draw: Literal["normal", "uniform", "coordinates", "mask", "constant"] = "normal"
    storage: bool = True

    def make(self, name: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> torch.Tensor:
        """The tensor that belongs to ``name``, drawn on the CPU in float64 and rounded."""
        seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if self.draw == "mask":
            value = _disc(self.shape) * self.scale
        elif self.draw == "constant":
            value = torch.full(self.shape, self.scale, dtype=torch.float64)
        elif self.draw == "uniform":
            value = torch.rand(self.shape, generator=seed, dtype=torch.float64) * self.scale
        else:
            value = torch.randn(self.shape, generator=seed, dtype=torch.float64) * self.scale
            if self.draw == "coordinates":
                h, w = self.shape[-2:]
                rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
                value = value + torch.stack([columns, rows])
        return value.to(device, dtype if self.storage else accumulation_dtype(dtype))


@dataclass(frozen=True)
class Sample:
    """One call: arguments by name, in order; tensors as ``Argument``, lists of them, or values."""

    name: str
    size: Size
    arguments: Mapping[str, Argument | list[Argument] | Any]
    #: The name in ``dispatch.OPERATORS`` that serves the call, where it is not the spec's.
    served_by: str | None = None
    #: Factor on the tolerance where flows are long: they round the positions in proportion.
    condition: float = 1.0

    def make(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Any]:
        """The call's arguments with tensors drawn for ``dtype``."""

        def draw(key: str, value: Any) -> Any:
            if isinstance(value, Argument):
                return value.make(f"{self.name}/{key}", dtype, device)
            if isinstance(value, list):
                return [draw(f"{key}/{i}", v) for i, v in enumerate(value)]
            return value

        return {key: draw(key, value) for key, value in self.arguments.items()}


@dataclass(frozen=True)
class Invalid:
    """A call that must raise ``error`` with a message that matches the pattern ``message``.

    ``change`` maps the arguments of the first small sample to the invalid ones.
    """

    name: str
    change: Callable[[dict[str, Any]], dict[str, Any]]
    error: type[Exception]
    message: str


@dataclass(frozen=True)
class OperatorSpec:
    """Everything that tests, benchmarks and documentation need to know of an operator."""

    name: str
    function: Callable[..., torch.Tensor]
    #: The definition, with the same arguments as ``function``; computes in the arguments' dtype.
    reference: Callable[..., torch.Tensor]
    #: One line for the table in the README.
    summary: str
    samples: tuple[Sample, ...]
    invalid: tuple[Invalid, ...]
    #: Names of the arguments that have a gradient.
    differentiable: tuple[str, ...]
    #: Floating-point operations of a call's forward pass.
    flops: Callable[[dict[str, Any]], int]
    #: Bytes a forward pass must move at least: each input read once, the output written once.
    bytes: Callable[[dict[str, Any]], int]
    dtypes: tuple[torch.dtype, ...] = FLOATING
    deterministic: bool = True
    #: Whether autocast casts the storage arguments to its dtype; others are never cast.
    autocast: bool = False
    #: Whether results on the way take the storage dtype too, which its rounding then limits.
    stores_intermediates: bool = False
    #: Backends that are made of several operators: what lies between these is rounded to the storage
    #: dtype, gradients too, and many numbers share one rounding, so that their errors do not average out.
    composed: frozenset[str] = frozenset()
    #: How many pixels further than the definition says a number that is not finite may spread.
    undefined_reach: int = 0
    #: Arguments that hold flows or coordinates, and the argument that each of them samples.
    positions: Mapping[str, str] = field(default_factory=dict)
    #: Largest error allowed against the float64 reference, relative to its largest magnitude.
    #: For bfloat16 and float16 the rule is instead: at most twice eager PyTorch's error.
    tolerance: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 1e-5, torch.float64: 1e-12}
    )

    def of_size(self, size: Size) -> tuple[Sample, ...]:
        """The samples of one size."""
        return tuple(s for s in self.samples if s.size == size)


def all_specs() -> dict[str, OperatorSpec]:
    """The specs of all operators by name: every folder of ``gi_kernels.ops`` declares one."""
    import importlib
    import pkgutil

    from gi_kernels import ops

    found = {}
    for module in pkgutil.iter_modules(ops.__path__):
        spec = importlib.import_module(f"gi_kernels.ops.{module.name}.spec").SPEC
        found[spec.name] = spec
    return found


def tensor_bytes(*values: Any) -> int:
    """Total bytes of the tensors in ``values``, lists included."""
    total = 0
    for v in values:
        if isinstance(v, torch.Tensor):
            total += v.numel() * v.element_size()
        elif isinstance(v, list | tuple):
            total += tensor_bytes(*v)
    return total


def _disc(shape: tuple[int, ...]) -> torch.Tensor:
    h, w = shape[-2:]
    rows = torch.arange(h, dtype=torch.float64)[:, None] - h / 2
    columns = torch.arange(w, dtype=torch.float64)[None, :] - w / 2
    inside = (rows**2 + columns**2) < (min(h, w) / 4) ** 2
    return inside.to(torch.float64).expand(shape).contiguous()
