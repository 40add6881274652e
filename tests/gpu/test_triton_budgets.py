"""Every Triton kernel compiled ahead of time for two GPUs, and held to ``budgets.json``.

After a change that is meant to need more: ``python tests/gpu/test_triton_budgets.py`` writes the file anew.
"""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from gi_kernels import jit
from gi_kernels.spec import all_specs
from gi_kernels.testing.ahead_of_time import measured

FILE = Path(__file__).with_name("budgets.json")
BUDGETS = json.loads(FILE.read_text()) if FILE.exists() else {"triton": None, "operators": {}}
SPECS = all_specs()
COMPILED = [n for n in SPECS if n in jit.IMPLEMENTATIONS]
#: Kernels whose products must be done by matrix instructions.
MULTIPLYING = {
    "correlation_lookup": {"products"},
    "global_attention": {"forward", "backward_query", "backward_segment"},
    "window_pool": {"gather", "spread", "dots"},
    "window_spread": {"gather", "spread", "dots"},
}

pytestmark = [
    pytest.mark.skipif(jit.PROBLEM is not None, reason=str(jit.PROBLEM)),
    pytest.mark.skipif(jit.INTERPRETED, reason="kernels that are interpreted are not compiled"),
]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch) -> None:
    """Nothing that an earlier run compiled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", COMPILED)
def test_budget(name: str) -> None:
    """Registers, shared memory and matrix instructions as recorded; no register is spilled."""
    if jit.PROBLEM is None and metadata.version("triton") != BUDGETS["triton"]:
        pytest.skip(f"recorded with triton {BUDGETS['triton']}, this is {metadata.version('triton')}")
    found, allowed = measured(SPECS[name]), BUDGETS["operators"][name]
    assert set(found) == set(allowed)
    for kernel, resources in found.items():
        assert resources.stack == 0, f"{kernel}: {resources.stack} bytes of registers spilled"
        for what in ("registers", "shared"):
            assert getattr(resources, what) <= allowed[kernel][what], f"{kernel}: {what} {resources}"
        assert list(resources.matrix) == allowed[kernel]["matrix"], kernel
        if kernel.split()[0] in MULTIPLYING.get(name, ()):
            assert resources.matrix, f"{kernel}: no matrix instruction"


def write() -> None:
    """Record what the kernels need now."""
    operators = {}
    for name in COMPILED:
        operators[name] = {k: r.row() for k, r in sorted(measured(SPECS[name]).items())}
        print(name, flush=True)
    text = json.dumps({"triton": metadata.version("triton"), "operators": operators}, indent=1)
    FILE.write_text(_rows_on_one_line(text) + "\n")


def _rows_on_one_line(text: str) -> str:
    return re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", lambda m: "{" + " ".join(m[1].split()) + "}", text)


if __name__ == "__main__":
    write()
