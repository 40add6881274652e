"""The small configuration, and how it is compared."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("cv2", reason="the [training] extra is not installed")
pytest.importorskip("lightning", reason="the [training] extra is not installed")

# After the installed package, which is what is tested.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import tiny
from gi_model.configs import build_generator
from gi_model.inpainting import inpaint_frame
from gi_model.training.configuration import read_configuration

ROWS = {
    tiny.OURS: {"psnr": 19.0, "ssim": 0.5, "lpips": 0.3},
    tiny.WARP: {"psnr": 21.0, "ssim": 0.6, "lpips": 0.2},
    tiny.TELEA: {"psnr": 17.0, "ssim": 0.4, "lpips": 0.4},
    tiny.PROPAGATION: {"psnr": 18.0, "ssim": 0.4, "lpips": 0.4},
}


def sample(seed: int = 0) -> tiny.Sample:
    rng = np.random.default_rng(seed)
    frames = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(3)]
    masks = [np.zeros((32, 32), bool) for _ in frames]
    for i, mask in enumerate(masks):
        mask[8 + i : 20, 6:18] = True
    return tiny.Sample(frames, masks)


def test_the_configuration_is_small_and_needs_no_weights() -> None:
    read = read_configuration([str(tiny.CONFIGURATION)])
    assert sum(p.numel() for p in build_generator(read.generator).parameters()) < 5e6
    assert read.flow.kind == "planar" and read.losses.perceptual == 0
    assert read.steps == read.schedule.max_decay_steps


def test_no_photo_is_on_both_sides() -> None:
    for package, (pattern, train, held_out) in tiny.PACKAGES.items():
        assert "{}" in pattern and train and held_out, package
        names = [*train.split(), *held_out.split()]
        assert len(names) == len(set(names)), package


@pytest.mark.parametrize(("name", "key"), [(tiny.TELEA, "lpips"), (tiny.PROPAGATION, "psnr")])
def test_the_table_says_who_is_ahead(name: str, key: str) -> None:
    text, won = tiny.report(ROWS, 9, 60.0)
    assert won and " is ahead of Telea" in text and "| Telea | 17.00 | 0.400 | 0.400 |" in text
    level = {name: {**ROWS[name], key: ROWS[tiny.OURS][key]}}
    text, won = tiny.report({**ROWS, **level}, 9, 60.0)
    assert not won and " is not ahead of Telea" in text


def test_warped_references_are_used_where_they_are_seen() -> None:
    def by_two(target: torch.Tensor, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flow = torch.zeros(1, 2, 2, 32, 32)
        flow[:, :, 0] = 2  # pixels to the right
        return flow, torch.zeros(1, 2, 1, 32, 32)

    one = sample()
    one.frames[1:] = [np.full((32, 32, 3), value, np.uint8) for value in (60, 100)]
    one.masks[1][:], one.masks[2][:] = False, False
    one.masks[1][:14], one.masks[2][:, :14] = True, True
    made = tiny.warp(one, by_two)  # type: ignore[arg-type]
    assert (made[14:20, 12:18] == 80).all() and (made[8:14, 12:18] == 100).all()
    assert (made[14:20, 6:12] == 60).all()
    assert np.array_equal(made[~one.masks[0]], one.frames[0][~one.masks[0]])
    telea = inpaint_frame(np.where(one.masks[0][..., None], made, one.frames[0]), _corner(one.masks[0]))
    assert np.array_equal(made, telea)


def _corner(mask: np.ndarray) -> np.ndarray:
    """What neither reference shows."""
    corner = mask.copy()
    corner[14:], corner[:, 12:] = False, False
    return corner


def test_measures_are_those_inside_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "lpips", lambda network: None)
    monkeypatch.setattr(tiny, "masked_lpips", lambda metric, made, truth, mask: [0.25] * len(made))
    one = sample()
    truth, mask = one.frames[0].astype(int), one.masks[0]
    off = np.where(mask[..., None], np.where(truth < 128, truth + 51, truth - 51), 255 - truth).astype(
        np.uint8
    )
    rows = tiny.measure([one], {"same": [one.frames[0]], "off": [off]})
    assert rows["same"] == {"psnr": 100.0, "ssim": pytest.approx(1, abs=1e-6), "lpips": 0.25}
    assert rows["off"]["psnr"] == pytest.approx(-20 * np.log10(0.2)) and rows["off"]["ssim"] < 0.9
