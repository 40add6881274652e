"""Files in and out: what is read, what is kept, what is written, and what damage leads to."""

from __future__ import annotations

import struct
import time
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2", reason="the [video] extra is not installed")
av = pytest.importorskip("av", reason="the [video] extra is not installed")

from test_propagate import COUNT, H, W, pan  # noqa: E402

from gi_model import video  # noqa: E402
from gi_model.errors import InputError  # noqa: E402
from gi_model.video.colour import FULL, UNSAID, from_rgb  # noqa: E402
from gi_model.video.images import read_image, read_labels  # noqa: E402
from gi_model.video.threads import Clock  # noqa: E402


def deep(image: np.ndarray) -> np.ndarray:
    """uint16, not only multiples of 257."""
    return image.astype(np.uint16) * 257 + np.arange(image.shape[1], dtype=np.uint16)[:, None] % 7


def soft() -> list[np.ndarray]:
    """Without detail that halved colour planes would lose."""
    return [cv2.GaussianBlur(frame, (0, 0), 8) for frame in pan()]


def write(path: Path, frames, times=None, **options) -> Path:
    with video.FrameWriter(path, **options) as writer:
        for i, frame in enumerate(frames):
            writer.write(frame, times[i] if times else None)
    return path


def encode(path: Path, frames, codec="libx264", pixels="yuv420p", colour=None, **context) -> Path:
    """A file such as another program would write it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        colour = colour or video.Colour()
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            container.mux(stream.encode(from_rgb(frame, pixels, colour)))
        container.mux(stream.encode(None))
    return path


# Images


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_images_of_16_bits(tmp_path, suffix):
    image = deep(pan()[0])
    video.write_image(tmp_path / f"0{suffix}", image)
    (read,) = video.FrameSource(tmp_path, "x")
    assert read.dtype == np.uint16 and (read == image).all()


def test_depths_may_not_differ(tmp_path):
    video.write_image(tmp_path / "0.png", pan()[0])
    video.write_image(tmp_path / "1.png", deep(pan()[0]))
    with pytest.raises(InputError, match=r"x: expected uint8 frames like .*, got uint16 at frame 1"):
        list(video.FrameSource(tmp_path, "x"))


def test_images_of_other_numbers_are_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "a.tiff"), np.zeros((4, 4, 3), np.float32))
    with pytest.raises(InputError, match="x: expected 8 or 16 bits per channel, got float32"):
        read_image(tmp_path / "a.tiff", "x")


def test_grey_images_become_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((4, 5), 7, np.uint8))
    assert (read_image(tmp_path / "a.png", "x") == np.full((4, 5, 3), 7)).all()


def test_8_bits_of_16():
    levels = np.array([[[0, 128, 129], [257, 65535, 65406]]], np.uint16)
    assert video.to_8_bit(levels).tolist() == [[[0, 0, 1], [1, 255, 254]]]
    assert video.to_8_bit(np.arange(3, dtype=np.uint8)).tolist() == [0, 1, 2]


# Masks


def palette_png(labels: np.ndarray, bits: int = 8) -> bytes:
    """A PNG with a palette in which every label is nearly black."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = labels.shape
    digits = ((labels[..., None] >> np.arange(bits - 1, -1, -1)) & 1).reshape(height, -1)
    rows = np.packbits(digits.astype(np.uint8), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, bits, 3, 0, 0, 0)
    palette = bytes(range(2**bits) if bits < 8 else [0] * 256) * 1
    palette = b"".join(bytes([value, 0, 0]) for value in palette)
    parts = (
        chunk(b"IHDR", head),
        chunk(b"PLTE", palette),
        chunk(b"IDAT", zlib.compress(data)),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_label_of_a_palette_is_masked(tmp_path, bits):
    labels = np.random.default_rng(0).integers(0, 2**bits, (H, W))
    (tmp_path / "0.png").write_bytes(palette_png(labels, bits))
    assert (read_labels(tmp_path / "0.png", "x") == labels).all()
    (mask,) = video.MaskSource(tmp_path)
    assert (mask == (labels != 0)).all()
    assert (read_image(tmp_path / "0.png", "x") < 128).all(), "colours would not do"


def test_other_images_have_no_labels(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((4, 5), np.uint8))
    assert read_labels(tmp_path / "a.png", "x") is None
    (tmp_path / "b.png").write_bytes(palette_png(np.ones((4, 5), int))[:60])
    with pytest.raises(InputError, match=r"x: .*b.png is not a readable image"):
        read_labels(tmp_path / "b.png", "x")


def test_masks_are_what_is_above_half(tmp_path):
    video.write_image(tmp_path / "0.png", np.array([[[0, 127, 0], [0, 0, 128]]], np.uint8))
    masks = video.MaskSource(tmp_path)
    assert [m.tolist() for m in masks] == [[[False, True]]] and masks.brightest == 128 / 255
    video.write_image(tmp_path / "0.png", np.array([[[0, 32767, 0], [0, 0, 32768]]], np.uint16))
    assert [m.tolist() for m in video.MaskSource(tmp_path)] == [[[False, True]]]


def davis(root: Path, *names: str) -> Path:
    for name in names:
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / name).mkdir(parents=True)
    return root


def test_sequences_of_a_data_set(tmp_path):
    root = davis(tmp_path, "480p/bear", "480p/swan", "1080p/bear")
    found = video.davis_sequence(root, "swan")
    assert found == (root / "JPEGImages/480p/swan", root / "Annotations/480p/swan")
    assert video.davis_sequence(root, "1080p/bear").frames == root / "JPEGImages/1080p/bear"
    for name, message in (
        (
            "bear",
            "VIDEO: expected --sequence to name one sequence bear of .*, which has 1080p/bear, 480p/bear",
        ),
        ("cow", "VIDEO: .* one sequence cow of .*, which has 1080p/bear, 480p/bear, 480p/swan"),
        (None, "VIDEO: expected --sequence to name a sequence of .*JPEGImages"),
    ):
        with pytest.raises(InputError, match=message):
            video.davis_sequence(root, name)
    assert video.davis_sequence(davis(tmp_path / "one", "480p/cow")).frames.name == "cow"


# Videos


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("codec", sorted(video.CODECS))
def test_codecs_depths_sizes_and_times(tmp_path, codec, odd):
    """Every codec in all its files, frames at irregular times, the same bytes every time."""
    frames = [f[: H - odd, : W - odd] for f in soft()]
    times = [Fraction(i * i + 3 * i, 100) for i in range(COUNT)]
    for suffix in video.CODECS[codec].suffixes:
        options = {"codec": codec, "time_base": Fraction(1, 12800)}
        path = write(tmp_path / f"a{suffix}", map(deep, frames), times, **options)
        source = video.FrameSource(path, "x")
        read = list(source.timed())
        assert len(read) == COUNT
        kept = codec in ("h264", "h265", "av1", "ffv1")
        assert read[0].image.dtype == (np.uint16 if kept else np.uint8)
        assert read[0].image.shape == frames[0].shape
        if codec == "ffv1":
            assert all((a.image == deep(b)).all() for a, b in zip(read, frames, strict=True))
        assert np.abs(video.to_8_bit(read[5].image).astype(int) - frames[5]).mean() < 4
        if codec != "mpeg4" and suffix != ".avi":
            assert all(abs(a.time - b) <= Fraction(1, 1000) for a, b in zip(read, times, strict=True))
        first = path.read_bytes()
        assert write(path, map(deep, frames), times, **options).read_bytes() == first


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.avi", "a"])
def test_reading_a_part(tmp_path, name):
    source = video.FrameSource(write(tmp_path / name, pan()), "x")
    whole = list(source)
    for start, stop in ((0, 3), (5, 6), (7, COUNT), (COUNT - 1, COUNT + 5), (COUNT, COUNT + 1), (4, 4)):
        part = list(source.read(start, stop))
        assert len(part) == len(whole[start:stop])
        assert all((a == b).all() for a, b in zip(part, whole[start:stop], strict=True))
    assert len(list(source.read(9))) == COUNT - 9


def test_a_part_of_a_video_with_a_wrong_index(tmp_path, monkeypatch):
    """What the packets say is not trusted: frames are counted from the beginning instead."""
    source = video.FrameSource(write(tmp_path / "a.mp4", pan()), "x")
    whole = list(source)
    source._index = [i * 7 for i in range(COUNT)]
    assert all((a == b).all() for a, b in zip(source.read(4, 7), whole[4:7], strict=True))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 5, 9, UNSAID])
def test_colour_tags_survive(tmp_path, matrix, full):
    """And with them the colours as any player shows them."""
    colour = video.Colour(matrix, primaries=5, transfer=6, range=FULL if full else 1)
    frames = soft()[:3]
    path = encode(
        tmp_path / "a.mp4", frames, colour=colour, colorspace=matrix, color_range=colour.range,
        color_primaries=5, color_trc=6,
    )  # fmt: skip
    source = video.FrameSource(path, "x")
    assert source.colour == colour
    copied = video.FrameSource(write(tmp_path / "b.mp4", source, colour=source.colour, quality=1), "x")
    assert copied.colour == colour
    for a, b in zip(source, copied, strict=True):
        assert abs((a.astype(int) - b).mean()) < 0.6 and np.abs(a.astype(int) - b).mean() < 1


def test_untouched_colours_come_out_as_they_went_in(tmp_path):
    """The codec aside: to RGB and back is exact to a level, and not darker on average."""
    frame = soft()[0]
    coded = from_rgb(frame, "yuv420p", video.Colour())
    again = from_rgb(video.colour.to_rgb(coded), "yuv420p", video.Colour())
    difference = again.to_ndarray().astype(int) - coded.to_ndarray()
    assert np.abs(difference).max() <= 4 and np.abs(difference).mean() < 0.1


@pytest.mark.parametrize(("degrees", "turned"), [(90, True), (180, False), (-90, True)])
def test_rotation_is_applied_and_turns_the_pixels_shape(tmp_path, degrees, turned):
    frames = [np.full((32, 64, 3), 40, np.uint8) for _ in range(3)]
    for frame in frames:
        frame[:8, :16] = 220
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        stream.set_display_rotation(degrees)
        for frame in frames:
            container.mux(stream.encode(from_rgb(frame, "yuv420p", video.Colour())))
        container.mux(stream.encode(None))
    source = video.FrameSource(tmp_path / "a.mp4", "x")
    shown = next(iter(source))
    assert shown.shape == ((64, 32, 3) if turned else (32, 64, 3))
    assert np.abs(shown.astype(int) - np.rot90(frames[0], degrees / 90)).mean() < 3
    assert source.aspect == (Fraction(3, 4) if turned else Fraction(4, 3))


def test_options_of_the_writer_are_checked(tmp_path):
    for name, options, message in (
        ("a.mp4", {"codec": "mjpeg"}, "--codec: expected one of h264, .*, got mjpeg"),
        ("a.webm", {"codec": "h264"}, r"--codec: expected a file for h264 \(.mp4, .*\) as -o, got a.webm"),
        ("a", {"codec": "h264"}, "--codec: expected a video as -o, got .*a folder of images"),
        ("a", {"quality": 3}, "--quality: expected a video as -o"),
        ("a.mp4", {"quality": 52}, "--quality: expected 0 to 51 for h264, got 52"),
        ("a.mkv", {"codec": "ffv1", "quality": 5}, "--quality: expected none, ffv1 is lossless, got 5"),
    ):
        with pytest.raises(InputError, match=message):
            video.FrameWriter(tmp_path / name, **options)


@pytest.mark.parametrize(("codec", "least"), [("h265", 16), ("av1", 64)])
def test_frames_that_are_too_small_for_an_encoder(tmp_path, codec, least):
    message = f"--codec: expected frames of at least {least} pixels a side for .*, got 500x8"
    with pytest.raises(InputError, match=message):
        write(tmp_path / "a.mkv", [np.zeros((8, 500, 3), np.uint8)], codec=codec)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 7), (8, 500)])
def test_small_frames(tmp_path, size):
    frames = [np.full((*size, 3), 90, np.uint8)] * 3
    for suffix in video.VIDEOS:
        read = list(video.FrameSource(write(tmp_path / f"a{suffix}", frames), "x"))
        assert [frame.shape for frame in read] == [(*size, 3)] * 3


def test_quality_is_a_matter_of_size(tmp_path):
    sizes = []
    for quality in (5, 40):
        sizes.append(write(tmp_path / "a.mp4", pan(), quality=quality).stat().st_size)
    assert sizes[0] > 2 * sizes[1]


# Sound


def with_sound(path: Path, codec: str = "aac", start: float = 0.0) -> Path:
    """A clip of 12 frames and a tone as long, both beginning at ``start`` seconds."""
    rate = 48000
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264" if path.suffix != ".webm" else "libvpx-vp9", rate=25)
        picture.width, picture.height, picture.pix_fmt = W, H, "yuv420p"
        sound = container.add_stream(codec, rate=rate)
        sound.codec_context.layout = "mono"
        for i, frame in enumerate(pan()):
            coded = from_rgb(frame, "yuv420p", video.Colour())
            coded.time_base, coded.pts = Fraction(1, 1000), round(1000 * (start + i / 25))
            container.mux(picture.encode(coded))
        tone = (8000 * np.sin(np.arange(rate * COUNT // 25) / 20)).astype(np.int16)
        for i in range(0, len(tone), 1024):
            part = av.AudioFrame.from_ndarray(tone[None, i : i + 1024], format="s16", layout="mono")
            part.sample_rate, part.time_base, part.pts = rate, Fraction(1, rate), round(start * rate) + i
            container.mux(sound.encode(part))
        container.mux(picture.encode(None))
        container.mux(sound.encode(None))
    return path


def packets(path: Path) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as container:
        return [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(audio=0) if p.size]


@pytest.mark.parametrize(("start", "name"), [(0.0, "b.mp4"), (0.0, "b.mkv"), (3.0, "b.mp4")])
def test_sound_is_copied_packet_by_packet(tmp_path, start, name):
    source = with_sound(tmp_path / "a.mkv", start=start)
    copy = write(tmp_path / name, video.FrameSource(source, "x"), sound=source)
    before, after = packets(source), packets(copy)
    assert [data for _, data in before] == [data for _, data in after]
    offset = before[0][0] - after[0][0]
    assert all(abs(a - b - offset) < 0.002 for (a, _), (b, _) in zip(before, after, strict=True))
    assert abs(offset - start) < 0.06, "both begin where the file begins"
    assert len(list(video.FrameSource(copy, "x"))) == COUNT


def test_sound_that_does_not_fit(tmp_path):
    source = with_sound(tmp_path / "a.mp4")
    with pytest.raises(
        InputError, match=r"-o: .webm files cannot hold the sound of .*a.mp4 \(aac\): .*--no-sound"
    ):
        video.FrameWriter(tmp_path / "b.webm", sound=source)
    assert not list(tmp_path.glob("*partial*"))


def test_a_video_without_sound_stays_silent(tmp_path):
    source = write(tmp_path / "a.mp4", pan())
    copy = write(tmp_path / "b.mp4", pan(), sound=source)
    with av.open(str(copy)) as container:
        assert not container.streams.audio


def test_damaged_sound_is_named_or_copied(tmp_path):
    """Whatever happens to a file with sound: a copy, or one named error, and nothing else."""
    whole = with_sound(tmp_path / "a.mp4").read_bytes()
    rng = np.random.default_rng(0)
    named = 0
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 12):
            data[at] = rng.integers(256)
        (tmp_path / "a.mp4").write_bytes(data)
        try:
            source = video.FrameSource(tmp_path / "a.mp4", "VIDEO")
            write(tmp_path / "b.mkv", source, sound=tmp_path / "a.mp4")
        except InputError:
            named += 1
        assert not list(tmp_path.glob(".*"))
    assert 0 < named < 60


# Damage


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_damaged_frame_is_named(tmp_path, name):
    data = bytearray(write(tmp_path / name, [*pan(), *pan()]).read_bytes())
    middle = len(data) // 2
    for i in range(middle, middle + 64):
        data[i] ^= 0x5A
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"x: .*{name} (is damaged|is not a readable video|holds no frames)"):
        list(video.FrameSource(tmp_path / name, "x"))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.webm"])
def test_a_file_that_is_cut_off_is_named(tmp_path, name):
    data = write(tmp_path / name, [*pan()] * 4).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(
        InputError, match=f"x: .*{name} (is cut off: it should last|is damaged|is not a readable)"
    ):
        list(video.FrameSource(tmp_path / name, "x"))


# Threads


def test_reading_ahead_is_bounded_and_in_order():
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    clock = Clock()
    with video.read_ahead(items(), 3, clock) as ahead:
        time.sleep(0.05)
        assert len(made) == 4, "three that wait and one that finds no room"
        assert list(ahead) == list(range(20))
    assert 0 < clock.seconds < 0.05, "waiting does not count"


def test_what_goes_wrong_ahead_comes_after_what_went_well():
    def items():
        yield 1
        raise InputError("damaged")

    with video.read_ahead(items(), 2) as ahead:
        assert next(ahead) == 1
        with pytest.raises(InputError, match="damaged"):
            next(ahead)


def test_reading_may_stop_early():
    closed = []

    def items():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    with pytest.raises(KeyError), video.read_ahead(items(), 1) as ahead:
        next(ahead)
        raise KeyError
    assert closed == [True]


def test_writing_behind():
    written = []
    with video.write_behind(written.append, 2) as send:
        for i in range(50):
            send(i)
    assert written == list(range(50))


@pytest.mark.parametrize("count", [1, 50])
def test_what_goes_wrong_behind_comes_back(count):
    """With the next item, or at the end."""
    sent = []

    def fail(item):
        raise OSError("full")

    with pytest.raises(OSError, match="full"), video.write_behind(fail, 2) as send:
        for i in range(count):
            send(i)
            sent.append(i)
    assert len(sent) <= 4


def test_what_waits_is_dropped_when_the_run_fails():
    written = []

    def slowly(item):
        time.sleep(0.02)
        written.append(item)

    with pytest.raises(KeyError), video.write_behind(slowly, 8) as send:
        for i in range(8):
            send(i)
        raise KeyError
    assert len(written) < 8


def test_depths_are_checked():
    with pytest.raises(ValueError, match="depth: expected at least 1, got 0"), video.read_ahead([], 0):
        pass
