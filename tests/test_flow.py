"""The flow stage: the published network's numbers, and every saving against the work it saves."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import gi_kernels
from gi_kernels import CorrelationPyramid
from gi_model.flow import RAFT, FlowStage, FrameEncoding, ImageEncoding

FOLDER = Path(__file__).parent / "golden"
GOLDEN = load_file(FOLDER / "raft.safetensors")
KEYS = json.loads((FOLDER / "raft_keys.json").read_text())  # published key -> shape, by network

_module = importlib.util.spec_from_file_location("golden_recipe", FOLDER / "recipe.py")
recipe = importlib.util.module_from_spec(_module)
_module.loader.exec_module(recipe)

NETWORKS = {"raft": False, "raft_small": True}
WRAPPER = {"native": (128, 128), "resized": (96, 176)}


def network(name: str = "raft") -> RAFT:
    """The network with the golden weights, which belong to published names."""
    raft = RAFT(small=NETWORKS[name])
    state = raft.state_dict()
    for key, names in raft.published_names().items():
        # Of a norm registered twice both entries are named after the second.
        published = next((n for n in names if ".downsample." in n), names[0])
        state[key] = recipe.weight(f"{name}/{published}", state[key], gain=0.6)
    raft.load_state_dict(state)
    return raft


@pytest.fixture(scope="module", params=NETWORKS)
def named(request):
    return request.param, network(request.param)


@pytest.fixture(scope="module")
def large():
    return network()


@pytest.fixture(scope="module")
def small():
    return network("raft_small")


def golden_images(name: str) -> list[torch.Tensor]:
    return [2 * recipe.uniform(f"{name}/image{i}", 1, 3, 128, 160) - 1 for i in (1, 2)]


def images(seed: int, count: int = 1, size: tuple[int, int] = (64, 80)) -> torch.Tensor:
    """Smooth images in [-1, 1]."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return 2 * F.interpolate(coarse, size, mode="bilinear") - 1


def frames(seed: int, *batch: int, size: tuple[int, int] = (64, 80)) -> torch.Tensor:
    """Frames with a mask in the middle, [*batch,4,H,W]."""
    colours = (images(seed, torch.Size(batch).numel(), size) + 1) / 2
    mask = torch.zeros_like(colours[:, :1])
    mask[..., size[0] // 4 : size[0] // 2, size[1] // 3 : size[1] // 2] = 1
    return torch.cat([colours, mask], dim=1).view(*batch, 4, *size)


def assert_close(actual, expected, relative=1e-5):
    assert actual.shape == expected.shape
    error = (actual.detach() - expected).norm() / expected.norm()
    assert error <= relative, f"relative error {error:.2e}, allowed {relative:.0e}"


# The published numbers


def test_golden_flow(named):
    name, raft = named
    first, second = (raft.encode(image) for image in golden_images(name))
    pyramid = CorrelationPyramid(first.features, second.features, radius=raft.radius)
    with torch.no_grad():
        for iterations in (1, 4, 20):
            flow, _ = raft.refine(pyramid, first, iterations)
            assert_close(flow, GOLDEN[f"{name}.flow_low_{iterations}"])
        for iterations in (1, 20):
            assert_close(raft(*golden_images(name), iterations), GOLDEN[f"{name}.flow_{iterations}"])


@pytest.mark.parametrize("case", WRAPPER)
def test_golden_stage(large, case):
    H, W = WRAPPER[case]
    target, source = (
        recipe.uniform(f"raft/wrapper/{case}/{role}", 1, 4, H, W) for role in ("target", "source")
    )
    target[:, 3], source[:, 3] = 0, 0
    target[:, 3, H // 4 : H // 2, W // 3 : W // 2] = 1
    stage = FlowStage(large, (128, 128))
    found = stage.both_ways(target, source[:, None])
    for name, value in zip(("flow", "error", "flow_backward", "error_backward"), found, strict=True):
        assert_close(value[:, 0], GOLDEN[f"wrapper.{case}.{name}"])
    for value, same in zip(stage(target, source[:, None]), found, strict=False):
        assert torch.equal(value, same)


def test_every_golden_tensor_is_tested():
    flows = {f"{n}.{what}" for n in NETWORKS for what in ("flow_1", "flow_20")}
    flows |= {f"{n}.flow_low_{i}" for n in NETWORKS for i in (1, 4, 20)}
    parts = ("flow", "error", "flow_backward", "error_backward")
    assert set(GOLDEN) == flows | {f"wrapper.{case}.{part}" for case in WRAPPER for part in parts}


def test_published_names_cover_the_published_state(named):
    name, raft = named
    state, names = raft.state_dict(), raft.published_names()
    assert names.keys() == state.keys()
    shapes = {published: list(state[key].shape) for key, group in names.items() for published in group}
    assert sum(map(len, names.values())) == len(shapes), "no name twice"
    assert shapes == KEYS[name]
    stage = FlowStage(raft)
    assert stage.published_names().keys() == stage.state_dict().keys()


# Savings


@torch.no_grad()
def test_a_batch_both_ways_is_its_pairs(named):
    name, raft = named
    first, second = images(1, 2), images(2, 2)
    flow, backward = raft.match_both_ways(raft.encode(first), raft.encode(second), 4)
    for i in range(2):
        assert_close(flow[i : i + 1], raft(first[i : i + 1], second[i : i + 1], 4))
        assert_close(backward[i : i + 1], raft(second[i : i + 1], first[i : i + 1], 4))


def test_a_stage_call_is_its_pairs(small):
    stage = FlowStage(small, (64, 64), 3)
    target, sources = frames(1, 2), frames(2, 2, 3)
    flow, error = stage(target, sources)
    assert flow.shape == (2, 3, 2, 64, 80) and error.shape == (2, 3, 1, 64, 80)
    for b in range(2):
        for t in range(3):
            one = stage(target[b : b + 1], sources[b : b + 1, t : t + 1])
            assert_close(flow[b, t], one[0][0, 0])
            assert_close(error[b, t], one[1][0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_encodings_give_the_same_bits(large, small, dtype):
    for raft in (large, small):
        stage = FlowStage(network_in(raft, dtype), (64, 64), 2)
        video = [frames(seed, 2) for seed in range(4)]
        kept = [stage.encode(frame) for frame in video]
        for centre in range(4):  # every frame in both roles
            others = [i for i in range(4) if i != centre]
            fresh = stage(video[centre], torch.stack([video[i] for i in others], dim=1))
            again = stage(kept[centre], [kept[i] for i in others])
            mixed = stage(video[centre], [video[others[0]], *(kept[i] for i in others[1:])])
            for a, b, c in zip(fresh, again, mixed, strict=True):
                assert torch.equal(a, b) and torch.equal(a, c)


def test_an_encoding_does_not_depend_on_its_batch(large):
    both = large.encode(images(1, 2))
    alone = large.encode(images(1, 2)[1:])
    for name in ("features", "hidden", "gates"):
        assert torch.equal(getattr(both, name)[1:], getattr(alone, name))


@torch.no_grad()
def test_kept_gates_are_the_published_recurrence(small):
    """One pass with the context split off is the pass on the concatenation."""
    gated = small.update.passes[0]
    hidden, context, motion = (torch.randn(1, c, 5, 6) for c in (96, 64, 82))
    x = torch.cat([context, motion], dim=1)
    both = torch.cat([hidden, x], dim=1)
    z, r = gated.update(both).sigmoid(), gated.reset(both).sigmoid()
    q = gated.candidate(torch.cat([r * hidden, x], dim=1)).tanh()
    share = gated.context_share(torch.float32)(context)
    found = gated.ready(torch.float32)(hidden, (motion,), share)
    torch.testing.assert_close(found, (1 - z) * hidden + z * q)


@torch.no_grad()
def test_fused_convolutions_agree_with_plain_ones(named, monkeypatch):
    name, raft = named
    found = raft(images(1), images(2), 5)
    monkeypatch.setattr(gi_kernels.FusedConvolution, "pays", staticmethod(lambda weight: False))
    expected = raft(images(1), images(2), 5)
    assert not torch.equal(found, expected), "nothing was fused"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_on_demand_correlation_is_the_stored_one(large, monkeypatch):
    expected = large(images(1), images(2), 3)
    monkeypatch.setattr("gi_kernels.ops.correlation_lookup.DENSE_LIMIT", 0)
    assert_close(large(images(1), images(2), 3), expected)


def test_the_reference_backend_agrees(small):
    stage = FlowStage(small, (64, 64), 2)
    expected = stage(frames(1, 1), frames(2, 1, 2))
    with gi_kernels.backend("reference"):
        found = stage(frames(1, 1), frames(2, 1, 2))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


# Sizes, precision, modes


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (9, 8), (17, 64), (61, 83), (1, 200)])
def test_any_size_is_finite(named, size):
    name, raft = named
    flow = raft(images(1, 1, size), images(2, 1, size), 3)
    assert flow.shape == (1, 2, *size) and flow.isfinite().all()


@torch.no_grad()
def test_odd_sizes_are_padded_evenly(large):
    first, second = images(1, 1, (61, 83)), images(2, 1, (61, 83))
    padding = (2, 3, 1, 2)
    padded = [F.pad(image, padding, mode="replicate") for image in (first, second)]
    expected = large(*padded, 2)[..., 1:62, 2:85]
    assert torch.equal(large(first, second, 2), expected)


@pytest.mark.parametrize("size", [(1, 1), (6, 9), (50, 70)])
def test_stage_takes_any_size(small, size):
    flow, error = FlowStage(small, (20, 36), 2)(frames(1, 1, size=size), frames(2, 1, 2, size=size))
    assert flow.shape == (1, 2, 2, *size) and error.shape == (1, 2, 1, *size)
    assert flow.isfinite().all() and error.isfinite().all()


@pytest.mark.parametrize("frames_", [(torch.zeros(0, 4, 16, 16), torch.zeros(0, 2, 4, 16, 16))])
def test_empty_batch(small, frames_):
    flow, error = FlowStage(small, (16, 16), 1)(*frames_)
    assert flow.shape == (0, 2, 2, 16, 16) and error.shape == (0, 2, 1, 16, 16)


def network_in(raft: RAFT, dtype: torch.dtype) -> RAFT:
    copy = RAFT(raft.small)
    copy.load_state_dict(raft.state_dict())
    return copy.to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("how", ["moved", "autocast"])
def test_bfloat16_is_close(named, how):
    name, raft = named
    expected = GOLDEN[f"{name}.flow_20"]
    if how == "moved":
        flow = network_in(raft, torch.bfloat16)(*golden_images(name))
    else:
        with torch.autocast("cpu", torch.bfloat16):
            flow = raft(*golden_images(name))
    assert flow.dtype == torch.float32
    assert_close(flow, expected, relative=2e-2)


def test_stage_under_autocast_keeps_flows_precise(large):
    stage = FlowStage(large, (64, 64), 4)
    arguments = frames(1, 1), frames(2, 1, 2)
    expected = stage(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = stage(*arguments)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, relative=5e-2)


@torch.no_grad()
def test_float64_agrees(small):
    double = network_in(small, torch.float64)
    flow = double(images(1).double(), images(2).double(), 3)
    assert flow.dtype == torch.float64
    assert_close(small(images(1), images(2), 3).double(), flow)


def test_gradients_reach_images_through_all_iterations(small):
    double = network_in(small, torch.float64)
    first, second = (images(seed).double().requires_grad_() for seed in (1, 2))
    flow = double(first, second, 2)
    direction = [
        torch.randn(i.shape, generator=torch.Generator().manual_seed(9)).double() for i in (first, second)
    ]
    cotangent = torch.randn(flow.shape, generator=torch.Generator().manual_seed(8)).double()
    gradients = torch.autograd.grad(flow, (first, second), cotangent)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    step = 1e-7  # norms of few pixels bend within 1e-5
    with torch.no_grad():
        ahead, behind = (
            double(first + s * direction[0], second + s * direction[1], 2) for s in (step, -step)
        )
    torch.testing.assert_close(slope, ((ahead - behind) * cotangent).sum() / (2 * step), rtol=1e-5, atol=0)


def test_always_in_eval_mode_and_frozen_in_a_stage(small):
    stage = FlowStage(small, (64, 64), 1).train()
    assert not any(module.training for module in stage.raft.modules())
    assert not any(parameter.requires_grad for parameter in stage.parameters())
    flow, _ = stage(frames(1, 1).requires_grad_(), frames(2, 1, 1))
    assert not flow.requires_grad


# Wrong arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, images(1)), TypeError, "image1: expected a torch.Tensor, got NoneType"),
        ((images(1), images(1).byte()), TypeError, "image2: expected float32.* got torch.uint8"),
        ((images(1)[:, :2], images(1)), ValueError, "image1: expected size 3 for dimension 1"),
        ((images(1), images(1)[..., 1:]), ValueError, "image2: expected size 80 for dimension 3"),
        ((images(1), images(1), 0), ValueError, "iterations: expected at least 1, got 0"),
        ((images(1), images(1), 2.0), TypeError, "iterations: expected an int, got float"),
        ((images(1)[..., :0], images(1)[..., :0]), ValueError, "image1: expected a size of at least 1"),
        (
            (images(1).to("meta"), images(1).to("meta")),
            ValueError,
            "image1: expected a tensor on cpu .* got meta",
        ),
    ],
)
def test_raft_names_wrong_arguments(small, arguments, error, message):
    with pytest.raises(error, match=message):
        small(*arguments)


def test_pairs_of_encodings_must_fit(small):
    one, other = small.encode(images(1)), small.encode(images(2, 1, (64, 72)))
    with pytest.raises(TypeError, match="second: expected an ImageEncoding, got Tensor"):
        small.match(one, images(1))
    with pytest.raises(
        ValueError, match=r"second: expected images of size \(64, 80\) like first, got \(64, 72\)"
    ):
        small.match(one, other)
    with pytest.raises(ValueError, match="second: expected 1 images like first, got 2"):
        small.match_both_ways(one, small.encode(images(1, 2)))
    low = ImageEncoding(one.features.bfloat16(), one.hidden.bfloat16(), one.gates.bfloat16(), one.size)
    with pytest.raises(TypeError, match=r"second: expected dtype torch\.float32 like first"):
        small.match(one, low)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (None, frames(1, 1, 1)),
            TypeError,
            "target: expected a torch.Tensor or a FrameEncoding, got NoneType",
        ),
        ((frames(1, 1), None), TypeError, "sources: expected a tensor or a sequence of frames, got NoneType"),
        ((frames(1, 1), []), ValueError, "sources: expected at least one source, got none"),
        (
            (frames(1, 1), frames(1, 1, 1)[:, :0]),
            ValueError,
            "sources: expected at least one source, got none",
        ),
        ((frames(1, 1), frames(1, 1)), ValueError, "sources: expected 5 dimensions"),
        ((frames(1, 1), frames(1, 2, 1)), ValueError, r"sources\[0\]: expected size 1 for dimension 0"),
        ((frames(1, 1), frames(1, 1, 2)[:, :, :3]), ValueError, "sources: expected size 4 for dimension 2"),
        ((frames(1, 1), [frames(1, 1), "x"]), TypeError, r"sources\[1\]: expected .* got str"),
        (
            (frames(1, 1)[..., 1:], frames(1, 1, 2)),
            ValueError,
            r"sources\[0\]: expected size 79 for dimension 3",
        ),
    ],
)
def test_stage_names_wrong_arguments(small, monkeypatch, arguments, error, message):
    stage = FlowStage(small, (64, 64), 1)
    monkeypatch.setattr(stage, "encode", lambda frame: pytest.fail("work was done before the check"))
    with pytest.raises(error, match=message):
        stage(*arguments)


def test_stage_names_encodings_of_another_stage(small):
    stage, other = FlowStage(small, (64, 64), 1), FlowStage(small, (64, 72), 1)
    with pytest.raises(ValueError, match=r"sources\[0\]: expected an encoding at resolution \(64, 64\), got"):
        stage(frames(1, 1), [other.encode(frames(1, 1))])
    with torch.autocast("cpu", torch.bfloat16):
        low = stage.encode(frames(1, 1))
    assert isinstance(low, FrameEncoding)
    with pytest.raises(TypeError, match=r"sources\[0\]: expected dtype torch.float32 like target"):
        stage(frames(1, 1), [low])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None,), TypeError, "raft: expected a RAFT, got NoneType"),
        ((256,), TypeError, r"resolution: expected a pair \(height, width\), got 256"),
        (((256, 0),), ValueError, "resolution: expected at least 1, got 0"),
        (((256, 256), 0), ValueError, "iterations: expected at least 1, got 0"),
    ],
)
def test_stage_names_wrong_settings(small, arguments, error, message):
    with pytest.raises(error, match=message):
        FlowStage(*arguments) if arguments == (None,) else FlowStage(small, *arguments)


# The stage without weights


def test_dis_is_a_stage():
    pytest.importorskip("cv2", reason="the [video] extra is not installed")
    from gi_model.flow import DISStage

    stage = DISStage()
    wide = frames(1, 1, size=(96, 140))
    target = wide[..., 4:132].clone()
    moved = [wide[..., 4 - d : 132 - d] for d in (2, -3)]  # by whole pixels
    flow, error = stage(target, torch.stack(moved, dim=1))
    assert flow.shape == (1, 2, 2, 96, 128) and error.shape == (1, 2, 1, 96, 128)
    inner = flow[0, :, :, 20:-20, 20:-20].flatten(2).median(dim=2).values
    torch.testing.assert_close(inner, torch.tensor([[2.0, 0.0], [-3.0, 0.0]]), atol=0.2, rtol=0)
    assert error[..., 20:-20, 20:-20].median() < 0.2
    kept = [stage.encode(frame) for frame in (target, *moved)]
    for a, b in zip(stage(kept[0], kept[1:]), (flow, error), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="sources: expected at least one source, got none"):
        stage(target, [])
