"""Frames of a video file or of a folder of images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, cast

import av
import numpy as np

from gi_model.errors import InputError
from gi_model.video.colour import Colour, to_rgb
from gi_model.video.images import IMAGES, read_image

DEFAULT_RATE = Fraction(25)
# A decoder that meets damage says so instead of painting something in its place.
STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}
# How much earlier than its file says a video may end, in seconds and in frames, before it counts as cut off.
SLACK, SLACK_FRAMES = 0.5, 2


class Timed(NamedTuple):
    """A frame and when it is shown, in seconds; None where nothing says it."""

    time: Fraction | None
    image: np.ndarray


class FrameSource:
    """The frames of a video file or of a folder of images, in order, decoded one at a time.

    Images are taken in the natural order of their names (2 before 10); hidden files are not looked
    at. A video that says it is to be shown rotated is rotated. A damaged frame is an error.

    Args:
        path: a video, an image, or a folder of images.
        argument: what messages call it.
        decode: reads an image file; arrays of one height and width.

    Attributes:
        count: number of frames; for a video file what its header or its packets say, which may
            differ from what can be decoded; 0 if not known.
        rate: frames per second, on average.
        time_base: seconds that times are multiples of; None for images.
        aspect: width of a pixel over its height.
        colour: tags of the video's colours; those of results by default for images.

    Raises:
        InputError: missing, unreadable, empty, or frames of differing sizes or depths.
    """

    def __init__(
        self,
        path: str | Path,
        argument: str,
        decode: Callable[[Path, str], np.ndarray] = read_image,
    ) -> None:
        self.path = Path(path)
        self.argument = argument
        self.decode = decode
        self.rate = DEFAULT_RATE
        self.time_base: Fraction | None = None
        self.aspect = Fraction(1)
        self.colour = Colour()
        self.images: list[Path] = []
        self._index: list[int] | None = None
        self._origin = Fraction(0)
        if not self.path.exists():
            raise InputError(f"{argument}: {self.path} does not exist")
        if self.path.is_dir():
            found = (p for p in self.path.iterdir() if p.suffix.lower() in IMAGES and p.name[0] != ".")
            self.images = sorted(found, key=_natural)
            if not self.images:
                raise InputError(f"{argument}: {self.path} holds no images ({', '.join(sorted(IMAGES))})")
            self.count = len(self.images)
        elif self.path.suffix.lower() in IMAGES:
            self.images = [self.path]
            self.count = 1
        else:
            self._describe()

    @property
    def still(self) -> bool:
        """Whether this is one image rather than a sequence."""
        return bool(self.images) and not self.path.is_dir()

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.read(0)

    def read(self, start: int, stop: int | None = None) -> Iterator[np.ndarray]:
        """Frames ``start`` to ``stop - 1``, fewer where the source ends before.

        A video is searched from the nearest frame before that can be decoded alone, where its file says
        when every frame is shown; else it is decoded from its beginning.
        """
        return (timed.image for timed in self.timed(start, stop))

    def timed(self, start: int = 0, stop: int | None = None) -> Iterator[Timed]:
        """The same with times: those of the file, less the time at which it begins."""
        if start < 0 or (stop is not None and stop <= start):
            return
        first = None
        items = self._read_images(start, stop) if self.images else self._read_video(start, stop)
        for index, timed in enumerate(items, start):
            image = timed.image
            first = image if first is None else first
            if image.shape[:2] != first.shape[:2]:
                raise InputError(
                    f"{self.argument}: expected frames of {first.shape[1]}x{first.shape[0]} pixels like the "
                    f"first in {self.path}, got {image.shape[1]}x{image.shape[0]} at frame {index}"
                )
            if image.dtype != first.dtype:
                raise InputError(
                    f"{self.argument}: expected {first.dtype} frames like the first in {self.path}, got "
                    f"{image.dtype} at frame {index}"
                )
            yield timed

    def _read_images(self, start: int, stop: int | None) -> Iterator[Timed]:
        for path in self.images[start:stop]:
            yield Timed(None, self.decode(path, self.argument))

    # Video files

    def _describe(self) -> None:
        """Fill in what the file and its first frame say."""
        with self._open() as container:
            stream = container.streams.video[0]
            self.rate = stream.average_rate or stream.guessed_rate or DEFAULT_RATE
            self.time_base = stream.time_base
            self.count = stream.frames or self._packets(container)
        with self._open() as container:
            frame = next(self._pictures(container), None)
            if frame is None:
                raise InputError(f"{self.argument}: {self.path} holds no frames")
            self.colour = Colour.of(frame)
            aspect = container.streams.video[0].sample_aspect_ratio or Fraction(1)
            self.aspect = 1 / aspect if round(frame.rotation / 90) % 2 else aspect

    def _read_video(self, start: int, stop: int | None) -> Iterator[Timed]:
        index = start
        times = self._times() if start else []
        if start < len(times):
            try:
                for frame in self._pictures_from(times[start]):
                    if index == len(times) or frame.pts != times[index]:
                        break  # not what the packets promised: count from the beginning
                    yield self._timed(frame)
                    index += 1
                    if index == stop:
                        return
            except InputError:  # such as a reference that lies before the place searched
                pass
        with self._open() as container:
            last = None
            for i, frame in enumerate(self._pictures(container)):
                last = frame
                if i >= index:
                    yield self._timed(frame)
                    index += 1
                    if index == stop:
                        return
            if last is not None:
                self._check_whole(container, last)

    def _pictures_from(self, time: int) -> Iterator[av.VideoFrame]:
        """Decoded frames from the one that is shown at ``time``, in units of the time base."""
        with self._open() as container:
            try:
                container.seek(time, stream=container.streams.video[0])
            except (av.FFmpegError, OSError) as error:
                raise self._damaged(error) from error
            for frame in self._pictures(container):
                if frame.pts is None or frame.pts >= time:
                    yield frame

    def _pictures(self, container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
        """Decoded frames; damage becomes ``InputError`` with the frame's number."""
        index = 0
        try:
            for packet in container.demux(video=0):
                if packet.is_corrupt:
                    raise self._damaged(f"frame {index} or one of the next")
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise self._damaged(f"frame {index}")
                    yield frame
                    index += 1
        except (av.FFmpegError, OSError, ValueError) as error:
            raise self._damaged(f"near frame {index}: {_reason(error)}") from error

    def _timed(self, frame: av.VideoFrame) -> Timed:
        try:
            image = _upright(to_rgb(frame), frame.rotation)
        except (av.FFmpegError, ValueError) as error:  # a pixel format without a conversion
            raise InputError(
                f"{self.argument}: {self.path} has pixels ({frame.format.name}) that cannot be read: "
                f"{_reason(error)}"
            ) from error
        if frame.pts is None or self.time_base is None:
            return Timed(None, image)
        return Timed(frame.pts * self.time_base - self._origin, image)

    def _check_whole(self, container: av.container.InputContainer, last: av.VideoFrame) -> None:
        """Raise if the file says that it is longer: it was cut off.

        Not for the family of .mp4, which says how much is stored rather than shown, and notices by itself.
        """
        stream = container.streams.video[0]
        if "mp4" in container.format.name or last.pts is None or stream.time_base is None:
            return
        promised = _clock(stream.metadata.get("DURATION", ""))
        if promised is None:
            return
        end = float(last.pts * stream.time_base)
        if end + SLACK + SLACK_FRAMES / float(self.rate) < promised:
            raise InputError(
                f"{self.argument}: {self.path} is cut off: it should last {promised:.2f} s and ends "
                f"after {end:.2f} s"
            )

    def _times(self) -> list[int]:
        """When each frame is shown, in units of the time base, in order; empty if that is not known."""
        if self._index is None:
            with self._open() as container:
                try:
                    shown = (p for p in container.demux(video=0) if p.size and not p.is_discard)
                    times = [packet.pts for packet in shown]
                except av.FFmpegError as error:
                    raise self._damaged(error) from error
            known = sorted(t for t in times if t is not None)
            self._index = known if len(set(known)) == len(times) else []
        return self._index

    def _open(self) -> av.container.InputContainer:
        try:
            container = cast(av.container.InputContainer, av.open(str(self.path)))
        except (av.FFmpegError, OSError, ValueError) as error:
            raise InputError(
                f"{self.argument}: {self.path} is not a readable video: {_reason(error)}"
            ) from error
        if not container.streams.video:
            container.close()
            raise InputError(f"{self.argument}: {self.path} holds no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            container.close()
            raise InputError(f"{self.argument}: {self.path} uses a codec that cannot be decoded here")
        stream.codec_context.options = STRICT
        start = container.start_time
        self._origin = max(Fraction(0), Fraction(start or 0, av.time_base))
        return container

    def _packets(self, container: av.container.InputContainer) -> int:
        """Number of packets with a frame: Matroska, for one, has no count in its header."""
        try:
            return sum(1 for packet in container.demux(video=0) if packet.size)
        except av.FFmpegError as error:
            raise self._damaged(error) from error

    def _damaged(self, where: object) -> InputError:
        return InputError(f"{self.argument}: {self.path} is damaged: {where}")


def _reason(error: Exception) -> str:
    """What went wrong, without the file's name, which PyAV adds."""
    return getattr(error, "strerror", None) or str(error)


def _clock(text: str) -> float | None:
    """Seconds of ``hh:mm:ss.fraction``."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", text.strip())
    return None if match is None else 3600 * int(match[1]) + 60 * int(match[2]) + float(match[3])


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that reads digits as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _upright(image: np.ndarray, degrees: int) -> np.ndarray:
    """``image`` turned counterclockwise by a multiple of 90 degrees."""
    return np.ascontiguousarray(np.rot90(image, round(degrees / 90))) if degrees else image
