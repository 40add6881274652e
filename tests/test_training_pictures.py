"""What training shows: pictures, logs, progress."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning.pytorch", reason="the [training] extra is not installed")
pytest.importorskip("tensorboard", reason="the [training] extra is not installed")

from gi_model.errors import InputError  # noqa: E402
from gi_model.flow.colours import flow_colours  # noqa: E402
from gi_model.sheet import HEADING, HOLE, LINE  # noqa: E402
from gi_model.streams import Attention  # noqa: E402
from gi_model.training.callbacks import Pictures, Progress, Throughput, loggers  # noqa: E402
from gi_model.training.pictures import WIDTH, Sample, sheets  # noqa: E402
from gi_model.training.step import Batch  # noqa: E402


def sample(B: int = 3, T: int = 2, side: int = WIDTH) -> Sample:
    """References that are the target moved left by 2 pixels, with the flow that undoes it."""
    random = torch.Generator().manual_seed(0)
    image = torch.rand(B, 3, side, side, generator=random)
    mask = torch.zeros(B, 1, side, side)
    mask[..., 8:24, 8:24] = 1
    flows = torch.zeros(B, T, 2, side, side)
    flows[:, :, 0] = -2
    moved = image.roll(-2, -1)[:, None].expand(-1, T, -1, -1, -1)
    batch = Batch(image, mask, moved, torch.zeros(B, T, 1, side, side), flows, flows[:, :, :1].abs())
    maps = Attention(torch.rand(B, 2, 16, 16, generator=random), torch.rand(B, 2, 16, 16, generator=random))
    return Sample(batch, torch.full_like(image, 0.5), [maps, maps])


def cell(sheet: np.ndarray, row: int, column: int, side: int = WIDTH) -> np.ndarray:
    top, left = HEADING + row * (side + LINE), column * (side + LINE)
    return sheet[top : top + side, left : left + side]


class Module(lightning.LightningModule):
    """In place of the real module: a weight, and what its callbacks ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.ones(()))
        self.wants_pictures, self.latest = False, None
        self.asked: list[int] = []
        self.epoch = self.number = self.steps = 0
        self.batches_in_all = 6

    @property
    def batches_done(self):
        return 3 * self.epoch + self.number

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            optimizer.step()
        self.log("train/l1", self.weight, prog_bar=True)
        self.steps += 1
        self.epoch, self.number = divmod(self.batches_done + 1, 3)
        self._show(index)

    def validation_step(self, batch, index):
        self._show(index)

    def _show(self, index):
        if self.wants_pictures:
            self.asked.append(index)
            self.latest = sample(B=1, side=16)

    def configure_optimizers(self):
        return [torch.optim.SGD([self.weight], 0.1) for _ in range(2)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs of 3 batches, and what was printed."""
    folder = tmp_path_factory.mktemp("run")
    module, throughput = Module(), Throughput()
    batches = torch.utils.data.DataLoader([{"image": torch.zeros(1)}] * 6, batch_size=2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=loggers(folder),
        callbacks=[Pictures(folder / "images", every=5), throughput, Progress(throughput, every=0)],
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    trainer.fit(module, batches, batches)
    return SimpleNamespace(folder=folder, module=module, throughput=throughput, trainer=trainer)


def test_frames():
    given = sample()
    frames = sheets(given, count=2)["frames"]
    assert frames.shape == (HEADING + 2 * WIDTH + LINE, 6 * WIDTH + 5 * LINE, 3)
    truth = np.rint(255 * given.batch.image[1].movedim(0, -1).numpy())
    assert np.array_equal(cell(frames, 1, 5), truth)
    masked, composite = cell(frames, 1, 0), cell(frames, 1, 4)
    assert (masked[8:24, 8:24] == HOLE).all() and np.array_equal(masked[24:], truth[24:])
    assert (composite[8:24, 8:24] == 128).all() and np.array_equal(composite[24:], truth[24:])
    assert (cell(frames, 1, 3) == 128).all()


def test_flows():
    given = sample()
    flows = sheets(given)["flows"]
    truth = np.rint(255 * given.batch.image[0].movedim(0, -1).numpy())
    aligned = cell(flows, 0, 1)
    assert np.abs(aligned[:, 2:].astype(int) - truth[:, 2:]).max() <= 1
    assert (aligned[:, :2] == HOLE).all()  # comes from outside
    assert (cell(flows, 0, 0) == (0, 255, 255)).all()  # to the left, at full length
    wheel = cell(flows, 0, 6)
    assert (wheel[0, 0] == 255).all() and wheel[WIDTH // 2, -2, 0] > 250 > 20 > wheel[WIDTH // 2, -2, 1]


def test_attention_is_of_every_block():
    attention = sheets(sample(), count=1)["attention"]
    assert attention.shape == (HEADING + WIDTH, 4 * WIDTH + 3 * LINE, 3)
    assert cell(attention, 0, 0).max() > 200


def test_what_is_missing_or_broken_is_not_shown():
    given = sample(side=16)
    bare = Sample(replace(given.batch, flows=None, errors=None), given.predicted)
    assert set(sheets(bare)) == {"frames"}
    for value in (float("nan"), float("inf")):
        broken = replace(given.batch, flows=torch.full_like(given.batch.flows, value))
        assert (cell(sheets(replace(given, batch=broken))["flows"], 0, 0) == 0).all()
    half = {k: None if v is None else v.bfloat16() for k, v in vars(given.batch).items()}
    assert set(sheets(Sample(Batch(**half), given.predicted.bfloat16()))) == {"frames", "flows"}


@pytest.mark.parametrize(
    ("flow", "colour"),
    [((0, 0), (255, 255, 255)), ((4, 0), (255, 0, 0)), ((-4, 0), (0, 255, 255)), ((99, 0), (255, 0, 0)),
     ((2, 0), (255, 128, 128)), ((0, 4), (128, 255, 0)), ((np.nan, 0), (0, 0, 0))],
)  # fmt: skip
def test_colours_of_flow(flow, colour):
    assert np.abs(flow_colours(np.array([[flow]], np.float32), 4).astype(int) - colour).max() <= 1


def test_pictures_are_drawn_when_they_are_due(run):
    found = sorted(p.relative_to(run.folder / "images").as_posix() for p in run.folder.rglob("frames_*.png"))
    # Batches 1, 2, 4 and 5 of the run, and the first one of each validation; a step per batch.
    assert found == [
        "train/frames_gs-000001_e-000000_b-000000.png",
        "train/frames_gs-000002_e-000000_b-000001.png",
        "train/frames_gs-000004_e-000001_b-000000.png",
        "train/frames_gs-000005_e-000001_b-000001.png",
        "val/frames_gs-000003_e-000001_b-000000.png",
        "val/frames_gs-000006_e-000002_b-000000.png",
    ]
    assert run.module.asked == [0, 1, 0, 0, 1, 0]
    assert not run.module.wants_pictures and run.module.latest is None
    picture = cv2.imread(str(run.folder / "images" / found[0]))[..., ::-1]
    assert np.array_equal(picture, sheets(sample(B=1, side=16))["frames"])
    assert not list(run.folder.rglob("*.partial*"))


def test_logs(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert {"train/frames", "train/flows", "train/attention", "val/frames"} <= set(events.Tags()["images"])
    assert [e.step for e in events.Images("train/frames")] == [1, 2, 4, 5]
    assert {"train/l1", "train/images_per_second"} <= set(events.Tags()["scalars"])
    with (run.folder / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and all(float(row["train/images_per_second"]) > 0 for row in rows)


def test_a_start_keeps_the_logs_of_those_before(run):
    _, later = loggers(run.folder)
    assert Path(later.log_dir) == run.folder / "csv" / "version_1"


def test_speed_and_time_left(run, capsys):
    assert run.throughput.images_per_second > 0 and run.throughput.left == 0
    progress = Progress(run.throughput, every=3600)
    run.throughput.left = 3725.2
    for _ in range(2):  # the second comes too early
        progress.on_train_batch_end(run.trainer, run.module, None, None, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("epoch 2, batch 6 of 6: images/s ") and "left 1:02:05" in line


@pytest.mark.parametrize("name", ["every", "count"])
def test_numbers_are_checked(name):
    with pytest.raises(InputError, match=f"^{name}: expected at least 1, got 0$"):
        Pictures("images", **{name: 0})
