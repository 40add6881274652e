"""The validation set: the published samples, scaling, padding, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from gi_model.data.validation import ValidationSet, padded
from gi_model.errors import InputError

GOLDEN = np.load(Path(__file__).parent / "golden" / "validation_dataset.npz")
META = json.loads(str(GOLDEN["meta"]))


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in META["filelist"]:
        pixels = GOLDEN[f"file/{name}"]
        cv2.imwrite(str(tmp_path / name), pixels[..., ::-1] if pixels.ndim == 3 else pixels)
    return tmp_path


@pytest.mark.parametrize("references", [2, 4])
@pytest.mark.parametrize("listed", [False, True], ids=["folder", "list"])
def test_published_samples(folder, references, listed):
    source = folder
    if listed:
        source = folder / "list.txt"
        source.write_text("".join(f"{folder / name}\n" for name in META["filelist"]))
    samples = ValidationSet(source, references)
    assert len(samples) == META["n_images"]
    for index in range(len(samples)):
        sample = samples[index]
        assert set(sample) == {"image", "mask", "srcs", "srcs_masks"}
        for key, value in sample.items():
            expected = GOLDEN[f"expected/n{references}/{index}/{key}"]
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, expected)


def test_scaling_and_padding(folder):
    pixels = np.arange(3 * 5 * 7, dtype=np.float32).reshape(3, 5, 7).transpose(1, 2, 0)
    expected = GOLDEN["pad_to_modulo_4_of_arange_3x5x7"].transpose(1, 2, 0)
    np.testing.assert_array_equal(padded(pixels, 4), expected)
    sample = ValidationSet(folder, 2, scale=0.5, multiple=16)[0]
    assert {key: value.shape for key, value in sample.items()} == {
        "image": (16, 16, 3),
        "mask": (16, 16, 1),
        "srcs": (2, 16, 16, 3),
        "srcs_masks": (2, 16, 16, 1),
    }
    assert set(np.unique(sample["srcs_masks"])) <= {-1, 1}


def test_mistakes(folder):
    with pytest.raises(InputError, match="has 4 references, expected at least 5"):
        ValidationSet(folder, 5)
    with pytest.raises(InputError, match="references: expected at least 1, got 0"):
        ValidationSet(folder, 0)
    with pytest.raises(InputError, match="is no folder and no list"):
        ValidationSet(folder / "absent", 2)
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="has no masks of targets"):
        ValidationSet(folder / "empty", 2)

    cv2.imwrite(str(folder / "image_000000_src_000001_m.png"), np.zeros((8, 8), np.uint8))
    with pytest.raises(InputError, match=r"image_000000_src_000001_m\.png has 8x8 pixels, expected 32x24"):
        ValidationSet(folder, 2)[0]
    (folder / "image_000000_src_000001_m.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="is not a readable image"):
        ValidationSet(folder, 2)[0]
    (folder / "image_000001_src_000000.png").unlink()
    with pytest.raises(InputError, match=r"has no picture, expected .*image_000001_src_000000\.png"):
        ValidationSet(folder, 2)
    (folder / "image_000001.png").unlink()
    with pytest.raises(InputError, match=r"image_000001_mask\.png has no target"):
        ValidationSet(folder, 2)
