"""Replacements against originals, on what a user's own batch sends through each module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from gi_kernels.acceleration.report import Entry
from gi_kernels.acceleration.swapping import restore, swap
from gi_kernels.testing import memory, timing

#: Largest error relative to the largest magnitude, by dtype of the result, or of autocast.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: Gradients pass many more sums.
GRADIENT_FACTOR = 5.0
#: Seconds of timing per module.
BUDGET = 0.5

_Outcome = tuple[list[torch.Tensor], list[torch.Tensor]]


def verify(model: nn.Module, entries: Sequence[Entry], run: Callable[[], Any], training: bool) -> None:
    """Compare each entry's module with its replacement; swap those that agree and are faster.

    ``run`` runs the model once, as it is, to see what arrives at each module. Children come before
    their parents, which are then compared as they will be: with the children that were swapped.
    """
    with _undisturbed(model):
        calls = _recorded(entries, run, training)
        try:
            for entry in reversed(entries):
                if entry.path in calls:
                    _compare(entry, calls[entry.path], training)
                else:
                    entry.leave_alone("the batch does not reach it")
        except BaseException:
            for entry in entries:
                restore(entry.module)
            raise


def _compare(entry: Entry, call: _Call, training: bool) -> None:
    module, replacement = entry.module, entry.replacement
    assert replacement is not None
    passes = replacement.passes if training else 1

    def original() -> _Outcome:
        return [call.run(module) for _ in range(passes)][-1]

    def accelerated() -> _Outcome:
        swap(module, replacement)
        try:
            module.forget()  # type: ignore[operator]
            return original()
        finally:
            restore(module, clear=False)

    with _undisturbed(module):
        try:
            with _undisturbed(module):
                expected = original()
            with _undisturbed(module):
                actual = accelerated()
        except Exception as problem:
            return entry.leave_alone(f"it failed on the batch: {type(problem).__name__}: {problem}")
        allowed = min((TOLERANCE.get(call.dtype or t.dtype, 0.0) for t in expected[0]), default=0.0)
        entry.error = _largest_error(actual[0], expected[0], allowed)
        if call.differentiated:
            entry.gradient_error = _largest_error(actual[1], expected[1], allowed)
        if not entry.error <= allowed:
            return entry.leave_alone(f"its result differs, {allowed:.0e} is allowed")
        if entry.gradient_error is not None and not entry.gradient_error <= GRADIENT_FACTOR * allowed:
            return entry.leave_alone(f"its gradients differ, {GRADIENT_FACTOR * allowed:.0e} is allowed")
        del expected, actual
        device = call.device
        entry.bytes = (
            memory.peak_extra_bytes(original, device),
            memory.peak_extra_bytes(accelerated, device),
        )
        times = timing.interleave({"original": original, "accelerated": accelerated}, device, BUDGET)
        before, after = times["original"].median, times["accelerated"].median
        entry.seconds = (before, after)
    if after >= before:
        return entry.leave_alone("it would not be faster")
    entry.replace()


class _Call:
    """The arguments of a module's first call, kept apart from the model, and its surroundings."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = detached(args), detached(kwargs)
        self.device = next((t.device for t in _tensors((args, kwargs))), torch.device("cpu"))
        self.differentiated = torch.is_grad_enabled()
        kind = self.device.type
        self.autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if self.autocast else None

    def run(self, module: nn.Module) -> _Outcome:
        """Results, and gradients of all inputs and parameters where the model's call could have some.

        The module's own hooks are not called: they saw the batch when it was recorded.
        """
        args, kwargs = detached((self.args, self.kwargs))
        autocast = torch.autocast(self.device.type, self.dtype) if self.autocast else nullcontext()
        inputs = [t for t in _tensors((args, kwargs)) if t.is_floating_point()]
        if self.differentiated:
            inputs = [t.requires_grad_() for t in inputs] + [
                p for p in module.parameters() if p.requires_grad
            ]
        with torch.set_grad_enabled(self.differentiated), autocast:
            results = [t for t in _tensors(module.forward(*args, **kwargs)) if t.is_floating_point()]
        outputs = [t for t in results if t.requires_grad]
        if not (self.differentiated and outputs and inputs):
            return [t.detach() for t in results], []
        incoming = [
            torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view(t.shape) for t in outputs
        ]
        gradients = torch.autograd.grad(outputs, inputs, incoming, allow_unused=True)
        zero = (torch.zeros_like(t) if g is None else g for g, t in zip(gradients, inputs, strict=True))
        return [t.detach() for t in results], list(zero)


def _recorded(entries: Sequence[Entry], run: Callable[[], Any], training: bool) -> dict[str, _Call]:
    """What arrives at each module first, by its path."""
    calls: dict[str, _Call] = {}

    def recorder(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path not in calls:
                calls[path] = _Call(args, kwargs)

        return record

    handles = [e.module.register_forward_pre_hook(recorder(e.path), with_kwargs=True) for e in entries]
    try:
        with torch.set_grad_enabled(training and torch.is_grad_enabled()):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Buffers, such as running statistics, and the random state are the same afterwards."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = {t.device for t in (*module.parameters(), *buffers.values()) if t.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    if name in buffers:
                        buffer.copy_(buffers[name])


def _largest_error(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], least: float) -> float:
    """Relative to each tensor's largest magnitude; infinite where shapes differ or NaN appears.

    A magnitude counts as at least ``least`` of the largest among all: numbers that cancel to nothing are
    small beside the others, not beside themselves.
    """
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return float("inf")
    magnitudes = [float(t.detach().abs().max()) if t.numel() else 0.0 for t in expected]
    floor = max(least * max(magnitudes, default=0.0), 1e-12)
    worst = 0.0
    for a, e, magnitude in zip(actual, expected, magnitudes, strict=True):
        if e.numel():
            error = float((a.detach().double() - e.detach().double()).abs().max())
            worst = max(worst, error / max(magnitude, floor) if error == error else float("inf"))
    return worst


def detached(value: Any) -> Any:
    """The same with every tensor detached and copied."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, tuple | list):
        return type(value)(detached(v) for v in value)
    if isinstance(value, dict):
        return {k: detached(v) for k, v in value.items()}
    return value


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [t for v in value for t in _tensors(v)]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    return []
