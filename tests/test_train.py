"""Runs of ``gi-model train`` on tiny networks: learning, resuming, kills, several processes, refusals."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

cv2 = pytest.importorskip("cv2", reason="the [training] extra is not installed")
pytest.importorskip("lightning", reason="the [training] extra is not installed")
yaml = pytest.importorskip("yaml", reason="the [training] extra is not installed")

from gi_model import configs, export_published, load_published  # noqa: E402
from gi_model.checkpoints import load_checkpoint  # noqa: E402
from gi_model.cli import main  # noqa: E402
from gi_model.data import Batches, Draws, Photos, ValidationSet  # noqa: E402
from gi_model.data.making import make_validation  # noqa: E402
from gi_model.data.masks import build_mask  # noqa: E402
from gi_model.errors import InputError  # noqa: E402
from gi_model.flow import RAFT  # noqa: E402
from gi_model.training.configuration import as_tree, configuration, read_configuration  # noqa: E402
from gi_model.training.keeping import VERSION, AtomicFiles, read_run  # noqa: E402
from gi_model.training.module import masked_quality  # noqa: E402
from gi_model.training.perceptual import PerceptualLoss  # noqa: E402
from gi_model.training.step import Alternation, Batch, filled  # noqa: E402
from gi_model.training.trainer_options import of_trainer  # noqa: E402
from gi_model.training.watch import LossError, Watch  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
_module = importlib.util.spec_from_file_location("golden_recipe", GOLDEN / "recipe.py")
recipe = importlib.util.module_from_spec(_module)
_module.loader.exec_module(recipe)

MASKS = {
    "irregular_proba": 0,
    "box_kwargs": {"margin": 2, "bbox_min_size": 6, "bbox_max_size": 16, "max_times": 2, "min_times": 1},
}
TINY: dict[str, Any] = {
    "data": {"photos": "photos", "size": 32, "references": 1, "masks": MASKS, "batch_size": 2, "workers": 0},
    "generator": {
        "kind": "two_stream", "width": 4, "blocks": 1, "max_width": 16, "downsamplings": 2, "grid": 2,
        "groups": 2, "heads": 2, "window_heads": 2, "refine": "conv", "aggregates": False,
    },
    "discriminator": {"width": 4, "layers": 1},
    "flow": {"kind": "none"},
    "losses": {"perceptual": 0},
    "learning_rate": 1e-3,
    "schedule": {"warm_up_steps": 0},
    "accumulate": 2,
    "steps": 6,
    "save_every": 1000,
    "log_every": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with photos, a validation set and a configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GI_MODEL_RUN", raising=False)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):  # so that the last batch of an epoch is small, and the last window short
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        cv2.imwrite(f"photos/{i}.png", cv2.resize(small, (60, 50), interpolation=cv2.INTER_CUBIC))
    write(TINY)
    return tmp_path


def write(tree: dict[str, Any], name: str = "tiny.yaml") -> None:
    Path(name).write_text(yaml.safe_dump(tree))


def validation() -> None:
    photos = Photos(
        sorted(Path("photos").iterdir()), size=32, references=1, mask=build_mask("mixed", **MASKS)
    )
    assert list(make_validation(photos, Path("held-out"), 3)) == [0, 1, 2]


def run_folder(name: str) -> Path:
    (found,) = Path("logs").glob(f"*_{name}")
    return found


def train(name: str, *options: str) -> Path:
    assert main(["train", "--config", "tiny.yaml", "-n", name, *options]) == 0
    return run_folder(name)


def last(folder: Path) -> dict[str, Any]:
    return read_run(folder / "checkpoints" / "last.ckpt")


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal to the bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    else:
        assert one == other, where


def assert_same_run(one: Path, other: Path) -> None:
    checkpoints = [last(folder) for folder in (one, other)]
    for checkpoint in checkpoints:
        checkpoint["gi_model"].pop("configuration")
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "gi_model", "epoch", "global_step"):
        assert_same(checkpoints[0][key], checkpoints[1][key], key)


def losses(folder: Path, term: str = "train/gen_l1") -> list[float]:
    rows = [
        row
        for path in sorted(folder.rglob("metrics.csv"))
        for row in csv.DictReader(path.read_text().splitlines())
    ]
    return [float(row[term]) for row in rows if row.get(term)]


@pytest.mark.parametrize("stop", [1, 2, 3], ids=["in a window", "at the end of an epoch", "in the next"])
def test_a_run_that_goes_on_computes_what_it_would_have(stop: int) -> None:
    validation()
    write({**TINY, "data": {**TINY["data"], "validation": {"one": {"data": "held-out", "references": 1}}}})
    whole = train("whole", "--ema", "0.9")
    halved = train("halved", "--ema", "0.9", "--steps", str(stop))
    before = losses(halved)
    assert main(["train", "--resume", str(halved), "--steps", "6"]) == 0
    assert_same_run(whole, halved)
    assert losses(whole)[: len(before)] == before and losses(halved) == losses(whole)
    best = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert len(best) == 4 and best[0].startswith("epoch=00000")
    # Everything that reads published checkpoints reads these.
    assert any(
        key.startswith("model0.0")
        for key in load_checkpoint(whole / "checkpoints" / "last.ckpt", part="discriminator")
    )


def test_a_run_that_nothing_judges_goes_on_too() -> None:
    write({**TINY, "losses": {"perceptual": 0, "feature_matching": 0, "adversarial": {"weight": 0}}})
    whole, halved = train("whole"), train("halved", "--steps", "3")
    assert main(["train", "--resume", str(halved), "--steps", "6"]) == 0
    assert_same_run(whole, halved)
    assert len(losses(whole)) == len(losses(halved)) and not losses(whole, "train/discr_adv")


def test_a_loss_that_falls() -> None:
    write({**TINY, "data": {**TINY["data"], "easy": True}})
    folder = train("falls", "--steps", "200", "learning_rate=1e-2", "accumulate=1", "save_every=50")
    found = losses(folder)
    assert len(found) == 200
    assert np.mean(found[-40:]) < 0.8 * np.mean(found[:20])


def trainings(*runs: dict[str, Any]) -> list[list[int]]:
    """Exit codes of the processes of runs, see ``trainings.py``."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("trainings.py"))],
        input=json.dumps(runs),
        # As many threads as here: sums in another order differ in their last bits.
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_while_training_and_while_writing() -> None:
    whole = train("whole", "--steps", "20")
    command = ["train", "--config", "tiny.yaml", "--steps", "100000", "save_every=1"]
    folders = [Path("logs/training"), Path("logs/writing")]
    kept, written = (folder / "checkpoints" / "last.ckpt" for folder in folders)
    killed = trainings(
        {"arguments": command, "environment": {"GI_MODEL_RUN": str(folders[0])}, "kill": str(kept)},
        {
            "arguments": command,
            "environment": {"GI_MODEL_RUN": str(folders[1]), "HALF": "4"},
            "kill": "half-written",
        },
    )
    assert killed == [[-signal.SIGKILL], [-signal.SIGKILL]]
    assert 1 <= last(folders[0])["gi_model"]["steps"] < 20
    (half,) = written.parent.glob(".last.*.partial.ckpt")
    assert written.stat().st_size / 3 < half.stat().st_size < written.stat().st_size
    assert last(folders[1])["gi_model"]["steps"] == 3, "the earlier checkpoint is whole"
    for folder in folders:
        assert main(["train", "--resume", str(folder), "--steps", "20", "save_every=1000"]) == 0
        assert_same_run(whole, folder)
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_checkpoint_is_whole_or_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, path = AtomicFiles(), tmp_path / "last.ckpt"
    first = {"gi_model": {"version": VERSION, "steps": 1}}
    files.save_checkpoint(first, path)

    def fails(*arguments: Any) -> None:
        arguments[1].write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space"):
        files.save_checkpoint({"gi_model": 2}, path)
    assert files.load_checkpoint(path) == first
    assert [found.name for found in tmp_path.glob("*.ckpt")] == ["last.ckpt"]


def test_asked_to_stop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train("whole")
    from gi_model.training import module

    learn = module.Alternation.batch

    def interrupted(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.global_step == 2 and arguments[1] == 0:  # the first of two batches of this step
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module.Alternation, "batch", interrupted)
        assert main(["train", "--config", "tiny.yaml", "-n", "stopped"]) == 130
    folder = run_folder("stopped")
    assert "step 3 is kept: --resume" in capsys.readouterr().err
    assert main(["train", "--resume", str(folder)]) == 0
    assert_same_run(whole, folder)


def test_a_lost_loss_keeps_the_last_good_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gi_model.training import objective

    monkeypatch.setattr(
        objective, "feature_matching", lambda *_: torch.tensor(float("nan"), requires_grad=True)
    )
    assert main(["train", "--config", "tiny.yaml", "-n", "lost"]) == 2
    assert "gen_fm is nan at step 0; no checkpoint had been written" in capsys.readouterr().err


def test_low_precision_and_the_definitions_of_operators() -> None:
    folder = train(
        "low", "--precision", "bf16", "--backend", "reference", "--steps", "2", "--perceptual-eval"
    )
    assert all(value.dtype != torch.bfloat16 for value in last(folder)["state_dict"].values())
    assert last(folder)["gi_model"]["configuration"]["backend"] == "reference"


def test_watch() -> None:
    watch = Watch(limit=10, patience=3)
    for step in range(3):
        watch({"gen_l1": 2.0}, step)
    watch({"gen_l1": 19.0}, 3)
    resumed = Watch(limit=10, patience=3)
    resumed.load_state_dict(watch.state_dict())
    with pytest.raises(LossError, match="gen_l1 is 1000 at step 4, more than 10 times its usual"):
        resumed({"gen_l1": 1000.0}, 4)
    with pytest.raises(LossError, match="gen_adv is inf"):
        watch({"gen_adv": float("inf")}, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--config: expected a YAML file"),
        (["--config", "none.yaml"], "none.yaml does not exist"),
        (["--config", "tiny.yaml", "data.photos=nowhere"], "nowhere is not a folder"),
        (["--config", "tiny.yaml", "data.photo=a"], "unknown key 'data.photo' (did you mean 'photos'?)"),
        (["--config", "tiny.yaml", "learning_rat=1"], "did you mean 'learning_rate'?"),
        (["--config", "tiny.yaml", "steps=many"], "steps: expected a whole number, got str 'many'"),
        (["--config", "tiny.yaml", "losses.perceptual=30"], "leave the term out with --no-perceptual"),
        (["--config", "tiny.yaml", "losses.perceptual=30", "losses.perceptual_weights=x.pth"], "x.pth"),
        (["--config", "tiny.yaml", "data.size=30"], "data.scale: expected frames of a multiple of 4"),
        (["--config", "tiny.yaml", "generator.aggregates=true"], "this generator needs flow"),
        (["--config", "tiny.yaml", "generator.aggregates=true", "--flow", "raft"], "weights of RAFT"),
        (["--config", "tiny.yaml", "--gpus", "0,"], "no GPU"),
        (["--config", "tiny.yaml", "--gpus", "0,1"], "--gpus: this machine has no GPU that PyTorch can use"),
        (["--config", "tiny.yaml", "--gpus", "a,b"], "--gpus: expected indices such as 0,1, got a,b"),
        (["--config", "tiny.yaml", "-t", "false"], "expected --resume_from_checkpoint FILE, got none"),
        (["--config", "tiny.yaml", "-t", "maybe"], "--train: expected true or false, got maybe"),
        (["--config", "tiny.yaml", "-x"], "--xtraspeed: DeepSpeed is not used; --gpus 0,1"),
        (["--config", "tiny.yaml", "--gradient_clip_val", "1"], "--gradient_clip_val: not supported; grad"),
        (["--config", "tiny.yaml", "--fast_dev_run"], "--steps 1 --limit_val_batches 1"),
        (["--config", "tiny.yaml", "--limit_val_batches", "0.5"], "expected a whole number, got '0.5'"),
        (["--config", "tiny.yaml", "--accelerator", "dp"], "--accelerator: expected ddp"),
        (["--config", "tiny.yaml", "monitor=fid"], "inception=pt_inception-2015-12-05-6726825d.pth"),
        (["--config", "tiny.yaml", "monitor=lpips"], "monitor: expected psnr, ssim, fid, got 'lpips'"),
        (["--config", "tiny.yaml", "validate_every_epochs=0"], "validate_every_epochs: expected a number"),
        (["--config", "tiny.yaml", "--resume", "photos"], "last.ckpt does not exist"),
        (["--config", "tiny.yaml", "--precision", "half"], "--precision: expected 32-true (32) or bf16"),
        (["--config", "tiny.yaml", "data.batch_size=0"], "data.batch_size: expected at least 1, got 0"),
        (["--config", "tiny.yaml", "--ema", "1"], "averaging.decay: expected 0 to below 1"),
        (["--config", "tiny.yaml", "generator_optimizer.betas=[0.9]"], "betas: expected two numbers"),
        (["--config", "tiny.yaml", "stray"], "expected key.sub=value, got 'stray'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("logs").exists()


PUBLISHED: dict[str, Any] = {
    "model": {
        "base_learning_rate": "1e-5",
        "target": "gi.models.inpainting.lama_guided.DefaultInpaintingTrainingModule",
        "params": {
            "monitor": "val_evaluator_stitched_state_two_fid_total_mean",
            "flow_cfg": {
                "target": "gi.modules.warp.raft.RAFT",
                "params": {"input_range": "01", "return_err": True, "resolution": [256, 256]},
            },
            "scheduler_config": {
                "target": "gi.lr_scheduler.LambdaWarmUpCosineScheduler",
                "params": {"warm_up_steps": 1000, "max_decay_steps": 1000000, "lr_start": "1e-4"},
            },
            "config": {
                "losses": {
                    "l1": {"weight_missing": 0, "weight_known": 10},
                    "adversarial": {
                        "kind": "r1", "weight": 10, "gp_coef": 0.001, "mask_as_fake_target": True,
                        "allow_scale_mask": True,
                    },
                    "feature_matching": {"weight": 100},
                    "resnet_pl": {"weight": 30, "weights_path": "checkpoints/lama/"},
                },
                "optimizers": {
                    "generator": {"kind": "adam", "lr_factor": 1.0},
                    "discriminator": {"kind": "adam", "lr_factor": 0.1},
                },
                "discriminator": {"kind": "pix2pixhd_nlayer", "input_nc": 3, "ndf": 64, "n_layers": 4},
            },
        },
    },
    "data": {
        "target": "gi.main.DataModuleFromConfig",
        "params": {
            "batch_size": 8, "num_workers": 4,
            "train": {
                "target": "gi.data.inpainting_lama_multiframe.LamaGI",
                "params": {
                    "easy": False, "n_references": 2, "root": "data", "filelist": "list.txt", "out_size": 256,
                    "transform_variant": "distortions",
                },
            },
            "combined_val_batches": False,
            "validation": {
                "1_four": {"params": {"filenames": "val.txt", "n_references": 4}},
                "0_two": {"params": {"filenames": "val.txt", "n_references": 2}},
            },
        },
    },
    "lightning": {"trainer": {"benchmark": True, "num_sanity_val_steps": 0, "accumulate_grad_batches": 2}},
}  # fmt: skip


def test_published_configuration() -> None:
    write(PUBLISHED, "ours.yaml")
    made = read_configuration(["ours.yaml"], ["data.params.batch_size=4", "seed=5"])
    assert (made.data.batch_size, made.seed, made.accumulate) == (4, 5, 2)
    assert made.rate(processes=2) == pytest.approx(1.6e-4)
    assert list(made.data.validation) == ["two", "four"]
    assert made.losses.perceptual_weights is not None
    assert made.losses.perceptual_weights.startswith("checkpoints/lama/ade20k/")
    # But for what comes from the machine, the published recipe is what is left out.
    assert made.losses.adversarial == configuration({}).losses.adversarial
    assert made.schedule == configuration({}).schedule
    assert made.generator_optimizer == configuration({}).generator_optimizer
    assert made.discriminator_optimizer == configuration({}).discriminator_optimizer
    assert configuration(as_tree(made)) == made
    with pytest.raises(InputError, match=r"unknown key in losses: 'resnet_p' .did you mean 'resnet_pl'"):
        read_configuration(["ours.yaml"], ["model.params.config.losses.resnet_p.weight=1"])


def test_batches_go_on_where_they_stopped() -> None:
    whole = iter(Batches(Draws(5, rank=1, world=2), 2))
    expected = [next(whole) for _ in range(7)]
    assert [len(batch) for batch in expected] == [2, 1, 2, 1, 2, 1, 2]
    for done in range(6):
        rest = iter(Batches(Draws(5, rank=1, world=2), 2, *divmod(done, 2)))
        assert [next(rest) for _ in range(7 - done)] == expected[done:]


def test_quality_is_measured_inside_the_mask() -> None:
    image, mask = torch.rand(2, 3, 16, 16), torch.zeros(2, 1, 16, 16)
    mask[0, :, 4:8, 4:8] = 1
    psnr, ssim, count = masked_quality(image + 0.1 * mask, image, mask).tolist()
    assert count == 1 and psnr == pytest.approx(20, abs=1e-3) and 0 < ssim < 1
    assert masked_quality(image, image, mask).tolist() == pytest.approx([100, 1, 1])
    quality = masked_quality(image + 0.1 * mask, image, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(masked_quality(image + 0.1 * mask, image, mask), quality)


def test_two_processes_learn_what_one_does_from_batches_twice_as_large() -> None:
    validation()
    for i in range(5, 8):
        (Path("photos") / f"{i}.png").write_bytes((Path("photos") / f"{i - 5}.png").read_bytes())
    Path("photos/3.png").write_bytes(b"broken")
    (Path("photos") / "4.png").write_bytes((Path("photos") / "2.png").read_bytes()[:100])
    one = {"one": {"data": "held-out", "references": 1}}
    write({**TINY, "data": {**TINY["data"], "validation": one}})
    Path("cut").mkdir()
    for path in Path("held-out").iterdir():
        (Path("cut") / path.name).write_bytes(path.read_bytes())
    (Path("cut") / "image_000001.png").write_bytes(b"broken")  # which the second process reads
    common = ["train", "--config", "tiny.yaml", "--steps", "4", "--logdir"]
    norms = {"EVAL_NORMS": "1"}
    codes = trainings(
        {"arguments": [*common, "logs/1", "data.batch_size=4"], "environment": norms},
        {"arguments": [*common, "logs/2"], "ranks": 2, "environment": norms},
        {"arguments": [*common, "logs/cut", "data.validation.one.data=cut"], "ranks": 2},
    )
    said = [[Path(f"{run}-{rank}.out").read_text() for rank in range(len(codes[run]))] for run in range(3)]
    assert codes[:2] == [[0], [0, 0]], said
    for term in ("train/gen_fm", "train/discr_adv"):
        one_process, two = (losses(Path(f"logs/{count}"), term) for count in (1, 2))
        assert len(two) == len(one_process) == 8
        np.testing.assert_allclose(two, one_process, rtol=2e-4)
    np.testing.assert_allclose(
        losses(Path("logs/2"), "val/one/psnr"), losses(Path("logs/1"), "val/one/psnr"), rtol=1e-3
    )
    # Both passes of each of four steps, of two accumulated batches each.
    assert all("gradients shared 8 times" in text for text in said[1])
    first, second = said[1]
    assert "training in" in first and "batch 1 of" in first and "trained 4 steps" in first
    assert not re.search("training in|batch 1 of|trained", second)
    count = re.compile(r"^(\d+) photos could not be read and were replaced", re.MULTILINE)
    counts = [count.search(text) for text in (said[0][0], first)]
    assert all(counts) and counts[0][1] == counts[1][1], said
    random = last(next(Path("logs/2").iterdir()))["gi_model"]["random"]
    assert len(random) == 2
    # What only one process meets ends the other one too, at once.
    assert all(codes[2]) and -signal.SIGKILL not in codes[2], said[2]
    assert any("image_000001.png is not a readable image" in text for text in said[2])


def test_weights_are_converted(capsys: pytest.CaptureFixture[str]) -> None:
    folder = train("made", "--ema", "0.5", "--steps", "2")
    kept = folder / "checkpoints" / "last.ckpt"
    state = load_checkpoint(kept)
    for name in ("whole.ckpt", "whole.safetensors"):
        assert main(["convert-checkpoint", str(kept), "-o", name]) == 0
        converted = load_checkpoint(name)
        expected = {key: value for key, value in state.items() if not key.startswith("generator_average.")}
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[key], value) for key, value in expected.items())
        # A run begins with them.
        assert train(name.replace(".", "-"), "--weights", name, "--steps", "1")
    options = ["--average", "--generator-only", "--dtype", "float16"]
    assert main(["convert-checkpoint", str(kept), "-o", "small.safetensors", *options]) == 0
    for key, value in load_checkpoint("small.safetensors", part="generator").items():
        average = state[f"generator_average.{key}"]
        assert torch.equal(value, average.half() if average.is_floating_point() else average)
    assert main(["convert-checkpoint", str(kept), "-o", "small.safetensors"]) == 2
    assert main(["convert-checkpoint", "whole.ckpt", "--average", "-o", "none.ckpt"]) == 2
    assert "--average: whole.ckpt holds no average" in capsys.readouterr().err
    assert main(["train", "--config", "tiny.yaml", "--resume_from_checkpoint", "whole.ckpt"]) == 2
    assert "to begin with its weights: --weights" in capsys.readouterr().err


def test_a_run_goes_on_from_the_published_layout(capsys: pytest.CaptureFixture[str]) -> None:
    whole = train("whole")
    kept = train("halved", "--steps", "4") / "checkpoints" / "last.ckpt"
    template = {"generator.x": torch.ones(1), "val_evaluator_raw_state_two.y": torch.ones(1)}
    torch.save({"state_dict": template}, "template.ckpt")
    options = ["--run", "--complete-with", "template.ckpt"]
    assert main(["convert-checkpoint", str(kept), "-o", "run.ckpt", *options]) == 0
    assert "the run after 4 steps" in capsys.readouterr().out
    written = torch.load("run.ckpt", weights_only=True)
    assert set(written) == {
        "epoch", "global_step", "pytorch-lightning_version", "state_dict", "callbacks", "optimizer_states",
        "lr_schedulers",
    }  # fmt: skip
    assert (written["epoch"], written["global_step"]) == (2, 4)
    assert set(written["state_dict"]) == set(load_checkpoint(kept)) | set(template)
    del written["state_dict"]["generator.x"]
    torch.save(written, "run.ckpt")
    on = train("on", "--resume_from_checkpoint", "run.ckpt")
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert_same(last(on)[key], last(whole)[key], key)
    for wrong in (["--average"], ["--generator-only"], ["--dtype", "float16"]):
        assert main(["convert-checkpoint", str(kept), "-o", "no.ckpt", "--run", *wrong]) == 2
    assert main(["convert-checkpoint", str(kept), "-o", "no.safetensors", "--run"]) == 2
    assert "-o: expected a name that ends in .ckpt with --run" in capsys.readouterr().err
    old = last(whole)
    del old["gi_model"]["version"]
    torch.save(old, "old.ckpt")
    assert main(["train", "--config", "tiny.yaml", "--resume_from_checkpoint", "old.ckpt"]) == 2
    assert "of version None of this training, expected 2" in capsys.readouterr().err


def test_options_of_the_published_trainer() -> None:
    given = {
        "gpus": "0,1", "max_epochs": "3", "max_steps": 9, "val_check_interval": "100", "precision": 32,
        "limit_val_batches": "4", "log_every_n_steps": "5", "benchmark": "true", "num_nodes": None,
    }  # fmt: skip
    assert of_trainer(given) == {
        "devices": [0, 1], "epochs": 3, "steps": 9, "validate_every_batches": 100, "precision": "32-true",
        "validation_batches": 4, "log_every": 5,
    }  # fmt: skip
    assert of_trainer({"val_check_interval": 0.25}) == {"validate_every_epochs": 0.25}
    assert of_trainer({"check_val_every_n_epoch": 2, "limit_val_batches": 1.0}) == {
        "validate_every_epochs": 2
    }
    with pytest.raises(InputError, match=r"lightning.trainer.max_step: unknown .did you mean 'max_steps'"):
        of_trainer({"max_step": 1}, "lightning.trainer.")


def test_the_test_phase(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    validation()
    monkeypatch.setenv("GI_MODEL_CACHE", "cache")
    one = {"one": {"data": "held-out", "references": 1}}
    write({**TINY, "data": {**TINY["data"], "validation": one, "test": one}})
    options = ["--limit_val_batches", "1", "--validate-every", "3", "-d"]
    assert main(["train", "--config", "tiny.yaml", "-n", "tested", *options]) == 0
    (folder,) = Path("logs/debug_runs").iterdir()
    said = capsys.readouterr().out
    assert (
        "the best checkpoints are those by PSNR inside the mask (for FID, as published: --inception" in said
    )
    assert "stitched, 1 reference" in said and "not computed: lpips (no weights" in said
    tested = (folder / "test" / "results.csv").read_text()
    assert sorted(path.name for path in (folder / "test").iterdir()) == ["results.csv", "results.json"]
    assert len(losses(folder, "val/one/psnr")) == 2

    weights = str(folder / "checkpoints" / "last.ckpt")
    options = ["train", "--config", "tiny.yaml", "-n", "only", "--resume_from_checkpoint", weights]
    assert main([*options, "--train", "false"]) == 0
    only = run_folder("only")
    assert (only / "test" / "results.csv").read_text() == tested and len(list(only.iterdir())) == 1
    assert not (train("untested", "--no-test", "--steps", "1") / "test").exists()


def test_an_error_while_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    import pdb

    from gi_model.training import module

    seen: list[Any] = []
    monkeypatch.setattr(pdb, "post_mortem", seen.append)
    monkeypatch.setattr(module.Alternation, "batch", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", "--config", "tiny.yaml", "-n", "wrong", "--debug"])
    assert len(seen) == 1 and next(Path("logs/debug_runs").glob("*_wrong")).is_dir()


def test_the_best_by_fid() -> None:
    from gi_model.evaluation.frechet import frechet_distance
    from gi_model.evaluation.inception import Inception

    validation()
    network = Inception()
    torch.manual_seed(0)
    for norm in network.modules():  # statistics of what it sees, or features would vanish or explode
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = None
    network.train()(torch.rand(2, 3, 64, 64))
    network.eval()
    torch.save(network.state_dict(), "inception.pth")
    one = {"one": {"data": "held-out", "references": 1}}
    write({**TINY, "data": {**TINY["data"], "validation": one}})
    folder = train(
        "fid", "--inception", "inception.pth", "--validate-every", "1", "--steps", "5", "accumulate=1"
    )
    found = losses(folder, "val/one/fid")
    kept = {int(path.stem[-8:]) for path in (folder / "checkpoints").glob("epoch=*")}
    assert len(found) == 5 and kept == {1 + int(i) for i in np.argsort(found)[:3]}

    generator = configs.build_generator(TINY["generator"])
    load_published(generator, load_checkpoint(folder / "checkpoints" / "last.ckpt"), "generator.")
    samples = [ValidationSet("held-out", 1)[i] for i in range(3)]
    batch = Batch.of_samples(torch.utils.data.default_collate(samples))
    with torch.no_grad():
        composite = batch.composite(filled(generator.eval(), batch))
        expected = frechet_distance(network(composite), network(batch.image))
    assert found[-1] == pytest.approx(expected, rel=1e-3)

    state = network.state_dict()
    state.popitem()
    torch.save({key: value for key, value in state.items() if "Mixed_7c" not in key}, "other.pth")
    assert main(["train", "--config", "tiny.yaml", "--inception", "other.pth"]) == 2


@pytest.mark.parametrize("published", [True, False])
def test_odd_published_behaviour_has_its_switch(published: bool) -> None:
    """A last, short window divided by the full count; flow that sees what is hidden."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1)
    step: Any = SimpleNamespace(objective=SimpleNamespace(judged=True))
    alternation = Alternation(
        step, (optimizer, optimizer), lambda step: 1, accumulate=3, rescale=not published
    )
    for number, stepping in ((0, False), (1, True)):  # two of three batches
        alternation._learn(0, weight.sum(), number, stepping)
    assert weight.item() == pytest.approx(-2 / 3 if published else -1)

    seen: list[torch.Tensor] = []

    def stage(image: torch.Tensor, srcs: torch.Tensor) -> tuple[None, None]:
        seen.extend((image, srcs))
        return None, None

    samples = {"image": torch.ones(1, 4, 4, 3), "srcs": torch.ones(1, 2, 4, 4, 3)}
    samples |= {"mask": torch.ones(1, 4, 4, 1), "srcs_masks": torch.ones(1, 2, 4, 4, 1)}
    Batch.of_samples(samples, stage, sees_hidden=published)
    assert all(bool((frames.narrow(-3, 0, 3) == published).all()) for frames in seen)
    assert configuration({}).flow.sees_hidden and not configuration({}).rescale_last_window


def test_flow_by_raft_and_the_perceptual_term_from_weights() -> None:
    """Of the published layouts, through the command."""
    torch.save({f"module.{key}": value for key, value in raft_state().items()}, "raft-things.pth")
    encoder = recipe.weights(PerceptualLoss().encoder.state_dict(), "")
    state = {key: value for key, value in encoder.items() if not key.endswith("num_batches_tracked")}
    torch.save({**state, "extra": torch.zeros(1)}, "encoder_epoch_20.pth")
    tree = {key: value for key, value in TINY.items() if key not in ("flow", "losses")}
    tree["generator"] = {**TINY["generator"], "aggregates": True}
    tree["losses"] = {"perceptual_weights": "encoder_epoch_20.pth"}
    tree["flow"] = {"checkpoint": "raft-things.pth", "resolution": [128, 128], "iterations": 2}
    write(tree)
    folder = train("weights", "--steps", "1")
    assert all(value > 0 and np.isfinite(value) for value in losses(folder, "train/gen_resnet_pl"))
    kept = load_checkpoint(folder / "checkpoints" / "last.ckpt")
    for key, value in raft_state().items():
        assert torch.equal(kept[f"flow.raft.{key}"], value), "flow is not learnt"
    # As published, the encoder's batch norms see each batch: two updates per pass of the generator.
    assert kept["loss_resnet_pl.impl.bn1.num_batches_tracked"] == 4
    assert torch.equal(kept["loss_resnet_pl.impl.conv1.weight"], encoder["conv1.weight"])
    frozen = train("frozen", "--steps", "1", "--perceptual-eval")
    assert losses(frozen, "train/gen_resnet_pl") != losses(folder, "train/gen_resnet_pl")
    kept = load_checkpoint(frozen / "checkpoints" / "last.ckpt")
    assert torch.equal(kept["loss_resnet_pl.impl.bn1.running_mean"], encoder["bn1.running_mean"])


@pytest.mark.slow(reason="compiles for two and a half minutes: --slow")
def test_a_compiled_generator_learns_the_same() -> None:
    plain, compiled = train("plain"), train("compiled", "--compile")
    np.testing.assert_allclose(losses(compiled), losses(plain), rtol=1e-3)
    assert last(compiled)["state_dict"].keys() == last(plain)["state_dict"].keys()


def raft_state() -> dict[str, torch.Tensor]:
    """Weights of RAFT in the published layout."""
    raft = RAFT()
    raft.load_state_dict(recipe.weights(raft.state_dict(), ""))
    state = export_published(raft)
    keys = json.loads((GOLDEN / "raft_keys.json").read_text())["raft"]
    assert {key: list(value.shape) for key, value in state.items()} == keys
    return state
