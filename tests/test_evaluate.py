"""The command that measures a generator on a validation set."""

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

from gi_model import build_generator, cli, export_published
from gi_model.commands import evaluate
from gi_model.data.validation import ValidationSet
from gi_model.errors import InputError
from gi_model.evaluation import images as measuring
from gi_model.evaluation.filling import Filler, load_filler
from gi_model.evaluation.images import Measures
from gi_model.evaluation.inception import Inception
from gi_model.evaluation.journal import Journal
from gi_model.evaluation.lpips import LPIPS

CONFIG = "{kind: two_stream, blocks: 1, width: 8, max_width: 16, downsamplings: 2}\n"
SAMPLES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A validation set of five images, a configuration and a checkpoint."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = folder / "data"
    data.mkdir()
    draw = np.random.default_rng(0)

    def write(name: str, mask: np.ndarray | None = None) -> None:
        pixels = cv2.resize(
            draw.integers(0, 256, (5, 5, 3), np.uint8), (32, 32), interpolation=cv2.INTER_CUBIC
        )
        cv2.imwrite(str(data / f"{name}.png"), pixels if mask is None else mask)

    for i in range(SAMPLES):
        mask = np.zeros((32, 32), np.uint8)
        mask[: 6 * i, 4:28] = 255
        write(f"image_{i:06d}")
        write(f"image_{i:06d}_mask", mask)
        for k in range(2):
            write(f"image_{i:06d}_src_{k:06d}")
            write(f"image_{i:06d}_src_{k:06d}_m", np.roll(mask, 7 * k + 3, axis=0))
    (folder / "tiny.yaml").write_text(CONFIG)
    torch.manual_seed(0)
    generator = build_generator(folder / "tiny.yaml")
    torch.save({"state_dict": export_published(generator, "generator.")}, folder / "tiny.ckpt")
    return folder


@pytest.fixture(autouse=True)
def without_weights(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GI_MODEL_CACHE", str(tmp_path / "cache"))


def command(folder: Path, output: Path, *more: str) -> list[str]:
    given = ["evaluate", "--config", folder / "tiny.yaml", "--checkpoint", folder / "tiny.ckpt"]
    given += ["--data", folder / "data", "--flow", "dis", "--workers", "0", "--batch-size", "2"]
    return [str(a) for a in [*given, "--output", output, "--references", "2", *more]]


def test_without_weights_scores_are_missing_by_name(folder, tmp_path, capsys):
    assert cli.main(command(folder, tmp_path / "out")) == 0
    said = capsys.readouterr().out
    assert "not computed: lpips (no weights: run `gi-model fetch-lpips`, or give --lpips)" in said
    assert "not computed: fid (no weights: give --inception)" in said
    assert "not computed: lpips_fid100_f1 (needs lpips and fid)" in said
    tree = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(tree["not_computed"]) == {"lpips", "fid", "lpips_fid100_f1", "ssim_fid100_f1"}
    two = tree["data_sets"]["two"]
    assert two["references"] == 2
    assert two["images"] == {"total": 5, "0-10%": 1, "10-20%": 1, "20-30%": 1, "40-50%": 1, "50-60%": 1}
    assert set(two["scores"]["raw"]) == {"ssim", "psnr"}
    stitched = two["scores"]["stitched"]
    assert stitched["ssim"]["0-10%"]["mean"] == pytest.approx(1, abs=1e-5)  # nothing is masked
    assert stitched["psnr"]["total"]["mean"] == "inf"
    assert stitched["ssim"]["total"]["mean"] > two["scores"]["raw"]["ssim"]["total"]["mean"]
    name = "val_evaluator_stitched_state_two_ssim_50-60%_mean"
    assert tree["published_names"][name] == stitched["ssim"]["50-60%"]["mean"]
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["evaluator"], r["masked"]) for r in rows[5:7]] == [("raw", "total"), ("stitched", "0-10%")]
    assert float(rows[5]["ssim_mean"]) == two["scores"]["raw"]["ssim"]["total"]["mean"]
    page = (tmp_path / "out" / "cases.html").read_text()
    assert page.count("<figure>") == 8
    assert page.count("<img") == 8 * 6
    worst = re.search(r"worst by ssim.*?<figcaption>(image_\d+)", page, re.DOTALL)
    assert worst and worst[1] in ("image_000003", "image_000004")


def test_all_scores(folder, tmp_path, capsys):
    torch.manual_seed(1)
    torch.save(export_published(LPIPS()), tmp_path / "lpips.pth")
    torch.save(Inception().state_dict(), tmp_path / "inception.pth")
    files = ["--lpips", str(tmp_path / "lpips.pth"), "--inception", str(tmp_path / "inception.pth")]
    # Twice as many references as there are of each image are refused; two and one are two data sets.
    assert cli.main(command(folder, tmp_path / "out", "4")) == 2
    assert "has 2 references, expected at least 4" in capsys.readouterr().err
    assert cli.main([*command(folder, tmp_path / "out", "1"), *files, "--legacy-names", "--cases", "0"]) == 0
    said = capsys.readouterr().out
    assert "not computed" not in said
    tree = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {key: about["references"] for key, about in tree["data_sets"].items()} == {"two": 2, "four": 1}
    for about in tree["data_sets"].values():
        for scores in about["scores"].values():
            assert set(scores) == {"ssim", "psnr", "lpips", "fid", "ssim_fid100_f1", "lpips_fid100_f1"}
            assert scores["fid"]["0-10%"]["mean"] is None  # of one image
            assert math.isfinite(scores["fid"]["total"]["mean"])
    assert not (tmp_path / "out" / "cases.html").exists()
    # Other weights are another evaluation.
    assert cli.main(command(folder, tmp_path / "out")) == 2
    assert "other settings (inception, lpips)" in capsys.readouterr().err


def test_goes_on_after_a_stop(folder, tmp_path, monkeypatch, capsys):
    assert cli.main(command(folder, tmp_path / "whole")) == 0
    add, added = Journal.add, []

    def stopping(self, batch, measured):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(batch)
        add(self, batch, measured)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stopping)
        assert cli.main(command(folder, tmp_path / "stopped")) == cli.INTERRUPTED
    assert "interrupted; what was measured is kept" in capsys.readouterr().err
    assert not (tmp_path / "stopped" / "results.json").exists()
    filled = []
    call = Filler.__call__
    monkeypatch.setattr(Filler, "__call__", lambda self, *a: filled.append(len(a[0])) or call(self, *a))
    assert cli.main([*command(folder, tmp_path / "stopped"), "--cases", "0"]) == 0
    assert filled == [1]  # two batches of two were measured before
    for name in ("results.json", "results.csv"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    assert cli.main([*command(folder, tmp_path / "stopped"), "--batch-size", "1"]) == 2
    assert "other settings (batch_size)" in capsys.readouterr().err
    assert cli.main([*command(folder, tmp_path / "stopped"), "--batch-size", "1", "--restart"]) == 0


def test_several_processes(folder, tmp_path, monkeypatch):
    assert cli.main([*command(folder, tmp_path / "one"), "--cases", "0"]) == 0
    monkeypatch.setattr(evaluate, "_barrier", lambda world: lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main([*command(folder, tmp_path / "two"), "--cases", "0"]) == 0
    assert (tmp_path / "two" / "results.json").read_bytes() == (
        tmp_path / "one" / "results.json"
    ).read_bytes()


def test_damaged_measurement(folder, tmp_path, capsys):
    assert cli.main(command(folder, tmp_path)) == 0
    (tmp_path / "measured" / "2-references" / "batch-000001.npz").write_bytes(b"PK")
    assert cli.main(command(folder, tmp_path)) == 2
    assert "batch-000001.npz cannot be read, remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["2"], "--references: expected each number once, got [2, 2]"),
        (["--flow", "raft"], "--flow-checkpoint: expected weights of RAFT"),
        (["--device", "nonsense"], "--device: 'nonsense' cannot be used"),
        (["--inception", "absent.pth"], "No such file or directory: absent.pth"),
        (["--multiple", "7"], "multiples of 4, at least 8, got 35x35 pixels; see --multiple"),
    ],
)
def test_mistakes(folder, tmp_path, capsys, more, message):
    assert cli.main(command(folder, tmp_path / "out") + more) == 2
    assert message in capsys.readouterr().err


def test_generator_sees_nothing_that_is_masked(folder):
    seen = {}

    class Generator(torch.nn.Module):
        downsamplings = 2

        def forward(self, blanked, references, flows, errors):
            seen.update(blanked=blanked, references=references, flows=flows)
            return blanked[:, :3]

    def stage(target, sources):
        seen.update(target=target, sources=sources)
        return "flows", "errors"

    samples = ValidationSet(folder / "data", 2)
    loaded = {name: torch.from_numpy(value)[None] for name, value in samples[3].items()}
    images, masks, srcs, srcs_masks = measuring.channels_first(loaded, torch.device("cpu"))
    predicted = Filler(Generator().eval(), stage)(images, masks, srcs, srcs_masks)
    assert not (predicted * masks).any()
    assert torch.equal(seen["blanked"][:, 3:], masks)
    assert not (seen["references"][:, :, :3] * srcs_masks).any()
    assert torch.equal(seen["sources"], torch.cat([srcs, srcs_masks], dim=2))
    assert torch.equal(seen["target"][:, :3], images)  # as published
    assert seen["flows"] == "flows"
    measured = Measures()(images, masks, predicted)
    assert measured["stitched/psnr"] > measured["raw/psnr"] - 1e-3


def test_scores_are_computed_in_full_float32():
    seen = []

    class Network(torch.nn.Module):
        def forward(self, images):
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            return images.flatten(1)

    before = torch.backends.cudnn.conv.fp32_precision
    image = torch.rand(1, 3, 8, 8)
    Measures(inception=Network())(image, image[:, :1], image)
    assert seen == ["ieee"] * 3
    assert torch.backends.cudnn.conv.fp32_precision == before


@pytest.mark.parametrize("kind", ["lama", "transformer"])
def test_generators_without_flow(folder, tmp_path, kind):
    config = tmp_path / "tiny.yaml"
    config.write_text(f"{{kind: {kind}, blocks: 1, width: 8, max_width: 16, downsamplings: 2}}\n")
    generator = build_generator(config)
    torch.save(export_published(generator, "generator."), tmp_path / "tiny.ckpt")
    filler = load_filler(config, tmp_path / "tiny.ckpt")
    assert filler.stage is None
    loaded = {n: torch.from_numpy(v)[None] for n, v in ValidationSet(folder / "data", 1)[2].items()}
    predicted = filler(*measuring.channels_first(loaded, torch.device("cpu")))
    assert predicted.shape == (1, 3, 32, 32)
    with pytest.raises(InputError):
        load_filler(config, folder / "tiny.ckpt")
