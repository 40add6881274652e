"""Filling a clip by a generator: what is looked at, what is kept, what is written, and the command."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

cv2 = pytest.importorskip("cv2", reason="the [video] extra is not installed")
pytest.importorskip("av", reason="the [video] extra is not installed")

from test_propagate import COUNT, H, W, blank, box_masks, pan, write_clip  # noqa: E402

from gi_model import cli, export_published, video  # noqa: E402
from gi_model.flow import RAFT, DISStage, FlowStage  # noqa: E402
from gi_model.generator import TwoStreamGenerator  # noqa: E402
from gi_model.inpainting import inpaint_frame  # noqa: E402
from gi_model.propagation import LearnedPropagator  # noqa: E402


def small_generator() -> TwoStreamGenerator:
    torch.manual_seed(0)
    return TwoStreamGenerator(width=8, blocks=2, crossed=1, grid=4, heads=4, window_heads=4).eval()


def propagator(stage=None, **options) -> LearnedPropagator:
    return LearnedPropagator(small_generator(), stage or DISStage(), **options)


def test_only_the_mask_changes_and_all_of_it():
    frames, masks = pan(), box_masks()
    results = list(propagator(radius=3).run(blank(frames, masks), masks))
    assert len(results) == COUNT
    for frame, mask, result in zip(frames, masks, results, strict=True):
        assert result.shape == (H, W, 3)
        assert result.dtype == np.uint8
        assert np.array_equal(result[~mask], frame[~mask])
        assert result[mask].any(), "nothing was written into the hole"


def test_what_the_mask_hides_does_not_matter():
    frames, masks = pan(), box_masks()
    runs = [list(propagator(radius=3).run(blank(frames, masks, v), masks)) for v in (0, 200)]
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_frame_is_encoded_once():
    frames, masks = pan(), box_masks()
    made = propagator(radius=3, references=2)
    encoded = []
    encode, flow = made.generator.encode_references, made.stage.encode
    made.generator.encode_references = lambda srcs: encoded.append("references") or encode(srcs)
    made.stage.encode = lambda rgba: encoded.append("flow") or flow(rgba)
    list(made.run(frames, masks))
    assert encoded.count("references") <= COUNT
    assert encoded.count("flow") == COUNT


def test_references_hide_least_of_the_hole():
    frames, masks = pan()[:5], [np.zeros((H, W), bool) for _ in range(5)]
    for i in (0, 1, 2, 4):  # frame 3 sees the hole of frame 1, frame 4 a part of it
        masks[i][20:40, 30:50] = True
    masks[4][20:30, 30:50] = False
    made, seen = propagator(radius=4, references=2), []
    stage = made.stage
    made.stage = type("Stage", (), {"encode": staticmethod(stage.encode)})()
    type(made.stage).__call__ = lambda self, target, sources: seen.append(sources) or stage(target, sources)
    for _ in made.run(frames, masks):
        pass
    for sources in seen[:3]:
        assert [float(s[0, 3].sum()) for s in sources] == sorted(float(s[0, 3].sum()) for s in sources)
        assert float(sources[0][0, 3].sum()) == 0, "the frame without a hole comes first"


def test_a_frame_without_others_is_inpainted():
    frame, mask = pan()[0], box_masks()[0]
    made = propagator()
    (result,) = made.run([frame], [mask])
    assert np.array_equal(result, inpaint_frame(frame, mask))
    assert made.unseen == made.masked == mask.sum()


def test_frames_are_scaled_to_what_the_generator_takes():
    made = propagator(size=64)
    assert made._size(np.empty((180, 320, 3))) == (64, 112)
    assert made._size(np.empty((9, 31, 3))) == (16, 32)
    frames = [cv2.resize(f, (131, 77)) for f in pan()[:3]]
    masks = [np.zeros((77, 131), bool) for _ in range(3)]
    masks[1][30:41, 50:71] = True
    results = list(made.run(frames, masks))
    assert [r.shape for r in results] == [(77, 131, 3)] * 3
    assert np.array_equal(results[1][~masks[1]], frames[1][~masks[1]])


def test_the_network_for_flow():
    frames, masks = pan()[:3], box_masks()[:3]
    torch.manual_seed(0)
    stage = FlowStage(RAFT(small=True), resolution=(64, 64), iterations=2)
    assert len(list(propagator(stage, radius=2).run(frames, masks))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0}, "radius: expected at least 1, got 0"),
        ({"references": 0}, "references: expected at least 1, got 0"),
        ({"size": 8}, "size: expected at least 16, got 8"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        propagator(**options)


def test_a_generator_that_trains():
    with pytest.raises(ValueError, match="generator: expected eval mode"):
        LearnedPropagator(small_generator().train(), DISStage())


def test_wrong_masks():
    with pytest.raises(ValueError, match="masks: expected one for every frame, got 2"):
        list(propagator().run(pan(), box_masks()[:2]))
    with pytest.raises(ValueError, match="masks: expected 96x72 pixels"):
        list(propagator().run(pan(), [np.zeros((4, 4), bool)] * COUNT))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A generator's and a flow network's, as they were released: with prefixes, and other things beside."""
    from gi_model import build_generator

    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    generator = {f"generator.{k}": v for k, v in export_published(build_generator("ours")).items()}
    torch.save({"state_dict": generator, "epoch": 3, "callbacks": {}}, folder / "ours.ckpt")
    raft = {f"module.{k}": v for k, v in export_published(RAFT(small=True)).items()}
    torch.save(raft, folder / "raft-small.pth")
    return folder


def test_command(checkpoints, tmp_path, capsys):
    frames, masks = pan()[:3], box_masks()[:3]
    paths = write_clip(tmp_path, blank(frames, masks), masks)
    command = ["propagate", str(paths[0]), "--masks", str(paths[1]), "-o", str(tmp_path / "out")]
    command += ["--checkpoint", str(checkpoints / "ours.ckpt"), "--radius", "2"]
    command += ["--flow-checkpoint", str(checkpoints / "raft-small.pth")]
    assert cli.main(command) == 0
    written = sorted((tmp_path / "out").iterdir())
    assert len(written) == 3
    assert re.search(r"frames per second; peak memory \d+ MiB", capsys.readouterr().out)
    results = list(video.FrameSource(tmp_path / "out", "out"))
    for result, frame, mask in zip(results, frames, masks, strict=True):
        assert np.array_equal(result[~mask], frame[~mask])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flow-checkpoint", "raft.pth"], "--flow-checkpoint: expected --checkpoint too"),
        (["--checkpoint", "missing.ckpt"], "missing.ckpt"),
        (["--checkpoint", "{folder}/raft-small.pth"], "generator"),
        (["--checkpoint", "{folder}/ours.ckpt", "--config", "lama"], "--config: expected a generator"),
        (["--checkpoint", "{folder}/ours.ckpt", "--config", "oars"], "oars"),
        (["--checkpoint", "{folder}/ours.ckpt", "--config", "ours_no_ffc"], "missing"),
    ],
)
def test_command_with_wrong_weights(checkpoints, tmp_path, capsys, options, message):
    frames, masks = pan()[:2], box_masks()[:2]
    paths = write_clip(tmp_path, blank(frames, masks), masks)
    command = ["propagate", str(paths[0]), "--masks", str(paths[1]), "-o", str(tmp_path / "out")]
    assert cli.main([*command, *(o.format(folder=checkpoints) for o in options)]) == cli.FAILED
    error = capsys.readouterr().err
    assert error.startswith("gi-model: ")
    assert message in error
    assert not (tmp_path / "out").exists()
