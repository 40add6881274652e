"""The compiled part: its build receipt, loading it, and attaching autograd and shapes to it.

The receipt lives in a small extension module that does not touch torch, so it can be read even when
the kernels cannot be loaded, for instance after torch was upgraded.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import library

from gi_kernels import jit

LIBRARY = Path(__file__).parent / "lib" / "libgi_kernels.so"


def _read_receipt() -> dict[str, Any]:
    try:
        receipt = importlib.import_module("gi_kernels._C").receipt()
    except ImportError as error:
        missing = Path(__file__).parent / "build_failure.txt"
        why = missing.read_text().strip() if missing.exists() else str(error)
        return {"built": False, "reason": why}
    return json.loads(receipt)


def _load() -> str | None:
    """Load the kernels; return why they could not be loaded, or None."""
    if not RECEIPT["built"]:
        return f"the C++ kernels were not built: {RECEIPT['reason']}"
    if RECEIPT["torch"] != torch.__version__:
        return (
            f"the C++ kernels were built for torch {RECEIPT['torch']}, "
            f"but torch {torch.__version__} is running; reinstall gi-kernels"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the C++ kernels could not be loaded: {error}"
    return None


RECEIPT: dict[str, Any] = _read_receipt()
#: Why the compiled kernels are missing, or None when they are loaded.
PROBLEM: str | None = _load()


def register(
    name: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    triton: str | None = None,
) -> None:
    """Attach a shape function, and autograd, to the operator ``name`` of every namespace that has it.

    These are ``gi``, whose kernels are compiled (nothing is done where they are missing), and
    ``gi_triton`` where a signature is given as ``triton``: it is declared here. ``backward`` is called
    with the namespace first. An operator without it raises when a gradient is asked of it, rather than
    returning none in silence.
    """
    global PROBLEM
    if PROBLEM is None and not hasattr(torch.ops.gi, name):
        PROBLEM = f"the C++ kernels were built from other sources, without gi::{name}; reinstall gi-kernels"
    if PROBLEM is None:
        _attach("gi", name, fake, setup_context, backward)
    if triton is not None:
        jit.define(fake.__module__, name, triton)
        _attach(jit.NAMESPACE, name, fake, setup_context, backward)


def _attach(
    namespace: str,
    name: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any] | None,
) -> None:
    operator = f"{namespace}::{name}"
    library.register_fake(operator, fake)

    def refuse(*_: Any) -> Any:
        raise NotImplementedError(
            f"{operator} has no derivative; gi_kernels.backend('reference') "
            "computes it with differentiable PyTorch operations"
        )

    derivative = partial(backward, getattr(torch.ops, namespace)) if backward else refuse
    library.register_autograd(operator, derivative, setup_context=setup_context if backward else None)
