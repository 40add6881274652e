"""The generators: the published numbers and names, cached references, the copy for inference, mistakes."""

from __future__ import annotations

import copy
import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from gi_model import configs
from gi_model.baselines import LamaGenerator, TransformerGenerator
from gi_model.configs import build_generator
from gi_model.errors import InputError
from gi_model.generator import TwoStreamGenerator
from gi_model.published import export_published, load_published
from gi_model.references import References
from gi_model.streams import (
    FoldedFourierUnit,
    FoldedReflectConv,
    FourierBlock,
    FourierUnit,
    PositionCode,
    ReflectConv,
    ResidualConv,
    TwoStreamBlock,
    crop,
    position_code,
    reflect,
    reflecting_convolution,
)

FOLDER = Path(__file__).parent / "golden"
GOLDEN = load_file(FOLDER / "operators.safetensors") | load_file(FOLDER / "generators.safetensors")
KEYS = json.loads(gzip.decompress((FOLDER / "generator_keys.json.gz").read_bytes()))

_module = importlib.util.spec_from_file_location("golden_recipe", FOLDER / "recipe.py")
recipe = importlib.util.module_from_spec(_module)
_module.loader.exec_module(recipe)

#: Small generators of each kind, for what needs no published numbers.
SMALL = {"in_channels": 4, "width": 4, "downsamplings": 2}
STREAMS = {"blocks": 3, "grid": 4, "heads": 2, "window_heads": 2}
SMALL_CONFIGS = {
    "fourier": {"kind": "two_stream", **SMALL, **STREAMS},
    "conv": {"kind": "two_stream", **SMALL, **STREAMS, "refine": "conv"},
    "no flow": {"kind": "two_stream", **SMALL, **STREAMS, "aggregates": False},
    "no attention": {"kind": "two_stream", **SMALL, **STREAMS, "attends": False},
    "pixels": {"kind": "two_stream", **SMALL, **STREAMS, "pixels": 4},
    "lama": {"kind": "lama", **SMALL, "blocks": 2},
    "transformer": {"kind": "transformer", **SMALL, "blocks": 3, "heads": 2},
}


def small(name: str = "fourier", seed: str = "weights") -> torch.nn.Module:
    """A small generator in eval mode, norms and biases not trivial."""
    generator = build_generator(SMALL_CONFIGS[name]).eval()
    generator.load_state_dict(recipe.weights(generator.state_dict(), f"small/{seed}/", gain=0.8))
    return generator


def frames(name: str, B: int, T: int, H: int, W: int, magnitude: float) -> dict[str, torch.Tensor]:
    """A call's arguments."""
    return {
        "input": recipe.uniform(f"{name}/input", B, 4, H, W),
        "srcs": recipe.uniform(f"{name}/srcs", B, T, 4, H, W),
        "flows": recipe.normal(f"{name}/flows", B, T, 2, H, W) * magnitude,
        "flow_errs": recipe.uniform(f"{name}/errs", B, T, 1, H, W),
    }


SMALL_CALL = frames("small", 2, 3, 32, 48, 5)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    """Mean absolute difference of images; few channels make single pixels err more in low precision."""
    difference = (actual - expected).abs().mean().item()
    assert actual.dtype == expected.dtype and difference <= allowed, difference


# -- the published numbers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours():
    return golden_generator("ours", "ours/")


def golden_generator(config: str, prefix: str) -> torch.nn.Module:
    generator = build_generator(config).eval()
    load_published(generator, recipe.weights(export_published(generator), prefix, gain=0.8))
    return generator


def check(actual: torch.Tensor, key: str, allowed: float = 5e-6) -> None:
    expected = GOLDEN[key]
    assert actual.shape == expected.shape, key
    error = ((actual.detach() - expected).norm() / expected.norm()).item()
    assert error <= allowed, f"{key}: relative error {error:.2e}, allowed {allowed:.0e}"


@torch.no_grad()
def test_ours(ours):
    call = frames("ours/ours_256", 1, 2, 256, 256, 4)
    out, attention = ours(**call, return_attention=True)
    check(out, "ours_256.out")
    check(attention[0].read, "ours_256.read_attn0")
    check(attention[0].write, "ours_256.write_attn0")
    assert len(attention) == 4

    references = ours.encode_references(call.pop("srcs"))
    assert torch.equal(ours(**call, references=references), out)


@torch.no_grad()
def test_ours_at_a_size_that_does_not_divide_into_windows(ours):
    check(ours(**frames("ours/ours_odd", 1, 1, 200, 264, 6)), "ours_odd.out")


@torch.no_grad()
def test_ours_for_inference(ours):
    fast, call = ours.for_inference(), frames("ours/ours_256", 1, 2, 256, 256, 4)
    check(fast(**call), "ours_256.out")
    out = ours.for_inference(torch.bfloat16)(**call)
    assert out.dtype == torch.float32
    check(out, "ours_256.out", allowed=0.02)


@torch.no_grad()
def test_ours_without_fourier_convolutions():
    generator = golden_generator("ours_no_ffc", "ours_no_ffc/")
    check(generator(**frames("ours_no_ffc/no_ffc_256", 1, 2, 256, 256, 4)), "no_ffc_256.out")


@torch.no_grad()
def test_lama():
    check(golden_generator("lama", "lama/")(recipe.uniform("lama/input", 1, 4, 128, 160)), "lama.out")


def test_training():
    generator = golden_generator("ours", "ours/train/").train()
    out = generator(**frames("ours/train", 2, 2, 128, 128, 4))
    loss = (out - recipe.uniform("ours/train/target", *out.shape)).abs().mean()
    loss.backward()
    check(out, "train.out")
    check(loss, "train.loss")
    check(generator.encoder[0].norm.running_mean, "train.bn_mean_after")

    published = {own: names[0] for own, names in generator.published_names().items()}
    norms = {published[name]: p.grad.norm().item() for name, p in generator.named_parameters()}
    expected = json.loads((FOLDER / "train_grad_norms.json").read_text())
    assert norms.keys() == expected.keys()
    for name, norm in expected.items():
        # Gradients that vanish are rounding noise; the windows are of one pixel here.
        assert norms[name] == pytest.approx(norm, rel=5e-3, abs=1e-7), name


@pytest.mark.parametrize(("case", "size"), [("square", (8, 8)), ("wide", (5, 9))])
def test_position_code_and_latents(case, size):
    code = PositionCode(12)
    recipe.fill(code, f"latent/{case}/")
    check(code(recipe.normal(f"latent/{case}/x", 1, 12, *size)), f"latent.{case}.features")
    check(position_code(*size).flatten(1).T[None], f"latent.{case}.position_code")

    generator = build_generator(SMALL_CONFIGS["fourier"])
    assert generator.published_names()["latents"] == ("model.4.latents",)
    check(
        recipe.weights({"latents": torch.empty(16, 16)}, f"latent/{case}/")["latents"][None],
        f"latent.{case}.latents",
    )
    state = (generator.latents, *generator._encode(torch.rand(2, 4, 16, 16))[1])
    assert all(torch.equal(state[0], latents) for latents in state[1:]), "expanded over the batch"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("margin", [0, 1, 3])
def test_reflect(margin, memory_format):
    """``F.pad``, in the layout of the map, which is not kept; so is the gradient."""
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64).contiguous(memory_format=memory_format)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = reflect(x, margin)
    assert not kept
    assert torch.equal(out, F.pad(x, (margin,) * 4, mode="reflect"))
    assert out.is_contiguous(memory_format=memory_format)
    (grad,) = torch.autograd.grad(out, x, torch.randn_like(out), retain_graph=True)
    assert grad.is_contiguous(memory_format=memory_format)
    assert torch.autograd.gradcheck(lambda x: reflect(x, margin), x)
    assert torch.autograd.gradgradcheck(lambda x: reflect(x, margin) ** 3, x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("margin", [0, 1])
def test_crop(margin, memory_format):
    """Indexing, but the gradient keeps the layout."""
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64).contiguous(memory_format=memory_format)
    x.requires_grad_()
    out = crop(x, 1, 4, margin)
    assert torch.equal(out, x[:, 1:4, margin : 4 - margin, margin : 6 - margin])
    assert out.data_ptr() == x[:, 1:, margin:, margin:].data_ptr()
    incoming = torch.randn(out.shape).double().contiguous(memory_format=memory_format)
    (grad,) = torch.autograd.grad(out, x, incoming)
    assert grad.is_contiguous(memory_format=memory_format)
    assert torch.autograd.gradcheck(lambda x: crop(x, 1, 4, margin), x)


@pytest.mark.parametrize("padding", [1, 3])
def test_reflecting_convolution(padding):
    """As PyTorch's, by value and state."""
    size = 2 * padding + 1
    conv = ReflectConv(4, 6, size, stride=2, groups=2)
    plain = torch.nn.Conv2d(4, 6, size, 2, padding, groups=2, padding_mode="reflect")
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 4, 8, 9)
    assert torch.allclose(conv(x), plain(x), atol=1e-6)


def test_fourier_block():
    block = FourierBlock(32, 0.75).eval()
    load_published(block, recipe.weights(export_published(block), "ffc/small/"))
    x = recipe.normal("ffc/small/x", 2, 32, 12, 16).requires_grad_()
    out = block(x)
    check(out, "ffc.small.out")
    (grad,) = torch.autograd.grad(out, x, recipe.normal("ffc/small/cotangent", *out.shape))
    check(grad, "ffc.small.grad_x")
    block.train()
    check(block(x), "ffc.small.out_train")
    check(block.first.global_norm.running_mean, "ffc.small.running_mean_after")


@pytest.mark.parametrize(
    ("case", "refine"),
    [("block_ffc", lambda: FourierBlock(32, 0.75)), ("block_conv", lambda: ResidualConv(32, 4))],
)
def test_two_stream_block(case, refine):
    block = TwoStreamBlock(32, 4, 4, 16, (refine(), refine())).eval()
    load_published(block, recipe.weights(export_published(block), f"{case}/small/"))
    shapes = {"features": (2, 32, 12, 16), "latents": (2, 16, 32), "k": (2, 4, 32, 8), "v": (2, 4, 32, 8)}
    features, latents, key, value = (recipe.normal(f"{case}/small/{n}", *s) for n, s in shapes.items())
    (features, latents), _, looked = block((features, latents), [(key, value)])
    check(features, f"{case}.small.features")
    check(latents, f"{case}.small.latents")
    assert looked is None


# -- the published names -----------------------------------------------------------------------------


@pytest.mark.parametrize("config", KEYS)
def test_published_names_and_shapes(config):
    with torch.device("meta"):
        generator = build_generator(config)
    exported = export_published(generator)
    found = {key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in exported.items()}
    assert found == KEYS[config]
    assert generator.published_names().keys() == generator.state_dict().keys()
    load_published(generator, exported)


@pytest.mark.parametrize("prefix", ["", "generator."])
@pytest.mark.parametrize("name", ["fourier", "conv", "no flow", "lama"])
def test_export_then_load_is_the_identity(name, prefix):
    source, target = small(name), small(name, "others")
    exported = export_published(source, prefix)
    others = {"discriminator.model0.0.weight": torch.zeros(1)} if prefix else {}
    load_published(target, exported | others, prefix)
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_loading_lists_all_that_does_not_fit_and_changes_nothing():
    generator = small()
    before = copy.deepcopy(generator.state_dict())
    state = {key: tensor + 1 for key, tensor in export_published(generator).items()}
    state["model.1.conv.wieght"] = state.pop("model.1.conv.weight")
    state["model.2.norm.bias"] = torch.zeros(9)
    state["model.3.norm.bias"] = "zeros"
    state["other"] = torch.zeros(1)
    with pytest.raises(InputError) as caught:
        load_published(generator, state)
    assert str(caught.value).splitlines() == [
        "state_dict: these weights do not fit TwoStreamGenerator:",
        "missing (1):",
        "  model.1.conv.weight (did you mean 'model.1.conv.wieght'?)",
        "unexpected (2):",
        "  model.1.conv.wieght (did you mean 'model.1.conv.weight'?)",
        "  other",
        "misshapen (2):",
        "  model.2.norm.bias: expected [8], got [9]",
        "  model.3.norm.bias: expected [16], got a str",
    ]
    assert all(torch.equal(before[key], value) for key, value in generator.state_dict().items())


@pytest.mark.parametrize(
    ("given", "asked", "hint"),
    [
        ("generator.", "", "prefix='generator.'"),
        ("", "generator.", "prefix=''"),
        ("a.b.", "b.", "prefix='a.b.'"),
    ],
)
def test_loading_with_the_wrong_prefix_names_the_right_one(given, asked, hint):
    generator = small("lama")
    with pytest.raises(InputError, match="missing") as caught:
        load_published(generator, export_published(generator, given), asked)
    assert hint in str(caught.value).splitlines()[-1]


def test_one_tensor_under_two_names():
    class Doubled(torch.nn.Linear):
        def published_names(self):
            return {"weight": ("w", "again.w"), "bias": ("b",)}

    layer, like = Doubled(2, 2), torch.rand(2, 2)
    load_published(layer, {"w": like, "again.w": like.clone(), "b": torch.zeros(2)})
    assert torch.equal(export_published(layer)["again.w"], like)
    with pytest.raises(InputError, match=r"different tensors under names of one:\n  w, again\.w"):
        load_published(layer, {"w": like, "again.w": like + 1, "b": torch.zeros(2)})


def test_only_modules_with_published_names_convert():
    for convert in (export_published, lambda module: load_published(module, {})):
        with pytest.raises(TypeError, match="module: expected one with published_names"):
            convert(torch.nn.Linear(1, 1))


# -- initialisation and training ---------------------------------------------------------------------


def test_initialisation():
    generator = build_generator({"kind": "two_stream", **SMALL, "width": 16, "heads": 8})
    for name, part in generator.named_modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.Linear) and part.weight.numel() > 1000:
            assert part.weight.std().item() == pytest.approx(0.02, rel=0.15), name
        if isinstance(part, torch.nn.Conv2d | torch.nn.Linear | torch.nn.LayerNorm) and part.bias is not None:
            assert not part.bias.any(), name
        if isinstance(part, torch.nn.ConvTranspose2d):
            assert part.weight.std().item() > 0.021, name
    assert generator.latents.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_every_parameter_has_a_gradient(name):
    generator = small(name).train()
    generator(**SMALL_CALL).sum().backward()
    assert [n for n, p in generator.named_parameters() if p.grad is None] == []


def test_batch_norm_updates():
    generator = small().train()
    generator(**SMALL_CALL)
    counts = {
        key: n.item() for key, n in generator.state_dict().items() if key.endswith("num_batches_tracked")
    }
    crossed = {key for key in counts if key.startswith(("blocks.0.", "blocks.1."))}
    assert {counts[key] for key in crossed} == {2}, "references first, then targets"
    assert {counts[key] for key in counts.keys() - crossed} == {1}, "targets and references together"
    mean = torch.cat([SMALL_CALL["input"][:, None], SMALL_CALL["srcs"]], 1).flatten(0, 1)
    first = generator.encoder[0]
    expected = 0.9 * small().encoder[0].norm.running_mean + 0.1 * first.conv(mean).mean((0, 2, 3))
    torch.testing.assert_close(first.norm.running_mean, expected)


# -- references --------------------------------------------------------------------------------------

CROSSING = ["fourier", "conv", "no flow", "no attention", "pixels", "transformer"]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("optimised", [False, True], ids=["plain", "for_inference"])
@pytest.mark.parametrize("name", CROSSING)
def test_cached_references_give_the_same_bits(name, optimised, autocast):
    generator = small(name).for_inference() if optimised else small(name)
    call = dict(SMALL_CALL)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        joint = generator(**call)
        references = generator.encode_references(call.pop("srcs"))
        assert torch.equal(generator(**call, references=references), joint)
    assert joint.dtype == torch.float32
    assert_near(joint, small(name)(**SMALL_CALL), 0.02 if autocast else 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("how", ["plain", "for_inference", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", CROSSING)
def test_what_is_kept_of_a_reference_does_not_depend_on_the_others(name, how):
    generator = small(name)
    if how in ("for_inference", "bfloat16"):
        generator = generator.for_inference(torch.bfloat16 if how == "bfloat16" else None)
    # Large enough for products to be computed otherwise in larger batches.
    srcs = recipe.uniform("small/srcs_128", 1, 4, 4, 128, 128)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        joint = generator.encode_references(srcs)
        first, *others = (generator.encode_references(srcs[:, t : t + 1]) for t in range(4))
        for other in others:
            first = first.append(other)
        two = generator.encode_references(srcs[:, [3, 1]])
    for given, expected in ((first, joint), (two, joint.drop(0, 2).reorder([1, 0]))):
        assert (len(given), given.nbytes) == (len(expected), expected.nbytes)
        for ours, theirs in zip(given.crossings, expected.crossings, strict=True):
            for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
                assert torch.equal(a, b) and a.stride() == b.stride()


@torch.no_grad()
@pytest.mark.parametrize("name", CROSSING)
def test_references_are_appended_dropped_and_reordered(name):
    generator, srcs = small(name), SMALL_CALL["srcs"]
    all_three = generator.encode_references(srcs)

    def output(references: References, *order: int) -> torch.Tensor:
        flow = {key: SMALL_CALL[key][:, list(order)] for key in ("flows", "flow_errs")}
        return generator(SMALL_CALL["input"], references=references, **flow)

    expected = output(all_three, 0, 1, 2)
    appended = generator.encode_references(srcs[:, :1]).append(generator.encode_references(srcs[:, 1:]))
    assert torch.equal(output(appended, 0, 1, 2), expected)
    torch.testing.assert_close(output(all_three.reorder([2, 0, 1]), 2, 0, 1), expected, atol=1e-5, rtol=0)
    assert torch.equal(output(all_three.reorder([2, 0, 1]).reorder([1, 2, 0]), 0, 1, 2), expected)

    two = all_three.drop(1)
    assert (len(all_three), len(appended), len(two), len(all_three.drop(0, -1))) == (3, 3, 2, 1)
    assert torch.equal(output(two, 0, 2), output(generator.encode_references(srcs[:, [0, 2]]), 0, 2))
    # Nothing is computed anew, and the layout in memory stays.
    for kept, crossing in zip(two.crossings, all_three.crossings, strict=True):
        for part, whole in zip(kept.tensors(), crossing.tensors(), strict=True):
            assert torch.equal(part, whole[:, [0, 2]])
            order = [sorted(range(2, 5), key=lambda d, t=t: -t.stride(d)) for t in (part, whole)]
            assert order[0] == order[1]


@torch.no_grad()
def test_references_know_their_memory_and_move():
    references = small().encode_references(SMALL_CALL["srcs"])
    # Per crossed block: keys and values of 16 latents, and of 8 x 12 pixels, 16 channels each.
    assert references.nbytes == 2 * 2 * (2 * 3) * (16 + 8 * 12) * 16 * 4
    assert references.drop(0).nbytes * 3 == references.nbytes * 2
    moved = references.to("meta")
    assert {t.device.type for c in moved.crossings for t in c.tensors()} == {"meta"}
    assert moved.nbytes == references.nbytes
    assert moved.append(moved).reorder([5, 4, 3, 2, 1, 0]).drop(0).nbytes * 3 == references.nbytes * 5
    with pytest.raises(ValueError, match=r"other: expected references like these.*cpu, got .*meta"):
        references.append(moved)
    with pytest.raises(ValueError, match=r"references: expected torch.float32 on cpu like the weights"):
        call = {key: SMALL_CALL[key] for key in ("input", "flows", "flow_errs")}
        small()(**call, references=moved)
    for given, same in zip(references.crossings, references.to("cpu").crossings, strict=True):
        assert all(a is b for a, b in zip(given.tensors(), same.tensors(), strict=True))
    assert small("lama").encode_references(SMALL_CALL["srcs"]).nbytes == 0


@torch.no_grad()
def test_lama_ignores_references():
    generator = small("lama")
    alone = generator(SMALL_CALL["input"])
    assert torch.equal(generator(**SMALL_CALL), alone)
    assert torch.equal(
        generator(SMALL_CALL["input"], references=generator.encode_references(SMALL_CALL["srcs"])), alone
    )
    assert generator(SMALL_CALL["input"], return_attention=True)[1] == []


@torch.no_grad()
@pytest.mark.parametrize("name", ["fourier", "transformer"])
def test_the_references_matter(name):
    generator, expected = small(name), small(name)(**SMALL_CALL)
    assert not torch.allclose(
        generator(**SMALL_CALL | {"srcs": SMALL_CALL["srcs"].flip(3)}), expected, atol=1e-4
    )


# -- for inference -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_the_copy_for_inference_agrees(name, channels_last):
    generator = small(name)
    before = copy.deepcopy(generator.state_dict())
    expected = generator(**SMALL_CALL)
    fast = generator.for_inference(channels_last=channels_last)
    torch.testing.assert_close(fast(**SMALL_CALL), expected, atol=1e-5, rtol=0)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in fast.modules()) <= 2 * STREAMS["blocks"]
    assert_near(generator.for_inference(torch.bfloat16, channels_last)(**SMALL_CALL), expected, 0.02)
    assert not any(p.requires_grad for p in fast.parameters())
    assert all(torch.equal(before[key], value) for key, value in generator.state_dict().items())
    assert torch.equal(generator(**SMALL_CALL), expected)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (6, 1), (2, 66)], ids=str)
def test_folded_spectra(size):
    unit = FourierUnit(6).double().eval()
    unit.norm.running_mean.normal_()
    unit.norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    torch.testing.assert_close(FoldedFourierUnit(unit)(x), x + unit(x))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_reflecting_convolutions_follow_their_weights_dtype(dtype):
    """Large enough for the kernel; cast after the kernel has seen the weight."""
    conv = FoldedReflectConv(64, 64)
    conv.bias = torch.nn.Parameter(torch.randn(64))
    x, addend = (torch.randn(1, 64, 9, 6).to(memory_format=torch.channels_last) for _ in range(2))
    expected = F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), conv.weight, conv.bias) + addend)
    torch.testing.assert_close(conv(x, addend=addend, activation="relu"), expected, atol=1e-5, rtol=0)
    parts = x.to(dtype).split([16, 48], dim=1)
    found = conv.to(dtype)(*parts, addend=addend.to(dtype), activation="relu")
    assert found.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradients_of_reflecting_convolutions(wanted):
    """Of the kernel's result as of PyTorch's; once and twice."""
    x = torch.randn(2, 64, 5, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    weight = torch.randn(48, 64, 3, 3, dtype=torch.float64)
    given = [t.requires_grad_(w) for t, w in zip((x, weight), wanted, strict=True)]

    def results(call):
        out = call(x, reflect(x, 1), weight)
        some = [t for t in given if t.requires_grad]
        gradients = torch.autograd.grad(out.square().sum(), some, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in gradients), some)
        return out, *gradients, *again

    found, expected = results(reflecting_convolution), results(lambda _, padded, w: F.conv2d(padded, w))
    assert "ReflectingConvolution" in type(found[0].grad_fn).__name__
    for got, wanted_one in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted_one)


def test_reflecting_convolutions_are_differentiable():
    conv = FoldedReflectConv(64, 64).double()
    x = torch.randn(1, 64, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    conv(x, activation="relu").sum().backward()
    assert x.grad is not None and conv.weight.grad is not None and conv.kept is None


@torch.no_grad()
def test_the_copy_for_inference_keeps_few_position_codes():
    fast = small().for_inference()
    for side in (2, *range(9, 13), 2, 11, 12, 13, 2):
        x = torch.rand(1, 4, 4 * side, 32)
        flow = {"flows": torch.zeros(1, 1, 2, 8, 8), "flow_errs": torch.zeros(1, 1, 1, 8, 8)}
        out = fast(x, x[:, None], **flow)
        torch.testing.assert_close(out, small()(x, x[:, None], **flow), atol=1e-5, rtol=0)
    assert list(fast.code.kept) == [(side, 8) for side in (11, 12, 13, 2)], "the last few"


def test_the_copy_for_inference_is_not_trained():
    fast = small().train().for_inference()
    assert not fast.training
    fast.eval()
    with pytest.raises(ValueError, match=r"mode: expected False"):
        fast.train()
    with pytest.raises(ValueError, match="has no published names"):
        export_published(fast)


@torch.no_grad()
def test_synchronised_norms_fold_too():
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(small())
    torch.testing.assert_close(
        synchronised.for_inference()(**SMALL_CALL), small()(**SMALL_CALL), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_position_codes_kept_under_autocast_are_not_rounded():
    fast = small().for_inference()
    with torch.autocast("cpu", torch.bfloat16):
        fast(**SMALL_CALL)
    torch.testing.assert_close(fast(**SMALL_CALL), small()(**SMALL_CALL), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["fourier", "transformer", "lama"])
def test_double_precision(name):
    exact = small(name).double()(**{key: value.double() for key, value in SMALL_CALL.items()})
    torch.testing.assert_close(small(name)(**SMALL_CALL).double(), exact, atol=1e-5, rtol=0)


# -- configurations ----------------------------------------------------------------------------------


def published_config(kind: str, **changed: object) -> dict:
    """A whole configuration in the published layout."""
    ratio = "${model.params.config.generator.resnet_conv_kwargs.ratio_gin}"
    generator = {
        "kind": kind, "is_deformable": True, "n_cross": 2, "input_nc": 4, "output_nc": 3, "ngf": 64,
        "n_downsampling": 3, "n_blocks": 4, "add_out_act": "sigmoid",
        "resnet_conv_kwargs": {"ratio_gin": 0.75, "ratio_gout": ratio, "enable_lfu": False},
    }  # fmt: skip
    return {
        "model": {
            "base_learning_rate": 1e-5,
            "target": "gi.models.inpainting.lama_guided.DefaultInpaintingTrainingModule",
            "params": {
                "monitor": "x",
                "flow_cfg": {"target": "gi.modules.warp.raft.RAFT", "params": {"resolution": [256, 256]}},
                "config": {
                    "losses": {"adversarial": {"kind": "r1", "weight": 10}},
                    "optimizers": {"generator": {"kind": "adam", "lr_factor": 1.0}},
                    "generator": generator | changed,
                    "discriminator": {"kind": "pix2pixhd_nlayer", "ndf": 64},
                },
            },
        },
        "data": {"target": "gi.main.DataModuleFromConfig", "params": {"batch_size": 8}},
        "lightning": {"trainer": {"benchmark": True}},
    }


CROSSED = {
    "is_crossattending": True, "num_latents_sqrt": 16, "num_groups": 4, "read_write_heads": 8, "pre_lama": 0,
    "post_lama": 0,
}  # fmt: skip
PLAIN = {"enable_lfu": False, "ratio_gin": 0, "ratio_gout": 0}
BASELINE = "gi.modules.gi.lama_guided"
PUBLISHED = {
    "ours": published_config(f"{BASELINE}.GIResNetGenerator", **CROSSED, block_type="ffc"),
    "ours_big": published_config(f"{BASELINE}.GIResNetGenerator", **CROSSED, block_type="ffc", n_blocks=12),
    "ours_no_ffc": published_config(f"{BASELINE}.GIResNetGenerator", **CROSSED, n_blocks=6),
    "lama": published_config(
        f"{BASELINE}_ffc.FFCResNetGenerator",
        n_blocks=6,
        init_conv_kwargs=PLAIN,
        downsample_conv_kwargs=PLAIN
        | {
            "ratio_gin": "${model.params.config.generator.init_conv_kwargs.ratio_gout}",
            "ratio_gout": "${model.params.config.generator.downsample_conv_kwargs.ratio_gin}",
        },
    ),
    "transformer": published_config(
        f"{BASELINE}_baseline.TrafoResNetGenerator",
        **CROSSED,
        n_blocks=6,
        n_downsampling=4,
        is_deformable=False,
    ),
}


def architecture(config: object) -> dict[str, torch.Size]:
    with torch.device("meta"):
        generator = build_generator(config)
    return {"kind": type(generator).__name__, **{key: t.shape for key, t in generator.state_dict().items()}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_accepted_unchanged(name, tmp_path):
    expected = architecture(name)
    section = PUBLISHED[name]["model"]["params"]["config"]["generator"]
    parameters = {key: value for key, value in section.items() if key != "kind"}
    for config in (PUBLISHED[name], section, {"target": section["kind"], "params": parameters}):
        assert architecture(config) == expected
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(PUBLISHED[name]))
    assert architecture(path) == architecture(str(path)) == expected


def test_named_configurations():
    kinds = {"ours": 4, "ours_big": 12, "ours_no_ffc": 6, "lama": 6, "transformer": 6, "tiny": 2}
    with torch.device("meta"):
        found = {name: build_generator(name) for name in configs.NAMED}
    assert {name: len(generator.blocks) for name, generator in found.items()} == kinds
    assert isinstance(found["ours"], TwoStreamGenerator)
    assert isinstance(found["lama"], LamaGenerator)
    assert isinstance(found["transformer"], TransformerGenerator)
    assert found["transformer"].code.channels == 1024


def with_entry(path: str, value: object) -> dict:
    """The published configuration ``ours`` with one entry changed or added."""
    tree = copy.deepcopy(PUBLISHED["ours"])
    *parents, leaf = path.split(".")
    section = tree
    for key in parents:
        section = section[key]
    section[leaf] = value
    return tree


GENERATOR = "model.params.config.generator"
WRONG_CONFIGS = {
    "name": ("our", r"unknown name: 'our' \(did you mean 'ours'\?\)"),
    "type": (3, "expected a name, a path or a mapping, got int"),
    "nothing": ({}, r"expected a 'kind' \(two_stream, lama, transformer\)"),
    "own key": ({"kind": "two_stream", "blcks": 3}, r"'blcks' \(did you mean 'blocks'\?\)"),
    "own kind": ({"kind": "two_strem"}, r"unknown kind: 'two_strem' \(did you mean 'two_stream'\?\)"),
    "own value": ({"kind": "two_stream", "blocks": 0}, "blocks: expected at least 1, got 0"),
    "own type": ({"kind": "two_stream", "attends": "no"}, "attends: expected a bool, got str"),
    "own choice": (
        {"kind": "two_stream", "refine": "ffc"},
        "refine: expected 'fourier' or 'conv', got 'ffc'",
    ),
    "own ratio": ({"kind": "lama", "global_ratio": 1.0}, "global_ratio: expected at least 2 of 512 channels"),
    "hostile kind": ({"kind": "os.system"}, "unknown kind: 'os.system'"),
    "hostile target": ({"target": "os.system", "params": {"command": "x"}}, "unknown kind: 'os.system'"),
    "hostile list": ({"kind": ["os.system"]}, "unknown kind"),
    "deep target": (with_entry("data.target", "os.system"), "unknown target in data: 'os.system'"),
    "deep kind": (
        with_entry("model.params.config.discriminator.kind", "x.Y"),
        "unknown kind in .*discriminator: 'x.Y'",
    ),
    "own class": (
        with_entry(f"{GENERATOR}.kind", "gi_model.generator.TwoStreamGenerator"),
        "unknown kind in",
    ),
    "published key": (with_entry(f"{GENERATOR}.n_block", 4), r"'n_block' \(did you mean 'n_blocks'\?\)"),
    "outer key": (with_entry("model.params.monitr", "x"), r"'monitr' \(did you mean 'monitor'\?\)"),
    "activation": (
        with_entry(f"{GENERATOR}.add_out_act", True),
        "add_out_act: only 'sigmoid' is supported, got True",
    ),
    "block type": (
        with_entry(f"{GENERATOR}.block_type", "fcc"),
        r"block_type: 'fcc' \(did you mean 'ffc'\?\)",
    ),
    "pre_lama": (with_entry(f"{GENERATOR}.pre_lama", 2), "pre_lama: only 0 is supported, got 2"),
    "local Fourier": (
        with_entry(f"{GENERATOR}.resnet_conv_kwargs.enable_lfu", True),
        "enable_lfu: only false",
    ),
    "ratios": (with_entry(f"{GENERATOR}.resnet_conv_kwargs.ratio_gin", "much"), "expected equal numbers"),
    "nowhere": (
        with_entry(f"{GENERATOR}.ngf", "${model.width}"),
        r"\$\{model.width\} leads nowhere: .*'width'",
    ),
    "circle": (with_entry(f"{GENERATOR}.ngf", f"${{{GENERATOR}.ngf}}"), "leads back to itself"),
    "no section": (with_entry("model.params.config", {}), "expected a section model.params.config.generator"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_wrong_configurations(case):
    config, message = WRONG_CONFIGS[case]
    with pytest.raises(InputError, match=message) as caught, torch.device("meta"):
        build_generator(config)
    assert str(caught.value).startswith("config: ")


def test_yaml_files(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("!!python/object/apply:os.system ['true']")
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "yaml", None)
        with pytest.raises(InputError, match="pip install pyyaml"):
            build_generator(path)
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    with pytest.raises(InputError, match=r"config.yaml is not YAML: could not determine a constructor"):
        build_generator(path)
    with pytest.raises(InputError, match=r"cannot read .*missing.yml"):
        build_generator(tmp_path / "missing.yml")
    path.write_text("- kind")
    with pytest.raises(InputError, match=r"expected a name, a path or a mapping in .*config.yaml, got list"):
        build_generator(path)


# -- mistakes in a call ------------------------------------------------------------------------------


def other_references(**call: torch.Tensor) -> References:
    return small().encode_references(call.get("srcs", SMALL_CALL["srcs"]))


WRONG_CALLS = {
    "input type": ({"input": None}, TypeError, "input: expected a torch.Tensor, got NoneType"),
    "input rank": ({"input": torch.rand(4, 32, 48)}, ValueError, "input: expected 4 dimensions .*got 3"),
    "input batch": ({"input": torch.rand(0, 4, 32, 48)}, ValueError, "input: expected a size of at least 1"),
    "input channels": (
        {"input": torch.rand(2, 3, 32, 48)},
        ValueError,
        r"input: expected size 4 .*\[2, 3, 32, 48\]",
    ),
    "input dtype": (
        {"input": torch.rand(2, 4, 32, 48).double()},
        TypeError,
        "input: expected dtype torch.float32",
    ),
    "input device": (
        {"input": torch.rand(2, 4, 32, 48, device="meta")},
        ValueError,
        "input: expected a tensor on cpu",
    ),
    "size": (
        {"input": torch.rand(2, 4, 32, 46), "srcs": torch.rand(2, 3, 4, 32, 46)},
        ValueError,
        "expected height and width to be multiples of 4, at least 8, got 32 x 46",
    ),
    "small size": (
        {"input": torch.rand(2, 4, 4, 48), "srcs": torch.rand(2, 3, 4, 4, 48)},
        ValueError,
        "expected height and width to be multiples of 4, at least 8, got 4 x 48",
    ),
    "srcs size": ({"srcs": torch.rand(2, 3, 4, 32, 32)}, ValueError, "srcs: expected size 48 .*got 32"),
    "srcs batch": ({"srcs": torch.rand(1, 3, 4, 32, 48)}, ValueError, "srcs: expected size 2 .*got 1"),
    "no srcs": ({"srcs": torch.rand(2, 0, 4, 32, 48)}, ValueError, "srcs: expected a size of at least 1"),
    "nothing": ({"srcs": None}, ValueError, "srcs, references: expected one of the two, got neither"),
    "both": (
        {"references": other_references()},
        ValueError,
        "srcs, references: expected one of the two, got both",
    ),
    "no flow": ({"flows": None}, ValueError, r"flows: expected a tensor \[2, 3, 2, h, w\], got None"),
    "no error": (
        {"flow_errs": None},
        ValueError,
        r"flow_errs: expected a tensor \[2, 3, 1, h, w\], got None",
    ),
    "flows": ({"flows": torch.rand(2, 2, 2, 8, 8)}, ValueError, "flows: expected size 3 .*got 2"),
    "empty flow": ({"flows": torch.rand(2, 3, 2, 0, 8)}, ValueError, "flows: expected a size of at least 1"),
    "errors": ({"flow_errs": torch.rand(2, 3, 2, 8, 8)}, ValueError, "flow_errs: expected size 1 .*got 2"),
    "references type": (
        {"srcs": None, "references": 3},
        TypeError,
        "references: expected References, got int",
    ),
    "references size": (
        {"srcs": None, "references": other_references(srcs=torch.rand(2, 3, 4, 32, 32))},
        ValueError,
        "references: expected those of 2 x T frames of 32 x 48 like input, got 2 x 3 of 32 x 32",
    ),
    "references count": (
        {"srcs": None, "references": other_references().drop(0)},
        ValueError,
        "flows: expected size 2",
    ),
    "references kind": (
        {"srcs": None, "references": small("lama").encode_references(SMALL_CALL["srcs"])},
        ValueError,
        "references: expected those of this generator",
    ),
    "references device": (
        {"srcs": None, "references": other_references().to("meta")},
        ValueError,
        "references: expected torch.float32 on cpu like the weights, got torch.float32 on meta",
    ),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_calls_are_refused_before_any_work(case):
    changed, error, message = WRONG_CALLS[case]
    generator = small()
    generator.encoder.forward = lambda x: pytest.fail("work was done")
    with pytest.raises(error, match=message):
        generator(**SMALL_CALL | changed)


def test_training_wants_targets_and_references_together():
    generator = small()
    references = generator.encode_references(SMALL_CALL["srcs"])
    generator.train()
    with pytest.raises(ValueError, match="srcs: expected eval mode to encode references"):
        generator.encode_references(SMALL_CALL["srcs"])
    with pytest.raises(ValueError, match="references: expected srcs when training"):
        generator(**SMALL_CALL | {"srcs": None, "references": references})


def test_wrong_uses_of_references():
    references = other_references()
    with pytest.raises(TypeError, match="other: expected References, got Tensor"):
        references.append(SMALL_CALL["srcs"])
    with pytest.raises(ValueError, match=r"other: expected references like these: batch 2, .* got batch 1"):
        references.append(other_references(srcs=SMALL_CALL["srcs"][:1]))
    with pytest.raises(ValueError, match="other: expected references like these"):
        references.append(small("no flow").encode_references(SMALL_CALL["srcs"]))
    with pytest.raises(IndexError, match="expected indices of 3 references, got 3"):
        references.drop(3)
    with pytest.raises(ValueError, match="expected at least one reference to remain of 3"):
        references.drop(0, 1, 2)
    with pytest.raises(ValueError, match=r"order: expected a permutation of 0 ... 2, got \[0, 0, 1\]"):
        references.reorder([0, 0, 1])
