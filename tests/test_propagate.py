"""The video tool: its result, its files, and every way its input can be wrong."""

from __future__ import annotations

import errno
import math
import re

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2", reason="the [video] extra is not installed")
pytest.importorskip("av", reason="the [video] extra is not installed")

from gi_model import cli, demo, video  # noqa: E402
from gi_model.metrics import MaskedQuality, similarity_map  # noqa: E402
from gi_model.propagation import Propagator, inpaint_frame  # noqa: E402

H, W, COUNT = 72, 96, 12


def pan() -> list[np.ndarray]:
    """A textured plane seen by a camera that moves two pixels per frame."""
    noise = np.random.default_rng(0).integers(0, 256, (H // 4, W // 2, 3)).astype(np.uint8)
    plane = cv2.GaussianBlur(cv2.resize(noise, (2 * W, H), interpolation=cv2.INTER_CUBIC), (0, 0), 1)
    return [np.ascontiguousarray(plane[:, 2 * i : 2 * i + W]) for i in range(COUNT)]


def box_masks() -> list[np.ndarray]:
    """A box that moves against the camera."""
    masks = np.zeros((COUNT, H, W), bool)
    for i in range(COUNT):
        masks[i, 28:44, 60 - 4 * i + 10 : 76 - 4 * i + 10] = True
    return list(masks)


def blank(frames, masks, value=0):
    return [np.where(m[..., None], value, f).astype(np.uint8) for f, m in zip(frames, masks, strict=True)]


def write_clip(folder, frames, masks):
    """Frames and masks as folders of images."""
    paths = []
    for name, images in (("frames", frames), ("masks", [np.repeat(m[..., None] * 255, 3, 2) for m in masks])):
        (folder / name).mkdir()
        for i, image in enumerate(images):
            video.save_image(folder / name / f"{i:04d}.png", image.astype(np.uint8))
        paths.append(folder / name)
    return paths


@pytest.fixture
def clip(tmp_path):
    frames, masks = pan(), box_masks()
    return (*write_clip(tmp_path, blank(frames, masks), masks), tmp_path)


def run(*arguments) -> int:
    return cli.main(["propagate", *map(str, arguments)])


def refused(capsys, folder, *arguments) -> str:
    """The message of a run that must exit with 2 and leave ``folder`` as it was."""
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert run(*arguments) == 2
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    return capsys.readouterr().err


def test_beats_inpainting_where_the_camera_moves():
    frames, masks = pan(), box_masks()
    ours, plain = MaskedQuality(), MaskedQuality()
    for result, frame, mask in zip(Propagator().run(blank(frames, masks), masks), frames, masks, strict=True):
        assert (result[~mask] == frame[~mask]).all(), "pixels outside the mask are not touched"
        ours.add(result, frame, mask)
        plain.add(inpaint_frame(blank([frame], [mask])[0], mask), frame, mask)
    assert ours.psnr > plain.psnr + 6
    assert ours.ssim > plain.ssim


def test_what_the_mask_hides_does_not_matter():
    frames, masks = pan(), box_masks()
    results = [list(Propagator().run(blank(frames, masks, value), masks)) for value in (0, 200)]
    for a, b in zip(*results, strict=True):
        assert (a == b).all()


def test_memory_does_not_grow_with_the_clip():
    """Frames are read at most ``radius`` ahead of the one that is yielded."""
    read = 0

    def frames():
        nonlocal read
        for _ in range(30):
            read += 1
            yield np.zeros((40, 40, 3), np.uint8)

    mask = np.zeros((40, 40), bool)
    for index, _ in enumerate(Propagator(radius=4).run(frames(), iter([mask] * 30))):
        assert read <= min(30, index + 6)


@pytest.mark.parametrize("mask", ["empty", "full"])
def test_one_frame(mask):
    frame = pan()[0]
    masks = [np.full((H, W), mask == "full")]
    (result,) = Propagator().run([frame], masks)
    assert result.shape == frame.shape
    assert mask == "full" or (result == frame).all()


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv", "out"])
def test_command_writes_video_and_picture(clip, capsys, name):
    frames, masks, folder = clip
    assert run(frames, "--masks", masks, "-o", folder / name, "--pictures", 2) == 0
    written = list(video.FrameSource(folder / name, "out"))
    assert len(written) == COUNT and written[0].shape == (H, W, 3)
    assert cv2.imread(str(folder / "out-frames.png")) is not None
    said = capsys.readouterr().out
    assert "frames per second" in said and "peak memory" in said
    assert not [p for p in folder.iterdir() if "partial" in p.name or "earlier" in p.name]


def test_command_scores_against_the_truth(clip, capsys):
    frames, masks, folder = clip
    (folder / "t").mkdir()
    truth, _ = write_clip(folder / "t", pan(), box_masks())
    assert run(frames, "--masks", masks, "-o", folder / "out", "--truth", truth) == 0
    said = capsys.readouterr().out
    assert "PSNR" in said and "inpainting per frame" in said


def test_one_still_mask_and_odd_sizes(tmp_path):
    frames = [f[:71, :95] for f in pan()[:3]]
    paths = write_clip(tmp_path, frames, [np.zeros((71, 95), bool)])
    still = next(paths[1].iterdir())
    assert run(paths[0], "--masks", still, "-o", tmp_path / "out.mp4") == 0
    assert next(iter(video.FrameSource(tmp_path / "out.mp4", "out"))).shape == (71, 95, 3)


def test_earlier_output_is_replaced_only_by_a_whole_one(clip, monkeypatch, capsys):
    frames, masks, folder = clip
    (folder / "out.mp4").write_bytes(b"earlier")
    monkeypatch.setattr(Propagator, "_repair", _fail(OSError(errno.ENOSPC, "No space left on device")))
    assert "No space left" in refused(capsys, folder, frames, "--masks", masks, "-o", folder / "out.mp4")
    assert (folder / "out.mp4").read_bytes() == b"earlier"


@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_full_disk(clip, monkeypatch, capsys, name):
    frames, masks, folder = clip
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("pathlib.Path.write_bytes", _fail(full))
    said = refused(capsys, folder, frames, "--masks", masks, "-o", folder / name)
    assert "No space left" in said


def _fail(error):
    def fail(*_):
        raise error

    return fail


def test_interrupt_leaves_nothing(clip, monkeypatch):
    frames, masks, folder = clip
    monkeypatch.setattr(Propagator, "_repair", _fail(KeyboardInterrupt()))
    assert run(frames, "--masks", masks, "-o", folder / "out") == 130
    assert sorted(p.name for p in folder.iterdir()) == ["frames", "masks"]


def test_bad_input(clip, capsys):
    frames, masks, folder = clip
    (folder / "empty").mkdir()
    (folder / "broken.mp4").write_bytes(b"this is no video")
    (folder / "small").mkdir()
    _, small = write_clip(folder / "small", pan(), [m[:40, :40] for m in box_masks()])
    (folder / "few").mkdir()
    _, few = write_clip(folder / "few", pan(), box_masks()[:3])
    (folder / "mixed").mkdir()
    mixed, _ = write_clip(folder / "mixed", [*pan()[:3], pan()[0][:40]], box_masks())
    (folder / "bad").mkdir()
    (folder / "bad" / "0.png").write_bytes(b"no image")
    out = ("-o", folder / "out.mp4")
    cases = [
        ((folder / "nothing", "--masks", masks, *out), "VIDEO: .*nothing does not exist"),
        ((folder / "empty", "--masks", masks, *out), "VIDEO: .*empty holds no images"),
        ((folder / "broken.mp4", "--masks", masks, *out), "VIDEO: .*broken.mp4 is not a readable video"),
        ((folder / "bad", "--masks", masks, *out), "VIDEO: .*0.png is not a readable image"),
        ((mixed, "--masks", masks, *out), "VIDEO: expected frames of 96x72 .* got 96x40 at frame 3"),
        ((frames, "--masks", folder / "nothing", *out), "--masks: .*nothing does not exist"),
        ((frames, "--masks", small, *out), "--masks: expected masks of 96x72 pixels .*, got 40x40"),
        ((frames, "--masks", few, *out), "--masks: expected 12 masks .*, got 3"),
        ((frames, "--masks", masks, "-o", folder / "out.xyz"), "-o: expected a folder or a video"),
        ((frames, "--masks", masks, "-o", folder / "no" / "out.mp4"), "-o: the folder .* does not exist"),
        ((frames, "--masks", masks, "-o", frames), "-o: expected another name than VIDEO"),
        ((frames, "--masks", masks, *out, "--truth", few.parent / "masks"), "--truth: expected 12 frames"),
        ((frames, "--masks", masks, *out, "--radius", 0), "--radius: expected at least 1, got 0"),
    ]
    for arguments, message in cases:
        said = refused(capsys, folder, *arguments)
        assert re.search(message, said), said


def test_masks_that_end_early(clip, capsys):
    """A mask video whose header does not give its length."""
    frames, masks = pan(), box_masks()[:5]
    with pytest.raises(Exception, match="expected a mask for every frame, got 5 masks"):
        list(Propagator(radius=2).run(frames, masks))


def test_metrics():
    a = np.full((20, 20, 3), 100, np.uint8)
    quality, mask = MaskedQuality(), np.ones((20, 20), bool)
    quality.add(a + np.uint8(10), a, mask)
    assert math.isclose(quality.psnr, 10 * math.log10(255**2 / 100), rel_tol=1e-9)
    assert np.allclose(similarity_map(a, a), 1)
    expected = (2 * 110 * 100 + 6.5025) / (110**2 + 100**2 + 6.5025)
    assert math.isclose(quality.ssim, expected, rel_tol=1e-6)


def test_bundled_clip_and_masks():
    source = video.FrameSource(demo.CLIP, "clip")
    assert source.count == 60 and len(list(source)) == 60
    share = [m.mean() for m in demo.moving_masks(source)]
    assert len(share) == 60 and all(0.05 < s < 0.12 for s in share)
