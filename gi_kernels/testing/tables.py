"""The operator table of the README, made from the specs.

``python -m gi_kernels.testing.tables README.md`` replaces what stands between the markers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gi_kernels import dispatch
from gi_kernels.spec import OperatorSpec, all_specs

BEGIN, END = "<!-- operators:begin -->", "<!-- operators:end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the table in the file that is named on the command line."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    document = Path(path)
    document.write_text(replace(document.read_text(), BEGIN, END, operator_table()))
    return 0


def operator_table() -> str:
    """One row per operator: what it computes, backends, dtypes, gradients, determinism."""
    rows = [
        "| operator | computes | backends | dtypes | gradients | deterministic |",
        "|---|---|---|---|---|---|",
    ]
    for name, spec in sorted(all_specs().items()):
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in spec.dtypes)
        gradients = ", ".join(f"`{a}`" for a in spec.differentiable) or "none"
        deterministic = "yes" if spec.deterministic else "no"
        rows.append(
            f"| `{name}` | {spec.summary} | {_backends(spec)} | {dtypes} | {gradients} | {deterministic} |"
        )
    return "\n".join(rows)


def replace(text: str, begin: str, end: str, content: str) -> str:
    """``text`` with ``content`` between the two markers.

    Raises:
        ValueError: a marker is missing.
    """
    if begin not in text or end not in text:
        raise ValueError(f"text: expected the markers {begin} and {end}")
    before, rest = text.split(begin, 1)
    _, after = rest.split(end, 1)
    return f"{before}{begin}\n{content}\n{end}{after}"


def _backends(spec: OperatorSpec) -> str:
    """Backends that are implemented, whether or not this machine has them."""
    served = {sample.served_by or spec.name for sample in spec.samples}
    has = [b for b in dispatch.BACKENDS if any(b in dispatch.OPERATORS[s].implementations for s in served)]
    return ", ".join(has)


if __name__ == "__main__":
    sys.exit(main())
