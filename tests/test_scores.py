"""SSIM, PSNR, FID, bins, aggregation: the published numbers and names."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gi_model import export_published, load_checkpoint, load_published
from gi_model.errors import InputError
from gi_model.evaluation.frechet import frechet_distance
from gi_model.evaluation.images import Measures
from gi_model.evaluation.inception import Inception, inception
from gi_model.evaluation.lpips import LPIPS
from gi_model.evaluation.scores import (
    aggregate,
    bin_index,
    bin_names,
    integral,
    published_names,
    reference_key,
)
from gi_model.evaluation.similarity import psnr, ssim, ssim_map

FOLDER = Path(__file__).parent / "golden"

_module = importlib.util.spec_from_file_location("golden_recipe", FOLDER / "recipe.py")
recipe = importlib.util.module_from_spec(_module)
_module.loader.exec_module(recipe)


def golden(name: str) -> tuple[dict[str, np.ndarray], dict]:
    arrays = dict(np.load(FOLDER / f"{name}.npz"))
    return arrays, json.loads(str(arrays.pop("meta")))


def test_ssim() -> None:
    arrays, meta = golden("ssim")
    for case, about in meta["cases"].items():
        x, y = (recipe.uniform(f"ssim/{case}/{which}", *about["shape"]) for which in "xy")
        images = {"x": x, "y": y, "z": (x + 0.1 * (y - 0.5)).clamp(0, 1), "black": torch.zeros_like(x)}
        for pair in ("x_y", "x_z", "x_x", "x_black", "black_black"):
            one, other = pair.split("_")
            expected = torch.from_numpy(arrays[f"{case}/{pair}"])
            torch.testing.assert_close(ssim(images[one], images[other]), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="others: expected"):
        ssim(x, y[..., 1:])


def test_ssim_away_from_the_border_is_the_usual_one() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = (recipe.uniform(f"ssim/usual/{which}", 2, 3, 30, 41).double() for which in "xy")
    _, usual = structural_similarity_index_measure(x, y, data_range=1.0, sigma=1.5, return_full_image=True)
    inner = (..., slice(5, -5), slice(5, -5))
    torch.testing.assert_close(ssim_map(x, y)[inner], usual[inner], rtol=1e-7, atol=1e-9)


def test_psnr() -> None:
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64) / 2
    assert psnr(x, x + 0.1).tolist() == pytest.approx([20, 20])
    assert psnr(x, x).tolist() == [math.inf, math.inf]
    with pytest.raises(TypeError, match="others: expected dtype"):
        psnr(x, x.float())


def test_frechet_distance() -> None:
    arrays, meta = golden("fid")
    for case in meta["cases"]:
        results, truth = (torch.from_numpy(arrays[f"{case}/{which}"]) for which in ("pred", "target"))
        distance = frechet_distance(results, truth)
        assert distance == pytest.approx(float(arrays[f"{case}/robust"]), rel=1e-9, abs=1e-9)
        tolerance = 1e-4 if case == "large_mean" else 1e-5  # there the published mean is rounded
        if case != "identical":  # where the published root of a singular matrix errs
            assert distance == pytest.approx(float(arrays[f"{case}/value"]), rel=tolerance, abs=tolerance)
    # More rows than columns, and fewer, are the same set.
    longer = torch.cat([results, truth])
    assert frechet_distance(longer, longer.flip(0)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match=r"others: expected .* at least 2 rows"):
        frechet_distance(results, truth[:1])
    with pytest.raises(TypeError, match="features: expected a floating tensor"):
        frechet_distance(results.int(), truth)


def test_inception(tmp_path) -> None:
    arrays, meta = golden("inception")
    own = Inception().state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in own.items()}
    published = meta["inception_state_dict"]
    assert shapes == {name: shape for name, shape in published.items() if not name.startswith("fc.")}

    state = {n: recipe.weight(n, t, meta["gain"]) for n, t in own.items() if "num_batches" not in n}
    torch.save(state | {"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "inception.pth")
    network = inception(tmp_path / "inception.pth")
    assert not network.training
    for case, about in meta["cases"].items():
        features = network(recipe.uniform(f"inception/{case}/x", *about["shape"]))
        expected = torch.from_numpy(arrays[f"{case}/pool3"])
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)

    del state["Mixed_7c.branch_pool.conv.weight"]
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=r"(?s)damaged\.pth: .*missing.*Mixed_7c\.branch_pool"):
        inception(tmp_path / "damaged.pth")


def test_integrals() -> None:
    arrays, meta = golden("integrals")
    assert meta["columns"][-2:] == ["ssim_fid100_f1", "lpips_fid100_f1"]
    for similar, different, fid, with_ssim, with_lpips in arrays["table"]:
        assert integral(similar, fid) == pytest.approx(with_ssim, rel=1e-12)
        assert integral(1 - different, fid) == pytest.approx(with_lpips, rel=1e-12)


def test_bins() -> None:
    arrays, meta = golden("evaluator")
    assert bin_index(arrays["bin_probe_area"]).tolist() == arrays["bin_probe_index"].tolist()
    for bins, names in meta["interval_names"].items():
        assert bin_names(int(bins)) == names


@pytest.mark.parametrize("evaluator", ["raw", "stitched"])
def test_published_evaluation(evaluator) -> None:
    arrays, meta = golden("evaluator")
    images, predicted = (
        torch.from_numpy(arrays[n]).permute(0, 3, 1, 2).float() / 255 for n in ("images", "predicted")
    )
    masks = torch.from_numpy(arrays["masks"])[:, None].float()
    results = predicted if evaluator == "raw" else masks * predicted + (1 - masks) * images
    similar = ssim(results, images).numpy()
    np.testing.assert_allclose(similar, arrays[f"{evaluator}/ssim_per_image"], rtol=1e-4, atol=1e-5)

    areas = masks.mean(dim=(1, 2, 3)).numpy()
    assert bin_index(areas).tolist() == arrays["bin_index"].tolist()
    which = "predicted" if evaluator == "raw" else "stitched"
    features = arrays[f"fid_activations/{which}"], arrays["fid_activations/target"]
    for heads in ("recipe_heads", "real_heads"):
        per_image = {"ssim": similar, "lpips": arrays[f"{evaluator}/lpips_per_image/{heads}"]}
        with_fid = features if heads == "recipe_heads" else None
        scores = aggregate(areas, per_image, with_fid)
        named = published_names(scores, evaluator, "two")
        prefix = f"val_evaluator_{evaluator}_state_two_"
        expected = {
            prefix + name: value for name, value in meta["results"][f"{heads}/{evaluator}/states"].items()
        }
        for name, value in expected.items():
            if value is None:
                assert math.isnan(named[name]), name
            else:
                tolerance = {"rel": 1e-3} if "fid" in name else {"rel": 1e-4, "abs": 1e-6}
                assert named[name] == pytest.approx(value, **tolerance), name
        assert {name for name in named if "ssim_fid100" not in name} == set(expected)
        if with_fid:
            for group, value in meta["robust_fid"][evaluator].items():
                assert scores["fid"][group]["mean"] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("heads", ["recipe_heads", "real_heads"])
def test_published_scores_of_images(heads) -> None:
    arrays, _ = golden("evaluator")
    images, predicted = (
        torch.from_numpy(arrays[n]).permute(0, 3, 1, 2).float() / 255 for n in ("images", "predicted")
    )
    metric = LPIPS()
    state = export_published(metric)
    state = {n: recipe.weight(n, t, 2**0.5 if n.startswith("features") else 1.0) for n, t in state.items()}
    if heads == "real_heads":
        state |= load_checkpoint(FOLDER / "lpips_heads.safetensors")
    load_published(metric, state)
    measured = Measures(metric)(images, torch.from_numpy(arrays["masks"])[:, None].float(), predicted)
    for evaluator in ("raw", "stitched"):
        expected = arrays[f"{evaluator}/lpips_per_image/{heads}"]
        np.testing.assert_allclose(measured[f"{evaluator}/lpips"], expected, rtol=0, atol=1e-7)
        expected = arrays[f"{evaluator}/ssim_per_image"]
        np.testing.assert_allclose(measured[f"{evaluator}/ssim"], expected, rtol=1e-4, atol=1e-5)


def test_one_image_of_a_bin_and_equal_images() -> None:
    features = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    scores = aggregate(
        np.array([0, 0.05, 0.95], np.float32), {"psnr": np.array([np.inf, 20, 30])}, (features, features + 1)
    )
    assert list(scores["fid"]) == ["total", "0-10%", "90-100%"]
    assert math.isnan(scores["fid"]["90-100%"]["mean"])
    assert scores["psnr"]["0-10%"]["mean"] == math.inf
    assert scores["psnr"]["90-100%"] == {"mean": 30, "std": 0}
    with pytest.raises(InputError, match="at least one image"):
        aggregate(np.zeros(0), {})


def test_keys_of_data_sets() -> None:
    assert [reference_key(n) for n in (1, 2, 4, 12)] == ["one", "two", "four", "12"]
