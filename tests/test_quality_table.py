"""The table of quality: its clips, masks, baselines and floors."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2", reason="the [video] extra is not installed")
pytest.importorskip("av", reason="the [video] extra is not installed")

# After the installed package, which is what is tested.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from moving_scene import H, W, centre, scene  # noqa: E402

from benchmarks import clips, quality  # noqa: E402
from benchmarks import masks as kinds  # noqa: E402
from benchmarks.classical import BASELINES, one_step, temporal_median  # noqa: E402


@pytest.mark.parametrize("kind", kinds.KINDS)
@pytest.mark.parametrize("size", [(270, 480), (384, 512), (204, 480)])
def test_masks_cover_what_they_should(kind: str, size: tuple[int, int]) -> None:
    masks = kinds.KINDS[kind](60, *size)
    shares = [float(mask.mean()) for mask in masks]
    assert len(masks) == 60 and all(m.shape == size and m.dtype == bool for m in masks)
    assert min(shares) >= 0.05 and max(shares) <= 0.12
    assert np.mean(np.all(masks, axis=0)) < 0.005  # nearly everything is seen at some time
    again = kinds.KINDS[kind](60, *size)
    assert all(np.array_equal(a, b) for a, b in zip(masks, again, strict=True))


def test_the_median_is_that_of_visible_values() -> None:
    frames = [np.full((40, 40, 3), v, np.uint8) for v in (10, 20, 90, 200)]
    mask = np.zeros((40, 40), bool)
    mask[10:20, 10:20] = True
    masks = [mask, np.zeros_like(mask), np.zeros_like(mask), np.zeros_like(mask)]
    repaired = temporal_median(frames, masks)
    assert (repaired[0][mask] == 90).all() and (repaired[0][~mask] == 10).all()
    assert all(np.array_equal(a, b) for a, b in zip(repaired[1:], frames[1:], strict=True))
    masks[1] = mask
    assert (temporal_median(frames, masks)[1][mask] == 145).all()


def test_baselines_do_not_look_into_masks() -> None:
    truth, masks = scene(step=2), centre()
    black = [np.where(m[..., None], np.uint8(0), f) for f, m in zip(truth, masks, strict=True)]
    white = [np.where(m[..., None], np.uint8(255), f) for f, m in zip(truth, masks, strict=True)]
    for name, repair in BASELINES.items():
        for a, b, true, mask in zip(repair(black, masks), repair(white, masks), truth, masks, strict=True):
            assert np.array_equal(a, b), name
            assert np.array_equal(a[~mask], true[~mask]), name


def test_one_step_sees_what_the_neighbours_show() -> None:
    truth = scene(step=2)
    bare = np.zeros((H, W), bool)
    mask = bare.copy()
    mask[26:38, 40:52] = True
    masks = [bare, mask, bare, bare, bare]
    error = np.abs(one_step(truth, masks)[1][mask].astype(int) - truth[1][mask])
    assert error.mean() < 3


def test_the_camera_of_a_pan_is_exact() -> None:
    y, x = np.mgrid[:300, :500]
    photo = np.stack([x / 2, y / 2, (x + y) / 4], axis=2).astype(np.float32)
    frames = clips.render(photo, 3, (40, 30), (60, 40), (2.25, -0.5), 1.0, 0.0, supersampling=3)
    assert frames[0].shape == (30, 40, 3)
    # Along the ramps a pixel of the frame is three of the photo: 1.5 levels. OpenCV samples the photo at
    # multiples of 1/32 pixel, here 1/64 level, in either frame.
    assert np.allclose((frames[1] - frames[0])[..., 0], 1.5 * 2.25, atol=1 / 32)
    assert np.allclose((frames[1] - frames[0])[..., 1], 1.5 * -0.5, atol=1 / 32)
    turned = clips.render(photo, 2, (41, 31), (60, 40), (0, 0), 1.25, 90.0, supersampling=3)[1]
    assert np.allclose(turned[15, 15:26, 1] - turned[15, 15, 1], 1.2 * np.arange(11), atol=1 / 32)


def test_clips_without_files_are_missing(tmp_path: Path) -> None:
    bundled = [clip for clip in clips.CLIPS if clip.file is None]
    assert bundled and list(clips.available(None)) == bundled
    frames = next(c for c in bundled if c.name == "city-still").frames(None)
    assert frames[0].dtype == np.uint8 and not np.array_equal(frames[0], frames[1])


def test_a_row_is_measured_and_reported(tmp_path: Path) -> None:
    row = quality.measure("city-still", "box", None, 3, tmp_path)
    assert (row["frames"], row["width"], row["height"]) == (3, 288, 162)
    assert list(row["methods"]) == ["telea", "median", "one-step", "ours"]
    assert all({"psnr", "ssim", "warp_error", "flicker"} <= set(m) for m in row["methods"].values())
    assert 0 < row["truth_warp_error"] < row["methods"]["telea"]["warp_error"]
    assert cv2.imread(str(tmp_path / "city-still-box.jpg")) is not None
    text = quality.report([row], ["city-still, box: too low"], ["vtest"])
    psnr = [m["psnr"] for m in row["methods"].values()]
    best = f"**{max(psnr):.2f}**"
    assert best in text and text.count("| city-still | box |") >= 4
    assert "- missed: city-still, box: too low" in text and "for want of files: vtest" in text


def row(moving: bool, floor: float | None, **psnr: float) -> dict[str, object]:
    methods = {name.replace("_", "-"): {"psnr": value} for name, value in psnr.items()}
    return {"clip": "c", "mask": "box", "moving": moving, "floor": floor, "methods": methods}


def test_floors_are_judged() -> None:
    good = row(True, 4.0, telea=20, median=18, one_step=23, ours=24.5)
    assert quality.judge([good]) == []
    low = row(True, 6.0, telea=20, median=18, one_step=23, ours=24.5)
    assert quality.judge([low]) == ["c, box: 4.50 dB above telea, floor 6"]
    behind = row(False, None, telea=20, median=30, one_step=23, ours=28.5)
    assert quality.judge([behind]) == [
        "c, box: 1.50 dB below median, floor 1",
        "c, box: 1.50 dB below median, floor 0.3",
    ]
    unknown = row(True, 4.0, telea=20, median=18, one_step=23, ours=float("nan"))
    assert len(quality.judge([unknown])) == 4
