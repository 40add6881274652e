"""Scores of videos as DEVIL defines them, and the command that computes them."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from gi_model import cli, export_published
from gi_model.evaluation import devil
from gi_model.evaluation.i3d import I3D
from gi_model.evaluation.journal import Journal
from gi_model.evaluation.lpips import LPIPS
from gi_model.evaluation.splits import find_videos

HEIGHT, WIDTH, FRAMES = 64, 72, 3


@pytest.fixture(scope="module")
def i3d_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("i3d") / "rgb_imagenet.pt"
    torch.manual_seed(0)
    torch.save(I3D().state_dict(), path)
    return path


def test_pvcs_averages_over_clips_of_ten_frames(monkeypatch):
    clips = []

    def network(clip):
        clips.append(clip)
        return [clip]

    video = torch.rand(1, 3, 12, 2, 2)
    assert devil.pvcs(network, video, video) == 0
    assert [c.shape[2] for c in clips] == [10] * 6
    assert torch.equal(clips[4], video[:, :, 2:])
    clips.clear()
    devil.pvcs(network, video[:, :, :4], 1 - video[:, :, :4])
    assert torch.equal(clips[0][:, :, 3:], video[:, :, 3:4].expand(-1, -1, 7, -1, -1))
    assert len(clips) == 2


def test_ssim_by_its_definition():
    draw = np.random.default_rng(0)
    x, y = (draw.random((9, 10, 3)).astype(np.float32) for _ in "xy")
    values = []
    for row in range(3):
        for column in range(4):
            for channel in range(3):
                a, b = (
                    i[row : row + 7, column : column + 7, channel].astype(np.float64).ravel() for i in (x, y)
                )
                (v, c), (_, w) = np.cov(a, b)
                m, n = a.mean(), b.mean()
                c1, c2 = 0.02**2, 0.06**2
                values.append((2 * m * n + c1) * (2 * c + c2) / ((m**2 + n**2 + c1) * (v + w + c2)))
    assert devil.ssim(x, y) == pytest.approx(np.mean(values), rel=1e-9)
    assert devil.ssim(x, x) == pytest.approx(1)


def test_patch_consistency():
    draw = np.random.default_rng(0)
    wide = draw.random((200, 220, 3)).astype(np.float32)
    still, moved = wide[30:150, 30:160], wide[20:140, 45:175]  # 10 up, 15 to the right
    assert devil.patch_consistency([still, moved], [(40, 50)], devil.patch_psnr) == math.inf
    # 20 pixels behind is one too far.
    assert devil.patch_consistency([still, wide[10:130, 30:160]], [(40, 50)], devil.patch_psnr) < 20
    assert devil.patch_consistency([still, wide[50:170, 30:160]], [(40, 50)], devil.patch_psnr) == math.inf
    assert math.isnan(devil.patch_consistency([still, moved], [None], devil.patch_psnr))

    shifted = np.clip(still + 0.1, 0, 2)
    places = [shifted[r : r + 50, c : c + 50] for r in range(0, 23) for c in range(50, 81)]
    patch = still[3:53, 70:120]
    best = max(devil.psnr(patch, place) for place in places)
    assert devil.patch_consistency([still, shifted], [(3, 70)], devil.patch_psnr) == pytest.approx(best)
    best = max(devil.ssim(patch, place) for place in places)
    assert devil.patch_consistency([still, shifted], [(3, 70)], devil.patch_ssim) == pytest.approx(best)


def test_places_of_patches():
    places = devil.random_corners([(3, 60, 70), (2, 50, 70), (2, 60, 60)])
    assert places[1] is None
    draw = np.random.default_rng(1234)
    expected = [(draw.integers(10), draw.integers(20)) for _ in range(2)] + [
        (draw.integers(10), draw.integers(10))
    ]
    assert [*places[0], *places[2]] == expected
    masks = np.zeros((4, 60, 100), bool)
    masks[0, 20:40, 45:56] = True
    masks[1, :5, 90:] = True
    assert devil.masked_corners(list(masks)) == [(4, 25), (0, 50), None]


def write(folder: Path, frames: list[np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{i:04d}.png"), frame if frame.ndim == 2 else frame[..., ::-1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Two splits of two videos; the splits share truth, not masks."""
    root = tmp_path_factory.mktemp("videos")
    draw = np.random.default_rng(0)
    for v in range(2):
        still = cv2.resize(
            draw.integers(0, 256, (16, 20, 3), np.uint8), (160, 130), interpolation=cv2.INTER_CUBIC
        )
        truth = [still[i : i + HEIGHT, 2 * i : 2 * i + WIDTH] for i in range(FRAMES)]
        write(root / "truth" / f"video{v}", truth)
        for split, size in (("large", 30), ("small", 12)):
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            mask[20 : 20 + size, 20 : 20 + size] = 255
            noise = draw.normal(0, 25, (FRAMES, HEIGHT, WIDTH, 3))
            results = [np.clip(t + n, 0, 255).astype(np.uint8) for t, n in zip(truth, noise, strict=True)]
            write(root / "results" / split / f"video{v}", results)
            write(root / "masks" / split / f"video{v}", [mask] * FRAMES)
    return root


@pytest.fixture(autouse=True)
def without_weights(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GI_MODEL_CACHE", str(tmp_path / "cache"))


def command(root: Path, output: Path) -> list[str]:
    return [
        "evaluate-video",
        *(str(root / name) for name in ("results", "truth", "masks")),
        "-o",
        str(output),
    ]


def test_splits_and_videos(folders, tmp_path, capsys):
    assert cli.main(command(folders, tmp_path / "out")) == 0
    said = capsys.readouterr().out
    for name, why in (("lpips", "no weights"), ("fid", "no weights"), ("pvcs", "no weights: give --i3d")):
        assert f"not computed: {name} ({why}" in said
    tree = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(tree["splits"]) == ["large", "small"]
    large, small = tree["splits"]["large"], tree["splits"]["small"]
    scores = {"psnr", "ssim", "warp_error", "warp_error_mask", "pcons_psnr", "pcons_ssim", "pcons_psnr_mask"}
    assert set(large["mean"]) == scores
    assert set(large["videos"]["video0"]) == scores | {"frames"}
    assert small["mean"]["psnr"] > large["mean"]["psnr"] + 5  # only inside the mask
    assert small["mean"]["ssim"] > large["mean"]["ssim"]
    assert large["mean"]["warp_error_mask"] > 2 * large["mean"]["warp_error"]
    pair = [large["videos"][f"video{v}"]["psnr"] for v in range(2)]
    assert large["mean"]["psnr"] == pytest.approx(np.mean(pair))
    assert large["standard_error"]["psnr"] == pytest.approx(abs(pair[0] - pair[1]) / 2)
    with (tmp_path / "out" / "videos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["split"], r["video"], r["frames"]) for r in rows][:2] == [
        ("large", "video0", "3"),
        ("large", "video1", "3"),
    ]
    assert float(rows[0]["psnr"]) == pair[0]
    assert rows[0]["lpips"] == ""


def test_weights_and_no_masks(folders, tmp_path, i3d_file, capsys):
    torch.manual_seed(0)
    torch.save(export_published(LPIPS("alexnet")), tmp_path / "lpips.pth")
    one = [
        "evaluate-video",
        str(folders / "results" / "small"),
        str(folders / "truth"),
        "-o",
        str(tmp_path / "out"),
    ]
    assert cli.main([*one, "--lpips", str(tmp_path / "lpips.pth"), "--i3d", str(i3d_file)]) == 0
    assert "not computed: warp_error_mask (needs MASKS)" in capsys.readouterr().out
    split = json.loads((tmp_path / "out" / "results.json").read_text())["splits"]["all"]
    assert {"lpips", "pvcs"} < set(split["mean"])
    assert 15 < split["mean"]["psnr"] < 25  # of whole frames, which differ by noise of 25 levels
    assert split["mean"]["pvcs"] > 0
    assert set(split["distances"]) == {"vfid"}
    assert split["distances"]["vfid"] > 0


def test_goes_on_after_a_stop(folders, tmp_path, monkeypatch):
    assert cli.main(command(folders, tmp_path / "whole")) == 0
    add, added = Journal.add, []

    def stopping(self, batch, measured):
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append(batch)
        add(self, batch, measured)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stopping)
        assert cli.main(command(folders, tmp_path / "stopped")) == cli.INTERRUPTED
    assert cli.main(command(folders, tmp_path / "stopped")) == 0
    for name in ("results.json", "videos.csv", "splits.csv"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_equal_videos(folders, tmp_path):
    truth = str(folders / "truth")
    assert cli.main(["evaluate-video", truth, truth, "-o", str(tmp_path / "out")]) == 0
    split = json.loads((tmp_path / "out" / "results.json").read_text())["splits"]["all"]
    assert split["mean"]["psnr"] == "inf"
    assert split["mean"]["ssim"] == pytest.approx(1)


def test_mistakes(folders, tmp_path, capsys):
    write(tmp_path / "short" / "video0", [np.zeros((HEIGHT, WIDTH, 3), np.uint8)] * 2)
    write(tmp_path / "other" / "video7", [np.zeros((HEIGHT, WIDTH, 3), np.uint8)] * 2)
    (tmp_path / "empty").mkdir()
    out = ["-o", str(tmp_path / "out")]
    for results, truth, message in (
        (folders / "results", tmp_path / "absent", "TRUTH: .*absent does not exist"),
        (tmp_path / "other", folders / "truth", "TRUTH: expected .*video7 or .*video7, neither exists"),
        (
            tmp_path / "short",
            folders / "truth",
            "TRUTH: expected 2 frames like the frames of .*short.video0, got 3",
        ),
        (folders / "results" / "small", tmp_path / "short", "TRUTH: expected .*video1"),
        (tmp_path / "empty", folders / "truth", "holds no folders of images and no videos"),
    ):
        assert cli.main(["evaluate-video", str(results), str(truth), *out]) == 2
        err = capsys.readouterr().err
        assert re.search(message, err), err


def test_places_of_videos(tmp_path):
    frames = [np.zeros((8, 8, 3), np.uint8)] * 2
    write(tmp_path / "results" / "clip", frames)
    write(tmp_path / "truth" / "clip", frames)
    cv2.imwrite(str(tmp_path / "clip.png"), frames[0])
    (tmp_path / "masks").mkdir()
    cv2.imwrite(str(tmp_path / "masks" / "clip.png"), frames[0])
    (video,) = find_videos(tmp_path / "results", tmp_path / "truth", tmp_path / "masks")
    assert (video.name, video.split, video.masks) == ("clip", "all", tmp_path / "masks" / "clip.png")
    assert len(video.frames()[2]) == 2
    (video,) = find_videos(tmp_path / "results" / "clip", tmp_path / "truth" / "clip", None)
    assert (video.name, video.truth) == ("clip", tmp_path / "truth" / "clip")
