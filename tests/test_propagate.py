"""The video tool: what it makes of a clip, the command, and every way its input can be wrong."""

from __future__ import annotations

import errno
import math
import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

cv2 = pytest.importorskip("cv2", reason="the [video] extra is not installed")
pytest.importorskip("av", reason="the [video] extra is not installed")

import gi_model  # noqa: E402
from gi_model import cli, demo, video  # noqa: E402
from gi_model.flow import DISFlow  # noqa: E402
from gi_model.inpainting import inpaint_frame  # noqa: E402
from gi_model.metrics import MaskedQuality, similarity_map  # noqa: E402
from gi_model.propagation import Propagator, VisibilityPolicy  # noqa: E402
from gi_model.propagation.neighbours import affine_motion, connect, continue_flow  # noqa: E402
from gi_model.propagation.sampling import sample_colour, sample_maps  # noqa: E402
from gi_model.sheet import HEADING, LINE, Sheet  # noqa: E402
from gi_model.video import reading  # noqa: E402

H, W, COUNT = 72, 96, 12


def plane(height: int = H, width: int = 2 * W) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3)).astype(np.uint8)
    return cv2.GaussianBlur(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC), (0, 0), 1)


def pan() -> list[np.ndarray]:
    """A textured plane seen by a camera that moves two pixels per frame."""
    return [np.ascontiguousarray(plane()[:, 2 * i : 2 * i + W]) for i in range(COUNT)]


def zoom() -> list[np.ndarray]:
    """The plane seen by a camera that zooms in and turns, by fractions of a pixel."""
    frames = []
    for i in range(COUNT):
        matrix = cv2.getRotationMatrix2D((W, H / 2), 0.8 * i, 1.015**i)
        matrix[:, 2] -= (W / 2, 0)
        frames.append(cv2.warpAffine(plane(), matrix, (W, H), flags=cv2.INTER_CUBIC))
    return frames


def box_masks() -> list[np.ndarray]:
    """A box that moves against the camera."""
    masks = np.zeros((COUNT, H, W), bool)
    for i in range(COUNT):
        masks[i, 28:44, 70 - 4 * i : 86 - 4 * i] = True
    return list(masks)


def blank(frames, masks, value=0):
    return [np.where(m[..., None], value, f).astype(np.uint8) for f, m in zip(frames, masks, strict=True)]


def write_clip(folder, frames, masks):
    """Frames and masks as folders of images."""
    folder.mkdir(exist_ok=True)
    for name, images in (("frames", frames), ("masks", [np.repeat(m[..., None] * 255, 3, 2) for m in masks])):
        (folder / name).mkdir()
        for i, image in enumerate(images):
            video.write_image(folder / name / f"{i:04d}.png", image.astype(np.uint8))
    return folder / "frames", folder / "masks"


@pytest.fixture
def clip(tmp_path):
    frames, masks = pan(), box_masks()
    return (*write_clip(tmp_path, blank(frames, masks), masks), tmp_path)


def run(*arguments) -> int:
    return cli.main(["propagate", *map(str, arguments)])


def listing(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def refused(capsys, folder, *arguments) -> str:
    """The message of a run that must exit with 2 and leave ``folder`` as it was."""
    before = listing(folder)
    assert run(*arguments) == 2
    assert {p: t for p, t in listing(folder).items() if p.is_file()} == {
        p: t for p, t in before.items() if p.is_file()
    }
    assert set(listing(folder)) == set(before)
    said = capsys.readouterr().err
    assert said.startswith("gi-model: ") and said.count("\n") == 1, said
    return said


def fail_with(error):
    def fail(*_, **__):
        raise error

    return fail


# The result


@pytest.mark.parametrize(("scene", "gain"), [(pan, 12), (zoom, 8)])
def test_beats_inpainting_where_the_camera_moves(scene, gain):
    frames, masks = scene(), box_masks()
    ours, plain = MaskedQuality(), MaskedQuality()
    propagator = Propagator()
    for result, frame, mask in zip(propagator.run(blank(frames, masks), masks), frames, masks, strict=True):
        assert (result[~mask] == frame[~mask]).all(), "pixels outside the mask are not touched"
        ours.add(result, frame, mask)
        plain.add(inpaint_frame(blank([frame], [mask])[0], mask), frame, mask)
    assert ours.psnr > plain.psnr + gain
    assert ours.ssim > plain.ssim + 0.2
    assert propagator.masked == sum(m.sum() for m in masks)
    assert propagator.unseen < 0.2 * propagator.masked


def test_what_the_mask_hides_does_not_matter():
    """The truth, or anything else in the hole, has no influence."""
    frames, masks = pan(), box_masks()
    hidden = (frames, blank(frames, masks), blank(frames, masks, 200))
    results = [list(Propagator().run(clip, masks)) for clip in hidden]
    for a, *others in zip(*results, strict=True):
        assert all((a == b).all() for b in others)


def test_what_no_frame_sees_is_filled_once():
    """A still camera and a still mask: all frames get the same, and it is closer than inpainting."""
    frames, masks = pan()[:1] * 10, box_masks()[:1] * 10
    propagator = Propagator()
    results = list(propagator.run(blank(frames, masks), masks))
    assert propagator.unseen == propagator.masked > 0
    ours, plain = MaskedQuality(), MaskedQuality()
    for result, frame, mask in zip(results, frames, masks, strict=True):
        assert (result == results[0]).all()
        assert (result[~mask] == frame[~mask]).all()
        ours.add(result, frame, mask)
        plain.add(inpaint_frame(frame, mask), frame, mask)
    assert ours.psnr > plain.psnr


def test_pixels_come_from_the_frames_themselves():
    """A still camera: the one frame without a mask is copied to the others, exactly."""
    frames, masks = pan()[:1] * 5, [*box_masks()[:1] * 4, np.zeros((H, W), bool)]
    for result in Propagator().run(blank(frames, masks), masks):
        assert np.abs(result.astype(int) - frames[0]).max() <= 1


def test_two_holes_with_different_motion():
    """Each region continues the motion around itself."""
    flow = torch.zeros(1, 2, 60, 160)
    flow[0, 0, :, :80], flow[0, 1, :, 80:] = 3, -2
    mask = np.zeros((60, 160), bool)
    mask[25:35, 30:40] = mask[25:35, 120:130] = True
    broken = torch.where(torch.from_numpy(mask), torch.tensor(50.0), flow)
    assert torch.allclose(continue_flow(broken, mask), flow, atol=1e-3)
    assert (continue_flow(flow, np.zeros((60, 160), bool)) == flow).all()


def test_flow_follows_the_scene_and_not_the_mask():
    """A still scene, and a hole that crosses it by 12 pixels per frame: its filling moves with it."""
    image = np.ascontiguousarray(plane(160, 240))
    masks = [np.zeros((160, 240), bool) for _ in range(2)]
    masks[0][60:100, 90:130] = masks[1][60:100, 102:142] = True
    images = tuple(inpaint_frame(image, m) for m in masks)
    flows = connect(DISFlow(), images, tuple(masks))
    for flow in (flows.forward, flows.backward):
        assert flow[0, :2].abs().max() < 1 and flow.isfinite().all()


def test_affine_motion():
    y, x = np.mgrid[:40, :50].astype(np.float32)
    flow = np.stack([0.02 * x - 0.03 * y + 1, 0.01 * x + 0.05 * y - 2])
    broken = flow.copy()
    broken[:, ::5, ::3] += 9  # a few outliers
    broken[:, 1, 1] = np.nan
    assert np.allclose(affine_motion(broken, np.ones((40, 50), bool)), flow, atol=0.02)
    assert (affine_motion(flow, np.zeros((40, 50), bool)) == 0).all()


def test_a_full_mask_and_an_empty_one():
    frame = pan()[0]
    assert next(Propagator().run([frame], [np.ones((H, W), bool)])).shape == frame.shape
    assert (next(Propagator().run([frame], [np.zeros((H, W), bool)])) == frame).all()
    full = list(Propagator().run(pan()[:3], [np.ones((H, W), bool)] * 3))
    assert len(full) == 3


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3), (16, 200)])
def test_small_frames(size):
    frames = [np.full((*size, 3), 90, np.uint8)] * 3
    masks = [np.zeros(size, bool) for _ in frames]
    masks[1][0, 0] = True
    for result in Propagator().run(frames, masks):
        assert result.shape == (*size, 3) and result.dtype == np.uint8


def test_memory_does_not_grow_with_the_clip():
    """Frames are read at most a window and a block ahead of the one that is yielded."""
    read = 0

    def frames():
        nonlocal read
        for _ in range(30):
            read += 1
            yield np.zeros((40, 40, 3), np.uint8)

    mask = np.zeros((40, 40), bool)
    propagator = Propagator(radius=4, policy=VisibilityPolicy(block=3))
    for index, _ in enumerate(propagator.run(frames(), iter([mask] * 30))):
        assert read <= min(30, index + 4 + 3)


def test_wrong_masks_for_the_propagator():
    frames, masks = pan(), box_masks()
    with pytest.raises(ValueError, match="masks: expected one for every frame, got 5"):
        list(Propagator(radius=2).run(frames, masks[:5]))
    with pytest.raises(ValueError, match=r"masks: expected 96x72 pixels .*, got 40x30 at frame 0"):
        list(Propagator().run(frames, [m[:30, :40] for m in masks]))
    with pytest.raises(ValueError, match="radius: expected at least 1, got 0"):
        Propagator(radius=0)


# Sampling


def test_samples_of_a_box_are_those_of_the_frame():
    rng = np.random.default_rng(1)
    maps = torch.from_numpy(rng.normal(size=(1, 3, 30, 40)).astype(np.float32))
    flow = torch.from_numpy(rng.normal(scale=9, size=(1, 2, 30, 40)).astype(np.float32))
    whole = sample_maps([maps], flow, (slice(0, 30), slice(0, 40)))
    box = slice(3, 21), slice(22, 40)
    part = sample_maps([maps[:, :1], maps[:, 1:]], flow[..., box[0], box[1]], box)
    assert torch.allclose(part, whole[..., box[0], box[1]], atol=1e-4)
    assert torch.allclose(whole, gi_kernels_warp(maps, flow), atol=1e-4)
    flow[0, 0, 5, 30] = math.nan
    assert (sample_maps([maps], flow[..., box[0], box[1]], box)[..., 2, 8] == 0).all()


def gi_kernels_warp(maps, flow):
    from gi_kernels import flow_warp

    return flow_warp(maps, flow)


def test_colours_are_sharper_than_bilinear_ones():
    image = plane(40, 60)
    y, x = np.mgrid[8:32, 10:50].astype(np.float32)
    assert np.allclose(sample_colour(image, x, y), image[8:32, 10:50], atol=1e-3)
    found = sample_colour(image, x + np.float32(2.5), y - 3)
    line = image.astype(np.float32)[5:29]
    cubic = (-line[:, 11:51] + 9 * line[:, 12:52] + 9 * line[:, 13:53] - line[:, 14:54]) / 16
    assert np.allclose(found, cubic.clip(0, 255), atol=1e-2)
    deep = image.astype(np.uint16) * 257
    assert np.allclose(sample_colour(deep, x + np.float32(2.5), y - 3), found, atol=1e-2)
    assert np.allclose(sample_colour(image, x - 900, y), image[8:32, :1], atol=1e-3), "the nearest pixel"


# The command


@pytest.mark.parametrize("name", ["out.mp4", "out.mov", "out.mkv", "out.webm", "out.avi", "out"])
def test_command_writes_video_and_picture(clip, capsys, name):
    frames, masks, folder = clip
    assert run(frames, "--masks", masks, "-o", folder / name, "--pictures", 2) == 0
    written = list(video.FrameSource(folder / name, "out"))
    assert len(written) == COUNT and written[0].shape == (H, W, 3)
    assert cv2.imread(str(folder / "out-frames.png")).shape == (HEADING + 2 * H + LINE, 2 * W + LINE, 3)
    said = capsys.readouterr()
    assert re.search(
        r"seen by other frames: \d+\.\d%; [\d.]+ frames per second; peak memory \d+ MiB", said.out
    )
    assert said.err == "", "no progress bar where there is no terminal"
    assert sorted(p.name for p in folder.iterdir()) == sorted(["frames", "masks", name, "out-frames.png"])


def test_command_scores_against_the_truth(clip, capsys):
    frames, masks, folder = clip
    truth, _ = write_clip(folder / "t", pan(), box_masks())
    assert run(frames, "--masks", masks, "-o", folder / "out", "--truth", truth) == 0
    said = capsys.readouterr().out
    found = re.search(r"PSNR ([\d.]+) dB, SSIM ([\d.]+) \(OpenCV inpainting per frame: ([\d.]+) dB", said)
    assert float(found[1]) > float(found[3]) + 10 and float(found[2]) > 0.9
    sheet = cv2.imread(str(folder / "out-frames.png"))
    assert sheet.shape[1] == 3 * W + 2 * LINE, "masked, repaired, truth"
    results = list(video.FrameSource(folder / "out", "out"))
    quality = MaskedQuality()
    for result, frame, mask in zip(results, pan(), box_masks(), strict=True):
        assert (result[~mask] == frame[~mask]).all()
        quality.add(result, frame, mask)
    assert math.isclose(quality.psnr, float(found[1]), abs_tol=0.006)


def test_peak_memory_is_of_this_process_alone():
    """Not of the one that has started it, which may have been larger."""
    script = """if True:
        import subprocess, sys
        large = bytearray(2**31)
        for place in range(0, len(large), 4096):
            large[place] = 1
        code = "from gi_model.commands.propagate import peak_memory; print(peak_memory())"
        print(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    """
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert 50 < float(said) < 1500


def test_command_reads_videos(clip, capsys):
    """Frames and masks from Matroska files, whose headers do not give their length."""
    frames, masks, folder = clip
    for source in (frames, masks):
        with video.FrameWriter(folder / f"{source.name}.mkv", lossless=True) as writer:
            for frame in video.FrameSource(source, "x"):
                writer.write(frame)
    assert run(frames, "--masks", masks, "-o", folder / "a") == 0
    assert run(folder / "frames.mkv", "--masks", folder / "masks.mkv", "-o", folder / "b") == 0
    for a, b in zip(video.FrameSource(folder / "a", "a"), video.FrameSource(folder / "b", "b"), strict=True):
        assert (a == b).all()


def test_one_still_mask_and_odd_sizes(tmp_path, capsys):
    frames = [f[:71, :95] for f in pan()[:3]]
    paths = write_clip(tmp_path, frames, [np.zeros((71, 95), bool)])
    still = next(paths[1].iterdir())
    for suffix in video.VIDEOS:
        assert run(paths[0], "--masks", still, "-o", tmp_path / f"out{suffix}") == 0
        assert next(iter(video.FrameSource(tmp_path / f"out{suffix}", "out"))).shape == (71, 95, 3)
    assert "the masks are empty" in capsys.readouterr().out


def test_an_earlier_result_is_replaced(clip):
    frames, masks, folder = clip
    for name in ("out", "out.mp4"):
        assert run(frames, "--masks", masks, "-o", folder / name) == 0
        before = listing(folder)
        assert run(frames, "--masks", masks, "-o", folder / name) == 0
        assert set(listing(folder)) == set(before)
        assert listing(folder)[folder / name] != before[folder / name]


def test_help(capsys):
    for arguments in (["--help"], ["propagate", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("VIDEO", "--masks", "--truth", "--radius", "Exit code 2"))


# Faults


def test_bad_input(clip, capsys):
    frames, masks, folder = clip
    (folder / "empty").mkdir()
    (folder / "broken.mp4").write_bytes(b"this is no video")
    (folder / "nil.mp4").write_bytes(b"")
    _, small = write_clip(folder / "small", pan(), [m[:40, :40] for m in box_masks()])
    _, few = write_clip(folder / "few", pan(), box_masks()[:3])
    _, many = write_clip(folder / "many", pan(), [*box_masks(), box_masks()[0]])
    mixed, _ = write_clip(folder / "mixed", [*pan()[:11], pan()[0][:40]], box_masks())
    (folder / "bad").mkdir()
    (folder / "bad" / "0.png").write_bytes(b"no image")
    (folder / "precious").mkdir()
    (folder / "precious" / "thesis.txt").write_text("years of work")
    (folder / "folder.mp4").mkdir()
    (folder / "file").write_text("a file")
    (folder / "q-frames.png").mkdir()
    for name, count in (("short.mkv", 4), ("long.mkv", COUNT + 1)):
        with video.FrameWriter(folder / name, lossless=True) as writer:
            for i in range(count):
                writer.write(pan()[i % COUNT])
    out = ("-o", folder / "out.mp4")
    cases = [
        ((folder / "nothing", "--masks", masks, *out), "VIDEO: .*nothing does not exist"),
        ((folder / "empty", "--masks", masks, *out), "VIDEO: .*empty holds no images"),
        ((folder / "broken.mp4", "--masks", masks, *out), "VIDEO: .*broken.mp4 is not a readable video"),
        ((folder / "nil.mp4", "--masks", masks, *out), "VIDEO: .*nil.mp4 is not a readable video"),
        (
            (folder / "bad", "--masks", folder / "bad" / "0.png", *out),
            "VIDEO: .*0.png is not a readable image",
        ),
        ((mixed, "--masks", masks, *out), "VIDEO: expected frames of 96x72 .* got 96x40 at frame 11"),
        ((frames, "--masks", folder / "nothing", *out), "--masks: .*nothing does not exist"),
        ((frames, "--masks", folder / "empty", *out), "--masks: .*empty holds no images"),
        ((frames, "--masks", small, *out), "--masks: expected masks of 96x72 pixels .*, got 40x40"),
        ((frames, "--masks", few, *out), "--masks: expected 12 masks .*, got 3"),
        ((frames, "--masks", many, *out), "--masks: expected 12 masks .*, got 13"),
        ((frames, "--masks", folder / "short.mkv", *out), "--masks: expected 12 masks .*, got 4"),
        ((frames, "--masks", folder / "long.mkv", *out), "--masks: expected 12 masks .*, got 13"),
        ((frames, "--masks", masks, *out, "--truth", few), "--truth: expected 12 frames .*, got 3"),
        (
            (frames, "--masks", masks, *out, "--truth", small),
            "--truth: expected frames of 96x72 .*, got 40x40",
        ),
        ((frames, "--masks", masks, *out, "--truth", folder / "bad"), "--truth: expected 12 frames"),
        ((frames, "--masks", masks, "-o", folder / "out.xyz"), "-o: expected a folder or a video"),
        ((frames, "--masks", masks, "-o", folder / "no" / "out.mp4"), "-o: the folder .* does not exist"),
        ((frames, "--masks", masks, "-o", frames), "-o: expected a place outside VIDEO"),
        ((frames, "--masks", masks, "-o", frames / "out.mp4"), "-o: expected a place outside VIDEO"),
        ((frames, "--masks", masks, "-o", masks), "-o: expected a place outside --masks"),
        ((frames, "--masks", masks, "-o", folder / "precious"), "-o: .*precious holds other files"),
        ((frames, "--masks", masks, "-o", folder / "folder.mp4"), "-o: expected a video, but .* is a folder"),
        ((frames, "--masks", masks, "-o", folder / "file"), "-o: expected a folder .* is a file"),
        ((frames, "--masks", masks, "-o", folder / "q.mp4"), "-o: the picture would be .*q-frames.png"),
        ((frames, "--masks", masks, "-o", "/"), "-o: expected the name of a new folder"),
        ((frames, "--masks", masks, "-o", ".."), "-o: expected the name of a new folder"),
        ((frames, "--masks", masks, *out, "--radius", 0), "--radius: expected at least 1, got 0"),
        ((frames, "--masks", masks, *out, "--pictures", -1), "--pictures: expected at least 1, got -1"),
    ]
    for arguments, message in cases:
        said = refused(capsys, folder, *arguments)
        assert re.search(message, said), said
    assert not list(folder.rglob("*partial*"))


def test_a_damaged_video(clip, capsys):
    """Cut off in the middle: what is left decodes, but masks and frames no longer match."""
    frames, masks, folder = clip
    with video.FrameWriter(folder / "whole.mkv", lossless=True) as writer:
        for frame in pan():
            writer.write(frame)
    data = (folder / "whole.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(data[: len(data) // 2])
    said = refused(capsys, folder, folder / "cut.mkv", "--masks", masks, "-o", folder / "out.mp4")
    assert re.search("VIDEO: .*cut.mkv is damaged|--masks: expected [0-9] masks .*, got 12", said), said


def test_a_codec_that_is_not_installed(clip, capsys, monkeypatch):
    frames, masks, folder = clip
    monkeypatch.setitem(video.CODECS, "h264", replace(video.CODECS["h264"], encoder="libnothing"))
    said = refused(capsys, folder, frames, "--masks", masks, "-o", folder / "out.mp4")
    assert "cannot encode .mp4" in said


@pytest.mark.parametrize("missing", ["av", "cv2", "rich"])
def test_missing_extra(clip, missing):
    frames, masks, folder = clip
    blocked = f"import sys; sys.modules[{missing!r}] = None; from gi_model import cli; "
    command = f"sys.exit(cli.main(['propagate', {str(frames)!r}, '--masks', {str(masks)!r}, '-o', 'out']))"
    done = subprocess.run(
        [sys.executable, "-c", blocked + command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.search(rf"import of {missing} halted|'{missing}' is not a package", done.stderr), done.stderr
    assert "pip install 'gi-kernels[video]'" in done.stderr
    assert sorted(p.name for p in folder.iterdir()) == ["frames", "masks"]


def environment() -> dict[str, str]:
    """For a child process that runs elsewhere: the package that is under test."""
    return {**os.environ, "PYTHONPATH": str(Path(gi_model.__file__).parents[1])}


@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_an_earlier_result_stays_when_the_run_fails(clip, monkeypatch, capsys, name):
    frames, masks, folder = clip
    assert run(frames, "--masks", masks, "-o", folder / name) == 0
    capsys.readouterr()
    monkeypatch.setattr(Propagator, "_repair", fail_with(OSError(errno.EIO, "Input/output error")))
    assert "Input/output error" in refused(capsys, folder, frames, "--masks", masks, "-o", folder / name)


def test_a_folder_comes_back_if_the_last_step_fails(clip, monkeypatch, capsys):
    """The result is renamed into place; an earlier one must be there again if that is refused."""
    frames, masks, folder = clip
    out = folder / "out"
    assert run(frames, "--masks", masks, "-o", out) == 0
    capsys.readouterr()
    replace = os.replace

    def refuse(source, target):
        if "partial" in Path(source).name and "earlier" not in Path(source).name and Path(target) == out:
            raise OSError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert "Permission denied" in refused(capsys, folder, frames, "--masks", masks, "-o", out)


@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_full_disk_for_images(clip, monkeypatch, capsys, name):
    """A folder's frames, or the picture of a video."""
    frames, masks, folder = clip
    monkeypatch.setattr(
        "pathlib.Path.write_bytes", fail_with(OSError(errno.ENOSPC, "No space left on device"))
    )
    said = refused(capsys, folder, frames, "--masks", masks, "-o", folder / name)
    assert "No space left" in said


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi"])
def test_files_that_may_not_grow(tmp_path, suffix):
    """The system refuses the encoder's own writes, as it does when the disk is full."""
    noise = np.random.default_rng(0).integers(0, 256, (H, W, 3)).astype(np.uint8)
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, earlier[1]))
    try:
        with (
            pytest.raises(OSError, match="File too large"),
            video.FrameWriter(tmp_path / f"o{suffix}") as writer,
        ):
            for _ in range(COUNT):
                writer.write(noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_really_full(clip):
    frames, masks, folder = clip
    (folder / "disk").mkdir()
    mount = f"mount -t tmpfs -o size=8k tmpfs {folder}/disk"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    for name in ("out.mp4", "out"):
        command = (
            f"{sys.executable} -m gi_model.cli propagate {frames} --masks {masks} -o {folder}/disk/{name}"
        )
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", f"{mount}; {command}; echo code $?; ls -A {folder}/disk"],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.stdout == "code 2\n", (done.stdout, done.stderr)
        assert "No space left on device" in done.stderr


def test_a_place_that_may_not_be_written(clip, capsys):
    frames, masks, folder = clip
    said = refused(capsys, folder, frames, "--masks", masks, "-o", "/proc/out.mp4")
    assert re.search("No such file|Permission denied|not permitted", said), said


@pytest.mark.parametrize("name", ["out.mp4", "out"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(clip, monkeypatch, capsys, request, name, number):
    frames, masks, folder = clip
    handler = signal.getsignal(signal.SIGTERM)
    # A process that was started in the background may have been told to ignore it.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ignored))
    monkeypatch.setattr(Propagator, "_repair", lambda *_: signal.raise_signal(number))
    before = listing(folder)
    assert run(frames, "--masks", masks, "-o", folder / name) == 130
    assert set(listing(folder)) == set(before)
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler


# Files


def test_images_are_read_in_natural_order(tmp_path):
    for i in (1, 2, 10, 9):
        video.write_image(tmp_path / f"frame{i}.png", np.full((4, 4, 3), i, np.uint8))
    (tmp_path / ".hidden.png").write_bytes(b"of another system")
    (tmp_path / "notes.txt").write_text("no frame")
    assert [int(f[0, 0, 0]) for f in video.FrameSource(tmp_path, "x")] == [1, 2, 9, 10]


def test_lossless_video(tmp_path):
    with video.FrameWriter(tmp_path / "a.mkv", lossless=True) as writer:
        for frame in pan():
            writer.write(frame)
    source = video.FrameSource(tmp_path / "a.mkv", "x")
    assert source.count == COUNT
    for a, b in zip(source, pan(), strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("suffix", sorted(video.VIDEOS))
def test_colours_rate_and_pixel_shape_survive(tmp_path, suffix):
    colours = [(200, 30, 90), (10, 220, 60), (250, 250, 5), (255, 255, 255)]
    path = tmp_path / f"a{suffix}"
    with video.FrameWriter(path, rate=Fraction(30000, 1001), aspect=Fraction(4, 3)) as writer:
        for colour in colours:
            writer.write(np.full((64, 80, 3), colour, np.uint8))
    source = video.FrameSource(path, "x")
    assert abs(source.rate - Fraction(30000, 1001)) < 0.01
    assert suffix == ".webm" or source.aspect == Fraction(4, 3)
    for frame, colour in zip(source, colours, strict=True):
        assert np.abs(frame.astype(int) - colour).max() <= 6


def test_rotated_video_is_turned_upright():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert (reading._upright(image, 0) == image).all()
    assert (reading._upright(image, 90) == np.rot90(image)).all()
    assert (reading._upright(image, -90) == np.rot90(image, -1)).all()
    assert (reading._upright(image, 180) == image[::-1, ::-1]).all()


# Measures and pictures


def test_metrics():
    a = np.full((20, 20, 3), 100, np.uint8)
    quality, mask = MaskedQuality(), np.ones((20, 20), bool)
    quality.add(a + np.uint8(10), a, mask)
    assert math.isclose(quality.psnr, 10 * math.log10(255**2 / 100), rel_tol=1e-9)
    assert np.allclose(similarity_map(a, a), 1)
    expected = (2 * 110 * 100 + 6.5025) / (110**2 + 100**2 + 6.5025)
    assert math.isclose(quality.ssim, expected, rel_tol=1e-6)


def test_metrics_of_16_bits():
    """On their own range, so that less than a grey level of 8 bits counts."""
    deep, mask = np.full((20, 20, 3), 25700, np.uint16), np.ones((20, 20), bool)
    quality = MaskedQuality()
    quality.add(deep + np.uint16(100), deep, mask)
    assert math.isclose(quality.psnr, 10 * math.log10(65535**2 / 100**2), rel_tol=1e-9)
    a, b = (np.repeat(image[..., :1], 3, axis=2) for image in pan()[:2])  # grey: luma is not rounded
    twice = [similarity_map(a, b), similarity_map(*(image.astype(np.uint16) * 257 for image in (a, b)))]
    assert np.allclose(*twice, atol=1e-6) and twice[0].std() > 0.1
    with pytest.raises(TypeError, match="images: expected two uint8 or two uint16, got uint16 and uint8"):
        quality.add(deep, a, mask)


def test_metrics_look_inside_the_mask_only():
    a = pan()[0]
    mask = box_masks()[0]
    quality = MaskedQuality()
    assert math.isnan(quality.psnr) and math.isnan(quality.ssim)
    quality.add(np.where(mask[..., None], a, 0).astype(np.uint8), a, mask)
    assert quality.psnr == math.inf and quality.ssim < 1, "windows at the rim reach outside"
    quality.add(np.where(mask[..., None], a ^ 255, a), a, mask)
    assert quality.pixels == 2 * mask.sum() and quality.psnr < 20


def test_sheet_is_spread_over_the_clip():
    image, mask = np.zeros((6, 90, 3), np.uint8), np.zeros((6, 90), bool)

    def shown(count, frames):
        sheet = Sheet(count, 3)
        for i in range(frames):
            sheet.add(i, image + np.uint8(i), mask, image, None)
        assert sheet.image().shape == (HEADING + 3 * (6 + LINE) - LINE, 2 * 90 + LINE, 3)
        return [int(row[0][0, 0, 0]) for row in sheet.collected][:3]

    assert shown(60, 60) == [10, 30, 50]
    assert shown(0, 60) == [0, 16, 32], "the length is not known"


def test_bundled_clip_and_masks():
    source = video.FrameSource(demo.CLIP, "clip")
    assert source.count == 60 and len(list(source)) == 60
    assert demo.CLIP.stat().st_size < 1.5e6 and (demo.CLIP.parent / "LICENSE.city.txt").exists()
    share = [m.mean() for m in demo.moving_masks(source)]
    assert len(share) == 60 and all(0.05 < s < 0.12 for s in share)


def test_demo_hides_the_region(tmp_path):
    """Nothing of the truth inside the mask reaches the tool; everything else does, exactly."""
    with video.FrameWriter(tmp_path / "clip.mkv", lossless=True) as writer:
        for frame in pan()[:3]:
            writer.write(frame)
    assert demo.harm(tmp_path / "clip.mkv", tmp_path / "out") == 0
    masked = video.FrameSource(tmp_path / "out" / "masked.mkv", "x")
    for frame, truth, mask in zip(masked, pan(), video.MaskSource(tmp_path / "out" / "masks"), strict=False):
        assert 0 < mask.mean() < 0.2
        assert (frame[mask] == 0).all() and (frame[~mask] == truth[~mask]).all()


def test_demo_says_what_went_wrong(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert demo.main(["-o", str(tmp_path / "file")]) == 2
    assert "demo: File exists" in capsys.readouterr().err
