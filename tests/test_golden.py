"""The published implementation's numbers, through the layers and through the public functions."""

from __future__ import annotations

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


def check(actual: torch.Tensor, key: str, tolerance: float = 1e-5, absolute: float = 1e-5) -> None:
    """Relative L2 error against the golden tensor ``key``; gradients that vanish are rounding noise."""
    expected = GOLDEN[key].to(actual.dtype)
    assert actual.shape == expected.shape, key
    error = (actual.detach() - expected).norm()
    assert error <= tolerance * expected.norm() + absolute * (expected.norm() < 1e-3), (
        f"{key}: relative error {float(error / expected.norm()):.2e}"
    )


def gradients(output: torch.Tensor, name: str, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    cotangent = recipe.normal(f"{name}/cotangent", *output.shape)
    return torch.autograd.grad(output, inputs, cotangent)


@pytest.mark.parametrize(
    "case, input, flow, magnitude",
    [
        ("resized", (2, 3, 9, 11), (2, 2, 18, 33), 6),
        ("same", (1, 5, 16, 12), (1, 2, 16, 12), 3),
        ("far", (1, 2, 8, 8), (1, 2, 64, 64), 200),
    ],
)
def test_warp(case, input, flow, magnitude):
    name = f"warp/{case}"
    x = recipe.normal(f"{name}/input", *input).requires_grad_()
    f = (recipe.normal(f"{name}/flow", *flow) * magnitude).requires_grad_()
    out = gi_kernels.flow_warp(x, f)
    check(out, f"warp.{case}.out")
    grad_input, grad_flow = gradients(out, name, x, f)
    check(grad_input, f"warp.{case}.grad_input")
    check(grad_flow, f"warp.{case}.grad_flow", 3e-5)


DEFORM = {
    "t2": (2, 2, 8, 10, 12, 40, 48, 6),
    "t4": (1, 4, 16, 8, 8, 64, 64, 12),
    "t1": (1, 1, 6, 7, 9, 14, 18, 3),
}


def deform_case(case):
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
    return name, layer, {key: value.requires_grad_() for key, value in inputs.items()}


@pytest.mark.parametrize("case", DEFORM)
def test_deformable_layer(case):
    name, layer, inputs = deform_case(case)
    out = layer(*inputs.values())
    check(out, f"deform.{case}.out")
    parameters = dict(layer.named_parameters())
    found = gradients(out, name, *inputs.values(), *parameters.values())
    for key, grad in zip(inputs, found, strict=False):
        check(grad, f"deform.{case}.grad_{key}", 3e-5)
    for key, grad in zip(parameters, found[len(inputs) :], strict=True):
        check(grad, f"deform.{case}.grad_param.{key}", 3e-5)
    weight, bias = found[len(inputs)], found[len(inputs) + 1]
    assert not weight[:, layer.channels + 1 :].any() and not bias.any(), "the target's term cancels exactly"


@pytest.mark.parametrize("case", DEFORM)
def test_deformable_function(case):
    _, layer, inputs = deform_case(case)
    C = layer.channels
    keys = torch.einsum("oc,btchw->btohw", layer.q.weight[:, :C, 0, 0], inputs["srcs"])
    values = torch.einsum("oc,btchw->btohw", layer.v.weight[:, :C, 0, 0], inputs["srcs"])
    out = gi_kernels.deformable_aggregation(
        inputs["x"], keys, values, inputs["flows"], inputs["errs"],
        layer.q.weight[:, C, 0, 0], layer.v.weight[:, C, 0, 0], layer.v.bias,
    )  # fmt: skip
    check(out, f"deform.{case}.out")


WINDOWS = {"even": (2, 16, 16, 16, 4), "odd": (1, 16, 17, 21, 2)}


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("case", WINDOWS)
def test_windows(kind, case):
    B, D, H, W, heads = WINDOWS[case]
    name, key = f"{kind}/{case}", f"{kind}.{case}"
    layer = (nn.WindowRead if kind == "read" else nn.WindowWrite)(D, heads, 16)
    recipe.fill(layer, f"{name}/")
    latents = recipe.normal(f"{name}/latents", B, 16, D).requires_grad_()
    features = recipe.normal(f"{name}/features", B, D, H, W).requires_grad_()
    arguments = (latents, features) if kind == "read" else (features, latents)
    out, attention = layer.eval()(*arguments, return_attention=True)
    check(out, f"{key}.out")
    check(attention, f"{key}.attn")
    grad_latents, grad_features = gradients(out, name, latents, features)
    check(grad_latents, f"{key}.grad_latents")
    check(grad_features, f"{key}.grad_features")
    if kind == "write":
        check(layer.train()(*arguments), f"{key}.out_train")


@pytest.mark.parametrize("case, B, N, M, D, heads", [("cross", 2, 16, 32, 32, 4), ("self", 1, 9, 0, 24, 3)])
def test_attention(case, B, N, M, D, heads):
    name, key = f"attn/{case}", f"attn.{case}"
    layer = nn.LatentAttention(D, heads)
    recipe.fill(layer, f"{name}/")
    x = recipe.normal(f"{name}/x", B, N, D).requires_grad_()
    extra = [recipe.normal(f"{name}/{s}", B, heads, M, D // heads).requires_grad_() for s in ("k", "v") if M]
    out, (own_key, own_value) = layer(x, tuple(extra) or None, return_kv=True)
    check(out, f"{key}.out")
    check(own_key, f"{key}.key")
    check(own_value, f"{key}.value")
    found = gradients(out, name, x, *extra)
    for argument, grad in zip(("x", "k", "v"), found, strict=False):
        check(grad, f"{key}.grad_{argument}")
    halves = [tuple(part.split(M // 2, dim=2)) for part in extra]
    if M:  # the same keys as two segments
        check(layer(x, list(zip(*halves, strict=True))), f"{key}.out")


@pytest.mark.parametrize("case, B, H, W", [("blob", 2, 40, 56), ("empty", 1, 24, 24)])
def test_completion(case, B, H, W):
    flow = recipe.normal(f"fill/{case}/flow", B, 2, H, W) * 5
    mask = GOLDEN[f"fill.{case}.mask"].float()
    check(gi_kernels.complete_flow(flow, mask), f"fill.{case}.out")
