"""CUDA graphs: a step's thousands of small kernels, launched at once."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from gi_kernels import dispatch

DEVICE = "cuda"  # the type of device whose work is recorded
WARM_UPS = 2  # runs before recording, in which libraries allocate and choose
KEPT = 8  # graphs, each with memory of its own for all that lies between arguments and results

_recording = threading.local()
_one_at_a_time = threading.Lock()  # CUDA records no two graphs of a process at once


class Graphs:
    """Runs functions of tensors through CUDA graphs, one for each kind of arguments.

    A kind is the function, the shapes, strides, dtypes and device of its tensors, the values of its other
    arguments, and the settings of PyTorch and of ``gi_kernels`` that choose kernels. Of each kind the first
    call runs the function on a stream of its own, then records it. Every call copies its tensors to where
    the graph reads them, launches the graph and copies the results out of it: they belong to the caller.
    The ``most`` kinds that were used last are kept.

    The function itself runs where tensors are not all on one GPU, where autograd is on, under
    ``torch.compile``, while a graph of the caller's is recorded, and, after a warning that names the
    reason, for a kind that cannot be recorded.

    What is recorded is work on the GPU only: a function may not look at the values of tensors, copy
    numbers from the host, or change its arguments. A graph reads weights where they are; changed in place
    their new values count, and if one has moved the kind is recorded anew. After a weight was replaced
    by another object, call :meth:`clear`. Tensors that a function keeps between calls: see :func:`hold`.

    Copies and pickles start without graphs. Calls may come from any thread and stream.
    """

    def __init__(self, most: int = KEPT) -> None:
        self.most = most
        self._lock = threading.Lock()
        #: By kind, last used last; None for those that cannot be recorded.
        self._graphs: OrderedDict[Hashable, _Graph | None] = OrderedDict()
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.most,)

    def __len__(self) -> int:
        """How many graphs are kept."""
        return sum(graph is not None for graph in self._graphs.values())

    def clear(self) -> None:
        """Drop all graphs."""
        with self._lock:
            self._graphs.clear()

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        weights: Callable[[], Iterable[torch.Tensor]] = tuple,
    ) -> Any:
        """``function(*arguments)``.

        Args:
            function: what to run; recorded once per kind.
            arguments: tensors, lists, tuples and dataclasses of them, and hashable values.
            weights: what tensors the function reads besides; called when it is recorded.
        """
        if torch.compiler.is_compiling() or not _recordable(tensors := list(_tensors(arguments))):
            return function(*arguments)
        kind = (function, _kind(arguments), _settings())
        with self._lock:
            if not self._knows(kind):
                self._graphs[kind] = self._recorded(function, arguments, weights)
            self._graphs.move_to_end(kind)
            while len(self._graphs) > self.most:
                self._graphs.popitem(last=False)
            graph = self._graphs[kind]
            if graph is not None:
                return graph.replay(tensors)
        return function(*arguments)

    def _knows(self, kind: Hashable) -> bool:
        """Whether there is a graph that still reads the weights, or a refusal."""
        if kind not in self._graphs:
            return False
        graph = self._graphs[kind]
        return graph is None or graph.is_current()

    def _recorded(
        self, function: Callable[..., Any], arguments: Any, weights: Callable[[], Iterable[torch.Tensor]]
    ) -> _Graph | None:
        try:
            with _one_at_a_time:
                return _Graph(function, arguments, list(weights()))
        except RuntimeError as error:  # also those of the CUDA runtime and of its memory
            if not self._warned:
                self._warned = True
                name = getattr(function, "__qualname__", repr(function))
                warnings.warn(
                    f"{name} runs without a CUDA graph, it cannot be recorded: {_reason(error)}",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return None


def hold(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, kept alive as long as the graph that is being recorded, if one is.

    For what a function made in an earlier call, keeps and may drop: the graph reads it where it is.
    """
    if not torch.compiler.is_compiling():
        held = getattr(_recording, "held", None)
        if held is not None:
            held.append(tensor)
    return tensor


class _Graph:
    """One recorded function, with the tensors that it reads and writes."""

    def __init__(self, function: Callable[..., Any], arguments: Any, weights: list[torch.Tensor]) -> None:
        self.weights = weights
        self.places = _places(weights)
        self.held: list[torch.Tensor] = []
        self.inputs: list[torch.Tensor] = []

        def own(tensor: torch.Tensor) -> torch.Tensor:
            self.inputs.append(tensor.detach().clone())
            return self.inputs[-1]

        device = next(_tensors(arguments)).device
        # Not inference tensors: these could not be overwritten later, outside of that mode.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device), _uncached_autocast():
            arguments = _changed(arguments, own)
            caller, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):  # a recording that fails may not give the caller's stream back
                for _ in range(WARM_UPS):
                    function(*arguments)
                self.graph = torch.cuda.CUDAGraph()
                # Other threads may go on with what is forbidden in this one.
                with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                    _recording.held = self.held
                    try:
                        self.outputs = function(*arguments)
                    finally:
                        _recording.held = None
            caller.wait_stream(stream)
            self.done = caller.record_event()

    def is_current(self) -> bool:
        """Whether all weights are where the graph reads them."""
        return _places(self.weights) == self.places

    def replay(self, tensors: list[torch.Tensor]) -> Any:
        """Results for other ``tensors``, in the order of those recorded."""
        with torch.cuda.device(tensors[0].device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)  # the last call may have been on another stream
            for own, given in zip(self.inputs, tensors, strict=True):
                own.copy_(given)
            self.graph.replay()
            results = _changed(self.outputs, torch.Tensor.clone)
            self.done = stream.record_event()
        return results


def _recordable(tensors: list[torch.Tensor]) -> bool:
    """Whether work on ``tensors`` can be recorded here and now."""
    return (
        len(tensors) > 0
        and tensors[0].device.type == DEVICE
        and all(t.device == tensors[0].device for t in tensors)
        and not torch.is_grad_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def _settings() -> Hashable:
    """What chooses kernels besides the arguments."""
    return (
        torch.is_autocast_enabled(DEVICE) and torch.get_autocast_dtype(DEVICE),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.are_deterministic_algorithms_enabled(),
        dispatch.asked(),
    )


def _uncached_autocast() -> torch.autocast:
    """Autocast as it is, but weights that it casts are cast again in every run."""
    enabled, dtype = torch.is_autocast_enabled(DEVICE), torch.get_autocast_dtype(DEVICE)
    return torch.autocast(DEVICE, dtype=dtype, enabled=enabled, cache_enabled=False)


def _places(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _reason(error: BaseException) -> str:
    """The first line of the error that came first: those on leaving a recording only follow from it."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# -- Tensors in lists, tuples and dataclasses ---------------------------------------------------------


def _changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with every tensor in it changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        parts = [_changed(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _changed(getattr(value, f.name), change) for f in fields(value)})
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in ``value``, in the order of ``_changed``."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from _tensors(getattr(value, f.name))


def _kind(value: Any) -> Hashable:
    """What two values must share to be arguments of one graph."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return type(value), *(_kind(part) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), *(_kind(getattr(value, f.name)) for f in fields(value))
    return value
