"""CUDA graphs without a GPU: what they record and replay, on the CPU.

``install`` puts stand-ins into ``torch.cuda`` and lets ``gi_model.graphs`` record work on the CPU. Like
the real one, a stand-in graph does not run Python again: it runs the operators that it saw, on the tensors
that it saw. Results are garbage until it is replayed, and an operator that would wait for the GPU while
recording fails.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gi_model import graphs

#: Operators that tell the host something about values.
WAITING = ("local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "item")


def waits(function, args) -> bool:
    """Whether an operator reads values of tensors on the host."""
    name = function.name().split("::")[1].split(".")[0].lstrip("_")
    if name in ("index", "index_put"):  # by a mask
        return any(i is not None and i.dtype == torch.bool for i in args[1])
    return name.startswith(WAITING)


class Graph:
    """In place of ``torch.cuda.CUDAGraph``."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for function, args, kwargs, results in self.calls:
            aliases = [r.alias_info for r in function._schema.returns]
            if any(a is not None and not a.is_write for a in aliases):
                continue  # a view, of memory that is written by others
            new = function(*args, **kwargs)
            if all(a is None for a in aliases):
                for old, fresh in zip(tree_leaves(results), tree_leaves(new), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(fresh)


class Recording(TorchDispatchMode):
    """In place of ``torch.cuda.graph``."""

    def __init__(self, graph, stream=None, capture_error_mode="global"):
        super().__init__()
        assert capture_error_mode == "thread_local"
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if waits(function, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        results = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, results))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        for function, _, _, results in self.graph.calls:
            if all(r.alias_info is None for r in function._schema.returns):
                for result in tree_leaves(results):
                    if isinstance(result, torch.Tensor) and result.dtype != torch.bool:
                        result.fill_(float("nan") if result.dtype.is_floating_point else -7)


def install(monkeypatch, capturing=lambda: False):
    stream = SimpleNamespace(
        wait_stream=lambda other: None, wait_event=lambda event: None, record_event=lambda: "event"
    )
    for name, stand_in in {
        "CUDAGraph": Graph,
        "graph": Recording,
        "Stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "current_stream": lambda: stream,
        "is_current_stream_capturing": capturing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
