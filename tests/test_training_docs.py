"""The commands in docs/training.md run, on tiny networks and photos."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2", reason="the [training] extra is not installed")
pytest.importorskip("lightning", reason="the [training] extra is not installed")
pytest.importorskip("tensorboard", reason="the [training] extra is not installed")

from documents import SmallInception, text_and_lines  # noqa: E402

from gi_model import cli, configs  # noqa: E402
from gi_model.evaluation import loading  # noqa: E402
from gi_model.training.trainer_options import NAMES  # noqa: E402

TEXT, LINES = text_and_lines("training.md")
COMMANDS = [line for line in LINES if line.startswith("gi-model ")]
TINY = {
    "kind": "two_stream", "width": 4, "blocks": 1, "max_width": 16, "downsamplings": 2, "grid": 2,
    "groups": 2, "heads": 2, "window_heads": 2, "refine": "conv",
}  # fmt: skip
# What the documented file leaves out, for the sake of time.
SMALL = """
discriminator: {width: 4, layers: 1}
accumulate: 1
log_every: 1
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with photos and the configuration of the document, in small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GI_MODEL_RUN", raising=False)
    monkeypatch.setenv("GI_MODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(configs.NAMED, "ours", TINY)
    monkeypatch.setattr(loading, "inception", lambda path: SmallInception())
    Path("pt_inception-2015-12-05-6726825d.pth").touch()
    draw = np.random.default_rng(0)
    for folder in ("photos", "held-out"):
        Path(folder).mkdir()
        for i in range(2):
            noise = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            cv2.imwrite(f"{folder}/{i}.jpg", cv2.resize(noise, (96, 80)))
    (written,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    small = {
        "size: 256": "size: 64",
        "batch_size: 8": "batch_size: 2",
        "workers: 4": "workers: 0",
    }
    for documented, tiny in small.items():
        assert documented in written
        written = written.replace(documented, tiny)
    Path("mine.yaml").write_text(written + SMALL)
    return tmp_path


def test_commands(place, capsys):
    assert [line.split()[1] for line in COMMANDS] == [
        "make-validation", "train", "train", "evaluate", "train", "convert-checkpoint",
    ]  # fmt: skip
    for line in COMMANDS:
        if "published.ckpt --name" in line:  # as the published code would have written it
            (kept,) = place.glob("logs/*_first/checkpoints/last.ckpt")
            assert cli.main(["convert-checkpoint", str(kept), "-o", "published.ckpt", "--run"]) == 0
        words = shlex.split(line)[1:]
        if words[0] == "make-validation":
            words += ["--size", "64"]
        if words[0] == "train":  # without the weights that the document has the reader fetch
            words += ["--steps", "2" if "first" in words else "3", "--no-perceptual", "--flow", "dis"]
        if words[0] == "evaluate":
            words += ["--workers", "0", "--flow", "dis"]
        if "--flow-checkpoint" in words:
            at = words.index("--flow-checkpoint")
            del words[at : at + 2]
        words = [str(next(place.glob(w), w)) if "*" in w else w for w in words]
        assert cli.main(words) == 0, capsys.readouterr().err
    (run,) = (place / "logs").glob("*_first")
    for name in re.findall(r"^\| `([a-z]+/[^`]*)`", TEXT, re.MULTILINE):
        assert list(run.glob(name.replace("N", "*"))), name
    assert (place / "evaluation" / "results.csv").exists()


def test_options_that_are_named_exist(capsys):
    said = ""
    for command in (
        "train",
        "convert-checkpoint",
        "make-validation",
        "evaluate",
        "evaluate-video",
        "fetch-lpips",
    ):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        said += capsys.readouterr().out
    for option in set(re.findall(r"--[a-z][a-z0-9_-]+", TEXT)) - {"--nproc-per-node", "--no-python"}:
        assert option in said or option[2:] in NAMES, option
