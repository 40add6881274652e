"""Compiling Triton kernels without a GPU, and what the compilers say of the result.

The launches of real calls are recorded on tensors without memory, and compiled with exactly the
constants, types and alignments that Triton would find on a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gi_kernels
from gi_kernels import dispatch, jit
from gi_kernels.spec import Argument, OperatorSpec, Sample
from gi_kernels.testing.calls import evaluate, map_tensors
from gi_kernels.testing.layouts import channels_last, contiguous


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs, and the kinds of matrix instructions in it."""

    registers: int  # per thread
    stack: int  # bytes per thread: registers that were spilled
    shared: int  # bytes per block
    matrix: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"matrix": list(self.matrix)}


def launches(
    spec: OperatorSpec,
    sample: Sample,
    dtype: torch.dtype,
    arrange: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> list[Any]:
    """The launches of a forward and a backward call of ``sample`` on the GPU, none of them run."""
    from gi_kernels.jit.launch import recorded

    arguments = map_tensors(lambda _, t: arrange(t.to("meta")), sample.make(dtype))
    with (
        mock.patch.object(dispatch, "_refusal_on", lambda *_: None),
        gi_kernels.backend("triton"),
        recorded() as found,
        _Implementations(),
    ):
        evaluate(spec.function, arguments, spec.differentiable)
    return list(found)


def compiled(call: Any, capability: int) -> Resources:
    """What a recorded launch needs on a GPU architecture: 80, 90, ..."""
    result = build(call, capability)
    usage = _usage(result.asm["cubin"])
    found = [n for n in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if n in result.asm["ptx"]]
    return Resources(usage["REG"], usage["STACK"], result.metadata.shared, tuple(found))


def build(call: Any, capability: int) -> Any:
    """Compile a recorded launch, as its first run on a GPU would; in Triton's cache it is found by that."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", capability, 32)
    backend, kernel = make_backend(target), call.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*call.args, **call.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, call.options, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def _usage(binary: bytes) -> dict[str, int]:
    """Registers and stack of the one kernel in a cubin."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", text)}


class _Implementations(TorchDispatchMode):
    """Runs the Python code of ``gi_triton::`` operators on tensors of every device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == jit.NAMESPACE:
            return jit.IMPLEMENTATIONS[func._opname](*args)
        return func(*args, **(kwargs or {}))


#: What is compiled: the common type, in the layout of the fast path, and float32 in the other one.
VARIANTS = (
    (torch.bfloat16, channels_last, 80),
    (torch.bfloat16, channels_last, 90),
    (torch.float32, contiguous, 90),
)


#: Calls of other shapes than the typical samples, which choose other constants.
EXTRA = {
    "global_attention": tuple(
        Sample(
            f"heads_of_{d}",
            "large",
            {
                "query": Argument((8, 8, 1024, d)),
                "keys": [Argument((8, 8, 1024, d))] * 2,
                "values": [Argument((8, 8, 1024, d))] * 2,
            },
        )
        for d in (16, 32, 128)
    )
}


def measured(spec: OperatorSpec) -> dict[str, Resources]:
    """Resources of an operator's kernels at its typical sizes and ``EXTRA``: the most that a call needs.

    Keys are ``kernel dtype sm_NN``.
    """
    found: dict[str, Resources] = {}
    for sample in (*spec.of_size("typical"), *EXTRA.get(spec.name, ())):
        for dtype, layout, capability in VARIANTS:
            arrange = contiguous if spec.name == "global_attention" else layout
            for call in launches(spec, sample, dtype, arrange):
                key = f"{call.kernel.__name__.strip('_')} {str(dtype).split('.')[1]} sm_{capability}"
                one = compiled(call, capability)
                before = found.get(key, one)
                found[key] = Resources(
                    max(one.registers, before.registers),
                    max(one.stack, before.stack),
                    max(one.shared, before.shared),
                    tuple(sorted({*one.matrix} & {*before.matrix})),
                )
    return found
