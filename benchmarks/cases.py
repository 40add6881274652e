"""What is measured: every operator of the specs and every layer, and who competes in each case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

import gi_kernels
from gi_kernels import dispatch
from gi_kernels.spec import Argument, OperatorSpec, Sample, all_specs, tensor_bytes
from gi_kernels.testing import published
from gi_kernels.testing.calls import Outcome, cotangent, evaluate, map_tensors, oracle, tensors
from gi_kernels.testing.errors import cosine, largest_error, magnitude
from gi_kernels.testing.layouts import channels_last, contiguous

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: What eager PyTorch runs for the same arguments.
PUBLISHED: dict[str, Callable[..., torch.Tensor]] = {
    "complete_flow": published.published_complete_flow,
    "convex_upsample": published.published_convex_upsample,
    "correlation_lookup": published.published_correlation,
    "deformable_aggregation": published.published_deformable_aggregation,
    "flow_consistency": published.published_flow_consistency,
    "flow_warp": published.published_flow_warp,
    "fused_convolution": published.published_convolution,
    "global_attention": published.published_global_attention,
    "pixel_projection": published.published_pixel_projection,
    "projected_aggregation": published.published_projected_aggregation,
    "window_pool": published.published_window_pool,
    "window_query": published.published_window_query,
    "window_spread": published.published_window_spread,
}

#: Arguments that are maps of many channels: these take the layout of a case.
MAPS = {
    "convex_upsample": ("mask",),
    "deformable_aggregation": ("features", "keys", "values"),
    "flow_warp": ("input",),
    "fused_convolution": ("inputs", "addend"),
    "pixel_projection": ("input",),
    "projected_aggregation": ("features", "references"),
    "window_pool": ("logits", "features"),
    "window_query": ("features",),
    "window_spread": ("logits",),
}

#: Samples that the speed floors name besides those of the specs.
EXTRA = {
    "global_attention": tuple(
        Sample(
            f"two_references_b{B}",
            size,
            {
                "query": Argument((B, 8, 256, 64)),
                "keys": [Argument((B, 8, 256, 64))] * 3,
                "values": [Argument((B, 8, 256, 64))] * 3,
            },
        )
        for B, size in ((1, "typical"), (8, "large"))
    ),
}

#: Largest error of a result at low precision, in units of its dtype's epsilon times the largest
#: magnitude. The contract tests hold the exact rule; here a wrong kernel must not get a time.
LOW_PRECISION = 2.0
#: The same for a competitor, relative to the largest magnitude: it has to compute the same thing,
#: but is not ours to correct (its normalised grid rounds positions).
COMPETITOR = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Contender:
    """A function, its arguments, and what it is differentiated by."""

    function: Callable[..., torch.Tensor]
    arguments: Mapping[str, Any]
    differentiable: tuple[str, ...] = ()
    parameters: tuple[torch.Tensor, ...] = ()

    def forward(self) -> Callable[[], torch.Tensor]:
        """A call without a graph."""

        def call() -> torch.Tensor:
            with torch.no_grad():
                return self.function(**self.arguments)

        return call

    def training(self) -> Callable[[], tuple[torch.Tensor, ...]]:
        """A call forward and backward; the incoming gradient has the layout of the result."""
        leaves = list(self.parameters)

        def track(path: str, tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.detach()
            if path.split("/")[0] in self.differentiable:
                leaves.append(tensor.requires_grad_())
            return tensor

        arguments = map_tensors(track, self.arguments)
        value = self.function(**arguments)
        incoming = torch.empty_like(value).copy_(cotangent(value))
        del value
        return lambda: torch.autograd.grad(self.function(**arguments), leaves, incoming, allow_unused=True)


@dataclass(frozen=True)
class Contest:
    """Contenders by name (``ours`` among them), and how to tell that they are right."""

    contenders: dict[str, Contender]
    #: Raises AssertionError for a wrong result; returns the largest error of ours, relative.
    verify: Callable[[], float]
    #: Which backend serves our operator, and work and traffic of a forward pass, where they are known.
    backend: str | None = None
    flops: int | None = None
    bytes: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One line of the results. ``build`` draws the inputs only when the case is run."""

    suite: str
    name: str
    sample: str
    size: str
    dtype: str
    training: bool
    layout: str
    build: Callable[[Case, torch.device, bool], Contest]

    @property
    def id(self) -> str:
        """Names the case in results, floors and test ids."""
        step = "training" if self.training else "forward"
        return f"{self.name}-{self.sample}-{self.layout}-{self.dtype}-{step}"


def operator_cases() -> list[Case]:
    """Of every spec: the first small sample per kernel, all typical and large ones."""
    cases = []
    for spec in all_specs().values():
        small = {s.served_by: s for s in reversed(spec.of_size("small"))}
        samples = [*reversed(small.values()), *spec.of_size("typical"), *spec.of_size("large")]
        for sample in (*samples, *EXTRA.get(spec.name, ())):
            for layout in ("contiguous", "channels_last"):
                if layout == "channels_last" and (spec.name not in MAPS or sample.size != "typical"):
                    continue
                for dtype in DTYPES:
                    for training in (False, True)[: 1 + bool(spec.differentiable)]:
                        build = _Operator(spec, sample)
                        cases.append(
                            Case(
                                "operators",
                                spec.name,
                                sample.name,
                                sample.size,
                                dtype,
                                training,
                                layout,
                                build,
                            )
                        )
    return cases


def lookup_cases() -> list[Case]:
    """Lookups in volumes that exist, as in every iteration of a flow network but the first."""
    spec = all_specs()["correlation_lookup"]
    return [
        Case("operators", "lookup", s.name, s.size, dtype, training, "contiguous", _Lookup(spec, s))
        for s in (*spec.of_size("typical"), *spec.of_size("large"))
        if s.arguments["mode"] == "dense"
        for dtype in DTYPES
        for training in (False, True)
    ]


def pyramid_cases() -> list[Case]:
    """A correlation pyramid on demand whose stored volume would take a gibibyte."""
    return [
        Case("operators", "pyramid", "on_demand_128", "large", "float32", False, "contiguous", _on_demand_128)
    ]


def layer_cases() -> list[Case]:
    """The layers of ``gi_kernels.nn`` in three sizes, with the published layers' weights."""
    cases = []
    for layer in LAYERS:
        for sample in layer.samples:
            for layout in ("contiguous", "channels_last"):
                if layout == "channels_last" and (not layer.maps or sample.size != "typical"):
                    continue
                for dtype in DTYPES if layout == "contiguous" else ("float32",):
                    for training in (False, True):
                        build = _Layer(layer, sample)
                        cases.append(
                            Case(
                                "layers", layer.name, sample.name, sample.size, dtype, training, layout, build
                            )
                        )
    ready = next(layer for layer in LAYERS if layer.name == "DeformableAggregation")
    for sample in ready.samples:
        if sample.size == "typical":
            cases += [
                Case(
                    "layers",
                    "aggregate",
                    sample.name,
                    sample.size,
                    d,
                    False,
                    "contiguous",
                    _Ready(ready, sample),
                )
                for d in DTYPES
            ]
    return cases


# Operators


@dataclass(frozen=True)
class _Operator:
    spec: OperatorSpec
    sample: Sample

    def __call__(self, case: Case, device: torch.device, compiled: bool) -> Contest:
        name, dtype = self.spec.name, DTYPES[case.dtype]
        plain = _arguments(self.sample, dtype, device)
        arrange, maps = _LAYOUTS[case.layout], MAPS.get(name, ())
        ours = map_tensors(lambda path, t: arrange(t) if path.split("/")[0] in maps else t, plain)
        differentiable = self.spec.differentiable
        contenders = {
            "ours": Contender(self.spec.function, ours, differentiable),
            "published": Contender(PUBLISHED[name], plain, differentiable),
        }
        if compiled:
            torch.compiler.reset()
            contenders["compiled"] = Contender(torch.compile(PUBLISHED[name]), plain, differentiable)
        contenders |= _nearest(name, ours, case.training)

        def verify() -> float:
            gradients = case.training and case.size == "small"
            exact = _oracle(name, self.sample.name, device.type, gradients)
            others = case.size != "large" and not case.training
            return _verify(self.spec, self.sample, dtype, contenders, exact, gradients, others)

        return Contest(
            contenders,
            verify,
            dispatch.explain(self.sample.served_by or name, *tensors(ours).values()).chosen,
            self.spec.flops(ours),
            self.spec.bytes(ours),
        )


def _arguments(sample: Sample, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The sample's arguments; storage is drawn in bfloat16 for all dtypes, so one oracle serves all."""
    coarse = _drawn(_Identity(sample), device.type)
    return map_tensors(lambda _, t: t.to(dtype) if t.dtype == torch.bfloat16 else t, coarse)


@dataclass(frozen=True)
class _Identity:
    """A sample as a key: samples hold dictionaries and have no hash."""

    sample: Sample

    def __hash__(self) -> int:
        return hash((self.sample.name, self.sample.size))


@lru_cache(maxsize=1)  # cases of one sample follow each other; large ones take long to draw
def _drawn(key: _Identity, device: str) -> dict[str, Any]:
    return key.sample.make(torch.bfloat16, device)


@lru_cache(maxsize=2)
def _oracle(name: str, sample_name: str, device: str, gradients: bool) -> Outcome:
    spec = all_specs()[name]
    arguments = _arguments(_sample_of(spec, sample_name), torch.float32, torch.device(device))
    return oracle(spec, arguments, torch.float32, spec.differentiable if gradients else ())


def _verify(
    spec: OperatorSpec,
    sample: Sample,
    dtype: torch.dtype,
    contenders: Mapping[str, Contender],
    exact: Outcome,
    gradients: bool,
    others: bool,
) -> float:
    """Check our value and gradients, and the values of the others that compute the same."""
    ours = contenders["ours"]
    found = evaluate(ours.function, ours.arguments, ours.differentiable if gradients else ())
    wanted, worst = dict(exact.items()), 0.0
    for what, tensor in found.items():
        if dtype != torch.float32 and what != "value":
            similarity = cosine(tensor, wanted[what])
            assert similarity > 0.999, f"ours: {what}: cosine {similarity:.5f} with the float64 gradient"
            continue
        error = largest_error(tensor, wanted[what]) / magnitude(wanted[what])
        if tensor.dtype == torch.float32:
            allowed = sample.condition * spec.tolerance[torch.float32]
        else:
            allowed = LOW_PRECISION * torch.finfo(tensor.dtype).eps
        if error > allowed:  # large samples with long flows are worse conditioned than the tests' small ones
            device = tensor.device.type
            allowed = 2 * _float32_error(spec.name, sample.name, device, what, gradients)
        assert error <= allowed, f"ours: {what}: relative error {error:.3g}, allowed {allowed:.3g}"
        worst = max(worst, error)
    for who, contender in contenders.items():
        if others and who not in ("ours", "copy", "clone"):
            value = evaluate(contender.function, contender.arguments).value
            error, allowed = largest_error(value, exact.value) / magnitude(exact.value), COMPETITOR[dtype]
            assert error <= allowed * sample.condition, f"{who}: relative error {error:.3g}"
    return worst


@lru_cache(maxsize=16)
def _float32_error(name: str, sample_name: str, device: str, what: str, gradients: bool) -> float:
    """Relative error of the definition itself, run in eager float32 on the same numbers."""
    spec = all_specs()[name]
    arguments = _arguments(_sample_of(spec, sample_name), torch.float32, torch.device(device))
    raw = dict(evaluate(spec.reference, arguments, spec.differentiable if gradients else ()).items())
    wanted = dict(_oracle(name, sample_name, device, gradients).items())[what]
    return largest_error(raw[what], wanted) / magnitude(wanted)


def _sample_of(spec: OperatorSpec, name: str) -> Sample:
    return next(s for s in (*spec.samples, *EXTRA.get(spec.name, ())) if s.name == name)


def _nearest(name: str, arguments: Mapping[str, Any], training: bool) -> dict[str, Contender]:
    """PyTorch's own function that comes closest, with as much prepared as it leaves to its caller."""
    if name == "flow_warp":
        input = arguments["input"]
        grid = published.warp_grid(arguments["flow"], *input.shape[2:])
        ready = {"input": input, "grid": grid}
        found = {"nearest": Contender(published.grid_sample, ready, ("input", "grid"))}
        if not training:
            target = torch.empty_like(input).copy_(input)
            found["copy"] = Contender(lambda input: target.copy_(input), {"input": input})
            found["clone"] = Contender(torch.clone, {"input": input})
        return found
    if name == "global_attention":
        return {"nearest": Contender(_joined_attention, arguments, ("query", "keys", "values"))}
    return {}


def _joined_attention(
    query: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, torch.cat(list(keys), 2), torch.cat(list(values), 2))


_LAYOUTS = {"contiguous": contiguous, "channels_last": channels_last}


@dataclass(frozen=True)
class _Lookup:
    spec: OperatorSpec
    sample: Sample

    def __call__(self, case: Case, device: torch.device, compiled: bool) -> Contest:
        a = _arguments(self.sample, DTYPES[case.dtype], device)
        radius, levels = a["radius"], a["levels"]
        pyramid = gi_kernels.CorrelationPyramid(a["features1"], a["features2"], levels, radius, "dense")
        theirs = published.published_volume_pyramid(a["features1"], a["features2"], levels)

        def ours(volumes: Sequence[torch.Tensor], coords: torch.Tensor) -> torch.Tensor:
            pyramid.pyramid = volumes
            return pyramid.lookup(coords)

        def published_lookup(volumes: Sequence[torch.Tensor], coords: torch.Tensor) -> torch.Tensor:
            return published.published_correlation_lookup(volumes, coords, radius)

        # As published the coordinates are detached before each lookup: only the volumes have gradients.
        volumes = ("volumes",)
        contenders = {
            "ours": Contender(ours, {"volumes": list(pyramid.pyramid), "coords": a["coords"]}, volumes),
            "published": Contender(published_lookup, {"volumes": theirs, "coords": a["coords"]}, volumes),
        }
        if compiled:
            torch.compiler.reset()
            arguments = contenders["published"].arguments
            contenders["compiled"] = Contender(torch.compile(published_lookup), arguments, volumes)

        def verify() -> float:
            exact = _oracle(self.spec.name, self.sample.name, device.type, False)
            dtype = DTYPES[case.dtype]
            return _verify(self.spec, self.sample, dtype, contenders, exact, False, not case.training)

        moved = tensor_bytes(a["coords"]) + a["coords"][:, :1].numel() * levels * (
            ((2 * radius + 2) ** 2 + (2 * radius + 1) ** 2) * a["features1"].element_size()
        )
        chosen = dispatch.explain("correlation_lookup", *pyramid.pyramid, a["coords"]).chosen
        work = a["coords"][:, :1].numel() * levels * (2 * radius + 1) ** 2 * 7
        return Contest(contenders, verify, chosen, work, moved)


def _on_demand_128(case: Case, device: torch.device, compiled: bool) -> Contest:
    shape, size = (1, 256, 128, 128), (1, 2, 128, 128)
    sample = Sample(
        case.sample,
        "large",
        {
            "features1": Argument(shape),
            "features2": Argument(shape),
            "coords": Argument(size, 3.0, "coordinates", storage=False),
        },
    )
    a = _arguments(sample, torch.float32, device)

    def ours(features1: torch.Tensor, features2: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
        return gi_kernels.CorrelationPyramid(features1, features2, mode="on_demand").lookup(coords)

    def verify() -> float:
        """Two rows of pixels against the definition, whose volume would not fit for all of them."""
        spec, rows = all_specs()["correlation_lookup"], slice(63, 65)
        part = {"features2": a["features2"], "levels": 4, "radius": 4, "mode": "dense"}
        part |= {k: a[k][:, :, rows] for k in ("features1", "coords")}
        exact = oracle(spec, {k: part[k] for k in spec.samples[0].arguments}, torch.float32, ()).value
        error = largest_error(ours(**a)[:, :, rows], exact) / magnitude(exact)
        assert error <= spec.tolerance[torch.float32], f"relative error {error:.3g}"
        return error

    chosen = dispatch.explain("correlation_lookup_on_demand", *a.values()).chosen
    volume = 128**4 * a["features1"].element_size()
    return Contest({"ours": Contender(ours, a)}, verify, chosen, notes={"dense_volume_bytes": volume})


# Layers


@dataclass(frozen=True)
class Layer:
    """A layer's samples; ``build`` makes ours or the published one from a module and a sample."""

    name: str
    samples: tuple[Sample, ...]
    build: Callable[[Any, Sample], torch.nn.Module]
    #: Inputs with gradients. Flows have none: the flow network is frozen.
    differentiable: tuple[str, ...]
    #: Inputs that take a case's layout.
    maps: tuple[str, ...] = ()


def _deformable(name: str, size: Any, shape: tuple[int, ...], flow: tuple[int, int], scale: float) -> Sample:
    B, T, C, H, W = shape
    return Sample(
        name,
        size,
        {
            "features": Argument((B, C, H, W)),
            "references": Argument((B, T, C, H, W)),
            "flows": Argument((B, T, 2, *flow), scale, storage=False),
            "errors": Argument((B, T, 1, *flow), 1.0, "uniform", storage=False),
        },
    )


def _attention(name: str, size: Any, batch: int, latents: int, dim: int, segments: int) -> Sample:
    pair = [Argument((batch, 8, latents, dim // 8))] * 2
    return Sample(name, size, {"x": Argument((batch, latents, dim)), "extra": [pair] * segments})


def _windows(name: str, size: Any, batch: int, dim: int, latents: int, map: tuple[int, int]) -> Sample:
    arguments = {"latents": Argument((batch, latents, dim)), "features": Argument((batch, dim, *map))}
    return Sample(name, size, arguments)


_WINDOWS = (
    _windows("square_64", "small", 2, 64, 16, (16, 16)),
    _windows("square_512", "typical", 1, 512, 256, (64, 64)),
    _windows("480p_512", "large", 1, 512, 256, (60, 107)),
)

LAYERS = (
    Layer(
        "DeformableAggregation",
        (
            _deformable("square_32", "small", (1, 2, 32, 16, 16), (64, 64), 8.0),
            _deformable("square_512", "typical", (1, 4, 512, 64, 64), (512, 512), 32.0),
            _deformable("480p_512", "large", (1, 4, 512, 60, 107), (480, 856), 32.0),
        ),
        lambda module, s: module(s.arguments["features"].shape[1]),
        ("features", "references"),
        ("features", "references"),
    ),
    Layer(
        "LatentAttention",
        (
            _attention("two_references_n16", "small", 1, 16, 64, 2),
            _attention("two_references_b1", "typical", 1, 256, 512, 2),
            _attention("four_references_b1", "typical", 1, 256, 512, 4),
            _attention("two_references_b8", "large", 8, 256, 512, 2),
            _attention("four_references_b8", "large", 8, 256, 512, 4),
        ),
        lambda module, s: module(s.arguments["x"].shape[2], 8),
        ("x", "extra"),
    ),
    Layer(
        "WindowRead",
        _WINDOWS,
        lambda module, s: module(s.arguments["latents"].shape[2], 8, s.arguments["latents"].shape[1]),
        ("latents", "features"),
        ("features",),
    ),
    Layer(
        "WindowWrite",
        _WINDOWS,
        lambda module, s: module(s.arguments["latents"].shape[2], 8, s.arguments["latents"].shape[1]),
        ("features", "latents"),
        ("features",),
    ),
)


@dataclass(frozen=True, eq=False)
class _Layer:
    layer: Layer
    sample: Sample

    def __call__(self, case: Case, device: torch.device, compiled: bool) -> Contest:
        plain = _arguments(self.sample, DTYPES[case.dtype], device)
        ours = {k: _LAYOUTS[case.layout](v) if k in self.layer.maps else v for k, v in plain.items()}
        mine, theirs = self.modules(DTYPES[case.dtype], case.training, device)

        def contender(module: torch.nn.Module, arguments: Mapping[str, Any]) -> Contender:
            parameters = tuple(p for _, p in sorted(module.named_parameters()))
            return Contender(module, arguments, self.layer.differentiable, parameters)

        contenders = {"ours": contender(mine, ours), "published": contender(theirs, plain)}
        if compiled:
            torch.compiler.reset()
            contenders["compiled"] = replace(contenders["published"], function=torch.compile(theirs))
        return Contest(contenders, lambda: self.verify(case, contenders, device))

    def modules(
        self, dtype: torch.dtype, training: bool, device: torch.device
    ) -> tuple[torch.nn.Module, torch.nn.Module]:
        """Ours and the published layer with the same weights, rounded to bfloat16 in every dtype."""
        from gi_kernels import nn

        torch.manual_seed(0)
        theirs = self.layer.build(getattr(published, f"Published{self.layer.name}"), self.sample)
        theirs = theirs.bfloat16().float()
        mine = self.layer.build(getattr(nn, self.layer.name), self.sample)
        mine.load_state_dict(theirs.state_dict())
        made = tuple(m.to(device, dtype).train(training) for m in (mine, theirs))
        return made[0], made[1]

    @lru_cache(maxsize=2)  # noqa: B019 - lives as long as the cases
    def exact(self, training: bool, device: str) -> torch.Tensor:
        """The published layer in float64; weights and inputs are the same numbers in every dtype."""
        theirs = self.modules(torch.float64, training, torch.device(device))[1]
        plain = _arguments(self.sample, torch.float32, torch.device(device))
        with torch.no_grad():
            return theirs(**map_tensors(lambda _, t: t.double(), plain))

    def verify(self, case: Case, contenders: Mapping[str, Contender], device: torch.device) -> float:
        """Our value against the published layer's in float64."""
        exact = self.exact(case.training, device.type)
        ours = contenders["ours"]
        with torch.no_grad():
            value = ours.function(**ours.arguments)
        error = largest_error(value, exact) / magnitude(exact)
        # Flows are sampled from a normalised grid there, in float32.
        allowed = 1e-3 if value.dtype == torch.float32 else 4 * torch.finfo(value.dtype).eps
        assert error <= allowed, f"ours: relative error {error:.3g}, allowed {allowed:.3g}"
        return error


@dataclass(frozen=True)
class _Ready:
    """Aggregation from projections that exist (they serve every target) against the whole layer."""

    layer: Layer
    sample: Sample

    def __call__(self, case: Case, device: torch.device, compiled: bool) -> Contest:
        whole = _Layer(self.layer, self.sample)
        contest = whole(case, device, compiled)
        a = contest.contenders["ours"].arguments
        mine: Any = contest.contenders["ours"].function
        with torch.no_grad():
            keys, values = mine.project(a["references"])
        ready = {
            "features": channels_last(a["features"]),
            "keys": keys,
            "values": values,
            "flows": a["flows"],
            "errors": a["errors"],
        }
        contenders = contest.contenders | {"ours": Contender(mine.aggregate, ready)}
        return Contest(contenders, lambda: whole.verify(case, contenders, device))
