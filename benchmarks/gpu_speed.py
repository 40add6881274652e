"""The speed targets on a GPU: cases, timing with warm and cold caches, report and roofline."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

import gi_kernels
from gi_kernels.spec import Argument, Sample, all_specs, tensor_bytes
from gi_kernels.testing import published
from gi_kernels.testing.calls import Outcome, map_tensors, tensors
from gi_kernels.testing.errors import cosine
from gi_kernels.testing.layouts import channels_last
from gi_kernels.testing.timing import seconds

#: Written before every cold call: more than the cache of any GPU.
FLUSH_BYTES = 512 * 2**20
ROUNDS = 30
#: Smallest cosine of a result with the definition's, below which there is no time.
COSINE = 0.999


@dataclass(frozen=True)
class Case:
    """An operator's call with a target, in bfloat16 and channels-last."""

    name: str
    operator: str
    arguments: Mapping[str, Any]
    #: What PyTorch or the published code runs instead, by name.
    competitors: Mapping[str, Callable[..., torch.Tensor]]
    #: Share of the copy's bandwidth (``copy``) or of the best competitor's speed (``best``) to reach,
    #: forward and in the whole step.
    target: str
    wanted: tuple[float, float]
    training: bool = True

    def make(self, device: str) -> dict[str, Any]:
        """Arguments on the device; maps channels-last."""
        made = Sample(self.name, "large", self.arguments).make(torch.bfloat16, device)
        if self.operator == "global_attention":
            return made
        return map_tensors(lambda _, t: channels_last(t), made)


def cases() -> list[Case]:
    """The cases of the targets."""
    found = [_warp(64), _warp(128), _aggregation()]
    found += [_attention(8, 256, segments) for segments in range(2, 9)] + [_attention(2, 4096, 1)]
    found += [_pool(), _spread()]
    found += [_lookup(32, "dense"), _lookup(32, "on_demand"), _lookup((135, 240), "on_demand")]
    return found


def _warp(side: int) -> Case:
    arguments = {
        "input": Argument((8, 512, side, side)),
        "flow": Argument((8, 2, side, side), 4.0, storage=False),
    }
    return Case(
        f"flow_warp B8 C512 {side}x{side}", "flow_warp", arguments,
        {"grid_sample": published.published_flow_warp}, "copy", (0.85, 0.60),
    )  # fmt: skip


def _aggregation() -> Case:
    B, T, C, side = 8, 4, 512, 64
    arguments = {
        "features": Argument((B, C, side, side)),
        "keys": Argument((B, T, C, side, side)),
        "values": Argument((B, T, C, side, side)),
        "flows": Argument((B, T, 2, side, side), 4.0, storage=False),
        "errors": Argument((B, T, 1, side, side), storage=False),
        **{
            n: Argument((C,), storage=False) for n in ("key_error_weight", "value_error_weight", "value_bias")
        },
    }
    return Case(
        "deformable_aggregation B8 T4 C512 64x64", "deformable_aggregation", arguments,
        {"published": published.published_deformable_aggregation}, "copy", (0.80, 0.50),
    )  # fmt: skip


def _attention(B: int, N: int, segments: int) -> Case:
    shape = (B, 8, N, 64)
    arguments = {
        "query": Argument(shape),
        "keys": [Argument(shape)] * segments,
        "values": [Argument(shape)] * segments,
    }
    share = 0.9 if N > 1000 else 1.0
    return Case(
        f"global_attention B{B} h8 d64 N{N} {segments} segments", "global_attention", arguments,
        {"scaled_dot_product_attention": _concatenated}, "best", (share, share),
    )  # fmt: skip


def _concatenated(
    query: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> torch.Tensor:
    """PyTorch's choice of attention kernel; joining the segments counts."""
    return F.scaled_dot_product_attention(query, torch.cat(list(keys), dim=2), torch.cat(list(values), dim=2))


def _pool() -> Case:
    arguments = {
        "logits": Argument((8, 8, 64, 64)), "features": Argument((8, 512, 64, 64)), "windows": (16, 16),
    }  # fmt: skip
    competitors = {"published": published.published_window_pool}
    return Case("window_pool B8 C512 64x64", "window_pool", arguments, competitors, "copy", (0.80, 0.80))


def _spread() -> Case:
    arguments = {
        "logits": Argument((8, 8, 64, 64)), "latents": Argument((8, 256, 8, 512)), "windows": (16, 16),
    }  # fmt: skip
    competitors = {"published": published.published_window_spread}
    return Case("window_spread B8 C512 64x64", "window_spread", arguments, competitors, "copy", (0.80, 0.80))


def _lookup(size: int | tuple[int, int], mode: str) -> Case:
    """Twenty lookups in a pyramid that is built once, as a flow network does."""
    h, w = size if isinstance(size, tuple) else (size, size)
    arguments = {
        "features1": Argument((1, 256, h, w)),
        "features2": Argument((1, 256, h, w)),
        "coords": Argument((1, 2, h, w), 2.0, "coordinates", storage=False),
        "mode": mode,
    }
    dense = {} if mode == "dense" else {"our dense volume": lambda **a: _run(**(a | {"mode": "dense"}))}
    competitors = dense | ({"published": _published_run} if mode == "dense" else {})
    return Case(
        f"correlation_lookup {mode} {h}x{w}, 20 lookups", "correlation_lookup", arguments, competitors,
        "best", (3.0 if mode == "dense" else 1.5, 1.0), training=False,
    )  # fmt: skip


def _run(features1: torch.Tensor, features2: torch.Tensor, coords: torch.Tensor, mode: str) -> torch.Tensor:
    pyramid = gi_kernels.CorrelationPyramid(features1, features2, mode=mode)
    for step in range(20):
        value = pyramid.lookup(coords + 0.25 * step)
    return value


def _published_run(
    features1: torch.Tensor, features2: torch.Tensor, coords: torch.Tensor, mode: str
) -> torch.Tensor:
    volumes = published.published_volume_pyramid(features1, features2, 4)
    for step in range(20):
        value = published.published_correlation_lookup(volumes, coords + 0.25 * step, 4)
    return value


def measure(
    case: Case, training: bool, backends: Sequence[str], ceilings: Mapping[str, float], device: str
) -> dict[str, Any]:
    """One row of the results: seconds of every contender, warm and cold, and what they come to."""
    spec = all_specs()[case.operator]
    arguments = case.make(device)
    function = _run if case.operator == "correlation_lookup" else spec.function
    contenders: dict[str, Callable[[], object]] = {}
    expected = None
    with gi_kernels.backend("reference"), torch.no_grad():
        expected = function(**arguments)
    for backend in backends:
        contenders[backend] = _call(function, arguments, spec.differentiable, training, backend)
        _verify(function, arguments, backend, expected)
    for name, competitor in case.competitors.items():
        contenders[name] = _call(competitor, arguments, spec.differentiable, training, "auto")
    times = {name: times_of(call, device) for name, call in contenders.items()}
    moved = _bytes(spec, arguments, expected, training)
    flops = spec.flops(arguments | ({"levels": 4, "radius": 4} if "mode" in arguments else {}))
    row: dict[str, Any] = {
        "case": case.name, "training": training, "bytes": moved, "flops": flops * (3 if training else 1),
        "target": case.target, "wanted": case.wanted[training], "seconds": times,
    }  # fmt: skip
    ours = {n: times[n]["cold"] for n in backends}
    others = [times[n]["cold"] for n in case.competitors]
    if ours:
        best = min(ours.values())
        reached = (
            moved / best / ceilings["copy"] if case.target == "copy" else min(others, default=best) / best
        )
        row |= {"backend": min(ours, key=ours.__getitem__), "reached": reached}
        row |= {"meets": reached >= case.wanted[training], "faster": min(others, default=best) / best}
    return row


def _call(
    function: Callable, arguments: dict, differentiable: Sequence[str], training: bool, backend: str
) -> Callable[[], object]:
    def call() -> object:
        with gi_kernels.backend(backend):
            if training:
                return step(function, arguments, differentiable)
            with torch.no_grad():
                return function(**arguments)

    return call


def step(function: Callable, arguments: Mapping[str, Any], differentiable: Sequence[str]) -> Outcome:
    """A call forward and backward with an incoming gradient of ones: nothing is copied from the host."""
    leaves: dict[str, torch.Tensor] = {}

    def track(path: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        if path.split("/")[0] in differentiable:
            leaves[path] = tensor.requires_grad_()
        return tensor

    value = function(**map_tensors(track, arguments))
    if not leaves:
        return Outcome(value, {})
    gradients = torch.autograd.grad(value, list(leaves.values()), torch.ones_like(value))
    return Outcome(value.detach(), dict(zip(leaves, gradients, strict=True)))


def _verify(function: Callable, arguments: dict, backend: str, expected: torch.Tensor) -> None:
    with gi_kernels.backend(backend), torch.no_grad():
        similarity = cosine(function(**arguments), expected)
    assert similarity > COSINE, f"{backend} is wrong: cosine {similarity:.5f} with the definition"


def _bytes(spec, arguments: dict, value: torch.Tensor, training: bool) -> int:
    """Each tensor once: arguments and result; in training also the incoming and outgoing gradients."""
    inputs = list(tensors(arguments).items())
    forward = tensor_bytes([t for _, t in inputs]) + tensor_bytes(value)
    if not training:
        return forward
    gradients = tensor_bytes([t for path, t in inputs if path.split("/")[0] in spec.differentiable])
    return 2 * forward + gradients


def times_of(call: Callable[[], object], device: str) -> dict[str, float]:
    """Median seconds of a call with warm and cold caches, and from Python with its launches.

    On a GPU the first two are those of a captured graph, as launches take longer than small kernels; of
    the call itself, and ``captured`` is 0, where it copies from the host and cannot be captured.
    """
    call()
    eager = median(seconds(call, device) for _ in range(ROUNDS))
    if torch.device(device).type != "cuda":
        return {"warm": eager, "cold": eager, "eager": eager, "captured": 0}
    try:
        replay = capture(call)[0].replay
    except RuntimeError:
        replay = call
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    cold = []
    for _ in range(ROUNDS):
        flush.zero_()
        cold.append(seconds(replay, device))
    return {
        "warm": median(seconds(replay, device) for _ in range(ROUNDS)),
        "cold": median(cold),
        "eager": eager,
        "captured": int(replay is not call),
    }


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a call, after calls that compile its kernels, and the results that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def ceilings(device: str) -> dict[str, float]:
    """Bytes per second of a large copy, read and written; FLOP/s of a large bfloat16 product."""
    large = torch.device(device).type == "cuda"
    source = torch.randn((2**30 if large else 2**16) // 2, device=device)
    target = torch.empty_like(source)
    copied = median(seconds(lambda: target.copy_(source), device) for _ in range(ROUNDS))
    n = 8192 if large else 128
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    multiplied = median(seconds(lambda: a @ b, device) for _ in range(ROUNDS))
    return {"copy": 2 * tensor_bytes(source) / copied, "product": 2 * n**3 / multiplied}


def device_name(device: str) -> str:
    """The device as a folder's name: ``h200``, ``h100-80gb-hbm3``."""
    if torch.device(device).type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name().lower().replace("nvidia", "").strip()
    return re.sub(r"[^a-z0-9]+", "-", name)


def write_report(folder: Path, parts: Sequence[str]) -> list[str]:
    """``summary.md`` and ``roofline.png`` from the parts' JSON; returns what was written."""
    found = {p: json.loads(f.read_text()) for p in parts if (f := folder / f"{p}.json").exists()}
    (folder / "summary.md").write_text(summary(found, parts))
    written = ["summary.md"]
    rows = found.get("speed", {}).get("rows", [])
    if rows:
        plot(rows, found["speed"]["ceilings"], folder / "roofline.png")
        written.append("roofline.png")
    return written


def summary(found: Mapping[str, Any], parts: Sequence[str]) -> str:
    """Markdown: what ran, what differs, and every case beside its target."""
    about = found.get("machine", {})
    lines = [f"# {about.get('device', 'unknown device')}", ""]
    lines += [f"torch {about.get('torch')}, triton {about.get('triton')}, Python {about.get('python')}", ""]
    lines += ["| part | checked | differ |", "|---|---|---|"]
    for part in parts:
        result = found.get(part)
        counts = (result.get("checked", 0), len(result.get("failures", []))) if result else ("not run", "")
        lines.append(f"| {part} | {counts[0]} | {counts[1]} |")
    rows = found.get("speed", {}).get("rows", [])
    if rows:
        limits = found["speed"]["ceilings"]
        lines += [
            "",
            f"Copy {limits['copy'] / 1e12:.2f} TB/s, product {limits['product'] / 1e12:.0f} TFLOP/s.",
            "",
        ]
        heads = ["case", "step", "backend", "cold", "warm", "from Python", "reached", "wanted", "best other"]
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        if "backend" in row:
            lines.append("| " + " | ".join(_cells(row)) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    times = row["seconds"][row["backend"]]
    return [
        row["case"],
        "forward and backward" if row["training"] else "forward",
        row["backend"],
        *(f"{times[k] * 1e6:.1f} µs" for k in ("cold", "warm", "eager")),
        f"{row['reached']:.2f} of {row['target']}",
        f"{row['wanted']:.2f}" + ("" if row["meets"] else " (missed)"),
        f"{row['faster']:.1f}x",
    ]


def plot(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float], file: Path) -> None:
    """Speed against operations per byte, under the measured ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    intensity = [2.0**k for k in range(-4, 13)]
    axes.loglog(intensity, [min(limits["product"], limits["copy"] * i) for i in intensity], "k-")
    for row in rows:
        if "backend" in row:
            cold = row["seconds"][row["backend"]]["cold"]
            point = row["flops"] / row["bytes"], row["flops"] / cold
            axes.plot(*point, "v" if row["training"] else "o", label=row["case"])
    axes.set_xlabel("floating-point operations per compulsory byte")
    axes.set_ylabel("floating-point operations per second")
    axes.legend(fontsize=5, loc="lower right")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
