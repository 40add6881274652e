"""The commands in docs/evaluation.md run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from documents import SmallInception, text_and_lines

from gi_model import build_generator, cli, configs, export_published
from gi_model.evaluation import loading
from gi_model.evaluation.i3d import I3D

TEXT, LINES = text_and_lines("evaluation.md")
COMMANDS = [line for line in LINES if "gi-model evaluate" in line]
TINY = {"kind": "two_stream", "blocks": 1, "width": 8, "max_width": 16, "downsamplings": 2}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with all that the commands name, in small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GI_MODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(configs.NAMED, "ours", TINY)
    monkeypatch.setattr(loading, "inception", lambda path: SmallInception())
    torch.save(export_published(build_generator("ours"), "generator."), "ours.ckpt")
    Path("pt_inception-2015-12-05-6726825d.pth").touch()
    torch.save(I3D().state_dict(), "rgb_imagenet.pt")
    draw = np.random.default_rng(0)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:20, 8:20] = 255

    def write(name: str, pixels: np.ndarray | None = None) -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(name, draw.integers(0, 256, (32, 32, 3), np.uint8) if pixels is None else pixels)

    for i in range(2):
        write(f"val_guided/image_{i:06d}.png")
        write(f"val_guided/image_{i:06d}_mask.png", mask)
        for k in range(4):
            write(f"val_guided/image_{i:06d}_src_{k:06d}.png")
            write(f"val_guided/image_{i:06d}_src_{k:06d}_m.png", mask)
        for t in range(2):
            write(f"results/fgd-h/video{i}/{t:04d}.png")
            write(f"truth/video{i}/{t:04d}.png")
            write(f"masks/fgd-h/video{i}/{t:04d}.png", mask)
    return tmp_path


def test_commands(place, capsys):
    assert [line.split("gi-model")[0] for line in COMMANDS] == [
        "",
        "torchrun --nproc-per-node 4 --no-python ",
        "",
    ]
    for line in COMMANDS:
        # Flow without weights, and no processes that read images, for the sake of time.
        line = line.replace("--flow-checkpoint raft-things.pth", "--flow dis --workers 0")
        assert cli.main(shlex.split(line.split("gi-model")[1])) == 0, capsys.readouterr().err
    for name in re.findall(r"^\| `([a-z]+\.[a-z]+)`", TEXT, re.MULTILINE):
        assert any((place / folder / name).exists() for folder in ("evaluation", "video-evaluation")), name
    results = (place / "evaluation" / "results.json").read_text()
    assert "val_evaluator_stitched_state_two_fid_total_mean" in results


def test_options_that_are_named_exist(capsys):
    said = ""
    for command in ("evaluate", "evaluate-video", "fetch-lpips"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        said += capsys.readouterr().out
    for option in set(re.findall(r"--[a-z][a-z0-9-]+", TEXT)) - {"--nproc-per-node", "--no-python"}:
        assert option in said, option
