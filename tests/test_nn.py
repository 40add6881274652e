"""The layers against plain formulations of what they compute, written here step by step.

The plain formulations keep to the published order of work: sample, concatenate, project; project every
pixel, then pool; spread, then norm and project with the layer's own modules. They run in float64.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gi_kernels
from gi_kernels import nn

BACKENDS = gi_kernels.available_backends("deformable_aggregation")
EXACT = 1e-10  # float64, relative to the largest magnitude
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with gi_kernels.backend(request.param):
        yield request.param


# Plain formulations: (layer, inputs) -> output


def plain_aggregation(layer, features, references, flows, errors):
    """softmax over references of q([source, error, target]) times v([source, error])."""
    B, T, C, H, W = references.shape
    source = plain_warp(references.flatten(0, 1), flows.flatten(0, 1).to(references.dtype))
    error = F.interpolate(
        errors.flatten(0, 1).to(references.dtype), (H, W), mode="bilinear", align_corners=True
    )
    target = features[:, None].expand(-1, T, -1, -1, -1).flatten(0, 1)
    logits = layer.q(torch.cat([source, error, target], dim=1)).unflatten(0, (B, T))
    content = layer.v(torch.cat([source, error], dim=1)).unflatten(0, (B, T))
    return features + (logits.softmax(dim=1) * content).sum(dim=1)


def plain_warp(x, flow):
    H, W = x.shape[2:]
    scale = flow.new_tensor([W / flow.shape[3], H / flow.shape[2]])[:, None, None]
    flow = F.interpolate(flow, (H, W), mode="bilinear", align_corners=True) * scale
    rows, columns = torch.meshgrid(
        torch.arange(H, dtype=flow.dtype), torch.arange(W, dtype=flow.dtype), indexing="ij"
    )
    extent = flow.new_tensor([max(W - 1, 1), max(H - 1, 1)])
    grid = 2 * (torch.stack([columns, rows]) + flow).permute(0, 2, 3, 1) / extent - 1
    return F.grid_sample(x, grid, align_corners=True)


def plain_attention(layer, x, *extra):
    """Softmax attention over the concatenation, ``extra`` being keys and values in turn."""
    heads, h = layer.heads, layer.attn.layernorm1(x)
    query, key, value = (
        module(h).unflatten(2, (heads, -1)).transpose(1, 2)
        for module in (layer.attn.query, layer.attn.key, layer.attn.value)
    )
    key, value = torch.cat([key, *extra[::2]], dim=2), torch.cat([value, *extra[1::2]], dim=2)
    weights = (query @ key.transpose(2, 3) / math.sqrt(query.shape[3])).softmax(dim=3)
    x = x + layer.projection((weights @ value).transpose(1, 2).flatten(2))
    return x + layer.mlp(layer.ln_premlp(x))


def plain_read(layer, latents, features):
    """Values of every pixel, pooled per window and head."""
    logits, values = (to_grid(m(features), layer.side) for m in (layer.to_logits, layer.to_values))
    values = values.unflatten(1, (layer.heads, -1))  # [B,h,c,i,y,j,x]: window (i, j), pixel (y, x)
    weights = logits.transpose(3, 4).flatten(4).softmax(dim=4)  # [B,h,i,j,yx]
    read = torch.einsum("bhijp,bhcijp->bijhc", weights, values.transpose(4, 5).flatten(5))
    latents = latents + layer.projection(layer.ln1(read.flatten(3).flatten(1, 2)))
    return latents + layer.mlp(layer.ln2(latents))


def plain_write(layer, features, latents):
    """The gated map of every pixel, then the layer's own batch norms and convolutions."""
    gates = to_grid(layer.to_logits(features), layer.side).sigmoid()  # [B,h,i,y,j,x]
    values = layer.to_values(latents).unflatten(2, (layer.heads, -1)).unflatten(1, (layer.side, -1))
    spread = torch.einsum("bhiyjx,bijhc->bhciyjx", gates, values)
    spread = spread.flatten(5).flatten(3, 4).flatten(1, 2)
    if spread.shape != features.shape:
        spread = F.interpolate(spread, features.shape[2:], mode="bilinear", align_corners=True)
    features = features + layer.projection(layer.ln1(spread))
    return features + layer.mlp.dense2(F.gelu(layer.mlp.dense1(layer.ln2(features))))


def to_grid(maps, side):
    """[B,C,H,W] -> [B,C,side,y,side,x], resized to a multiple of ``side`` of at least ``side``."""
    H, W = (side * max(1, round(n / side)) for n in maps.shape[2:])
    if maps.shape[2:] != (H, W):
        maps = F.interpolate(maps, (H, W), mode="bilinear", align_corners=True)
    return maps.unflatten(3, (side, -1)).unflatten(2, (side, -1))


# Cases


@dataclass(frozen=True)
class LayerCase:
    """A layer, its inputs by shape, the plain formulation, and what is done to the layer first."""

    name: str
    build: Callable[[], torch.nn.Module]
    plain: Callable[..., torch.Tensor]
    shapes: Sequence[tuple[int, ...]]
    prepare: Callable[[Any], object] = lambda layer: None
    scale: Sequence[float] = ()

    def make(self, dtype=torch.float64, seed=0):
        """The layer with all parameters and statistics random, and its inputs."""
        torch.manual_seed(seed)
        layer = self.build()
        with torch.no_grad():
            for key, value in [*layer.named_parameters(), *layer.named_buffers()]:
                if key.endswith("running_var"):
                    value.uniform_(0.5, 2)
                elif value.is_floating_point() and value.dim() == 1:
                    value.add_(torch.randn_like(value) * 0.3)
        self.prepare(layer)
        scale = [*self.scale, *[1.0] * (len(self.shapes) - len(self.scale))]
        inputs = [torch.randn(s) * factor for s, factor in zip(self.shapes, scale, strict=True)]
        # Flows and errors keep their dtype: they are float32 beside features of low precision.
        inputs = [x if self.is_map(i) and dtype.itemsize < 4 else x.to(dtype) for i, x in enumerate(inputs)]
        return layer.to(dtype), inputs

    def is_map(self, position):
        """Whether an input is a flow or an error."""
        return self.plain is plain_aggregation and position >= 2

    def call(self, layer, inputs):
        """Ours, with the signature that the layer has."""
        if self.plain is not plain_attention:
            return layer(*inputs)
        x, *extra = inputs
        return layer(x, list(zip(extra[::2], extra[1::2], strict=True)) or None)


def aggregation(name, B, T, C, size, flow, magnitude):
    shapes = [(B, C, *size), (B, T, C, *size), (B, T, 2, *flow), (B, T, 1, *flow)]
    build = lambda: nn.DeformableAggregation(C)  # noqa: E731
    return LayerCase(f"aggregation_{name}", build, plain_aggregation, shapes, scale=(1, 1, magnitude))


def attention(name, B, N, dim, heads, *lengths):
    shapes = [(B, N, dim)] + [(B, heads, M, dim // heads) for M in lengths for _ in "kv"]
    return LayerCase(f"attention_{name}", lambda: nn.LatentAttention(dim, heads), plain_attention, shapes)


def windows(kind, name, B, dim, heads, side, size, prepare=lambda layer: None):
    shapes = [(B, side**2, dim), (B, dim, *size)]
    if kind == "read":
        build = lambda: nn.WindowRead(dim, heads, side**2)  # noqa: E731
        return LayerCase(f"read_{name}", build, plain_read, shapes, prepare)
    build = lambda: nn.WindowWrite(dim, heads, side**2)  # noqa: E731
    return LayerCase(f"write_{name}", build, plain_write, shapes[::-1], prepare)


def norms(**attributes):
    """Set attributes of both batch norms of a write."""

    def prepare(layer):
        for norm in (layer.ln1, layer.ln2):
            for key, value in attributes.items():
                setattr(norm, key, value)

    return prepare


def replace_norms(make):
    """Other norms instead of both batch norms of a write."""

    def prepare(layer):
        for name in ("ln1", "ln2"):
            setattr(layer, name, make(layer.to_values.in_features))

    return prepare


class OtherBatchNorm(torch.nn.BatchNorm2d):
    """A kind of batch norm that the layer does not know."""

    def forward(self, x):
        return super().forward(x) * 2


def freeze_norms(layer):
    """Batch norms that stay in eval mode while the layer trains."""
    for norm in (layer.ln1, layer.ln2):
        norm.eval().train = lambda mode=True: None


def offset_values(layer):
    """A mean of r far above its deviation."""
    layer.to_values.bias.data += 100


AGGREGATION = [
    aggregation("resized", 2, 3, 6, (7, 9), (14, 18), 4),
    aggregation("same", 1, 2, 5, (6, 4), (6, 4), 2),
    aggregation("one_reference", 2, 1, 4, (5, 6), (10, 9), 3),
    aggregation("far", 1, 4, 3, (5, 5), (20, 20), 60),
]
ATTENTION = [
    attention("alone", 2, 9, 12, 3),
    attention("one_segment", 2, 9, 12, 3, 7),
    attention("three_segments", 1, 5, 16, 4, 5, 1, 8),
    attention("one_latent", 3, 1, 8, 1, 4),
]
SIZES = {"even": (12, 8), "odd": (11, 14), "tiny": (1, 3), "half_up": (6, 10), "one_window": (5, 7)}
READ = [windows("read", n, 2, 8, 4, 1 if n == "one_window" else 4, s) for n, s in SIZES.items()]
WRITE = [windows("write", n, 2, 8, 4, 1 if n == "one_window" else 4, s) for n, s in SIZES.items()]
VARIANTS = [
    windows("write", f"{name}_{size}", 2, 8, 2, 4, SIZES[size], prepare)
    for size in ("even", "odd")
    for name, prepare in {
        "momentum": norms(momentum=0.3),
        "cumulative": norms(momentum=None),
        "eps": norms(eps=0.1),
        "frozen": freeze_norms,
        "offset": offset_values,
        "untracked": replace_norms(lambda dim: torch.nn.BatchNorm2d(dim, track_running_stats=False)),
        "not_affine": replace_norms(lambda dim: torch.nn.BatchNorm2d(dim, affine=False)),
        "group_norm": replace_norms(lambda dim: torch.nn.GroupNorm(2, dim)),
        "identity": replace_norms(lambda dim: torch.nn.Identity()),
        "other_norm": replace_norms(OtherBatchNorm),
    }.items()
]
ONE = [windows(kind, "single", 1, 4, 2, 2, (4, 6)) for kind in ("read", "write")]
ALL = [*AGGREGATION, *ATTENTION, *READ, *WRITE, *ONE]
TYPICAL = [AGGREGATION[0], ATTENTION[2], READ[0], READ[1], WRITE[0], WRITE[1]]


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name)


def results(run, layer, inputs, cotangent=None):
    """Value, all gradients and running statistics by name; None where there is no gradient."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    value = run(layer, inputs)
    if cotangent is None:
        cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(9)).to(value.dtype)
    named = {f"grad {i}": x for i, x in enumerate(inputs)}
    named |= {f"grad {key}": p for key, p in layer.named_parameters()}
    gradients = torch.autograd.grad(value, list(named.values()), cotangent, allow_unused=True)
    found = {"value": value.detach(), **dict(zip(named, gradients, strict=True))}
    return found | {key: b.clone() for key, b in layer.named_buffers()}


def assert_close(actual, expected, tolerance, smallest=0.1):
    """Largest errors relative to the largest magnitude; absolute below ``smallest``: gradients cancel."""
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        got = actual[name]
        assert got is not None, f"{name}: no gradient"
        assert got.shape == wanted.shape, name
        if wanted.numel():
            error = (got.double() - wanted.double()).abs().max().item()
            scale = max(wanted.abs().max().item(), smallest)
            assert error <= tolerance * scale, f"{name}: error {error:.3g} at magnitude {scale:.3g}"


def plainly(case):
    return lambda layer, inputs: case.plain(layer, *inputs)


# Values, gradients, statistics


@each([*ALL, *VARIANTS])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equals_the_plain_formulation(case, training, backend):
    """Three steps, so that running statistics build on each other."""
    layer, inputs = case.make()
    layer.train(training)
    plain_layer = copy.deepcopy(layer)
    for step in range(3):
        inputs = [x * (1 + step) if not case.is_map(i) else x for i, x in enumerate(inputs)]
        expected = results(plainly(case), plain_layer, inputs)
        # Summing numbers around 50 in another order moves the last digits of their deviation.
        tolerance = 1e-7 if "offset" in case.name else EXACT
        assert_close(results(case.call, layer, inputs), expected, tolerance)


@each([*AGGREGATION[:2], *READ[:2], *WRITE[:2], *ONE])
@pytest.mark.parametrize("incoming", ["contiguous", "channels_last", "expanded", "odd_batch_stride"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "sliced"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, EXACT), (torch.float32, 3e-5)], ids=str)
def test_any_memory_layout(case, layout, incoming, dtype, tolerance):
    """Inputs and incoming gradients in every layout; the result has the layout of its features.

    Convolutions take other ways in PyTorch by dtype and number of threads.
    """
    layer, inputs = case.make(dtype)
    exact = copy.deepcopy(layer).double()

    def arrange(x, layout):
        if x.dim() == 5:
            return arrange(x.flatten(0, 1), layout).unflatten(0, x.shape[:2])
        if x.dim() != 4:
            return x
        if layout in LAYOUTS:
            return x.contiguous(memory_format=LAYOUTS[layout])
        if layout == "sliced":
            wide = torch.full((*x.shape[:2], x.shape[2] + 2, x.shape[3] * 2), torch.nan, dtype=x.dtype)
            wide[:, :, 1:-1, ::2] = x
            return wide[:, :, 1:-1, ::2]
        if layout == "expanded":
            return x[:, :, :1, :1].expand(x.shape)
        return x.contiguous(memory_format=torch.channels_last).as_strided(  # equal where the batch is one
            x.shape, (x[0].numel() if len(x) > 1 else 1, 1, x.shape[1] * x.shape[3], x.shape[1])
        )

    value = plainly(case)(copy.deepcopy(layer), inputs)
    cotangent = arrange(torch.randn_like(value), incoming)
    given = [arrange(x, layout) for x in inputs]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        actual = results(case.call, layer, given, cotangent)
    finally:
        torch.set_num_threads(threads)
    wide = [x.double() for x in inputs]
    assert_close(actual, results(plainly(case), exact, wide, cotangent.double()), tolerance)
    if value.dim() == 4 and layout in LAYOUTS:
        assert actual["value"].is_contiguous(memory_format=LAYOUTS[layout])


@each(ALL)
def test_float32(case, backend):
    """Single precision, against float64 of the same weights; the published layer does no better."""
    layer, inputs = case.make(torch.float32)
    exact_layer = copy.deepcopy(layer).double()
    expected = results(plainly(case), exact_layer, [x.double() for x in inputs])
    assert_close(results(case.call, layer, inputs), expected, 3e-5)


@each(TYPICAL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_low_precision(case, dtype, training):
    """Errors against float64: at most twice those of the plain formulation at the same dtype."""
    layer, inputs = case.make(dtype)
    layer.train(training)
    exact = copy.deepcopy(layer).double()
    raw = results(plainly(case), copy.deepcopy(layer), inputs)
    expected = results(plainly(case), exact, [x.double() for x in inputs])
    actual = results(case.call, layer, inputs)
    assert_as_good(actual, raw, expected)
    assert actual["value"].dtype == dtype


@each(TYPICAL)
def test_autocast(case):
    """The same under autocast, inputs and weights float32."""
    layer, inputs = case.make(torch.float32)
    exact = copy.deepcopy(layer).double()

    def cast(run):
        def under_autocast(layer, inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return run(layer, inputs)

        return under_autocast

    raw = results(cast(plainly(case)), copy.deepcopy(layer), inputs)
    expected = results(plainly(case), exact, [x.double() for x in inputs])
    assert_as_good(results(cast(case.call), layer, inputs), raw, expected)


def assert_as_good(actual, raw, expected):
    """The accuracy rule for low precision: largest and mean square error, direction of gradients."""
    for name, wanted in expected.items():
        got, eager = (x[name].double() for x in (actual, raw))
        dtype = actual[name].dtype
        if not dtype.is_floating_point:
            assert torch.equal(got, wanted.double()), name
            continue
        once = torch.finfo(dtype if dtype.itemsize == 2 else torch.bfloat16).eps * wanted.abs().max()
        assert (got - wanted).abs().max() <= 2 * (eager - wanted).abs().max() + once, name
        spread = lambda x, wanted=wanted: (x - wanted).square().mean().sqrt()  # noqa: E731
        assert spread(got) <= 2 * spread(eager) + once / 4, name
        if name.startswith("grad") and wanted.abs().max() > 1e-6:
            similarity = F.cosine_similarity(got.flatten(), wanted.flatten(), dim=0)
            theirs = F.cosine_similarity(eager.flatten(), wanted.flatten(), dim=0)
            # Where rounding of the inputs turns the gradient, ours may turn no further than theirs twice.
            assert 1 - similarity <= max(1e-3, 2 * (1 - theirs)), f"{name}: cosine {similarity:.6f}"


@each(WRITE[:2])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_synchronised_norms(case, training):
    """In training the norm itself is called, since its statistics span devices; in eval they are known."""
    layer, inputs = case.make()
    turned = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer)).train(training)
    calls = []
    turned.ln1.register_forward_hook(lambda *_: calls.append(1))
    actual = results(case.call, turned, inputs)
    assert_close(actual, results(plainly(case), layer.train(training), inputs), EXACT)
    assert len(calls) == training


def test_statistics_survive_a_mean_far_above_the_deviation():
    """In float32, r varies by 1e-3 around 50: its variance would drown in a float32 difference."""
    torch.manual_seed(0)
    layer = nn.WindowWrite(8, 2, 4)
    layer.to_values.weight.data *= 1e-3
    layer.to_values.bias.data += 100
    layer.to_logits.weight.data *= 1e-4
    plain_layer = copy.deepcopy(layer).double()
    features, latents = torch.randn(2, 8, 8, 8), torch.randn(2, 4, 8)
    layer(features, latents)
    plain_write(plain_layer, features.double(), latents.double())
    assert torch.allclose(layer.ln1.running_var.double(), plain_layer.ln1.running_var, rtol=1e-3, atol=0.0)
    fresh = 10 * (layer.ln1.running_var - 0.9)  # momentum 0.1 from a variance of one
    assert fresh.max() < 1e-3


# Zero gradients, kept projections, extra segments


def test_what_cancels_has_zero_gradients(backend):
    """Zero, not None, whatever the values: data-parallel training waits for every parameter."""
    layer, inputs = AGGREGATION[0].make(torch.float32)
    layer.q.bias.data[:] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1, 2, 3])
    layer.q.weight.data[:, layer.channels + 1 :] = torch.nan
    layer(*inputs).sum().backward()
    assert torch.equal(layer.q.bias.grad, torch.zeros_like(layer.q.bias))
    target = layer.q.weight.grad[:, layer.channels + 1 :]
    assert torch.equal(target, torch.zeros_like(target))
    assert layer.q.weight.grad[:, : layer.channels + 1].abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("cases_", [TYPICAL], ids=["typical"])
def test_every_parameter_gets_a_gradient(cases_):
    for case in cases_:
        layer, inputs = case.make(torch.float32)
        case.call(layer, inputs).sum().backward()
        assert all(p.grad is not None for p in layer.parameters()), case.name


@each(AGGREGATION)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_projections_can_be_kept(case, layout, backend):
    layer, (features, references, flows, errors) = case.make(torch.float32)
    shape = references.shape[:2]
    references = references.flatten(0, 1).contiguous(memory_format=LAYOUTS[layout]).unflatten(0, shape)
    keys, values = layer.project(references)
    for projected in (keys, values):
        assert projected.shape == references.shape
        assert projected.stride(2) == 1, "channels are contiguous in memory"
    kept = layer.aggregate(features, keys, values, flows, errors)
    assert torch.equal(kept, layer(features, references, flows, errors))
    assert torch.equal(kept, layer.aggregate(features, keys, values, flows, errors)), "used twice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_kept_projections_of_many_channels_are_the_same_numbers(dtype):
    torch.manual_seed(0)
    layer = nn.DeformableAggregation(300).to(dtype)
    features, references = torch.randn(1, 300, 5, 6, dtype=dtype), torch.randn(1, 3, 300, 5, 6, dtype=dtype)
    flows, errors = torch.randn(1, 3, 2, 5, 6, dtype=dtype), torch.rand(1, 3, 1, 5, 6, dtype=dtype)
    kept = layer.aggregate(features, *layer.project(references), flows, errors)
    assert torch.equal(kept, layer(features, references, flows, errors))


def test_references_are_projected_independently():
    layer, (features, references, flows, errors) = AGGREGATION[0].make()
    parts = [layer.project(references[:, t : t + 1]) for t in range(references.shape[1])]
    keys, values = (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
    expected = layer(features, references, flows, errors)
    assert_close(
        {"value": layer.aggregate(features, keys, values, flows, errors)}, {"value": expected}, EXACT
    )


def test_gradients_flow_through_kept_projections():
    """Two targets share one projection: its gradient is the sum of both."""
    layer, (features, references, flows, errors) = AGGREGATION[0].make()
    references.requires_grad_()
    kept = layer.project(references)
    shared = layer.aggregate(features, *kept, flows, errors) + layer.aggregate(
        -features, *kept, -flows, errors
    )
    alone = layer(features, references, flows, errors) + layer(-features, references, -flows, errors)
    actual, expected = (
        torch.autograd.grad(x.square().sum(), [references, layer.q.weight, layer.v.weight])
        for x in (shared, alone)
    )
    for got, wanted in zip(actual, expected, strict=True):
        assert_close({"grad": got}, {"grad": wanted}, EXACT)


def test_extra_as_pair_and_as_sequence(backend):
    layer, (x, *extra) = attention("", 2, 5, 8, 2, 6).make()
    keys, values = extra
    forms = {
        "tuple": (keys, values),
        "list": [keys, values],
        "one pair": [(keys, values)],
        "pair of lists": [[keys, values]],
        "two pairs": ((keys[:, :, :2], values[:, :, :2]), (keys[:, :, 2:], values[:, :, 2:])),
        "with an empty segment": [(keys, values), (keys[:, :, :0], values[:, :, :0])],
    }
    expected = plain_attention(layer, x, keys, values)
    for name, form in forms.items():
        assert_close({name: layer(x, form)}, {name: expected}, EXACT)
    alone = plain_attention(layer, x)
    assert_close({"none": layer(x)}, {"none": alone}, EXACT)
    assert_close({"empty": layer(x, [])}, {"empty": alone}, EXACT)


def test_return_kv(backend):
    """A layer returns its own keys and values, and gradients pass through them."""
    layer, (target, keys, values) = attention("", 2, 5, 8, 2, 6).make()
    reference = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    out, own = layer(reference, (keys, values), return_kv=True)
    assert isinstance(own, tuple)
    h = layer.attn.layernorm1(reference)
    for got, module in zip(own, (layer.attn.key, layer.attn.value), strict=True):
        wanted = module(h).view(2, 7, 2, 4).permute(0, 2, 1, 3)
        assert_close({"own": got}, {"own": wanted}, EXACT)
    assert_close({"out": out}, {"out": layer(reference, (keys, values))}, EXACT)
    crossed = layer(target, own)
    assert_close({"out": crossed}, {"out": plain_attention(layer, target, *own)}, EXACT)
    (actual,) = torch.autograd.grad(crossed.square().sum(), reference, retain_graph=True)
    (expected,) = torch.autograd.grad(plain_attention(layer, target, *own).square().sum(), reference)
    assert_close({"grad": actual}, {"grad": expected}, EXACT)


@each([*READ, *WRITE])
def test_return_attention(case, backend):
    """Softmax or sigmoid of the logits at the grid's size; the result is the same."""
    layer, inputs = case.make()
    layer.eval()
    features = inputs[1 if case.plain is plain_read else 0]
    out, attention = layer(*inputs, return_attention=True)
    assert torch.equal(out, layer(*inputs))
    logits = to_grid(layer.to_logits(features), layer.side)
    if case.plain is plain_write:
        expected = logits.sigmoid()
    else:
        expected = logits.exp() / logits.exp().sum((3, 5), keepdim=True)
    assert_close({"attention": attention}, {"attention": expected.flatten(4).flatten(2, 3)}, EXACT)


@each(READ)
def test_a_read_pools_alike_by_queries_and_by_logits(case, backend):
    """The same numbers, and the same gradients but for the logits' bias."""
    layer, (_, features) = case.make()
    weight, bias = layer.to_logits.weight, layer.to_logits.bias
    sources = (features.requires_grad_(), weight, bias)
    found = {}

    def by_logits(features):
        size, windows = nn.grid_size(features, layer.side), (layer.side, layer.side)
        logits = nn.resize(layer.to_logits(features), size)
        return gi_kernels.window_pool(logits, nn.resize(features, size), windows)

    for way, pool in (("queries", layer._pool), ("logits", by_logits)):
        pooled = pool(features)
        gradients = torch.autograd.grad(pooled.sin().sum(), sources)
        found[way] = dict(zip(("features", "weight", "bias"), gradients, strict=True), pooled=pooled)
    assert torch.equal(found["queries"].pop("bias"), torch.zeros_like(bias))
    assert found["logits"].pop("bias").abs().max() < 1e-12
    assert_close(found["queries"], found["logits"], EXACT)


# Compilers, copies, checkpoints


@each(TYPICAL)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
def test_compiles_in_one_graph(case, training, mixed):
    """Forward and backward, equal to eager, running statistics included; no second graph."""
    layer, inputs = case.make(torch.float32)
    layer.train(training)
    other = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")

    def run(function):
        def under(layer, inputs):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                return function(layer, inputs)

        return under

    expected = results(run(case.call), other, inputs)
    tolerance = 2e-2 if mixed else 1e-5
    assert_close(results(run(compiled), layer, inputs), expected, tolerance)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_close(results(run(compiled), layer, inputs), results(run(case.call), other, inputs), tolerance)


@each([AGGREGATION[0], ATTENTION[2], READ[0], WRITE[0]])
def test_inductor(case):
    """The default compiler."""
    layer, inputs = case.make(torch.float32)
    torch._dynamo.reset()
    expected = results(case.call, copy.deepcopy(layer), inputs)
    compiled = torch.compile(case.call, fullgraph=True)
    assert_close(results(compiled, layer, inputs), expected, 1e-4)


@each([AGGREGATION[0], ATTENTION[2], READ[0], WRITE[0]])
def test_compiled_with_changing_sizes(case):
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager", dynamic=True)
    layer, inputs = case.make(torch.float32)
    for crop in (0, 4):
        smaller = [x[..., : x.shape[-1] - crop] if x.dim() >= 4 else x for x in inputs]
        if case.plain is plain_attention:
            smaller = [x[..., : x.shape[-2] - crop // 4, :] for x in inputs]
        expected = results(case.call, copy.deepcopy(layer), smaller)
        assert_close(results(compiled, copy.deepcopy(layer), smaller), expected, 1e-5)


@each(TYPICAL)
def test_copies_and_pickles(case):
    layer, inputs = case.make(torch.float32)
    layer.eval()
    expected = case.call(layer, inputs)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(case.call(twin, inputs), expected)
    fresh = case.build()
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(case.call(fresh.eval(), inputs), expected)


@each(TYPICAL)
def test_channels_last_weights(case):
    """``module.to(memory_format=...)`` also turns the weights of 1x1 convolutions."""
    layer, inputs = case.make()
    plain_layer = copy.deepcopy(layer)
    layer.to(memory_format=torch.channels_last)
    assert_close(results(case.call, layer, inputs), results(plainly(case), plain_layer, inputs), EXACT)


def published_table(kind, d, heads):
    """Names and shapes in the published checkpoints, for width ``d``."""
    linear = lambda name, i, o, conv: {  # noqa: E731
        f"{name}.weight": (o, i, 1, 1) if conv else (o, i),
        f"{name}.bias": (o,),
    }
    norm = lambda name: {f"{name}.weight": (d,), f"{name}.bias": (d,)}  # noqa: E731
    statistics = lambda name: {  # noqa: E731
        f"{name}.running_mean": (d,), f"{name}.running_var": (d,), f"{name}.num_batches_tracked": ()
    }  # fmt: skip
    if kind == "aggregation":
        return linear("q", 2 * d + 1, d, True) | linear("v", d + 1, d, True)
    mlp = lambda conv: linear("mlp.dense1", d, d, conv) | linear("mlp.dense2", d, d, conv)  # noqa: E731
    if kind == "attention":
        projections = [linear(f"attn.{name}", d, d, False) for name in ("query", "key", "value")]
        table = norm("attn.layernorm1") | norm("ln_premlp") | mlp(False) | linear("projection", d, d, False)
        return table | projections[0] | projections[1] | projections[2]
    write = kind == "write"
    table = norm("ln1") | norm("ln2") | mlp(write) | linear("to_logits", d, heads, True)
    table |= linear("to_values", d, d, not write) | linear("projection", d, d, write)
    return table | (statistics("ln1") | statistics("ln2") if write else {})


@pytest.mark.parametrize(
    "kind, layer",
    [
        ("aggregation", nn.DeformableAggregation(12)),
        ("attention", nn.LatentAttention(12, 3)),
        ("read", nn.WindowRead(12, 3, 4)),
        ("write", nn.WindowWrite(12, 3, 4)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_parameters_are_named_as_published(kind, layer):
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == published_table(kind, 12, 3)


# Faults


@each([AGGREGATION[0], ATTENTION[1], READ[0], WRITE[0]])
def test_an_empty_batch(case, backend):
    layer, inputs = case.make(torch.float32)
    layer.eval()
    found = results(case.call, layer, [x[:0] for x in inputs])
    assert found["value"].shape[0] == 0
    assert all(g is None or not g.any() for k, g in found.items() if k.startswith("grad"))


def test_training_needs_more_than_one_value_per_channel():
    layer = nn.WindowWrite(4, 2, 1).train()
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"features: expected more than one pixel"):
        layer(torch.randn(1, 4, 1, 1), torch.randn(1, 1, 4))
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: nn.DeformableAggregation(0), ValueError, "channels: expected at least 1, got 0"),
        (lambda: nn.DeformableAggregation(2.0), TypeError, "channels: expected an int, got float"),
        (lambda: nn.LatentAttention(10, 3), ValueError, "heads: expected a divisor of dim 10, got 3"),
        (lambda: nn.LatentAttention(8, 0), ValueError, "heads: expected at least 1, got 0"),
        (lambda: nn.WindowRead(8, 3, 4), ValueError, "heads: expected a divisor of dim 8, got 3"),
        (lambda: nn.WindowRead(8, 2, 12), ValueError, "num_latents: expected a square number, got 12"),
        (lambda: nn.WindowWrite(8, 2, 15), ValueError, "num_latents: expected a square number, got 15"),
        (lambda: nn.WindowWrite(8, 2, -4), ValueError, "num_latents: expected at least 1, got -4"),
        (lambda: nn.WindowWrite(0, 2, 4), ValueError, "dim: expected at least 1, got 0"),
    ],
)
def test_wrong_sizes_of_layers(build, error, message):
    with pytest.raises(error, match=message):
        build()


def wrong(case, position, change, error, message):
    return pytest.param(case, position, change, error, message, id=f"{case.name}: {message}")


@pytest.mark.parametrize(
    "case, position, change, error, message",
    [
        wrong(AGGREGATION[0], 0, lambda x: x[:, :5], ValueError, "features: expected size 6"),
        wrong(AGGREGATION[0], 0, lambda x: x[0], ValueError, "features: expected 4 dimensions"),
        wrong(AGGREGATION[0], 1, lambda x: x[:, :, :5], ValueError, "references: expected size 6"),
        wrong(AGGREGATION[0], 1, lambda x: x[..., 1:], ValueError, "references: expected size 9"),
        wrong(AGGREGATION[0], 1, lambda x: x.double(), TypeError, "references: expected dtype torch.float32"),
        wrong(AGGREGATION[0], 1, lambda x: x[:, :0], ValueError, "flows: expected size 0"),
        wrong(AGGREGATION[0], 2, lambda x: x[:, :2], ValueError, "flows: expected size 3"),
        wrong(AGGREGATION[0], 2, lambda x: x[:, :, :1], ValueError, "flows: expected size 2"),
        wrong(AGGREGATION[0], 2, lambda x: x.long(), TypeError, "flows: expected float32, float64"),
        wrong(AGGREGATION[0], 3, lambda x: x[1:], ValueError, "errors: expected size 2"),
        wrong(AGGREGATION[0], 3, lambda x: None, TypeError, "errors: expected a torch.Tensor, got NoneType"),
        wrong(ATTENTION[1], 0, lambda x: x[..., :8], ValueError, "x: expected size 12"),
        wrong(ATTENTION[1], 0, lambda x: x.long(), TypeError, "x: expected float32"),
        wrong(ATTENTION[1], 0, lambda x: x.half(), TypeError, "x: expected dtype torch.float32"),
        wrong(ATTENTION[1], 1, lambda x: x[:, :2], ValueError, r"extra\[0\] keys: expected size 3"),
        wrong(ATTENTION[1], 2, lambda x: x[:, :, 1:], ValueError, r"extra\[0\] values: expected size 7"),
        wrong(ATTENTION[1], 2, lambda x: x.double(), TypeError, r"extra\[0\] values: expected dtype"),
        wrong(READ[0], 0, lambda x: x[:, 1:], ValueError, "latents: expected size 16"),
        wrong(READ[0], 0, lambda x: x[:1], ValueError, "features: expected size 1"),
        wrong(READ[0], 1, lambda x: x[:, 1:], ValueError, "features: expected size 8"),
        wrong(READ[0], 1, lambda x: x[:, :, :0], ValueError, "features: expected a size of at least 1"),
        wrong(READ[0], 1, lambda x: x.bfloat16(), TypeError, "features: expected dtype torch.float32"),
        wrong(READ[0], 1, lambda x: x.to("meta"), ValueError, "features: expected a tensor on cpu"),
        wrong(WRITE[0], 0, lambda x: x[:, 1:], ValueError, "features: expected size 8"),
        wrong(WRITE[0], 0, lambda x: x[..., :0], ValueError, "features: expected a size of at least 1"),
        wrong(WRITE[0], 1, lambda x: x[..., 1:], ValueError, "latents: expected size 8"),
        wrong(WRITE[0], 1, lambda x: x[0], ValueError, "latents: expected 3 dimensions"),
    ],
)
def test_wrong_inputs(case, position, change, error, message):
    """Each is refused by name, before any work, and changes nothing."""
    layer, inputs = case.make(torch.float32)
    state = copy.deepcopy(layer.state_dict())
    inputs[position] = change(inputs[position])
    with pytest.raises(error, match=message):
        case.call(layer, inputs)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize(
    "extra, error, message",
    [
        (3, TypeError, "extra: expected a pair .* got int"),
        (torch.zeros(1, 2, 3, 4), TypeError, "extra: expected a pair .* got Tensor"),
        ([torch.zeros(1, 2, 3, 4)], TypeError, r"extra\[0\]: expected a pair \(keys, values\), got Tensor"),
        ([(torch.zeros(1, 2, 3, 4),)], TypeError, r"extra\[0\]: expected a pair"),
        ((torch.zeros(1, 2, 3, 4), None), TypeError, r"extra\[0\] values: expected a torch.Tensor"),
        ([(None, None)], TypeError, r"extra\[0\] keys: expected a torch.Tensor"),
    ],
)
def test_wrong_extra(extra, error, message):
    with pytest.raises(error, match=message):
        nn.LatentAttention(8, 2)(torch.zeros(1, 3, 8), extra)


def test_aggregate_names_what_is_wrong():
    layer, (features, references, flows, errors) = AGGREGATION[0].make(torch.float32)
    keys, values = layer.project(references)
    with pytest.raises(ValueError, match="references: expected 5 dimensions"):
        layer.project(references[0])
    with pytest.raises(ValueError, match="values: expected size 3 for dimension 1"):
        layer.aggregate(features, keys, values[:, :2], flows, errors)
    with pytest.raises(ValueError, match="keys: expected size 6 for dimension 2"):
        layer.aggregate(features, keys[:, :, :5], values, flows, errors)
    with pytest.raises(TypeError, match=r"keys: expected dtype torch\.float32"):
        layer.aggregate(features, keys.double(), values, flows, errors)
