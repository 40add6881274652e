"""``accelerate`` on the published classes themselves, and our published style against them.

Runs where ``GI_PUBLISHED`` names a checkout of runwayml/guided-inpainting, whose code needs ``einops``,
``kornia`` and ``scipy``; what else it imports and these classes do not use is stubbed.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import sys
from abc import ABC
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from test_acceleration import assert_close, assert_identical, batch_of, masked_frames, tensors
from torch import nn

from gi_kernels.acceleration import OPERATORS, accelerate
from gi_kernels.testing.timing import interleave
from gi_model import export_published
from gi_model.configs import build_generator
from gi_model.published import parameter_order
from gi_model.testing.published_flow import published_flow_stage
from gi_model.testing.published_generator import published_generator
from gi_model.testing.steps import Steps, blanked

CHECKOUT = os.environ.get("GI_PUBLISHED")
pytestmark = [
    pytest.mark.skipif(CHECKOUT is None, reason="GI_PUBLISHED names no checkout of the published code"),
    pytest.mark.filterwarnings("ignore"),
]

LAMA = "gi.modules.lama.saicinpainting"
STUBBED = (
    *("omegaconf", "pandas", "cv2", "skimage", "torchvision", "gi.main"),
    *("pytorch_lightning", "pytorch_lightning.utilities", "pytorch_lightning.utilities.apply_func"),
    *(f"{LAMA}.evaluation", f"{LAMA}.training.data", f"{LAMA}.training.data.datasets"),
    *(f"{LAMA}.training.losses.{n}" for n in ("perceptual", "distance_weighting")),
    *(f"{LAMA}.training.modules.{n}" for n in ("fake_fakes", "pix2pixhd", "ffc", "ffc_multiframe")),
    *(f"{LAMA}.training.visualizers{n}" for n in ("", ".base")),
)


class LightningModule(ABC, nn.Module):
    """As far as the training module's ``forward`` needs it."""


@pytest.fixture(scope="module")
def published():
    """Imports a module of the checkout by name."""
    assert Path(CHECKOUT, "gi").is_dir(), f"GI_PUBLISHED: {CHECKOUT} has no folder gi"
    before, path = dict(sys.modules), list(sys.path)
    sys.path.insert(0, CHECKOUT)
    sys.modules.update({name: MagicMock() for name in STUBBED})
    sys.modules["pytorch_lightning"].LightningModule = LightningModule
    yield lambda name: importlib.import_module(f"gi.{name}")
    sys.path[:] = path
    for name in [n for n in sys.modules if n.split(".")[0] == "gi" or n in STUBBED]:
        del sys.modules[name]
    sys.modules.update({name: module for name, module in before.items() if name in STUBBED})


@pytest.fixture
def on_the_cpu(published, monkeypatch):
    """The published completion asks for a GPU by name."""
    utilities = published("modules.RAFT.flow_utils")
    stub = MagicMock(wraps=torch)
    stub.device = lambda _: torch.device("cpu")
    for name in ("float32", "Tensor"):
        setattr(stub, name, getattr(torch, name))
    monkeypatch.setattr(utilities, "torch", stub)


def generator(published, blocks=2):
    torch.manual_seed(0)
    made = published("modules.gi.lama_guided").GIResNetGenerator(
        *(4, 3),
        ngf=16,
        n_blocks=blocks,
        num_latents_sqrt=4,
        add_out_act="sigmoid",
        is_deformable=True,
        is_crossattending=True,
        n_cross=2,
        max_features=512,
        n_downsampling=5,
    )
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
        norms = [m for m in made.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0  # statistics of what it sees, or features would explode
        made.train()(
            masked_frames(2, 4, 128, 128), masked_frames(2, 1, 4, 128, 128), **flows_of(2, 1, 128, 128)
        )
        for norm in norms:
            norm.momentum = 0.1
    return made.eval()


def test_parameters_are_numbered_as_theirs(published):
    """As optimizers of both number them."""
    ours = build_generator(
        {"kind": "two_stream", "width": 16, "blocks": 2, "downsamplings": 5, "grid": 4, "refine": "conv"}
    )
    names = ours.published_names()
    found = [names[own][0] for own in parameter_order(ours)]
    assert found == [name for name, _ in generator(published).named_parameters()]


def flows_of(B, T, H, W):
    return {"flows": 4 * torch.randn(B, T, 2, H, W), "flow_errs": torch.rand(B, T, 1, H, W)}


def originals(published, steps):
    """The published generator in its published configuration and the flow wrapper, with our weights."""
    ratios = {"ratio_gin": 0.75, "ratio_gout": 0.75, "enable_lfu": False}
    model = published("modules.gi.lama_guided").GIResNetGenerator(
        *(4, 3),
        n_blocks=4,
        add_out_act="sigmoid",
        block_type="ffc",
        resnet_conv_kwargs=ratios,
        is_deformable=True,
        is_crossattending=True,
        n_cross=2,
    )
    model.load_state_dict(export_published(steps.generator))
    flow = flow_wrapper(published, resolution=(256, 256))
    flow.raft.load_state_dict(export_published(steps.raft))
    return model.eval(), flow


def call_of(steps, flows, errors):
    """A generator's arguments."""
    frames = {"input": blanked(steps.target), "srcs": blanked(steps.sources)}
    return frames | {"flows": flows, "flow_errs": errors}


def original_flows(flow, target, sources):
    """Flows and errors, pair by pair, as the published training module computes them."""
    pairs = [flow(target, source) for source in sources.unbind(1)]
    return tuple(torch.stack(parts, dim=1) for parts in zip(*pairs, strict=True))


def flow_network(published, small=False):
    torch.manual_seed(0)
    args = argparse.Namespace(small=small, mixed_precision=True, dropout=0, alternate_corr=False)
    return published("modules.RAFT.raft").RAFT(args).eval()


def flow_wrapper(published, **options):
    kind = published("modules.warp.raft").RAFT
    wrapper = kind.__new__(kind)
    nn.Module.__init__(wrapper)
    wrapper.raft = flow_network(published)
    wrapper.resolution, wrapper.input_range, wrapper.return_backward = (128, 128), "01", False
    wrapper.return_err = True
    for name, value in options.items():
        setattr(wrapper, name, value)
    return wrapper.eval()


def training_module(published):
    kind = published("models.inpainting.lama_guided").DefaultInpaintingTrainingModule
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.generator, module.flow = generator(published), flow_wrapper(published)
    module.rescale_size_getter = module.const_area_crop_kwargs = module.add_noise_kwargs = None
    module.refine_mask_for_losses, module.fake_fakes_proba = None, 0
    module.concat_mask, module.visualize_attn = True, False
    module.flow.train = lambda mode=True: module.flow
    return module


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [(128, 128), (160, 224)], ids=str)
def test_generator(published, size, training):
    model = generator(published).train(training)
    ours = copy.deepcopy(model)
    report = accelerate(ours)
    assert not report.left_alone
    assert {e.operator for e in report.replaced} == set(OPERATORS[:5])
    input, srcs = masked_frames(2, 4, *size), masked_frames(2, 2, 4, *size)
    flows = flows_of(2, 2, *size)
    results = []
    for m in (ours, model):
        out = m(input, srcs, **flows)
        (out - 0.5).square().sum().backward()
        results.append((out, [p.grad for p in m.parameters()]))
    assert_close(results[0][0], results[1][0], 1e-3)
    assert_close(
        [g for g in results[0][1] if g is not None], [g for g in results[1][1] if g is not None], 2e-2
    )
    assert_close([b.float() for b in ours.buffers()], [b.float() for b in model.buffers()], 1e-3)
    with torch.no_grad():
        attended = [m.eval()(input, srcs=srcs, **flows, return_attn=True) for m in (ours, model)]
    assert_close(*attended, 1e-3)
    report.undo()
    assert [type(m) for m in ours.modules()] == [type(m) for m in model.modules()]


@torch.no_grad()
@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
def test_flow_network(published, small):
    model = flow_network(published, small)
    ours = copy.deepcopy(model)
    accelerate(ours)
    images = 255 * masked_frames(2, 1, 3, 128, 136)[:, :, :3]
    for options in ({"iters": 4}, {"iters": 3, "test_mode": False}):
        assert_close(ours(*images, **options), model(*images, **options), 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("size", [(128, 128), (96, 176)], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_flow_wrapper(published, on_the_cpu, size, backward):
    model = flow_wrapper(published, return_backward=backward)
    frames = masked_frames(2, 1, 4, *size)
    expected = model(*frames.clone(), iters=4)
    accelerate(model)
    assert_close(model(*frames, iters=4), expected, 1e-3)


@torch.no_grad()
def test_training_module(published, on_the_cpu):
    model, batch = training_module(published), batch_of()
    expected = model.eval()(dict(batch))
    report = accelerate(model)
    assert {e.operator for e in report.replaced} == set(OPERATORS)
    actual = model(dict(batch))
    assert list(actual) == list(expected)
    for name in expected:
        assert_close(actual[name], expected[name], 2e-3)
    again = model(dict(batch))
    assert again["flows"] is actual["flows"]
    report.undo()
    assert_identical(tensors(model(dict(batch))), tensors(expected))


@torch.no_grad()
@pytest.mark.parametrize("size", [128, 256])
def test_our_published_style_computes_the_same(published, on_the_cpu, size):
    steps = Steps(batch=2 if size == 128 else 1, references=2, size=size)
    model, flow = originals(published, steps)
    expected = original_flows(flow, steps.target, steps.sources)
    flows = published_flow_stage(steps.raft)(steps.target, steps.sources)
    assert_close(flows, expected, 1e-4)
    call = call_of(steps, *expected)
    assert_close(published_generator(steps.generator)(**call), model(**call), 1e-5)


@torch.no_grad()
@pytest.mark.slow(reason="times the published code, for a minute: --slow")
def test_our_published_style_is_not_slower(published, on_the_cpu):
    """Or what ours is compared with would flatter it; 5 % are left to the clock."""
    steps = Steps(batch=1, references=2)
    model, flow = originals(published, steps)
    flow_baseline, baseline = published_flow_stage(steps.raft), published_generator(steps.generator)
    call = call_of(steps, *steps.flows)
    for part, ours, original in (
        (
            "flow stage",
            lambda: flow_baseline(steps.target, steps.sources),
            lambda: original_flows(flow, steps.target, steps.sources),
        ),
        ("generator", lambda: baseline(**call), lambda: model(**call)),
    ):
        times = interleave({"ours": ours, "original": original}, budget=25)
        ratio = times["ours"].median / times["original"].median
        print(f"{part}: our published style takes {ratio:.3f} of the original's time")
        assert ratio <= 1.05, part
