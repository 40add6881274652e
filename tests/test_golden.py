"""The published implementation's numbers, through the layers and through the public functions."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gi_kernels
from gi_kernels import nn

FOLDER = Path(__file__).parent / "golden"
GOLDEN = load_file(FOLDER / "operators.safetensors")

_module = importlib.util.spec_from_file_location("golden_recipe", FOLDER / "recipe.py")
recipe = importlib.util.module_from_spec(_module)
_module.loader.exec_module(recipe)

BACKENDS = gi_kernels.available_backends("flow_warp")


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request):
    with gi_kernels.backend(request.param):
        yield request.param


#: Of larger parts than the layers: in test_generator.py.
LATER = ("ffc.small", "block_ffc.small", "block_conv.small", "latent.square", "latent.wide")

WARP = {
    "resized": ((2, 3, 9, 11), (2, 2, 18, 33), 6),
    "same": ((1, 5, 16, 12), (1, 2, 16, 12), 3),
    "far": ((1, 2, 8, 8), (1, 2, 64, 64), 200),
}
DEFORM = {
    "t2": (2, 2, 8, 10, 12, 40, 48, 6),
    "t4": (1, 4, 16, 8, 8, 64, 64, 12),
    "t1": (1, 1, 6, 7, 9, 14, 18, 3),
}
WINDOWS = {"even": (2, 16, 16, 16, 4), "odd": (1, 16, 17, 21, 2)}
ATTENTION = {"cross": (2, 16, 32, 32, 4), "self": (1, 9, 0, 24, 3)}
FILL = {"blob": (2, 40, 56), "empty": (1, 24, 24)}
TABLES = {
    "warp": WARP, "deform": DEFORM, "read": WINDOWS, "write": WINDOWS, "attn": ATTENTION, "fill": FILL
}  # fmt: skip


def test_no_case_is_left_out():
    stored = {key.rsplit(".grad_param", 1)[0].rsplit(".", 1)[0] for key in GOLDEN if "grad_param" not in key}
    tested = {f"{operator}.{case}" for operator, cases in TABLES.items() for case in cases}
    assert stored == tested | set(LATER)


@pytest.mark.parametrize("case", WARP)
def test_warp(case):
    input, flow, magnitude = WARP[case]
    name = f"warp/{case}"
    x = recipe.normal(f"{name}/input", *input).requires_grad_()
    f = (recipe.normal(f"{name}/flow", *flow) * magnitude).requires_grad_()
    out = gi_kernels.flow_warp(x, f)
    check_all(name, {"out": out} | gradients(out, name, {"input": x, "flow": f}))


@pytest.mark.parametrize("through", ["layer", "functions"])
@pytest.mark.parametrize("case", DEFORM)
def test_deformable_aggregation(case, through):
    B, T, C, H, W, h, w, magnitude = DEFORM[case]
    name = f"deform/{case}"
    layer = nn.DeformableAggregation(C)
    recipe.fill(layer, f"{name}/")
    inputs = {
        "x": recipe.normal(f"{name}/x", B, C, H, W),
        "srcs": recipe.normal(f"{name}/srcs", B, T, C, H, W),
        "flows": recipe.normal(f"{name}/flows", B, T, 2, h, w) * magnitude,
        "errs": recipe.uniform(f"{name}/errs", B, T, 1, h, w),
    }
    for tensor in inputs.values():
        tensor.requires_grad_()
    if through == "layer":
        out = layer(*inputs.values())
    else:
        out = gi_kernels.deformable_aggregation(
            inputs["x"],
            torch.einsum("oc,btchw->btohw", layer.q.weight[:, :C, 0, 0], inputs["srcs"]),
            torch.einsum("oc,btchw->btohw", layer.v.weight[:, :C, 0, 0], inputs["srcs"]),
            inputs["flows"],
            inputs["errs"],
            layer.q.weight[:, C, 0, 0] + 0 * layer.q.bias,
            layer.v.weight[:, C, 0, 0],
            layer.v.bias,
        )
    parameters = {f"param.{key}": value for key, value in layer.named_parameters()}
    found = gradients(out, name, inputs | parameters)
    check_all(name, {"out": out} | found)
    weight, bias = found["grad_param.q.weight"], found["grad_param.q.bias"]
    assert not weight[:, C + 1 :].any() and not bias.any(), "the target's term cancels exactly"


@pytest.mark.parametrize("through", ["layer", "functions"])
@pytest.mark.parametrize("case", WINDOWS)
def test_read(case, through):
    layer, latents, features = window_case("read", case)
    if through == "layer":
        out, attention = layer(latents, features, return_attention=True)
    else:  # project every pixel as published, then pool each head by itself
        size = grid(features)
        logits, values = (nn.resize(m(features), size) for m in (layer.to_logits, layer.to_values))
        parts = zip(logits.split(1, dim=1), values.chunk(layer.heads, dim=1), strict=True)
        pooled = [gi_kernels.window_pool(*part, (4, 4)).squeeze(2) for part in parts]
        out = latents + layer.projection(layer.ln1(torch.cat(pooled, dim=2)))
        out = out + layer.mlp(layer.ln2(out))
        # The weights of a window's pixels are what a map of ones in one pixel is pooled to.
        attention = pooled_ones(logits)
    check_window_case("read", case, layer, latents, features, out, {"attn": attention})


@pytest.mark.parametrize("through", ["layer", "functions"])
@pytest.mark.parametrize("case", WINDOWS)
def test_write(case, through):
    layer, latents, features = window_case("write", case)
    if through == "layer":
        out, attention = layer(features, latents, return_attention=True)
        out_train = copy.deepcopy(layer).train()(features, latents)
    else:  # spread each head by itself, then norm and project every pixel as published

        def write(layer):
            parts = zip(logits.split(1, dim=1), layer.to_values(latents).chunk(layer.heads, 2), strict=True)
            spread = [gi_kernels.window_spread(gate, value.unsqueeze(2), (4, 4)) for gate, value in parts]
            spread = nn.resize(torch.cat(spread, dim=1), tuple(features.shape[2:]))
            z = features + layer.projection(layer.ln1(spread))
            return z + layer.mlp(layer.ln2(z))

        logits = nn.resize(layer.to_logits(features), grid(features))
        out, attention = write(layer), logits.sigmoid()
        out_train = write(copy.deepcopy(layer).train())
    extra = {"attn": attention, "out_train": out_train}
    check_window_case("write", case, layer, latents, features, out, extra)


@pytest.mark.parametrize("through", ["layer", "functions"])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case, through):
    B, N, M, D, heads = ATTENTION[case]
    name = f"attn/{case}"
    layer = nn.LatentAttention(D, heads)
    recipe.fill(layer, f"{name}/")
    inputs = {"x": recipe.normal(f"{name}/x", B, N, D)}
    if M:
        inputs |= {s: recipe.normal(f"{name}/{s}", B, heads, M, D // heads) for s in ("k", "v")}
    x, *extra = (t.requires_grad_() for t in inputs.values())
    if through == "layer":
        out, (key, value) = layer(x, tuple(extra) or None, return_kv=True)
    else:
        h = layer.attn.layernorm1(x)
        query, key, value = (
            m(h).view(B, N, heads, -1).transpose(1, 2)
            for m in (layer.attn.query, layer.attn.key, layer.attn.value)
        )
        # The references' part in two segments.
        keys, values = ([own, *rest] for own, rest in zip((key, value), _halves(extra), strict=True))
        out = x + layer.projection(
            gi_kernels.global_attention(query, keys, values).transpose(1, 2).flatten(2)
        )
        out = out + layer.mlp(layer.ln_premlp(out))
    check_all(name, {"out": out, "key": key, "value": value} | gradients(out, name, inputs))


@pytest.mark.parametrize("case", FILL)
def test_completion(case):
    B, H, W = FILL[case]
    flow = recipe.normal(f"fill/{case}/flow", B, 2, H, W) * 5
    mask = GOLDEN[f"fill.{case}.mask"].float()
    # The closed mask belongs to the propagation's preparation of masks.
    check_all(f"fill/{case}", {"out": gi_kernels.complete_flow(flow, mask)}, given=("mask", "closed_mask"))


def window_case(kind, case):
    """A layer in eval mode with its latents and features."""
    B, D, H, W, heads = WINDOWS[case]
    layer = (nn.WindowRead if kind == "read" else nn.WindowWrite)(D, heads, 16).eval()
    recipe.fill(layer, f"{kind}/{case}/")
    latents = recipe.normal(f"{kind}/{case}/latents", B, 16, D).requires_grad_()
    features = recipe.normal(f"{kind}/{case}/features", B, D, H, W).requires_grad_()
    return layer, latents, features


def check_window_case(kind, case, layer, latents, features, out, extra):
    name = f"{kind}/{case}"
    check_all(name, {"out": out} | extra | gradients(out, name, {"latents": latents, "features": features}))


def grid(features):
    """The multiples of four nearest to a map's size."""
    return tuple(4 * round(n / 4) for n in features.shape[2:])


def pooled_ones(logits):
    """The pooling weights of every pixel, by pooling maps that are one in one pixel per window."""
    H, W = logits.shape[2:]
    h, w = H // 4, W // 4
    one = torch.eye(h * w).view(h * w, h, w).repeat(1, 4, 4).expand(logits.shape[0], -1, -1, -1)
    weights = gi_kernels.window_pool(logits, one, (4, 4))  # [B,16,heads,pixel]
    weights = weights.unflatten(3, (h, w)).unflatten(1, (4, 4))  # [B,i,j,heads,y,x]
    return weights.permute(0, 3, 1, 4, 2, 5).reshape(logits.shape)


def gradients(output, name, inputs):
    """Gradients by argument for the golden incoming gradient."""
    cotangent = recipe.normal(f"{name}/cotangent", *output.shape)
    found = torch.autograd.grad(output, list(inputs.values()), cotangent, retain_graph=True)
    return {f"grad_{key}": grad for key, grad in zip(inputs, found, strict=True)}


def check_all(name: str, actual: dict[str, torch.Tensor], given: tuple[str, ...] = ()) -> None:
    """Relative L2 error against every golden tensor of a case; vanishing gradients are rounding noise."""
    prefix = name.replace("/", ".") + "."
    stored = {key.removeprefix(prefix) for key in GOLDEN if key.startswith(prefix)}
    assert actual.keys() == stored - set(given)
    for key, got in actual.items():
        expected = GOLDEN[prefix + key]
        assert got.shape == expected.shape, key
        allowed = 1e-5 * expected.norm() if expected.norm() > 1e-3 else 1e-5
        error = (got.detach() - expected).norm()
        assert error <= allowed, f"{prefix}{key}: error {error:.2e}, allowed {allowed:.2e}"


def _halves(extra):
    return [part.split(part.shape[2] // 2, dim=2) for part in extra] or [(), ()]
