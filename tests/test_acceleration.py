"""``accelerate`` on stand-ins for the published classes: equality, verification, reports, undoing."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
import torch.nn.functional as F
from torch import nn

import gi_kernels
from gi_kernels import nn as layers
from gi_kernels.acceleration import OPERATORS, accelerate, verification
from gi_kernels.acceleration import layers as replacements
from gi_kernels.acceleration.flow import FlowNetwork
from gi_kernels.acceleration.swapping import MEMORY, is_swapped

TESTS = Path(__file__).parent
DIM, HEADS, SIDE = 32, 4, 4

needs_kernels = pytest.mark.skipif(
    gi_kernels.native.PROBLEM is not None, reason=f"no compiled kernels: {gi_kernels.native.PROBLEM}"
)


@dataclass(frozen=True)
class LayerCase:
    """A stand-in, what replaces it, and arguments for a map of a size."""

    operator: str
    build: Callable[[], nn.Module]
    arguments: Callable[[int, int], tuple]

    def make(self, size=(16, 16), seed=0):
        torch.manual_seed(seed)
        module = randomised(self.build())
        return module, self.arguments(*size)


def maps(H, W, B=2):
    return torch.randn(B, DIM, H, W)


def latents(B=2):
    return torch.randn(B, SIDE**2, DIM)


LAYERS = {
    case.operator: case
    for case in (
        LayerCase(
            "deformable_write",
            lambda: stand_ins.DeformableWriteLayer(DIM),
            lambda H, W: (
                maps(H, W),
                torch.randn(2, 3, DIM, H, W),
                6 * torch.randn(2, 3, 2, 4 * H, 4 * W),
                torch.rand(2, 3, 1, 4 * H, 4 * W),
            ),
        ),
        LayerCase(
            "windowed_read",
            lambda: stand_ins.LocalReadLayer(DIM, DIM, HEADS, SIDE**2, read_heads=HEADS),
            lambda H, W: (latents(), maps(H, W)),
        ),
        LayerCase(
            "windowed_write",
            lambda: stand_ins.LocalWriteLayer(DIM, DIM, HEADS, SIDE**2, write_heads=HEADS),
            lambda H, W: (maps(H, W), latents()),
        ),
        LayerCase("attention", lambda: stand_ins.AttentionLayer(DIM, HEADS), lambda H, W: (latents(),)),
        LayerCase(
            "position_code",
            lambda: stand_ins.LatentInitLayer(DIM, SIDE, DIM),
            lambda H, W: (maps(H, W),),
        ),
    )
}


def randomised(module):
    """With all parameters and running statistics random."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name, b in module.named_buffers():
            if b.is_floating_point():
                b.copy_(torch.rand_like(b) + 0.5 if "var" in name else 0.1 * torch.randn_like(b))
    return module


def tensors(value):
    return verification._tensors(value)


def outcome(module, arguments, **options):
    """Results and gradients of arguments and parameters."""
    arguments = [a.detach().clone().requires_grad_() for a in arguments]
    results = tensors(module(*arguments, **options))
    generator = torch.Generator().manual_seed(5)
    incoming = [torch.randn(r.shape, generator=generator) for r in results]
    wanted = [*arguments, *module.parameters()]
    gradients = torch.autograd.grad(results, wanted, incoming, allow_unused=True)
    return results, [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=True)]


def assert_close(actual, expected, tolerance=1e-4):
    """Relative to the largest magnitude among all."""
    actual, expected = tensors(actual), tensors(expected)
    assert [a.shape for a in actual] == [e.shape for e in expected]
    for a, e in zip(actual, expected, strict=True):
        scale = max(e.abs().max().item(), 1e-2 * max(x.abs().max().item() for x in expected), 1e-6)
        assert (a - e).abs().max().item() <= tolerance * scale


def assert_identical(actual, expected):
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        assert torch.equal(a, e)


def raft(small=False):
    torch.manual_seed(0)
    return stand_ins.RAFTNetwork(small).eval()


def wrapper(**options):
    options = {"resolution": (128, 128), "input_range": "01", "return_err": True} | options
    return stand_ins.RAFTWrapper(raft(), **options).eval()


def masked_frames(*shape):
    """[..., 4, H, W] with a hole in each mask."""
    frames = torch.rand(*shape[:-3], 4, *shape[-2:])
    frames = F.avg_pool2d(frames.flatten(0, -4), 9, stride=1, padding=4).view(frames.shape)
    frames[..., 3, :, :] = 0
    H, W = shape[-2:]
    frames[..., 3, H // 4 : H // 2, W // 3 : W // 2] = 1
    return frames


# Layers


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [(16, 16), (17, 22), (6, 5)], ids=str)
@pytest.mark.parametrize("operator", LAYERS)
def test_layer_agrees(operator, size, training):
    module, arguments = LAYERS[operator].make(size)
    ours = copy.deepcopy(module)
    report = accelerate(ours)
    assert [e.operator for e in report.replaced] == [operator]
    for m in (module, ours):
        m.train(training)
    for actual, expected in zip(outcome(ours, arguments), outcome(module, arguments), strict=True):
        assert_close(actual, expected)
    assert_close([b.float() for b in ours.buffers()] or [], [b.float() for b in module.buffers()] or [])


@pytest.mark.parametrize("operator", ["windowed_read", "windowed_write"])
def test_attention_maps(operator):
    module, arguments = LAYERS[operator].make((17, 22))
    ours = copy.deepcopy(module)
    accelerate(ours)
    assert_close(ours(*arguments, return_attn=True), module(*arguments, return_attn=True))


@pytest.mark.parametrize("return_kv", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["own", "extra"])
def test_keys_and_values(given, return_kv):
    module, (x,) = LAYERS["attention"].make()
    kv = [torch.randn(2, HEADS, 40, DIM // HEADS) for _ in range(2)] if given else None
    ours = copy.deepcopy(module)
    accelerate(ours)
    actual, expected = (m(x, kv=kv, return_kv=return_kv) for m in (ours, module))
    assert_close(actual, expected)
    assert not return_kv or isinstance(actual[1], list)


def test_batch_statistics_are_updated_alike():
    module, arguments = LAYERS["windowed_write"].make((16, 16))
    ours = copy.deepcopy(module)
    accelerate(ours)
    for _ in range(3):
        ours.train()(*arguments), module.train()(*arguments)
    for name, buffer in module.named_buffers():
        assert_close(ours.get_buffer(name).double(), buffer.double())


def test_low_precision_by_autocast():
    module, arguments = LAYERS["windowed_read"].make()
    ours = copy.deepcopy(module)
    accelerate(ours)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ours(*arguments)
    assert_close(actual.float(), module(*arguments), 0.05)


def test_position_code_is_made_once_per_size():
    module, (x,) = LAYERS["position_code"].make()
    made = []
    module.pos_embeddings.register_buffer("none", None)
    accelerate(module)
    whole = type(module.pos_embeddings).forward
    module.pos_embeddings.forward = lambda *a, **k: made.append(a) or whole(module.pos_embeddings, *a, **k)
    with torch.inference_mode():
        module(x), module(x)
    module(x)[0].sum().backward()  # what was remembered in inference serves training
    module(x[..., :5])
    assert len(made) == 2
    for width in range(1, 20):
        module(x[..., :width])
    assert len(module.__dict__[f"{MEMORY}codes"]) <= 8


# Flow


@pytest.mark.parametrize("test_mode", [True, False])
@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
def test_flow_network_agrees(small, test_mode):
    module = raft(small)
    images = 255 * masked_frames(2, 2, 3, 128, 136)[:, :, :3]
    flow_init = torch.randn(2, 2, 16, 17)
    ours = copy.deepcopy(module)
    assert accelerate(ours).replaced[0].replacement is FlowNetwork
    options = {"iters": 3, "test_mode": test_mode, "flow_init": flow_init}
    actual, expected = (m(*images, **options) for m in (ours, module))
    assert_close(actual, expected)
    actual, expected = (
        torch.autograd.grad(tensors(v)[-1].sum(), m.update_block.parameters(), allow_unused=True)
        for m, v in ((ours, actual), (module, expected))
    )
    assert_close([g for g in actual if g is not None], [g for g in expected if g is not None], 1e-3)


class OtherConv(nn.Conv2d):
    """A convolution whose forward may be anything."""


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.Conv2d, OtherConv])
def test_gates_with_and_without_the_context_apart(kind):
    module = raft()
    for conv in module.update_block.gru.children():
        conv.__class__ = kind
    images = 255 * masked_frames(2, 1, 3, 128, 128)[:, :, :3]
    expected = module(*images, iters=2)
    accelerate(module)
    assert_close(module(*images, iters=2), expected)


@torch.no_grad()
@pytest.mark.parametrize("size", [(128, 128), (96, 176)], ids=str)
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("returned", ["flow", "error", "backward", "all"])
def test_flow_wrapper_agrees(returned, channels, size):
    error, backward = returned in ("error", "all"), returned in ("backward", "all")
    input_range = "01" if channels == 4 else "-11"
    module = wrapper(return_err=error, return_backward=backward, input_range=input_range)
    frames = masked_frames(2, 2, 4, *size)[:, :, :channels]
    ours = copy.deepcopy(module)
    for operators in (["flow_wrapper"], None):
        accelerate(ours, operators=operators)
        assert_close(ours(*frames, iters=3), module(*frames, iters=3))


def test_flow_wrapper_has_gradients():
    module = wrapper()
    ours = copy.deepcopy(module)
    accelerate(ours)
    frames = masked_frames(2, 1, 4, 128, 128)
    gradients = []
    for m in (ours, module):
        flow, error = m(*frames, iters=2)
        (flow.sum() + error.sum()).backward()
        gradients.append([p.grad for p in m.raft.update_block.parameters() if p.grad is not None])
    assert_close(*gradients, 1e-3)


def test_flow_wrapper_checks_its_input():
    module = wrapper()
    accelerate(module)
    frames = masked_frames(2, 1, 4, 128, 128)
    with pytest.raises(ValueError, match=r"image1: expected values in \[0, 1\]"):
        module(*(3 * frames))
    with pytest.raises(ValueError, match="image1: expected 3 or 4 channels, got 2"):
        module(*frames[:, :, :2])


def test_flow_wrapper_in_training_mode_is_left_to_the_original():
    module = wrapper()
    module.train()
    ours = copy.deepcopy(module)
    accelerate(ours)
    frames = masked_frames(2, 2, 4, 128, 128)
    with torch.no_grad():
        assert_close(ours(*frames, iters=2), module(*frames, iters=2))
    assert ours.calls == 1
    assert_close([b.float() for b in ours.buffers()], [b.float() for b in module.buffers()])


# The flow loop


def training_module(flow=True):
    torch.manual_seed(1)
    generator = stand_ins.Generator(DIM, HEADS, SIDE)
    return stand_ins.DefaultInpaintingTrainingModule(generator, wrapper() if flow else None)


def batch_of(B=1, T=2, H=128, W=128, seed=0):
    torch.manual_seed(seed)
    target, sources = masked_frames(B, 4, H, W), masked_frames(B, T, 4, H, W)
    return {
        "image": target[:, :3],
        "mask": target[:, 3:],
        "srcs": sources[:, :, :3],
        "srcs_masks": sources[:, :, 3:],
    }


def test_flow_loop_agrees():
    module, batch = training_module(), batch_of()
    ours = copy.deepcopy(module)
    report = accelerate(ours)
    assert {e.operator for e in report.replaced} == set(OPERATORS)
    actual, expected = ours(dict(batch)), module(dict(batch))
    assert list(actual) == list(expected)
    for name in expected:
        assert_close(actual[name], expected[name], 1e-3)


def test_flow_loop_is_one_call_per_batch():
    module, batch = training_module(), batch_of(T=3)
    accelerate(module, operators=["flow_loop"])
    sizes = []
    module.flow.register_forward_hook(lambda m, a, out: sizes.append(len(a[0])))
    for _ in range(2):  # as for the generator and the discriminator, with dictionaries of their own
        module(dict(batch))
    assert sizes == [3]
    module(batch_of(T=3, seed=1))
    assert sizes == [3, 3]
    module(batch_of(B=2, seed=1))
    assert sizes == [3, 3, 4]
    module(given := module(dict(batch)))
    assert sizes == [3, 3, 4, 3] and "flows" in given


def test_flow_loop_notices_other_weights():
    module, batch = training_module(), batch_of(T=1)
    accelerate(module)
    before = module(dict(batch))["flows"]
    with torch.no_grad():
        module.flow.raft.update_block.flow_head.conv2.bias.add_(1)
    assert not torch.equal(module(dict(batch))["flows"], before)


def test_flows_of_inference_serve_training():
    module, batch = training_module(), batch_of(T=1)
    accelerate(module)
    with torch.inference_mode():
        module(dict(batch))
    module(dict(batch))["inpainted"].sum().backward()


# Reports, undoing, repeating


def test_report():
    model = training_module()
    report = accelerate(model)
    assert {e.path for e in report.replaced if e.operator == "attention"} == {
        f"generator.blocks.{i}.attn{j}" for i in (0, 1) for j in (1, 2)
    }
    text = str(report)
    assert f"{len(report.entries)} modules accelerated, 0 left alone" in text
    assert "generator.blocks.0.read (windowed_read) by WindowRead" in text
    assert "(the model) (flow_loop) by FlowLoop" in text


def test_undo_is_exact():
    model, batch = training_module().eval(), batch_of()
    with torch.no_grad():
        expected = model(dict(batch))
    classes = [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    report = accelerate(model)
    assert model.state_dict().keys() == state.keys()
    with torch.no_grad():
        model(dict(batch))
    report.undo()
    report.undo()
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert_identical(model.state_dict(), state)
    with torch.no_grad():
        assert_identical(model(dict(batch)), expected)


def test_it_stays_an_instance_and_keeps_hooks():
    model, arguments = LAYERS["attention"].make()
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    accelerate(model)
    model(*arguments)
    assert isinstance(model, stand_ins.AttentionLayer) and seen == [1]


def test_accelerating_twice():
    model, arguments = LAYERS["windowed_write"].make()
    first = accelerate(model)
    second = accelerate(model)
    assert not second.replaced and second.left_alone[0].reason == "it is accelerated already"
    second.undo()
    assert is_swapped(model)
    first.undo()
    assert not is_swapped(model)


def test_our_layers_are_reported():
    model = nn.ModuleList(
        [layers.WindowRead(8, 2, 4), layers.LatentAttention(8, 2), stand_ins.AttentionLayer(8, 2)]
    )
    report = accelerate(model)
    assert [e.operator for e in report.replaced] == ["attention"]
    assert {e.reason for e in report.left_alone} == {"it is a layer of gi_kernels"}
    assert not accelerate(model[:2], operators=["windowed_read"]).replaced


def test_products_inside_are_exchanged_and_given_back():
    model, _ = LAYERS["windowed_write"].make()
    report = accelerate(model)
    assert type(model.to_values) is not nn.Linear and type(model.mlp.dense1) is not nn.Conv2d
    report.undo()
    assert type(model.to_values) is nn.Linear and type(model.mlp.dense1) is nn.Conv2d


# What is refused


class Subclass(stand_ins.AttentionLayer):
    """Inherits ``forward``."""


class OtherForward(stand_ins.AttentionLayer):
    """Does not."""

    def forward(self, x):
        return x


def with_hook():
    module = stand_ins.AttentionLayer(DIM, HEADS)
    module.attn.query.register_forward_hook(lambda *_: None)
    return module


def without(name, module):
    delattr(module, name)
    return module


def changed(module, name, child):
    module.set_submodule(name, child)
    return module


def with_forward(module):
    module.forward = lambda x: x
    return module


REFUSED = [
    (lambda: stand_ins.AttentionLayer(DIM, HEADS, dropout=0.1), "its attention has dropout 0.1"),
    (
        lambda: changed(stand_ins.AttentionLayer(DIM, HEADS), "mlp.activation", nn.GELU("tanh")),
        "its MLP has a GELU(approximate='tanh')",
    ),
    (
        lambda: changed(stand_ins.AttentionLayer(DIM, HEADS), "mlp.activation", nn.ReLU()),
        "its MLP has a ReLU()",
    ),
    (
        lambda: changed(stand_ins.AttentionLayer(DIM, HEADS), "mlp.dense1", nn.Linear(DIM, 2 * DIM)),
        "parameter mlp.dense1.weight has shape [64, 32], expected [32, 32]",
    ),
    (
        lambda: changed(stand_ins.LocalReadLayer(DIM, DIM, 1, 16, 4), "ln2", nn.Identity()),
        "it has no parameter ln2.bias",
    ),
    (
        lambda: changed(stand_ins.LocalWriteLayer(DIM, DIM, 1, 16, 4), "more", nn.Linear(1, 1)),
        "it has a parameter more.bias more than the published layer",
    ),
    (lambda: stand_ins.LocalReadLayer(DIM, DIM, 1, 16, read_heads=5), "5 heads do not divide 32 channels"),
    (
        lambda: changed(stand_ins.DeformableWriteLayer(DIM), "v", nn.Conv2d(DIM, DIM, 1)),
        "parameter v.weight has shape [32, 32, 1, 1], expected [32, 33, 1, 1]",
    ),
    (
        lambda: changed(stand_ins.LatentInitLayer(DIM, 2, DIM), "pos_embeddings", nn.Linear(1, 1)),
        "its position code is trained",
    ),
    (lambda: training_module(flow=False), "it has no flow network"),
    (
        lambda: without("cnet", raft()),
        "as flow_network, it has no attribute cnet; as flow_wrapper, it has no",
    ),
    (
        lambda: changed(raft(), "update_block.mask.2", nn.Conv2d(32, 4 * 4 * 9, 1)),
        "parameter update_block.mask.2.weight has shape [144, 32, 1, 1], expected 576 channels",
    ),
    (lambda: OtherForward(DIM, HEADS), "its class OtherForward has a forward of its own"),
    (lambda: with_forward(stand_ins.AttentionLayer(DIM, HEADS)), "its forward was replaced"),
    (with_hook, "attn.query has hooks, which would not be called"),
]


@pytest.mark.parametrize("build, reason", REFUSED, ids=[r for _, r in REFUSED])
def test_refused_with_the_reason(build, reason):
    model = nn.ModuleList([build(), stand_ins.DeformableWriteLayer(8)])
    report = accelerate(model)
    assert reason in next(e for e in report.left_alone if e.path == "0").reason
    assert f"left alone: {reason}" in str(report) or reason in str(report)
    assert not is_swapped(model[0]) and is_swapped(model[1])


def test_nothing_found():
    with pytest.raises(ValueError, match=r"(?s)model: expected published modules.*found none.*no class"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"(?s)found none.*\(the model\): its attention has dropout 0.1"):
        accelerate(stand_ins.AttentionLayer(DIM, HEADS, dropout=0.1))


def test_subset_of_operators():
    model = training_module()
    report = accelerate(model, operators=["attention", "flow_network"])
    assert {e.operator for e in report.replaced} == {"attention", "flow_network"}
    assert {e.reason for e in report.left_alone} == {"it was not asked for"}
    assert any(e.operator == "flow_wrapper" for e in report.left_alone)


def test_strict():
    model = stand_ins.AttentionLayer(DIM, HEADS)
    with pytest.raises(ValueError, match="operators: 'flow_loop' was not found"):
        accelerate(model, operators=["attention", "flow_loop"])
    assert not is_swapped(model)
    assert accelerate(model, operators=["attention", "flow_loop"], strict=False).replaced


@pytest.mark.parametrize(
    "error, message, options",
    [
        (TypeError, "model: expected a torch.nn.Module, got int", {"model": 3}),
        (ValueError, "mode: expected 'inference' or 'training', got 'fast'", {"mode": "fast"}),
        (TypeError, "operators: expected a sequence of names, got 'attention'", {"operators": "attention"}),
        (TypeError, "operators: expected a sequence of names, got 3", {"operators": 3}),
        (ValueError, "operators: expected names among .*, got 'warp'", {"operators": ["warp"]}),
        (TypeError, "verify: expected a tensor, tuple, dict or function, got int", {"verify": 3}),
    ],
)
def test_invalid_arguments(error, message, options):
    model = stand_ins.AttentionLayer(DIM, HEADS)
    with pytest.raises(error, match=message):
        accelerate(options.pop("model", model), **options)
    assert not is_swapped(model)


def test_subclass_that_inherits_forward():
    assert accelerate(Subclass(DIM, HEADS)).replaced


# Verification


@pytest.fixture
def quick(monkeypatch):
    """Little timing; what is accelerated counts as twice as fast."""
    monkeypatch.setattr(verification, "BUDGET", 0.0)

    def interleave(contenders, device, budget):
        for call in contenders.values():
            call()
        return {n: Seconds(s) for n, s in zip(contenders, (2e-3, 1e-3), strict=True)}

    monkeypatch.setattr(verification.timing, "interleave", interleave)


@dataclass
class Seconds:
    """In place of measured times."""

    median: float


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_verified(quick, mode):
    model, batch = training_module(), batch_of()
    model.generator.start.register_buffer("none", None)
    kept = {k: v.clone() for k, v in batch.items()}
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    chance = torch.get_rng_state()
    report = accelerate(model, mode=mode, verify=batch)
    assert torch.equal(torch.get_rng_state(), chance)
    assert_identical(model.state_dict(), state)
    assert list(batch) == list(kept)
    assert_identical(batch, kept)
    assert not report.left_alone, str(report)
    for e in report.replaced:
        assert is_swapped(e.module)
        assert e.error <= 1e-3 and e.seconds == (2e-3, 1e-3) and min(e.bytes) >= 0
        flow = e.path.startswith("flow")  # runs without gradients, in training too
        assert (e.gradient_error is None) == (mode == "inference" or flow)
    assert "(2.00x)" in str(report) and "MiB ->" in str(report)
    assert all(p.grad is None for p in model.parameters())


@needs_kernels
def test_verified_by_the_clock():
    torch.manual_seed(0)
    model = nn.Sequential(stand_ins.LocalReadLayer(256, 256, 8, 256))
    arguments = torch.randn(1, 256, 256), torch.randn(1, 256, 64, 64)
    report = accelerate(model, verify=lambda: model[0](*arguments))
    (entry,) = report.replaced
    assert entry.seconds[1] < entry.seconds[0] and entry.bytes[1] < entry.bytes[0]


def test_slow_replacement_is_left_alone(monkeypatch):
    model, arguments = LAYERS["attention"].make()

    def slow(self, x, kv=None, return_kv=False):
        for _ in range(20):
            out = super(replacements.LatentAttention, self).forward(x, return_kv=return_kv)
        return out

    monkeypatch.setattr(replacements.LatentAttention, "forward", slow)
    monkeypatch.setattr(verification, "BUDGET", 0.0)
    report = accelerate(model, verify=arguments)
    (entry,) = report.left_alone
    assert entry.reason == "it would not be faster" and entry.seconds[1] > entry.seconds[0]
    assert not is_swapped(model) and type(model.projection) is nn.Linear


@pytest.mark.parametrize("wrong", ["value", "gradient", "shape", "not finite", "exception"])
def test_wrong_replacement_is_left_alone(monkeypatch, quick, wrong):
    model, arguments = LAYERS["attention"].make()
    right = replacements.LatentAttention.forward

    def forward(self, x, kv=None, return_kv=False):
        out = right(self, x, kv, return_kv)
        if wrong == "exception":
            raise RuntimeError("no such thing")
        changes = {
            "value": lambda: out * 1.01,
            "gradient": lambda: out.detach() + 0.5 * (out - out.detach()),
            "shape": lambda: out[:, 1:],
            "not finite": lambda: out * torch.where(out == out.max(), float("nan"), 1.0),
        }
        return changes[wrong]()

    monkeypatch.setattr(replacements.LatentAttention, "forward", forward)
    (entry,) = accelerate(model, mode="training", verify=arguments[0]).left_alone
    expected = {
        "gradient": "its gradients differ",
        "exception": "it failed on the batch: RuntimeError: no such thing",
    }
    assert entry.reason.startswith(expected.get(wrong, "its result differs"))
    assert not is_swapped(model)


def test_batch_that_reaches_one_module_only(quick):
    model = nn.ModuleDict({k: stand_ins.AttentionLayer(DIM, HEADS) for k in ("used", "idle")})
    report = accelerate(model, verify=lambda: model["used"](latents()))
    assert [e.path for e in report.replaced] == ["used"]
    assert [(e.path, e.reason) for e in report.left_alone] == [("idle", "the batch does not reach it")]


def test_keywords_and_dictionaries(quick):
    model, arguments = LAYERS["attention"].make()
    kv = [torch.randn(2, HEADS, 8, DIM // HEADS) for _ in range(2)]
    assert accelerate(model, verify={"x": arguments[0], "kv": kv}).replaced


def test_batch_on_which_the_model_fails():
    model = stand_ins.AttentionLayer(DIM, HEADS)
    with pytest.raises(RuntimeError):
        accelerate(model, verify=torch.randn(1, 4, DIM + 1))
    assert not is_swapped(model) and not model._forward_pre_hooks


def test_verification_under_autocast(quick):
    model, arguments = LAYERS["attention"].make()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            model(*arguments)

    report = accelerate(model, mode="training", verify=run)
    assert report.replaced, str(report)


# Copies, pickles, compilation, parallel training


def test_deepcopy():
    model, batch = training_module().eval(), batch_of(T=1)
    accelerate(model)
    with torch.no_grad():
        expected = model(dict(batch))
    copied = copy.deepcopy(model)
    assert type(copied) is type(model) and f"{MEMORY}flows" not in copied.__dict__
    with torch.no_grad():
        assert_identical(copied(dict(batch)), expected)


def test_pickle_into_another_process(tmp_path):
    model, arguments = LAYERS["windowed_write"].make()
    accelerate(model.eval())
    with torch.no_grad():
        torch.save((model, arguments, model(*arguments)), tmp_path / "model.pt")
    program = (
        "import sys, torch; model, arguments, expected = torch.load(sys.argv[1], weights_only=False);"
        "torch.testing.assert_close(model(*arguments), expected); print(type(model).__name__)"
    )
    paths = [str(TESTS), str(Path(gi_kernels.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.pt")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "AcceleratedLocalWriteLayer"


class Owner(ABC, stand_ins.AttentionLayer):
    """As Lightning modules do: an abstract base class whose pickles leave something out."""

    trainer: Any = None

    def __getstate__(self):
        return self.__dict__ | {"trainer": None}


def test_own_state_of_a_class_is_respected():
    model = Owner(DIM, HEADS)
    model.trainer = lambda: None  # cannot be pickled
    accelerate(model)
    revived = pickle.loads(pickle.dumps(model))
    assert type(revived) is type(model) and revived.trainer is None


@needs_kernels
@pytest.mark.parametrize("operator", LAYERS)
def test_compiles(operator):
    module, arguments = LAYERS[operator].make()
    expected = module.eval()(*arguments)
    accelerate(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*arguments), expected)


@needs_kernels
@torch.no_grad()
def test_flow_compiles():
    module, batch = training_module().eval(), batch_of(T=1)
    expected = module(dict(batch))["inpainted"]
    accelerate(module)
    assert_close(torch.compile(module, backend="eager")(dict(batch))["inpainted"], expected, 1e-3)


def test_parallel_training(tmp_path):
    """All parameters get a gradient: the wrapper waits for each."""
    module, arguments = LAYERS["deformable_write"].make()
    accelerate(module)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(module)
        for _ in range(2):
            parallel(*arguments).sum().backward()
        assert all(p.grad is not None for p in module.parameters())
        assert is_swapped(parallel.module) and accelerate(parallel).left_alone
    finally:
        torch.distributed.destroy_process_group()


# Training


def photos(count, size=128):
    """Crops of frames of the bundled clip, [count,3,size,size] in [0,1]."""
    pytest.importorskip("av")
    from gi_model.demo import CLIP
    from gi_model.video import FrameSource

    frames = []
    for i, frame in enumerate(FrameSource(CLIP, "clip")):
        if i % 5 == 0:
            frames.append(
                torch.from_numpy(frame.copy()).permute(2, 0, 1)[None, :, 20 : 20 + size, 40 : 40 + size]
            )
        if len(frames) == count:
            break
    return torch.cat(frames).float() / 255


def test_training_runs_alike():
    frames = photos(3)
    batch = batch_of(T=2) | {"image": frames[:1], "srcs": frames[None, 1:]}
    runs = []
    for fast in (False, True):
        model = training_module()
        if fast:
            accelerate(model, mode="training")
        optimizers = [torch.optim.Adam(m.parameters(), 1e-3) for m in (model.generator, model.discriminator)]
        losses = []
        for _ in range(30):
            for i, optimizer in enumerate(optimizers):
                loss = model.training_step(batch, i)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        runs.append((torch.stack(losses), model.state_dict()))
    (expected, parameters), (losses, ours) = runs
    assert expected[58] < 0.8 * expected[0]  # it learns
    assert_close(losses, expected, 1e-3)
    assert ours.keys() == parameters.keys()
    for name, value in parameters.items():
        assert_close(ours[name].float(), value.float(), 1e-2), name
