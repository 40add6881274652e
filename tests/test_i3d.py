"""I3D: the published numbers and names."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gi_model.errors import InputError
from gi_model.evaluation.i3d import I3D, clip_distance, i3d

FOLDER = Path(__file__).parent / "golden"
GOLDEN = np.load(FOLDER / "i3d.npz")
META = json.loads(str(GOLDEN["meta"]))

_module = importlib.util.spec_from_file_location("golden_recipe", FOLDER / "recipe.py")
recipe = importlib.util.module_from_spec(_module)
_module.loader.exec_module(recipe)


@pytest.fixture(scope="module")
def i3d_file(tmp_path_factory) -> Path:
    """Weights that are functions of their names, in the published layout."""
    path = tmp_path_factory.mktemp("i3d") / "rgb_imagenet.pt"
    state = recipe.weights(I3D().state_dict(), META["prefix"], META["gain"])
    state = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    torch.save(state | {"logits.conv3d.weight": torch.zeros(400, 1024, 1, 1, 1)}, path)
    return path


def test_published_numbers(i3d_file, tmp_path):
    network = i3d(i3d_file)
    for case, shape in META["cases"].items():
        x, y = (network(recipe.uniform(f"i3d/{case}/{which}", *shape)) for which in "xy")
        assert [list(features.shape) for features in x] == GOLDEN[f"{case}/shapes"].tolist()
        expected = torch.from_numpy(GOLDEN[f"{case}/features"])
        torch.testing.assert_close(x[-1].mean(dim=(2, 3, 4)), expected, rtol=1e-4, atol=1e-4)
        assert clip_distance(x, y).item() == pytest.approx(float(GOLDEN[f"{case}/distance"]), rel=1e-4)
        assert clip_distance(x, x).item() == 0
    torch.save(network.state_dict() | {"Mixed_3b.b0.bn.weight": torch.zeros(3)}, tmp_path / "damaged.pt")
    with pytest.raises(InputError, match=r"(?s)damaged\.pt: .*misshapen.*Mixed_3b\.b0\.bn\.weight"):
        i3d(tmp_path / "damaged.pt")
