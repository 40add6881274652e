"""Runs of ``gi-model propagate`` as a whole: what goes on, what is kept, what damaged inputs lead to."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2", reason="the [video] extra is not installed")
av = pytest.importorskip("av", reason="the [video] extra is not installed")

from test_propagate import (  # noqa: E402
    COUNT,
    H,
    W,
    blank,
    box_masks,
    environment,
    listing,
    pan,
    refused,
    run,
    write_clip,
)
from test_video import davis, deep, packets, palette_png, with_sound, write  # noqa: E402

from gi_model import video  # noqa: E402
from gi_model.commands._outputs import FAST  # noqa: E402
from gi_model.errors import InputError  # noqa: E402
from gi_model.flow.colours import flow_colours  # noqa: E402
from gi_model.propagation import Propagator  # noqa: E402
from gi_model.propagation.finished import Journal, fingerprint  # noqa: E402


@pytest.fixture
def clip(tmp_path):
    frames, masks = pan(), box_masks()
    return (*write_clip(tmp_path, blank(frames, masks), masks), tmp_path)


# Options


def test_a_data_set(tmp_path, capsys):
    """The bear moves, and its labels are dark colours."""
    root = davis(tmp_path / "DAVIS", "480p/bear")
    for i in range(3):
        video.write_image(root / f"JPEGImages/480p/bear/{i:05d}.jpg", pan()[i])
        labels = box_masks()[i].astype(int) * (1 + i)
        (root / f"Annotations/480p/bear/{i:05d}.png").write_bytes(palette_png(labels))
    assert run(root, "--sequence", "bear", "-o", tmp_path / "a") == 0
    assert "seen by other frames" in capsys.readouterr().out
    assert run(root, "-o", tmp_path / "b", "--radius", 2) == 0, "there is only one sequence"
    assert run(root / "JPEGImages", "-o", tmp_path / "c") == 2
    assert "--masks: expected" in capsys.readouterr().err, "this is no data set"


def test_masks_are_needed(clip, capsys):
    frames, _, folder = clip
    assert "--masks: expected a video" in refused(capsys, folder, frames, "-o", folder / "out")


def test_dark_masks_are_told_from_empty_ones(clip, capsys):
    frames, _, folder = clip
    cv2.imwrite(str(folder / "dark.png"), np.ones((H, W), np.uint8))
    assert run(frames, "--masks", folder / "dark.png", "-o", folder / "out") == 0
    assert "the masks are empty; the brightest pixel is 0.4% of white, above 50%" in capsys.readouterr().out


def test_codec_and_quality(clip, capsys):
    frames, masks, folder = clip
    sizes = []
    for quality in (5, 45):
        out = folder / "out.mkv"
        assert run(frames, "--masks", masks, "-o", out, "--codec", "h265", "--quality", quality) == 0
        sizes.append(out.stat().st_size)
    assert sizes[0] > 2 * sizes[1]
    with av.open(str(out)) as container:
        assert container.streams.video[0].codec_context.name == "hevc"
    said = refused(capsys, folder, frames, "--masks", masks, "-o", folder / "a.webm", "--codec", "h264")
    assert "--codec: expected a file for h264" in said
    said = refused(capsys, folder, frames, "--masks", masks, "-o", folder / "a.mp4", "--quality", 99)
    assert "--quality: expected 0 to 51 for h264, got 99" in said


@pytest.mark.parametrize("name", ["out.mkv", "out"])
def test_16_bits_stay(tmp_path, name):
    """Where nothing is masked, to the last bit."""
    paths = write_clip(tmp_path, map(deep, pan()[:3]), [np.zeros((H, W), bool)] * 3)
    for i, image in enumerate(pan()[:3]):
        video.write_image(paths[0] / f"{i:04d}.png", deep(image))
    codec = ("--codec", "ffv1") if name.endswith("mkv") else ()
    assert run(paths[0], "--masks", paths[1], "-o", tmp_path / name, *codec, "--side-by-side") == 0
    for a, b in zip(video.FrameSource(tmp_path / name, "x"), pan()[:3], strict=True):
        assert a.dtype == np.uint16 and (a == deep(b)).all()


def test_side_by_side_and_intermediate(clip, capsys):
    frames, masks, folder = clip
    for name, side in (("out.mkv", "out-side-by-side.mkv"), ("out", "out-side-by-side.mp4")):
        options = ("--side-by-side", "--keep-intermediate")
        for _ in range(2):  # an earlier one is replaced
            assert run(frames, "--masks", masks, "-o", folder / name, *options) == 0
        shown = list(video.FrameSource(folder / side, "x"))
        assert len(shown) == COUNT and shown[0].shape == (H, 2 * W, 3)
        result = list(video.FrameSource(folder / name, "x"))
        off = [np.abs(shown[4][:, W:].astype(int) - result[i]).mean() for i in (4, 8)]
        assert off[0] < 0.4 * off[1]
        kept = folder / "out-intermediate"
        assert sorted(p.name for p in kept.iterdir()) == ["finished", "flow"]
        assert len(list((kept / "flow").glob("*.png"))) == COUNT - 1
        assert len(list((kept / "finished").glob("*.npz"))) == COUNT
        assert f"{folder / side} and {kept}" in capsys.readouterr().out
    (kept / "notes.txt").write_text("mine")
    said = refused(capsys, folder, frames, "--masks", masks, "-o", folder / "out", "--keep-intermediate")
    assert "--keep-intermediate: " in said and "holds other files" in said


def test_intermediate_motion_is_what_was_followed(clip):
    """Also inside the mask, and that of the result where a propagator has none to show."""
    frames, masks, folder = clip
    assert run(frames, "--masks", masks, "-o", folder / "out", "--keep-intermediate") == 0
    followed: dict[int, np.ndarray] = {}
    propagator = Propagator()
    propagator.on_flow = followed.__setitem__
    hidden = list(video.MaskSource(masks))
    assert len(list(propagator.run(video.FrameSource(frames, "x"), hidden))) == COUNT
    assert sorted(followed) == list(range(COUNT - 1))
    for index, flow in followed.items():
        (picture,) = video.FrameSource(folder / "out-intermediate" / "flow", "x").read(index, index + 1)
        assert (picture == flow_colours(flow, FAST * H)).all()
        assert np.abs(flow[hidden[index]] - (-2, 0)).max() < 0.5
    edited = folder / "edited.png"
    image = next(iter(video.FrameSource(frames, "x")))
    image[10:30, 10:30] = 255
    video.write_image(edited, image)
    options = ("--keyframe", f"0={edited}", "--keep-intermediate")
    assert run(frames, *options, "-o", folder / "out") == 0
    assert len(list((folder / "out-intermediate" / "flow").glob("*.png"))) == COUNT - 1


def test_sound_and_times_reach_the_result(tmp_path, capsys):
    source = with_sound(tmp_path / "a.mp4")
    cv2.imwrite(str(tmp_path / "mask.png"), box_masks()[3].astype(np.uint8) * 255)
    arguments = (source, "--masks", tmp_path / "mask.png")
    assert run(*arguments, "-o", tmp_path / "b.mp4", "--side-by-side") == 0
    assert [d for _, d in packets(source)] == [d for _, d in packets(tmp_path / "b.mp4")]
    said = refused(capsys, tmp_path, *arguments, "-o", tmp_path / "b.webm")
    assert re.search(r"-o: .webm files cannot hold the sound .*\(aac\)", said)
    assert run(*arguments, "-o", tmp_path / "c.webm", "--no-sound") == 0

    times = [Fraction(i * i, 100) for i in range(1, 6)]
    write(tmp_path / "v.mkv", pan()[:5], times, time_base=Fraction(1, 1000))
    assert run(tmp_path / "v.mkv", "--masks", tmp_path / "mask.png", "-o", tmp_path / "w.mp4") == 0
    read = [t.time for t in video.FrameSource(tmp_path / "w.mp4", "x").timed()]
    assert [t - read[0] for t in read] == [t - times[0] for t in times]


def test_one_frame_full_and_empty_masks(tmp_path, capsys):
    for name, mask in (("full", True), ("empty", False)):
        paths = write_clip(tmp_path / name, pan()[:1], [np.full((H, W), mask)])
        assert run(paths[0], "--masks", paths[1], "-o", tmp_path / f"{name}.mp4") == 0
        assert len(list(video.FrameSource(tmp_path / f"{name}.mp4", "x"))) == 1
    said = capsys.readouterr().out
    assert "seen by other frames: 0.0%" in said and "the masks are empty;" in said


def test_where_the_time_goes(clip, capsys):
    frames, masks, folder = clip
    assert run(frames, "--masks", masks, "-o", folder / "out.mp4") == 0
    assert re.search(r"\nseconds: decode \d+\.\d, .*encode \d+\.\d\n", capsys.readouterr().out)


def test_an_edited_keyframe(clip, capsys):
    frames, _, folder = clip
    write_clip(folder / "whole", pan(), box_masks())
    source = folder / "whole" / "frames"
    edited = pan()[4]
    edited[30:50, 20:40] = (255, 0, 0)
    video.write_image(folder / "edited.png", edited)
    assert run(source, "--keyframe", f"4={folder / 'edited.png'}", "-o", folder / "out") == 0
    said = capsys.readouterr().out
    assert "edited with confidence: " in said and "masks" not in said
    results = list(video.FrameSource(folder / "out", "x"))
    assert np.abs(results[4].astype(int) - edited).mean() < 3
    for index in (2, 6):  # the camera moves two pixels per frame
        moved = 20 - 2 * (index - 4)
        patch = results[index][34:46, moved + 4 : moved + 16].astype(int)
        assert np.abs(patch - (255, 0, 0)).mean() < 30


def test_keyframes_are_checked(clip, capsys):
    frames, masks, folder = clip
    image = folder / "e.png"
    video.write_image(image, pan()[0])
    out = ("-o", folder / "out")
    for given, message in (
        (["--keyframe", "x=e.png"], "--keyframe: expected the index of a frame, = and an image, got x=e.png"),
        (["--keyframe", "3"], "--keyframe: expected the index"),
        (["--keyframe", f"3={folder / 'no.png'}"], "--keyframe: .*no.png does not exist"),
        (
            ["--keyframe", f"3={image}", "--keyframe", f"03={image}"],
            "--keyframe: expected one image for frame 3",
        ),
        (["--keyframe", f"3={image}", "--checkpoint", "a"], "--checkpoint: expected none with --keyframe"),
        (["--keyframe", f"99={image}"], "99"),
    ):
        said = refused(capsys, folder, frames, *given, *out)
        assert re.search(message, said), said


# Resuming


def stop_after(monkeypatch, count: int, error: BaseException) -> None:
    """Let the run end when so many frames have been finished."""
    put = Journal.put

    def limited(self, index, image):
        if len(self) >= count:
            raise error
        put(self, index, image)

    monkeypatch.setattr(Journal, "put", limited)


def test_an_interrupted_run_goes_on(clip, monkeypatch, capsys):
    frames, masks, folder = clip
    arguments = (frames, "--masks", masks, "-o", folder / "out.mp4")
    assert run(*arguments) == 0
    whole = (folder / "out.mp4").read_bytes()
    with monkeypatch.context() as patch:
        stop_after(patch, 5, KeyboardInterrupt())
        assert run(*arguments) == 130
    assert "interrupted; 5 finished frames are kept: --resume goes on" in capsys.readouterr().err
    assert (folder / "out.mp4").read_bytes() == whole and (folder / ".out.mp4.finished").is_dir()
    assert run(*arguments, "--resume") == 0
    said = capsys.readouterr()
    assert "5 frames had been finished" in said.err and "5 frames were finished before" in said.out
    assert (folder / "out.mp4").read_bytes() == whole
    assert not (folder / ".out.mp4.finished").exists()


def test_a_stale_journal_is_removed(clip, monkeypatch, capsys):
    frames, masks, folder = clip
    arguments = (frames, "--masks", masks, "-o", folder / "out")
    with monkeypatch.context() as patch:
        stop_after(patch, 3, KeyboardInterrupt())
        assert run(*arguments) == 130
    capsys.readouterr()
    assert refused(capsys, folder, *arguments, "--radius", 0), "not by a run that never starts"
    assert run(*arguments) == 0
    assert f"removed what an earlier run had finished ({folder / '.out.finished'})" in capsys.readouterr().err
    assert run(*arguments, "--resume") == 0
    assert "0 frames had been finished" in capsys.readouterr().err


def test_another_run_is_not_resumed(clip, monkeypatch, capsys):
    frames, masks, folder = clip
    arguments = (frames, "--masks", masks, "-o", folder / "out")
    with monkeypatch.context() as patch:
        stop_after(patch, 3, KeyboardInterrupt())
        assert run(*arguments) == 130
    capsys.readouterr()
    said = refused(capsys, folder, *arguments, "--resume", "--radius", 3)
    assert "--resume: the earlier run had --radius 15, this one has 3; without --resume" in said
    (masks / "0003.png").write_bytes((masks / "0004.png").read_bytes())
    assert "--resume: the earlier run had --masks " in refused(capsys, folder, *arguments, "--resume")


def test_a_failed_run_keeps_frames_only_if_told_to_resume(clip, monkeypatch, capsys):
    frames, masks, folder = clip
    arguments = (frames, "--masks", masks, "-o", folder / "out")
    for options, left in (((), False), (("--resume",), True)):
        with monkeypatch.context() as patch:
            stop_after(patch, 3, OSError(28, "No space left on device"))
            assert run(*arguments, *options) == 2
        assert (folder / ".out.finished").exists() is left
    assert run(*arguments, "--resume") == 0


def test_two_runs_do_not_share_a_place(clip, capsys):
    frames, masks, folder = clip
    other = Journal(folder / ".out.finished", {}, lambda index: pan()[index])
    said = refused(capsys, folder, frames, "--masks", masks, "-o", folder / "out")
    assert "-o: another run is writing there" in said
    other.close(keep=False)


def test_journal(tmp_path):
    frames = pan()
    journal = Journal(tmp_path / "j", {"a": "1"}, lambda index: frames[index])
    results = [frame.copy() for frame in frames[:4]]
    results[1][10:20, 30:50] = 7
    results[2][:] ^= 255
    results[3][-1, -1, 2] ^= 1
    for index in (2, 0, 1, 3):
        assert journal.get(index) is None
        journal.put(index, results[index])
    assert all((journal.get(i) == results[i]).all() for i in range(4)) and len(journal) == 4
    assert (tmp_path / "j/000001.npz").stat().st_size < 1000, "only what changed is stored"
    journal.close(keep=True)

    (tmp_path / "j/000001.npz").write_bytes((tmp_path / "j/000001.npz").read_bytes()[:-30])
    (tmp_path / "j/000003.npz").write_bytes(b"")
    (tmp_path / "j/000007.npz.partial").write_bytes(b"half")
    again = Journal(tmp_path / "j", {"a": "1"}, lambda index: frames[index], resume=True)
    assert (again.get(2) == results[2]).all() and again.get(1) is None and again.get(3) is None
    again.close(keep=True)
    with pytest.raises(InputError, match="the earlier run had a 1, this one has nothing"):
        Journal(tmp_path / "j", {}, lambda index: frames[index], resume=True)
    (tmp_path / "j/run.json").write_text("{")
    assert Journal(tmp_path / "j", {}, lambda index: frames[index], resume=True).found == 0


def test_journal_of_16_bits(tmp_path):
    frame = deep(pan()[0])
    result = frame.copy()
    result[4:9, 4:9] = 65535
    journal = Journal(tmp_path / "j", {}, lambda index: frame)
    journal.put(0, result)
    assert journal.get(0).dtype == np.uint16 and (journal.get(0) == result).all()


def test_fingerprints(tmp_path):
    video.write_image(tmp_path / "0.png", pan()[0])
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first and "(1 file, " in first
    video.write_image(tmp_path / "1.png", pan()[0])
    assert fingerprint(tmp_path) != first


# A parent that has imported everything starts a run and kills it when so many frames are finished.
KILLER = """
import json, os, signal, sys, time
from pathlib import Path
from gi_model import cli
import gi_model.commands._outputs, gi_model.propagation.finished, rich.progress

def attempt(arguments, journal, count):
    child = os.fork()
    if child == 0:
        os._exit(cli.main(arguments))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if count is not None and len(list(Path(journal).glob("*.npz"))) >= count:
            os.kill(child, signal.SIGKILL)
            count = None
        time.sleep(0.0005)

print(json.dumps([attempt(*a) for a in json.load(sys.stdin)]))
"""


def test_killed_at_any_moment(tmp_path):
    """Several times in a row, then finished: the same bytes as a run that was left alone."""
    frames, masks = pan() * 2, box_masks() * 2
    paths = write_clip(tmp_path, blank(frames, masks), masks)
    moments = np.random.default_rng(3).choice(np.arange(1, 22), 4, replace=False)
    stops = {"out.mp4": sorted(int(n) for n in moments[:3]), "out": [int(moments[3])]}
    attempts = []
    for name, counts in stops.items():
        command = ["propagate", str(paths[0]), "--masks", str(paths[1]), "--radius", "3"]
        journal = str(tmp_path / f".{name}.finished")
        attempts.append(([*command, "-o", str(tmp_path / f"whole{name[3:]}")], journal, None))
        command += ["-o", str(tmp_path / name), "--resume"]
        attempts += [(command, journal, count) for count in counts] + [(command, journal, None)]
    done = subprocess.run(
        [sys.executable, "-c", KILLER],
        input=json.dumps(attempts),
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, -9, -9, -9, 0, 0, -9, 0], done.stderr
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    for i in range(len(frames)):
        one, other = (tmp_path / name / f"{i:06d}.png" for name in ("out", "whole"))
        assert one.read_bytes() == other.read_bytes()
    assert not [p.name for p in tmp_path.iterdir() if p.name[0] == "."], "nothing is left of the killed"


# Full disks


@pytest.mark.parametrize("name", ["out.mkv", "out"])
def test_files_that_may_not_grow(clip, capsys, name):
    frames, masks, folder = clip
    assert run(frames, "--masks", masks, "-o", folder / name) == 0
    capsys.readouterr()
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 1500, 6000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, earlier[1]))
        try:
            said = refused(capsys, folder, frames, "--masks", masks, "-o", folder / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
        assert "File too large" in said


# Damaged inputs


class Grey(Propagator):
    """Fills holes with grey: these tests are about files."""

    def run(self, frames, masks, *, finished=None):
        for index, (frame, mask) in enumerate(zip(frames, masks, strict=False)):
            result = np.where(mask[..., None], np.array(99, frame.dtype), frame)
            finished.put(index, result)
            yield result


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, with bytes changed or lost, or with a part that is overwritten."""
    kind = rng.integers(4)
    changed = bytearray(data)
    at = int(rng.integers(len(data)))
    if kind == 0:
        return data[:at]
    if kind == 1:
        for place in rng.integers(0, len(data), int(rng.integers(1, 12))):
            changed[place] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        del changed[at : at + int(rng.integers(1, 40))]
    else:
        changed[at : at + 40] = rng.integers(0, 256, len(changed[at : at + 40]), dtype=np.uint8).tobytes()
    return bytes(changed)


SMALL = [np.ascontiguousarray(f[:24, :32]) for f in pan()[:5]]


def sound_inputs(folder):
    """Videos and images of one clip, and masks of several kinds."""
    holes = [m[24:48, 48:80] for m in box_masks()[:5]]
    codecs = {"a.mp4": "h264", "a.mkv": "h265", "a.webm": "vp9", "a.avi": "mpeg4", "b.mkv": "ffv1"}
    videos = [write(folder / name, SMALL, codec=codec) for name, codec in codecs.items()]
    images, masks = ("png", "jpg", "tif", "webp", "bmp"), ("labels", "white")
    for kind in (*images, *masks):
        (folder / kind).mkdir()
        for i, (image, hole) in enumerate(zip(SMALL, holes, strict=True)):
            if kind == "labels":
                (folder / kind / f"{i}.png").write_bytes(palette_png(hole.astype(int)))
            elif kind == "white":
                cv2.imwrite(str(folder / kind / f"{i}.png"), hole.astype(np.uint8) * 255)
            else:
                video.write_image(folder / kind / f"{i}.{kind}", image)
    return videos, [folder / kind for kind in images], [folder / kind for kind in masks]


def test_hundreds_of_damaged_inputs(tmp_path, monkeypatch, capfd):
    """A result, or a line that names what is wrong; never a half-written or a lost one."""
    monkeypatch.setattr("gi_model.propagation.Propagator", Grey)
    videos, folders, masks = sound_inputs(tmp_path)
    out = tmp_path / "out"
    outcomes = {0: 0, 2: 0}
    for seed in range(320):
        rng = np.random.default_rng(seed)
        source, mask = [*videos, *folders][seed % 10], masks[seed // 10 % 2]
        victims = [source] if source.is_file() else sorted(source.iterdir())
        if seed % 4 == 3:
            victims = sorted(mask.iterdir())
        victim = victims[int(rng.integers(len(victims)))]
        whole = victim.read_bytes()
        victim.write_bytes(damaged(whole, rng))
        before = listing(out)
        code = run(source, "--masks", mask, "-o", out)
        said = capfd.readouterr().err
        outcomes[code] += 1
        if code == 2:
            lines = [line for line in said.splitlines() if line.startswith("gi-model: ")]
            assert len(lines) == 1 and re.match("gi-model: (VIDEO|--masks): ", lines[0]), said
            assert listing(out) == before, f"seed {seed}"
        else:
            assert 1 <= len(list(out.iterdir())) <= 5
        victim.write_bytes(whole)
        assert not [p.name for p in tmp_path.iterdir() if p.name[0] == "."], f"seed {seed}"
    assert outcomes[0] > 30 and outcomes[2] > 100, outcomes
