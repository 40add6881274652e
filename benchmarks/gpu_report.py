"""What ``gpu_suite`` found, as Markdown, a roofline plot, and the rules of dispatch that it supports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite import LIMITS

#: How much faster one backend must be than another to be preferred.
CLEARLY = 1.03

Row = Mapping[str, Any]


def write(folder: Path) -> list[str]:
    """``summary.md`` and ``roofline.png`` from the results in ``folder``; returns what was written."""
    parts = json.loads((folder / "gpu_suite.json").read_text())["parts"]
    rows = speed_rows(parts)
    rules = supported(rows)
    (folder / "summary.md").write_text(summary(parts, rows, rules))
    print("\n".join(rules), flush=True)
    written = ["summary.md"]
    if rows:
        plot(rows, _ceilings(parts), folder / "roofline.png")
        written.append("roofline.png")
    return written


def speed_rows(parts: Mapping[str, Any]) -> list[Row]:
    """The rows of the operators' times."""
    return [c["row"] for c in parts.get("speed", {}).get("checks", []) if "backend" in c["row"]]


def _ceilings(parts: Mapping[str, Any]) -> dict[str, float]:
    return parts["speed"]["checks"][0]["ceilings"]


def summary(parts: Mapping[str, Any], rows: Iterable[Row], rules: Iterable[str]) -> str:
    """Markdown: what ran, what differs, and every case beside its target."""
    about: dict[str, Any] = {}
    for check in parts.get("machine", {}).get("checks", []):
        about |= check
    lines = [f"# {about.get('device', 'unknown device')}", ""]
    lines += [f"torch {about.get('torch')}, triton {about.get('triton')}, Python {about.get('python')}", ""]
    lines += ["| part | checked | differ | seconds |", "|---|---|---|---|"]
    for part in LIMITS:
        if part == "report":
            continue
        found = parts.get(part)
        if found is None:
            lines.append(f"| {part} | not run | | |")
            continue
        state = "" if found["complete"] else " (not finished)"
        lines.append(
            f"| {part} | {found['checked']}{state} | {len(found['failures'])} | {found['seconds']} |"
        )
    rows = list(rows)
    if rows:
        limits = _ceilings(parts)
        lines += [
            "",
            f"Copy {limits['copy'] / 1e12:.2f} TB/s, product {limits['product'] / 1e12:.0f} TFLOP/s.",
        ]
        lines += ["", *_table(rows)]
    steps = [c for p in ("steps", "compiled") for c in parts.get(p, {}).get("checks", []) if "step" in c]
    if steps:
        lines += ["", "| step | ours | published | faster | wanted |", "|---|--:|--:|--:|---|"]
        lines += [_step(c) for c in steps]
    lines += ["", "What the measurements say for `gi_kernels/rules.py`:", "", "```", *rules, "```"]
    wrong = [(part, f) for part in LIMITS for f in parts.get(part, {}).get("failures", [])]
    if wrong:
        lines += ["", "## What differs", ""]
        lines += [f"- {part}: `{str(f).splitlines()[0][:300]}`" for part, f in wrong]
    return "\n".join(lines) + "\n"


HEADS = (
    *("case", "step", "backend", "cold", "warm", "from Python", "a copy of its bytes", "reached", "wanted"),
    *("best other", "memory"),
)


def _table(rows: Iterable[Row]) -> list[str]:
    return ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"] + [
        "| " + " | ".join(_cells(row)) + " |" for row in rows
    ]


def _cells(row: Row) -> list[str]:
    times = row["seconds"][row["backend"]]
    named = row["target"] != "none"
    return [
        row["case"],
        "forward and backward" if row["training"] else "forward",
        row["backend"],
        *(f"{times[k] * 1e6:.1f} µs" for k in ("cold", "warm", "eager")),
        f"{row['copy'] * 1e6:.1f} µs",
        f"{row['reached']:.2f} of {'best' if row['target'] == 'best' else 'copy'}",
        (f"{row['wanted']:.2f}" + ("" if row["meets"] else " (missed)")) if named else "",
        f"{row['faster']:.2f}x",
        f"{row['memory']:.3f}" if "memory" in row else "",
    ]


def line(row: Row) -> str:
    """One row, short, for a log."""
    if "backend" not in row:
        return f"{row['case']}: no kernel"
    cells = _cells(row)
    others = ", ".join(f"{n} {t['cold'] * 1e6:.1f}" for n, t in row["seconds"].items())
    return f"{cells[0]}, {cells[1]}: {cells[2]} {cells[3]} cold, {cells[7]} (wanted {cells[8]}); {others}"


def _step(check: Mapping[str, Any]) -> str:
    row = check["step"]
    wanted = f"{row['wanted']:.0f}x" + ("" if row["meets"] else " (missed)") if "wanted" in row else ""
    times = row["seconds"]
    return (
        f"| {check['name']} | {times['ours'] * 1e3:.2f} ms | {times['published'] * 1e3:.2f} ms | "
        f"{row['faster']:.1f}x | {wanted} |"
    )


def supported(rows: Iterable[Row]) -> list[str]:
    """Per operator, which backend was the faster one: a rule, or what to look at where they take turns."""
    winners: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        ours = {b: row["seconds"][b]["cold"] for b in ("cuda", "triton") if b in row["seconds"]}
        if len(ours) < 2:
            continue
        factor = ours["triton"] / ours["cuda"]
        winner = "cuda" if factor > CLEARLY else "triton" if factor < 1 / CLEARLY else "either"
        what = f"{row['case']}{' training' if row['training'] else ''}: triton/cuda {factor:.2f}"
        winners.setdefault(row["operator"], []).append((winner, f"{what}, {row['numbers']} numbers"))
    lines = []
    for operator, found in winners.items():
        chosen = {w for w, _ in found} - {"either"}
        if len(chosen) == 2:
            rule = "cuda and triton take turns: a rule by size or step, of"
        else:
            order = ("triton", "cuda") if chosen == {"triton"} else ("cuda", "triton")
            rule = f"Rule({operator!r}, {order!r}), by"
        lines += [f"{operator}: {rule}", *(f"    {text}" for _, text in found)]
    return lines or ["nothing: no operator was measured on both backends"]


def plot(rows: Iterable[Row], limits: Mapping[str, float], file: Path) -> None:
    """Speed against operations per byte, under the measured ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    intensity = [2.0**k for k in range(-4, 13)]
    axes.loglog(intensity, [min(limits["product"], limits["copy"] * i) for i in intensity], "k-")
    for row in rows:
        cold = row["seconds"][row["backend"]]["cold"]
        point = row["flops"] / row["bytes"], row["flops"] / cold
        axes.plot(*point, "v" if row["training"] else "o", label=row["case"])
    axes.set_xlabel("floating-point operations per compulsory byte")
    axes.set_ylabel("floating-point operations per second")
    axes.legend(fontsize=5, loc="lower right")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
