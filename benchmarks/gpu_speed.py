"""Speed on a GPU: the cases that have targets and others, timing with warm and cold caches."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import gi_kernels
from gi_kernels.spec import Argument, OperatorSpec, all_specs, tensor_bytes
from gi_kernels.testing import memory, published
from gi_kernels.testing.calls import Outcome, map_tensors, tensors
from gi_kernels.testing.errors import cosine, largest_error, magnitude
from gi_kernels.testing.layouts import channels_last
from gi_kernels.testing.timing import seconds

#: Read before every cold call: more than the cache of any GPU.
FLUSH_BYTES = 512 * 2**20
#: Cycles that a GPU waits before a warm call, so that its launch is not counted: about 0.2 ms.
AHEAD_CYCLES = 400_000
ROUNDS = 20
#: Smallest cosine of a result with the definition's, below which there is no time.
COSINE = 0.999
#: Largest error of a step relative to the largest magnitude: of the published style, not of float64.
STEP_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
#: How many times as fast as the published step in eager PyTorch, and compiled, the targets want it.
STEP_WANTED = {False: 10.0, True: 2.0}


@dataclass(frozen=True)
class Case:
    """An operator's call in bfloat16 and channels-last, with what it is compared with."""

    name: str
    operator: str
    arguments: Mapping[str, Any]
    #: What PyTorch or the published code runs instead, by name.
    competitors: Mapping[str, Callable[..., torch.Tensor]]
    #: Share of the copy's bandwidth (``copy``) or of the best competitor's speed (``best``) to reach,
    #: forward and in the whole step; ``none``: nothing was promised.
    target: str = "none"
    wanted: tuple[float, float] = (0.0, 0.0)
    training: bool = True
    #: How many times as fast as the best competitor it must be, besides, forward.
    least_faster: float = 0.0
    #: Most memory, as a share of a competitor's of that name.
    most_memory: tuple[str, float] | None = None
    served_by: str | None = None

    def make(self, device: str) -> dict[str, Any]:
        """Arguments, drawn on the device; maps channels-last."""

        # One of its own: PyTorch's is of no use after a call that could not be captured.
        generator = torch.Generator(device).manual_seed(0)

        def draw(value: Any) -> Any:
            if isinstance(value, list):
                return [draw(v) for v in value]
            return _drawn(value, device, generator) if isinstance(value, Argument) else value

        made = {key: draw(value) for key, value in self.arguments.items()}
        if self.operator == "global_attention":
            return made
        return map_tensors(lambda _, t: channels_last(t), made)


def _drawn(argument: Argument, device: str, generator: torch.Generator) -> torch.Tensor:
    if argument.draw in ("mask", "constant"):
        return argument.make("", torch.bfloat16, device)
    draw = torch.rand if argument.draw == "uniform" else torch.randn
    value = draw(argument.shape, device=device, generator=generator) * argument.scale
    if argument.draw == "coordinates":
        h, w = argument.shape[-2:]
        rows, columns = torch.meshgrid(
            torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij"
        )
        value = value + torch.stack([columns, rows])
    return value.to(torch.bfloat16) if argument.storage else value


# ---- the cases -------------------------------------------------------------------------------------


def cases() -> list[Case]:
    """The cases of the targets, and the typical samples of the other operators."""
    found = [_warp(64), _warp(128), _aggregation()]
    found += [_attention(8, 256, segments) for segments in range(2, 9)] + [_attention(2, 4096, 1)]
    found += [_pool(), _spread()]
    found += [_lookup(size, mode) for size in (32, (135, 240)) for mode in ("dense", "on_demand")]
    for name, competitor in {
        "projected_aggregation": published.published_projected_aggregation,
        "fused_convolution": published.published_convolution,
        "window_query": published.published_window_query,
        "convex_upsample": published.published_convex_upsample,
        "complete_flow": published.published_complete_flow,
        "flow_consistency": published.published_flow_consistency,
    }.items():
        found += [_typical(name, i, competitor) for i in range(len(all_specs()[name].of_size("typical")))]
    return found


def _warp(side: int) -> Case:
    arguments = {
        "input": Argument((8, 512, side, side)),
        "flow": Argument((8, 2, side, side), 4.0, storage=False),
    }
    competitors = {"grid_sample": published.published_flow_warp}
    name = f"flow_warp B8 C512 {side}x{side}"
    return Case(name, "flow_warp", arguments, competitors, "copy", (0.85, 0.60), least_faster=3.0)


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
    competitors = {"published": published.published_deformable_aggregation}
    name = "deformable_aggregation B8 T4 C512 64x64"
    return Case(name, "deformable_aggregation", arguments, competitors, "copy", (0.80, 0.50))


def _attention(B: int, N: int, segments: int) -> Case:
    shape = (B, 8, N, 64)
    arguments = {
        "query": Argument(shape),
        "keys": [Argument(shape)] * segments,
        "values": [Argument(shape)] * segments,
    }
    share = 0.9 if N > 1000 else 1.0
    competitors = {
        "PyTorch's choice": _attend(None),
        "flash": _attend(SDPBackend.FLASH_ATTENTION),
        "cuDNN": _attend(SDPBackend.CUDNN_ATTENTION),
    }
    name = f"global_attention B{B} h8 d64 N{N} {segments} segments"
    return Case(name, "global_attention", arguments, competitors, "best", (share, share))


def _attend(by: SDPBackend | None) -> Callable[..., torch.Tensor]:
    """PyTorch's attention by one of its kernels; joining the segments counts."""

    def attend(
        query: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        key, value = (t[0] if len(t) == 1 else torch.cat(list(t), dim=2) for t in (keys, values))
        with nullcontext() if by is None else sdpa_kernel(by):
            return F.scaled_dot_product_attention(query, key, value)

    return attend


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
    large = isinstance(size, tuple)
    case = Case(
        f"correlation_lookup {mode} {h}x{w}, 20 lookups", "correlation_lookup", arguments,
        {"published": _published_run}, "best", (3.0, 1.0), training=False,
    )  # fmt: skip
    if mode == "dense":
        return case
    return replace(
        case,
        competitors={"our dense volume": lambda **a: lookups(**(a | {"mode": "dense"}))},
        target="best" if large else "none",  # small maps are served by the volume
        wanted=(1.5, 1.0),
        most_memory=("our dense volume", 0.05) if large else None,
        served_by="correlation_lookup_on_demand",
    )


def lookups(
    features1: torch.Tensor, features2: torch.Tensor, coords: torch.Tensor, mode: str
) -> torch.Tensor:
    """The last of twenty lookups."""
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


def _typical(operator: str, number: int, competitor: Callable[..., torch.Tensor]) -> Case:
    spec = all_specs()[operator]
    sample = spec.of_size("typical")[number]
    name, training = f"{operator} {sample.name}", bool(spec.differentiable)
    return Case(name, operator, sample.arguments, {"published": competitor}, training=training)


def shrunk(case: Case) -> Case:
    """A case with maps of at most 16 x 16 and 16 channels: to try the script on a CPU."""

    def small(argument: Any) -> Any:
        if isinstance(argument, list):
            return [small(a) for a in argument]
        if not isinstance(argument, Argument):
            return argument
        keep = case.operator == "fused_convolution"  # whose sizes depend on each other
        shape = argument.shape if keep else tuple(min(n, 576 if n == 576 else 16) for n in argument.shape)
        return replace(argument, shape=shape)

    arguments = {name: small(a) for name, a in case.arguments.items()}
    if case.operator == "window_spread":
        arguments |= {"latents": Argument((8, 16, 8, 16)), "windows": (4, 4)}
    return replace(case, arguments=arguments)


# ---- measuring -------------------------------------------------------------------------------------


def measure(
    case: Case, training: bool, backends: Sequence[str], ceilings: Mapping[str, float], device: str
) -> dict[str, Any]:
    """One row of the results: seconds of every contender, warm and cold, and what they come to."""
    spec = all_specs()[case.operator]
    arguments = case.make(device)
    function = lookups if case.operator == "correlation_lookup" else spec.function
    with gi_kernels.backend("reference"), torch.no_grad():
        expected = function(**arguments)
    moved = _bytes(spec, arguments, expected, training)
    flops = spec.flops(arguments | ({"levels": 4, "radius": 4} if "mode" in arguments else {}))
    contenders: dict[str, Callable[[], object]] = {}
    for backend in backends:
        contenders[backend] = _call(function, arguments, spec.differentiable, training, backend)
        _verify(function, arguments, backend, expected)
    del expected
    for name, competitor in case.competitors.items():
        contenders[name] = _call(competitor, arguments, spec.differentiable, training, "auto")
    times: dict[str, dict[str, float]] = {}
    refused: dict[str, str] = {}
    for name, call in contenders.items():
        try:
            times[name] = times_of(call, device)
            times[name]["peak"] = memory.peak_extra_bytes(call, device)
        except RuntimeError as error:
            if name in backends or _fatal(error):
                raise
            refused[name] = str(error)[-200:]  # a kernel of PyTorch's that serves no such call
    row: dict[str, Any] = {
        "case": case.name, "operator": case.operator, "training": training, "bytes": moved,
        "flops": flops * (3 if training else 1), "target": case.target, "wanted": case.wanted[training],
        "numbers": max(t.numel() for t in tensors(arguments).values()),
        "copy": copy_seconds(moved, device), "seconds": times, "refused": refused,
    }  # fmt: skip
    return row | _judged(case, training, row, backends, ceilings)


def _judged(
    case: Case,
    training: bool,
    row: Mapping[str, Any],
    backends: Sequence[str],
    ceilings: Mapping[str, float],
) -> dict[str, Any]:
    """The fastest of our backends, and what it reaches of the target."""
    times = row["seconds"]
    if not backends:
        return {}
    backend = min(backends, key=lambda b: times[b]["cold"])
    best = times[backend]["cold"]
    faster = min((times[n]["cold"] for n in case.competitors if n in times), default=best) / best
    reached = row["bytes"] / best / ceilings["copy"] if case.target != "best" else faster
    meets = case.target == "none" or reached >= case.wanted[training]
    if not training and faster < case.least_faster:
        meets = False
    found = {"backend": backend, "reached": reached, "faster": faster}
    if case.most_memory is not None and case.most_memory[0] in times:
        name, share = case.most_memory
        found["memory"] = times[backend]["peak"] / max(times[name]["peak"], 1)
        meets = meets and found["memory"] <= share
    return found | {"meets": meets}


def _fatal(error: RuntimeError) -> bool:
    return "CUDA error" in str(error) and "out of memory" not in str(error)


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


def _bytes(spec: OperatorSpec, arguments: dict, value: torch.Tensor, training: bool) -> int:
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
    the call itself, and ``captured`` is 0, where it copies from the host and cannot be captured. The GPU
    is busy while they are launched, so that it need not wait for them.
    """
    call()
    call()
    eager = median(seconds(call, device) for _ in range(ROUNDS))
    if torch.device(device).type != "cuda":
        return {"warm": eager, "cold": eager, "eager": eager, "captured": 0}
    replay, captured = call, 0
    try:
        graph, kept = capture(call)
        replay, captured = graph.replay, 1  # type: ignore[assignment]
    except RuntimeError as error:
        if _fatal(error) and "captur" not in str(error):
            raise
    flush = torch.zeros(FLUSH_BYTES // 4, device=device)
    warm = median(_queued(replay, lambda: torch.cuda._sleep(AHEAD_CYCLES)) for _ in range(ROUNDS))
    cold = median(_queued(replay, flush.sum) for _ in range(ROUNDS))
    return {"warm": warm, "cold": cold, "eager": eager, "captured": captured}


def _queued(call: Callable[[], object], ahead: Callable[[], object]) -> float:
    """Seconds of a call that is launched while ``ahead`` is still running."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    ahead()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3  # milliseconds


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of a call, after calls that compile its kernels, and the results that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()
    return graph, result


def copy_seconds(moved: int, device: str) -> float:
    """Seconds of PyTorch's copy of as many bytes, read and written together, with a cold cache."""
    source = torch.empty(max(moved // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return times_of(lambda: target.copy_(source), device)["cold"]


def ceilings(device: str) -> dict[str, float]:
    """Bytes per second of a large copy, read and written; FLOP/s of a large bfloat16 product."""
    large = torch.device(device).type == "cuda"
    source = torch.ones((2**30 if large else 2**16) // 2, device=device)
    target = torch.empty_like(source)
    copied = median(seconds(lambda: target.copy_(source), device) for _ in range(ROUNDS))
    n = 8192 if large else 128
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, device=device, generator=generator).to(torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    multiplied = median(seconds(lambda: a @ b, device) for _ in range(ROUNDS))
    return {"copy": 2 * tensor_bytes(source) / copied, "product": 2 * n**3 / multiplied}


def step_row(
    batch: int, references: int, dtype: torch.dtype, against_compiled: bool, device: str
) -> dict[str, Any]:
    """A whole step of propagation against the published one, checked before it is timed."""
    from gi_model.testing.steps import Steps

    on_gpu = torch.device(device).type == "cuda"
    made = Steps(batch, references, *((256, device, 20) if on_gpu else (128, device, 1)))
    pair = made.whole(dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.no_grad():
        mine, theirs = pair.ours(), pair.published()
    error = largest_error(mine, theirs) / magnitude(theirs)
    assert error <= STEP_TOLERANCE[dtype], f"relative error {error:.3g}"
    if against_compiled:
        pair = replace(pair, published=made.whole(dtype, compiled=True).published)
    times = {}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):  # PyTorch's own setting
        for name, call in (("ours", pair.ours), ("published", pair.published)):
            call(), call()
            times[name] = median(seconds(call, device) for _ in range(7))
    faster = times["published"] / times["ours"]
    row = {"error": error, "seconds": times, "faster": faster}
    if (batch, references) == (1, 4):
        row |= {"wanted": STEP_WANTED[against_compiled], "meets": faster >= STEP_WANTED[against_compiled]}
    return {"step": row}


def compile_sample(operator: str, sample: str, dtype: torch.dtype, capability: int) -> int:
    """Compile what a sample launches, in the layouts of the contract, into Triton's cache; how many calls."""
    from gi_kernels.testing.ahead_of_time import build, launches
    from gi_kernels.testing.layouts import LAYOUTS

    spec = all_specs()[operator]
    (chosen,) = (s for s in spec.samples if s.name == sample)
    layouts = ("contiguous", "channels_last", "sliced") if chosen.size == "small" else ("channels_last",)
    count = 0
    for layout in layouts:
        for call in launches(spec, chosen, dtype, LAYOUTS[layout]):
            build(call, capability)
            count += 1
    return count


def device_name(device: str) -> str:
    """The device as a folder's name: ``h200``, ``h100-80gb-hbm3``."""
    if torch.device(device).type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name().lower().replace("nvidia", "").strip()
    return re.sub(r"[^a-z0-9]+", "-", name)
