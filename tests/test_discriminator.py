"""The discriminator: the published numbers and names, second derivatives, mistakes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gi_model import export_published, load_published
from gi_model.discriminator import Discriminator
from gi_model.errors import InputError

FOLDER = Path(__file__).parent / "golden"
GOLDEN = np.load(FOLDER / "discriminator.npz")
META = json.loads(str(GOLDEN["meta"]))

_module = importlib.util.spec_from_file_location("golden_recipe", FOLDER / "recipe.py")
recipe = importlib.util.module_from_spec(_module)
_module.loader.exec_module(recipe)


def published(width: int = 64, layers: int = 4) -> Discriminator:
    """With weights that are functions of their published names."""
    made = Discriminator(3, width, layers)
    load_published(made, recipe.weights(export_published(made), ""))
    return made


def golden(name: str) -> torch.Tensor:
    return torch.from_numpy(GOLDEN[name])


def assert_near(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", META["cases"])
def test_published_numbers(case, training):
    about, name = META["cases"][case], f"{case}/{'train' if training else 'eval'}"
    model = published(about["ndf"], about["n_layers"]).train(training)
    image = recipe.uniform(f"disc/{case}/image", *about["shape"]).requires_grad_()
    logits, features = model(image)
    assert_near(logits, golden(f"{name}/logits"))
    assert [list(f.shape) for f in features] == GOLDEN[f"{name}/feat_shapes"].tolist()
    for i, feature in enumerate(features):
        assert_near(feature[0, :4, :3, :3], golden(f"{name}/feat{i}_head"))
    for kind, of in (("mean", torch.mean), ("std", lambda f: f.std(correction=0))):
        assert_near(torch.stack([of(f.double()) for f in features]), golden(f"{name}/feat_{kind}"))
    (gradient,) = torch.autograd.grad(logits.sum(), image)
    assert_near(gradient.flatten(1).norm(dim=1), golden(f"{name}/input_grad_norm"), rtol=1e-3)
    assert_near(gradient[0, :, :4, :4], golden(f"{name}/input_grad_head"), rtol=1e-3, atol=1e-4)
    if training:
        norms = [block.norm for block in model.blocks if block.norm is not None]
        assert_near(
            torch.stack([n.running_mean.mean() for n in norms]), golden(f"{name}/bn_running_mean_mean")
        )
        assert_near(torch.stack([n.running_var.mean() for n in norms]), golden(f"{name}/bn_running_var_mean"))
        counts = [n.num_batches_tracked.item() for n in norms]
        assert counts == GOLDEN[f"{name}/bn_num_batches"].tolist()


def test_published_names_and_shapes():
    with torch.device("meta"):
        model = Discriminator()
    exported = export_published(model)
    assert {name: list(t.shape) for name, t in exported.items()} == META["state_dict_ndf64_nlayers4"]
    assert sum(p.numel() for p in model.parameters()) == META["n_params"]


def test_loading_and_exporting_are_inverse_and_strict():
    source, target = published(8, 2), Discriminator(3, 8, 2)
    exported = export_published(source, "discriminator.")
    load_published(target, exported | {"generator.model.1.conv.weight": torch.zeros(1)}, "discriminator.")
    assert target.state_dict().keys() == source.state_dict().keys()
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key
    del exported["discriminator.model1.1.running_var"]
    exported["discriminator.model4.0.bias"] = torch.zeros(1)
    with pytest.raises(InputError) as caught:
        load_published(target, exported, "discriminator.")
    assert str(caught.value).splitlines()[1:] == [
        "missing (1):",
        "  model1.1.running_var",
        "unexpected (1):",
        "  model4.0.bias",
    ]


def test_second_derivatives():
    """As the penalty on the gradient at real images needs them, through batch statistics."""
    model = Discriminator(2, 3, 2).double()
    images = recipe.uniform("disc/second", 2, 2, 5, 6).double().requires_grad_()
    weights = (model.blocks[1].conv.weight, model.blocks[1].norm.weight)

    def penalty(images: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        names = ("blocks.1.conv.weight", "blocks.1.norm.weight")
        named = dict(zip(names, weights, strict=True))
        logits, _ = torch.func.functional_call(model, named, (images,))
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return gradient.square().sum((1, 2, 3))

    assert torch.autograd.gradcheck(penalty, (images, *weights))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (None, TypeError, "images: expected a torch.Tensor, got NoneType"),
        (torch.zeros(3, 8, 8), ValueError, "images: expected 4 dimensions"),
        (torch.zeros(1, 4, 8, 8), ValueError, r"images: expected size 3 .* got 4"),
        (torch.zeros(1, 3, 0, 8), ValueError, "images: expected a size of at least 1 for dimension 2"),
        (torch.zeros(1, 3, 8, 8).double(), TypeError, "images: expected dtype torch.float32"),
        (torch.zeros(1, 3, 8, 8, device="meta"), ValueError, "images: expected a tensor on cpu"),
    ],
)
def test_wrong_images(images, error, message):
    with pytest.raises(error, match=message):
        Discriminator(3, 8, 2)(images)


@pytest.mark.parametrize("name", ["in_channels", "width", "layers"])
def test_wrong_settings(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        Discriminator(**{name: 0})
    with pytest.raises(TypeError, match=f"{name}: expected an int, got float"):
        Discriminator(**{name: 1.5})
