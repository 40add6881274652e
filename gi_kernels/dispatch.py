"""Which backend serves a call, and why.

``auto`` takes the first backend that can run the call, but for Triton's interpreter: on a GPU in the order
that ``rules`` say. An explicit choice either runs or raises the reason why it cannot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from gi_kernels import jit, native, rules
from gi_kernels.precision import accumulation_dtype

#: In order of preference, but for what ``rules`` say of a GPU; ``reference`` runs everywhere.
BACKENDS = ("cuda", "triton", "cpp", "reference")

#: Operators that have CUDA kernels, csrc/*/cuda.cu.
CUDA = frozenset(
    {
        *("complete_flow", "convex_upsample", "correlation_lookup", "correlation_lookup_on_demand"),
        *("deformable_aggregation", "flow_consistency", "flow_warp", "window_pool", "window_spread"),
    }
)

OPERATORS: dict[str, Operator] = {}


@dataclass(frozen=True)
class Operator:
    """One operator and its implementations, by backend name. All take the same arguments.

    ``reference`` computes in the dtype of its arguments; it is called with accumulation dtypes
    and its result is rounded to the storage dtype, that of the first tensor argument. ``cuda`` comes
    with ``cpp``: both are kernels of one torch operator, which goes by the tensors' device.
    """

    name: str
    implementations: dict[str, Callable[..., Any]]
    #: Per backend, why it cannot run a call on given tensors (lists flattened), or None.
    limits: dict[str, Callable[[list[torch.Tensor]], str | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name in CUDA:
            self.implementations.setdefault("cuda", self.implementations["cpp"])
        OPERATORS[self.name] = self


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` returns: the backend that runs, and why each of the others does not."""

    operator: str
    chosen: str
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.operator}: {self.chosen}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


# Overrides by `backend(...)`, innermost last. A plain module global, so that torch.compile guards
# on it; entries are removed by identity, so contexts that overlap in threads leave nothing behind.
_overrides: list[list[str]] = []


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run operators on backend ``name`` inside a ``with`` block, in the whole process.

    ``name`` is ``auto``, ``reference``, ``cpp``, ``triton`` or ``cuda``. An operator that the named
    backend cannot run raises ``RuntimeError`` with the reason. The environment variable
    ``GI_KERNELS_BACKEND`` sets the default.

    Raises:
        ValueError: unknown name.
    """
    entry = [_valid(name, "backend")]
    _overrides.append(entry)
    try:
        yield
    finally:
        for i in range(len(_overrides) - 1, -1, -1):
            if _overrides[i] is entry:
                del _overrides[i]
                break


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would run ``op(*args, **kwargs)`` and why each of the others would not.

    ``op`` is an operator's name or its public function.

    Raises:
        ValueError: unknown operator.
    """
    operator = _operator(op)
    tensors = _tensors([*args, *kwargs.values()])
    wanted = asked()
    refused: dict[str, str] = {}
    chosen = None
    for name in _order(operator, tensors):
        reason = _refusal(operator, name, tensors)
        if reason is None and wanted == "auto":
            reason = _reserve(name, tensors)
        if reason is None and wanted not in ("auto", name):
            reason = f"{wanted} was asked for"
        if reason is None and chosen is not None:
            reason = f"{chosen} is preferred" + _grounds(operator, name, tensors)
        if reason is None:
            chosen = name
        else:
            refused[name] = reason
    return Explanation(operator.name, chosen or f"none ({refused[wanted]})", refused)


def available_backends(op: str | Callable[..., Any], device: str = "cpu") -> list[str]:
    """Names of the backends that can run ``op`` for float32 tensors on ``device``, best first.

    Under ``TRITON_INTERPRET=1`` that is ``triton`` on the CPU too, last.

    Raises:
        ValueError: unknown operator.
    """
    operator = _operator(op)
    kind = torch.device(device).type
    found = [n for n in BACKENDS if _refusal_on(operator, n, kind) is None]
    return sorted(found, key=lambda name: _interpreted(name, kind))


def run(operator: Operator, *args: Any) -> Any:
    """Run ``operator`` on the backend that is asked for, or the best one."""
    tensors = _tensors(args)
    wanted = asked()
    if wanted == "auto":
        for name in _order(operator, tensors):
            if _refusal(operator, name, tensors) is None and _reserve(name, tensors) is None:
                wanted = name
                break
    else:
        reason = _refusal(operator, wanted, tensors)
        if reason is not None:
            raise RuntimeError(f"{operator.name}: backend '{wanted}' cannot run: {reason}")
    implementation = operator.implementations[wanted]
    if wanted != "reference":
        return implementation(*args)
    storage = tensors[0].dtype
    accumulation = accumulation_dtype(storage)
    arguments = [_cast(a, accumulation) for a in args]
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device):
        return implementation(*arguments).to(storage)
    with torch.autocast(device, enabled=False):  # its matrix products would round what was cast up
        return implementation(*arguments).to(storage)


def asked() -> str:
    """The backend that is asked for: a name, or ``auto``."""
    return _overrides[-1][0] if _overrides else _default


def _order(operator: Operator, tensors: list[torch.Tensor]) -> tuple[str, ...]:
    """The backends as ``auto`` tries them."""
    if _device(tensors) != "cuda":
        return BACKENDS
    return (*rules.preferred(operator.name, tensors).order, "cpp", "reference")


def _grounds(operator: Operator, name: str, tensors: list[torch.Tensor]) -> str:
    """Why one of a GPU's backends is preferred to the one that is named."""
    if _device(tensors) != "cuda":
        return ""
    rule = rules.preferred(operator.name, tensors)
    if name not in rule.order:
        return ""
    return f" ({rule.measured_on}: {rule.numbers})" if rule.measured_on else f" ({rule.numbers})"


def _device(tensors: list[torch.Tensor]) -> str:
    return tensors[0].device.type if tensors else "cpu"


def _refusal(operator: Operator, name: str, tensors: list[torch.Tensor]) -> str | None:
    reason = _refusal_on(operator, name, _device(tensors))
    if reason is None and tensors and name in operator.limits:
        reason = operator.limits[name](tensors)
    return reason


def _reserve(name: str, tensors: list[torch.Tensor]) -> str | None:
    """Why ``auto`` passes over a backend that can run a call, or None."""
    if _interpreted(name, _device(tensors)):
        return "Triton's interpreter is slow and made for tests: it runs what it is asked for by name"
    return None


def _interpreted(name: str, device: str) -> bool:
    return name == "triton" and device == "cpu"


def _refusal_on(operator: Operator, name: str, device: str) -> str | None:
    """Why backend ``name`` cannot run ``operator`` on ``device``, or None. The one predicate."""
    if name == "reference":
        return None
    if name == "cpp" and device != "cpu":
        return f"the C++ kernels run on the CPU, the tensors are on {device}"
    if (
        name in ("cuda", "triton")
        and device != "cuda"
        and not (_interpreted(name, device) and jit.INTERPRETED)
    ):
        return f"{name} kernels run on a CUDA device, the tensors are on {device}"
    if name == "triton" and jit.PROBLEM is not None:
        return jit.PROBLEM
    if name not in operator.implementations:
        return f"there is no {name} kernel for {operator.name} in this version"
    if name != "triton" and native.PROBLEM is not None:
        return native.PROBLEM
    if name == "cuda" and not native.RECEIPT.get("cuda"):
        return f"built without CUDA: {native.RECEIPT.get('cuda_reason')}"
    return None


def _operator(op: str | Callable[..., Any]) -> Operator:
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name not in OPERATORS:
        raise ValueError(f"op: expected one of {', '.join(sorted(OPERATORS))}, got {name!r}")
    return OPERATORS[name]


def _tensors(args: Sequence[Any]) -> list[torch.Tensor]:
    found = []
    for a in args:
        if isinstance(a, torch.Tensor):
            found.append(a)
        elif isinstance(a, list | tuple):
            found += [t for t in a if isinstance(t, torch.Tensor)]
    return found


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype)
    if isinstance(value, list | tuple):
        return [_cast(v, dtype) for v in value]
    return value


def _valid(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source}: expected auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


_default = _valid(os.environ.get("GI_KERNELS_BACKEND", "auto"), "GI_KERNELS_BACKEND")
