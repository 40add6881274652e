"""Writing frames to a video file or to a folder of images."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import cast

import av
import numpy as np

from gi_model.errors import InputError
from gi_model.staging import publish_folder, remove, temporary_name
from gi_model.video.colour import UNSAID, Colour, from_rgb
from gi_model.video.images import write_image
from gi_model.video.reading import DEFAULT_RATE
from gi_model.video.sound import Sound

# The number of threads is fixed: with some encoders the bits depend on it.
THREADS = 4
# Muxers write neither their version nor a random number, so that equal runs give equal files.
REPEATABLE = {"fflags": "+bitexact"}


@dataclass(frozen=True)
class Codec:
    """What the user calls a codec, and how FFmpeg's encoder is told.

    Attributes:
        encoder: FFmpeg's name.
        suffixes: files that hold it.
        option: the encoder's name for quality, a number that is better the lower it is.
        quality: its default.
        qualities: least and largest; none for a lossless codec.
        settings: other options.
        odd: pixel format for frames with an odd side; None if it takes the usual one.
        least: pixels of the shorter side; with fewer the encoder refuses, or never comes back.
    """

    encoder: str
    suffixes: tuple[str, ...]
    option: str = "crf"
    quality: int = 0
    qualities: range = range(0)
    settings: dict[str, str] = field(default_factory=dict)
    odd: str | None = "yuv444p"
    least: int = 1

    def pixels(self, image: np.ndarray) -> str:
        """The pixel format for a frame: 10 bits for uint16, where the encoder has them."""
        deep = image.dtype == np.uint16
        if self.encoder == "ffv1":
            return "gbrp16le" if deep else "bgr0"
        odd = image.shape[0] % 2 or image.shape[1] % 2
        usual = (odd and self.odd) or "yuv420p"
        known = {f.name for f in av.Codec(self.encoder, "w").video_formats or ()}
        return f"{usual}10le" if deep and f"{usual}10le" in known else usual


CODECS = {
    "h264": Codec("libx264", (".mp4", ".mov", ".mkv"), quality=18, qualities=range(52)),
    "h265": Codec(
        "libx265",
        (".mp4", ".mov", ".mkv"),
        quality=20,
        qualities=range(52),
        settings={"x265-params": "log-level=none"},
        least=16,
    ),
    "vp9": Codec(
        "libvpx-vp9",
        (".webm", ".mkv", ".mp4"),
        quality=20,
        qualities=range(64),
        settings={"b": "0", "row-mt": "0", "cpu-used": "2"},
    ),
    "av1": Codec(
        "libsvtav1",
        (".mp4", ".mkv", ".webm"),
        quality=25,
        qualities=range(1, 64),
        settings={"preset": "8"},
        odd=None,
        least=64,
    ),
    "mpeg4": Codec("mpeg4", (".avi", ".mp4", ".mov", ".mkv"), "qscale", 3, range(1, 32), odd=None),
    "ffv1": Codec("ffv1", (".mkv", ".avi"), settings={"level": "3", "slicecrc": "1"}),
}
# Suffixes of videos, each with its usual codec.
VIDEOS = {".mp4": "h264", ".mov": "h264", ".mkv": "h264", ".webm": "vp9", ".avi": "mpeg4"}


class FrameWriter:
    """Writes frames to a video file or, if the name has no suffix, to a folder of PNG images.

    Everything goes to a temporary name beside the target and is renamed when the ``with`` block
    ends well; otherwise it is removed and an earlier file of that name stays as it was. An existing
    folder is replaced only if it holds nothing but what this class has written. Equal frames give equal
    files.

    uint16 frames become images of 16 bits and videos of 10 (FFV1: 16), or of 8 where the encoder
    has no more (VP9 as PyAV brings it, MPEG-4).

    Args:
        path: the target.
        rate: frames per second of a video, on average.
        lossless: the same as ``codec="ffv1"``: RGB values are kept exactly, in Matroska.
        aspect: width of a pixel over its height; .webm files do not keep it.
        codec: a key of ``CODECS``; by default the suffix decides, see ``VIDEOS``.
        quality: the codec's number for quality, lower is better: CRF, or the quantiser of MPEG-4.
        colour: tags of the video, and the matrix and range that RGB is converted with.
        time_base: seconds that the times of ``write`` are multiples of; by default one over ``rate``.
        sound: a video file whose sound is copied.

    Raises:
        InputError: a name that cannot be written to, a codec that is missing or does not go into such a
            file, a quality out of range, or sound that does not.
        OSError: what the file system answers, such as a full disk.
    """

    def __init__(
        self,
        path: str | Path,
        rate: Fraction = DEFAULT_RATE,
        lossless: bool = False,
        aspect: Fraction = Fraction(1),
        *,
        codec: str | None = None,
        quality: int | None = None,
        colour: Colour | None = None,
        time_base: Fraction | None = None,
        sound: Path | None = None,
    ) -> None:
        self.path = Path(path)
        self.suffix = self.path.suffix.lower()
        self.rate = rate
        self.aspect = aspect
        self._check_target()
        self.codec = self._choose("ffv1" if lossless else codec, quality)
        self.quality = quality
        # MPEG-4 is read as BT.601: it is seldom tagged, and AVI cannot be.
        self.colour = Colour(matrix=UNSAID, range=0) if self._is("mpeg4") else colour or Colour()
        # These files know no times, only a rate.
        self.time_base = None if self.suffix == ".avi" or self._is("mpeg4") else time_base
        self.temporary = temporary_name(self.path)
        self.sound = Sound(sound, self.path) if sound is not None and self.codec is not None else None
        self.container: av.container.OutputContainer | None = None
        self.stream: av.VideoStream | None = None
        self.count = 0
        self._last = -1  # time of the last frame, in units of the time base

    def __enter__(self) -> FrameWriter:
        if self.codec is None:
            self.temporary.mkdir()
        else:
            try:
                self.container = av.open(str(self.temporary), "w", options=REPEATABLE)
            except BaseException:
                self._remove()
                raise
        return self

    def write(self, frame: np.ndarray, time: Fraction | None = None) -> None:
        """Append a frame ``[height, width, 3]``, uint8 or uint16, shown from ``time`` (seconds) on.

        Without a time, a frame follows the one before at the rate.
        """
        if self.container is None:
            write_image(self.temporary / f"{self.count:06d}.png", frame)
        else:
            if self.stream is None:
                self.stream = self._add_stream(frame)
            picture = from_rgb(frame, cast(str, self.stream.pix_fmt), self.colour)
            picture.time_base = self.stream.codec_context.time_base
            picture.pts = self._last = self._time(time, picture.time_base)
            self._mux(self._encode(picture))
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                if kind is None and self.stream is not None:
                    self._mux(self._encode(None))
                    if self.sound is not None:
                        self.sound.mux_rest()
            finally:
                self._close(kind is None)
            if kind is None:
                self._publish()
        finally:
            self._remove()  # a no-op once the temporary name has been renamed

    def _close(self, well: bool) -> None:
        if self.sound is not None:
            self.sound.close()
        if self.container is not None:
            try:
                self.container.close()
            except (av.FFmpegError, OSError):
                if well:  # otherwise the first error says more
                    raise

    def _time(self, time: Fraction | None, base: Fraction) -> int:
        """``time`` in units of ``base``; later than the last one in any case."""
        if time is None or self.time_base is None:
            steps = self.count / (self.rate * base)  # frames are so many units apart
            return max(round(steps), self._last + 1)
        return max(round(time / base), self._last + 1)

    def _encode(self, picture: av.VideoFrame | None) -> list[av.Packet]:
        assert self.stream is not None
        try:
            return self.stream.encode(picture)
        except av.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            size = f"{self.stream.width}x{self.stream.height}"
            raise InputError(
                f"-o: {self.path.name} cannot hold frames of {size}: {error.strerror}"
            ) from error

    def _mux(self, packets: list[av.Packet]) -> None:
        assert self.container is not None
        for packet in packets:
            if self.sound is not None and packet.dts is not None:
                self.sound.mux_until(packet.dts * cast(Fraction, packet.time_base))
            self.container.mux(packet)

    def _choose(self, name: str | None, quality: int | None) -> Codec | None:
        """The codec; None for images."""
        if self.suffix not in VIDEOS:
            if name is not None or quality is not None:
                option = "--quality" if name is None else "--codec"
                raise InputError(f"{option}: expected a video as -o, got {self.path}, a folder of images")
            return None
        name = name or VIDEOS[self.suffix]
        if name not in CODECS:
            raise InputError(f"--codec: expected one of {', '.join(CODECS)}, got {name}")
        codec = CODECS[name]
        if self.suffix not in codec.suffixes:
            suffixes = ", ".join(codec.suffixes)
            raise InputError(f"--codec: expected a file for {name} ({suffixes}) as -o, got {self.path.name}")
        if quality is not None and quality not in codec.qualities:
            if not codec.qualities:
                raise InputError(f"--quality: expected none, {name} is lossless, got {quality}")
            raise InputError(
                f"--quality: expected {codec.qualities[0]} to {codec.qualities[-1]} for {name}, got {quality}"
            )
        try:
            av.Codec(codec.encoder, "w")
        except ValueError as error:
            raise InputError(f"-o: the installed PyAV cannot encode {self.suffix}: {error}") from error
        return codec

    def _is(self, name: str) -> bool:
        return self.codec is CODECS[name]

    def _check_target(self) -> None:
        """Raise ``InputError`` for a name that would fail, or destroy something, at the very end."""
        path = self.path
        if path.name in ("", ".."):
            raise InputError(f"-o: expected the name of a new folder or of a video, got {path}")
        if not path.parent.is_dir():
            raise InputError(f"-o: the folder {path.parent} does not exist")
        if self.suffix not in VIDEOS:
            if path.suffix and not path.is_dir():
                raise InputError(f"-o: expected a folder or a video ({', '.join(VIDEOS)}), got {path.name}")
            if path.exists() and not path.is_dir():
                raise InputError(f"-o: expected a folder or a new name, but {path} is a file")
            if path.is_dir() and any(not re.fullmatch(r"\d{6}\.png", p.name) for p in path.iterdir()):
                raise InputError(f"-o: {path} holds other files than an earlier result; name another folder")
            return
        if path.is_dir():
            raise InputError(f"-o: expected a video, but {path} is a folder")

    def _add_stream(self, frame: np.ndarray) -> av.VideoStream:
        assert self.container is not None and self.codec is not None
        if min(frame.shape[:2]) < self.codec.least:
            raise InputError(
                f"--codec: expected frames of at least {self.codec.least} pixels a side for "
                f"{self.codec.encoder}, got {frame.shape[1]}x{frame.shape[0]}"
            )
        os.environ.setdefault("SVT_LOG", "1")  # errors only: this encoder talks on standard error
        stream = cast(av.VideoStream, self.container.add_stream(self.codec.encoder, rate=self.rate))
        context = stream.codec_context
        stream.height, stream.width = frame.shape[:2]
        stream.pix_fmt = self.codec.pixels(frame)
        context.sample_aspect_ratio = self.aspect
        context.thread_count = THREADS
        context.time_base = self.time_base or 1 / self.rate
        stream.options = dict(self.codec.settings)
        if self.codec.qualities:
            quality = self.codec.quality if self.quality is None else self.quality
            stream.options |= {self.codec.option: str(quality)}
        if not av.VideoFormat(stream.pix_fmt).is_rgb and not self._is("mpeg4"):
            # Said in the file, so that no player has to guess and shift the colours.
            context.colorspace = self.colour.matrix
            context.color_range = self.colour.range
            context.color_primaries = self.colour.primaries
            context.color_trc = self.colour.transfer
        if self.sound is not None:
            self.sound.add_to(self.container)
        return stream

    def _publish(self) -> None:
        if self.codec is None:
            publish_folder(self.temporary, self.path)
        else:
            os.replace(self.temporary, self.path)

    def _remove(self) -> None:
        remove(self.temporary)
