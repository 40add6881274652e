"""The Triton kernels as operators ``gi_triton::*``: whether they can run, and how they are declared.

Triton is imported by the first call of a kernel, never by importing this package.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

from torch import library

NAMESPACE = "gi_triton"
#: Whether kernels run on the CPU in Triton's interpreter, which is made for tests and slow.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: Why no Triton kernel can run, or None.
PROBLEM: str | None = (
    None if importlib.util.find_spec("triton") else "triton is not installed: pip install triton"
)

#: What each operator calls on its device.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}

_LIBRARY = library.Library(NAMESPACE, "DEF")


def define(folder: str, name: str, signature: str) -> None:
    """Declare ``gi_triton::name``, which calls the function ``name`` of the module ``<folder>.triton``."""
    _LIBRARY.define(name + signature)

    def implementation(*args: Any) -> Any:
        return getattr(importlib.import_module(f"{folder}.triton"), name)(*args)

    IMPLEMENTATIONS[name] = implementation
    for key in ("CUDA", *(["CPU"] if INTERPRETED else [])):
        _LIBRARY.impl(name, implementation, key)
