"""Tables, plot and floors from the results: ``python -m benchmarks.report [--floors]``.

Without options: for every ``benchmarks/results/<device>/results.json`` a ``table.md`` with all
cases and a ``speedup.png``, and the README's section between the markers. With ``--floors``: what
``benchmarks.floors`` demands of the results, line by line; the exit code is 1 if a floor is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.floors import judge

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

Entry = Mapping[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Write the reports, or judge the floors."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("--floors", action="store_true", help="compare with the floors, write nothing")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--partial", action="store_true", help="take partial.json, of a run of some cases")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("*/partial.json" if options.partial else "*/results.json"))
    if not files:
        print(f"no results in {options.results}: run `pytest benchmarks/ --benchmark-only`", file=sys.stderr)
        return 2
    loaded = [(file, _load(file)) for file in files]
    if options.floors:
        return floors(loaded)
    for file, results in loaded:
        (file.parent / "table.md").write_text(table(results))
        plot(results, file.parent / "speedup.png")
        print(f"wrote {file.parent / 'table.md'} and speedup.png")
    if options.partial:
        print("the README keeps its section: these are results of some cases only")
    else:
        section(options.readme, loaded)
    return 0


def _load(file: Path) -> dict[str, Any]:
    """Results, with those of whole steps and of video that lie beside them."""
    results = json.loads(file.read_text())
    video = file.with_name("propagation.json")
    if video.exists():
        results["propagation"] = json.loads(video.read_text())["cases"]
    learning = file.with_name("training.json")
    if learning.exists():
        results["training"] = json.loads(learning.read_text())
    steps = file.with_name("end_to_end.json")
    if steps.exists():
        results["cases"] += json.loads(steps.read_text())["cases"]
    return results


def floors(loaded: Iterable[tuple[Path, Mapping[str, Any]]]) -> int:
    """Print a verdict per floor and device; 1 if any is missed."""
    missed = 0
    for file, results in loaded:
        verdicts = judge(results)
        reached = sum(v.reached for v in verdicts)
        about = results["machine"]
        print(f"{about['device']}, {threads(about)}, commit {about['commit']} ({file}):")
        for verdict in verdicts:
            print(f"  {verdict}")
        print(f"  {reached} of {len(verdicts)} floors reached")
        missed += len(verdicts) - reached
    return 1 if missed else 0


def table(results: Mapping[str, Any]) -> str:
    """Every case in Markdown, losses too."""
    lines = [f"# Benchmarks on {results['machine']['device']}", "", *preface(results), ""]
    for suite, title in (("operators", "Operators"), ("layers", "Layers")):
        entries = [e for e in results["cases"] if e["suite"] == suite]
        if not entries:
            continue
        lines += [f"## {title}", "", *HEADER]
        lines += [_row(e, _times(e)) for e in sorted(entries, key=_order)]
        lines.append("")
    if "propagation" in results:
        lines += ["## Video", "", *propagation(results)]
    if "training" in results:
        lines += ["## Training", "", *training(results)]
    return "\n".join(lines)


HEADER = (
    "| case | dtype | pass | ours | published | against published | against compiled | against nearest "
    "| memory | roofline |",
    "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
)

NOTES = """\
*Against published, compiled, nearest*: their median over ours, higher is better, below 1 we lose.
Published: the published formulation in eager PyTorch, contiguous. Compiled: the same under
`torch.compile` (forward at the typical size in float32, unless the run was told `--compile-all`). Nearest:
`grid_sample` with its grid ready; scaled-dot-product attention, the concatenation included. *Memory*:
our peak of newly allocated memory, the result included, over the published one's, lower is better.
*Roofline*: the least time for the operator's compulsory bytes (at the speed of a large copy) and
operations (at that of a matrix product in the same dtype), both measured in the same run, over our
time; small maps that stay in the caches may exceed 100 %. *training*: forward and backward.
† served by the PyTorch reference: no compiled kernel ran."""


def propagation(results: Mapping[str, Any]) -> list[str]:
    """Speed, memory and stages of ``gi-model propagate`` by size, if they were measured."""
    cases = results.get("propagation", [])
    if not cases:
        return []
    lines = [
        "`gi-model propagate` without weights, H.264 to H.264, a hole of about 7 % that moves over a pan; "
        "`-edit`: a poster of that area carried from the first frame, `-edits`: from the first and the last "
        "(`python -m benchmarks.bench_propagation`):",
        "",
        "| size | frames | frames per second | peak memory | where the time goes |",
        "|---|--:|--:|--:|---|",
    ]
    for case in cases:
        total = sum(case["stages"].values()) or 1.0
        shares = sorted(case["stages"].items(), key=lambda item: -item[1])
        spent = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in shares)
        lines.append(
            f"| {case['name']} ({case['width']}x{case['height']}) | {case['frames']} "
            f"| {case['frames_per_second']:.2f} | {case['peak_bytes'] / 2**20:.0f} MiB | {spent} |"
        )
    return [*lines, "", "Decoding and encoding run beside the rest, in threads.", ""]


def training(results: Mapping[str, Any]) -> list[str]:
    """Speed and memory of whole training steps and of data loading, if they were measured."""
    if "training" not in results:
        return []
    cases, loading = results["training"]["cases"], results["training"]["loading"]
    first, published = cases[0], next(c for c in cases if c["style"] == "published")
    lines = [
        f"A whole training step, {first['batch']} of {first['size']}x{first['size']} with two references on "
        f"the {first['device'].upper()}: flow on the fly, both passes, both optimizers "
        "(`python -m benchmarks.bench_training`):",
        "",
        "| style | images per second | against published | peak memory |",
        "|---|--:|--:|--:|",
    ]
    for case in cases:
        ratio = case["images_per_second"] / published["images_per_second"]
        lines.append(
            f"| {case['style']} | {case['images_per_second']:.3g} | {_times_faster(ratio)} "
            f"| {case['peak_bytes'] / 2**20:.0f} MiB |"
        )
    rate, batch = loading["images_per_second_per_core"], 1e3 * loading["computed_seconds_per_batch"]
    made = (
        f"Data loading makes {rate:.1f} images per second and core. Computed from that, not measured: "
        f"{loading['cores']} cores make {loading['computed_images_per_second']:.0f}, a batch of "
        f"{loading['batch']} in {batch:.0f} ms; a GPU whose step takes longer does not wait for data."
    )
    return [*lines, "", made, ""]


def preface(results: Mapping[str, Any]) -> list[str]:
    """Machine, versions and limits in a few lines."""
    m, r = results["machine"], results["roofline"]
    about = (
        f"{m['device']}, {m['cores']} cores, {threads(m)}, {m['system']}, torch {m['torch']}, "
        f"Python {m['python']}, commit {m['commit']}, {results['time']}."
    )
    if "gpu" in m:
        about += f" GPU: {', '.join(f'{k} {v}' for k, v in m['gpu'].items())}."
    limits = (
        f"Measured limits: copy {r['copy_bytes_per_second'] / 1e9:.1f} GB/s, matrix product "
        f"{r['float32_flops'] / 1e9:.0f} GFLOP/s in float32, {r['bfloat16_flops'] / 1e9:.0f} in bfloat16."
    )
    return [about, limits, "", NOTES]


def threads(machine: Mapping[str, Any]) -> str:
    """Number of threads with its noun."""
    return f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"


def section(readme: Path, loaded: Iterable[tuple[Path, Mapping[str, Any]]]) -> None:
    """Rewrite what stands between the markers of the README: typical sizes, all devices."""
    text = readme.read_text() if readme.exists() else ""
    if BEGIN not in text or END not in text:
        print(f"{readme} has no section {BEGIN} ... {END}: left as it is")
        return
    lines = [BEGIN]
    for file, results in loaded:
        folder = file.parent.relative_to(readme.resolve().parent)
        typical = [e for e in results["cases"] if e["size"] == "typical"]
        lines += [
            f"**{results['machine']['device']}** ([all cases]({folder.as_posix()}/table.md))",
            "",
            f"![Speed against the published formulation]({folder.as_posix()}/speedup.png)",
            "",
            *HEADER,
            *(_row(e, _times(e)) for e in sorted(typical, key=_order) if e["dtype"] == "float32"),
            "",
            *preface(results),
            "",
            *propagation(results),
            *training(results),
        ]
    lines.append(END)
    before, rest = text.split(BEGIN, 1)
    readme.write_text(before + "\n".join(lines) + rest.split(END, 1)[1])
    print(f"rewrote the benchmarks in {readme}")


def plot(results: Mapping[str, Any], file: Path) -> None:
    """How many times faster than the published formulation, at the typical size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = [e for e in results["cases"] if e["size"] == "typical" and "published" in e["contenders"]]
    labels = list(dict.fromkeys(_label(e) for e in sorted(entries, key=_order)))
    if not labels:
        return
    kinds = {
        "float32 forward": "#1f5a94",
        "float32 training": "#7fb2df",
        "bfloat16 forward": "#a8541b",
        "bfloat16 training": "#e3a878",
    }
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.42 * len(labels)))
    for k, (kind, colour) in enumerate(kinds.items()):
        found = {_label(e): _ratio(e, "published") for e in entries if _kind(e) == kind}
        places = [i + (k - 1.5) * 0.2 for i, label in enumerate(labels) if label in found]
        speeds = [found[label] or 0.0 for label in labels if label in found]
        # On a logarithmic axis a bar starts at 1: to the right faster, to the left slower.
        axes.barh(places, [s - 1 for s in speeds], 0.19, left=1, color=colour, label=kind)
        for place, speed in zip(places, speeds, strict=True):
            if kind == "float32 forward":
                beyond = {"ha": "left" if speed >= 1 else "right", "va": "center", "fontsize": 7}
                axes.text(speed * (1.03 if speed >= 1 else 0.97), place, f"{speed:.1f}", **beyond)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axes.set_xlabel("times as fast as the published formulation in eager PyTorch (median)")
    axes.set_title(f"{results['machine']['device']}, {threads(results['machine'])}", fontsize=10)
    axes.legend(fontsize=8, loc="best")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _row(e: Entry, times: str) -> str:
    mark = " †" if e["backend"] == "reference" else ""
    step = "training" if e["training"] else "forward"
    limit = f"{e['roofline_fraction']:.0%}" if "roofline_fraction" in e else "–"
    ratios = " | ".join(_times_faster(_ratio(e, who)) for who in ("published", "compiled", "nearest"))
    return f"| {_label(e)}{mark} | {e['dtype']} | {step} | {times} | {ratios} | {_memory(e)} | {limit} |"


def _times(e: Entry) -> str:
    published = e["contenders"].get("published")
    theirs = "–" if published is None else _duration(published["median"])
    return f"{_duration(e['contenders']['ours']['median'])} | {theirs}"


def _memory(e: Entry) -> str:
    ours, published = e["contenders"]["ours"]["peak_bytes"], e["contenders"].get("published")
    if published is not None:
        return f"{ours / published['peak_bytes']:.2f}×" if published["peak_bytes"] else "–"
    return f"{ours / 2**20:.0f} MiB"


def _ratio(e: Entry, who: str) -> float | None:
    theirs = e["contenders"].get(who)
    return None if theirs is None else theirs["median"] / e["contenders"]["ours"]["median"]


def _times_faster(ratio: float | None) -> str:
    if ratio is None:
        return "–"
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"


def _duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def _label(e: Entry) -> str:
    layout = ", channels last" if e["layout"] == "channels_last" else ""
    return f"{e['name']} {e['sample']}{layout}"


def _kind(e: Entry) -> str:
    return f"{e['dtype']} {'training' if e['training'] else 'forward'}"


def _order(e: Entry) -> tuple[Any, ...]:
    sizes = ("small", "typical", "large")
    return (
        e["suite"] != "operators",
        e["name"].lower(),
        sizes.index(e["size"]),
        e["sample"],
        e["layout"],
        e["dtype"] != "float32",
        e["training"],
    )


if __name__ == "__main__":
    sys.exit(main())
