"""Frames in and out: video files and folders of images. RGB, 8 bits, ``[height, width, 3]`` arrays."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import cast

import av
import cv2
import numpy as np

from gi_model.errors import InputError

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
VIDEOS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9", ".avi": "mpeg4"}
DEFAULT_RATE = Fraction(25)
BT709 = 1  # colour matrix of ITU-R BT.709, as video streams are tagged with it
LIMITED_RANGE = 1  # luma from 16 to 235


class FrameSource:
    """The frames of a video file or of a folder of images, in order, decoded one at a time.

    Images are taken in the natural order of their names (2 before 10); hidden files are not looked
    at. A video that says it is to be shown rotated is rotated.

    Attributes:
        count: number of frames; for a video file what its header or its packets say, which may
            differ from what can be decoded; 0 if not known.
        rate: frames per second.
        aspect: width of a pixel over its height.

    Raises:
        InputError: missing, unreadable, empty, or frames of differing sizes.
    """

    def __init__(self, path: str | Path, argument: str) -> None:
        self.path = Path(path)
        self.argument = argument
        self.rate = DEFAULT_RATE
        self.aspect = Fraction(1)
        self.images: list[Path] = []
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
            with self._open() as container:
                stream = container.streams.video[0]
                self.rate = stream.average_rate or DEFAULT_RATE
                self.aspect = stream.sample_aspect_ratio or Fraction(1)
                self.count = stream.frames or self._packets(container)

    @property
    def still(self) -> bool:
        """Whether this is one image rather than a sequence."""
        return bool(self.images) and not self.path.is_dir()

    def __iter__(self) -> Iterator[np.ndarray]:
        size = None
        for index, frame in enumerate(self._read_images() if self.images else self._decode()):
            size = size or frame.shape
            if frame.shape != size:
                raise InputError(
                    f"{self.argument}: expected frames of {size[1]}x{size[0]} pixels like the first in "
                    f"{self.path}, got {frame.shape[1]}x{frame.shape[0]} at frame {index}"
                )
            yield frame

    def _read_images(self) -> Iterator[np.ndarray]:
        for path in self.images:
            data = np.frombuffer(path.read_bytes(), np.uint8)
            try:
                image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
            except cv2.error:  # larger than OpenCV allows
                image = None
            if image is None:
                raise InputError(f"{self.argument}: {path} is not a readable image")
            yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    def _decode(self) -> Iterator[np.ndarray]:
        with self._open() as container:
            decoded = False
            try:
                for frame in container.decode(video=0):
                    decoded = True
                    yield _upright(frame.to_ndarray(format="rgb24"), frame.rotation)
            except av.FFmpegError as error:
                raise InputError(f"{self.argument}: {self.path} is damaged: {error}") from error
            if not decoded:
                raise InputError(f"{self.argument}: {self.path} holds no frames")

    def _open(self) -> av.container.InputContainer:
        try:
            container = av.open(str(self.path))
        except (av.FFmpegError, OSError) as error:
            raise InputError(f"{self.argument}: {self.path} is not a readable video: {error}") from error
        if not container.streams.video:
            container.close()
            raise InputError(f"{self.argument}: {self.path} holds no video stream")
        if container.streams.video[0].codec_context is None:
            container.close()
            raise InputError(f"{self.argument}: {self.path} uses a codec that cannot be decoded here")
        return container

    def _packets(self, container: av.container.InputContainer) -> int:
        """Number of packets with a frame: Matroska, for one, has no count in its header."""
        try:
            return sum(1 for packet in container.demux(video=0) if packet.size)
        except av.FFmpegError as error:
            raise InputError(f"{self.argument}: {self.path} is damaged: {error}") from error


class MaskSource:
    """Masks, true where a pixel is to be repaired: a video, a folder of images, or one still image.

    A pixel is masked where any channel is above 127. A still image serves every frame.
    """

    def __init__(self, path: str | Path, argument: str = "--masks") -> None:
        self.frames = FrameSource(path, argument)

    def __iter__(self) -> Iterator[np.ndarray]:
        for mask in self.frames:
            mask = mask.max(axis=2) > 127
            yield mask
            while self.frames.still:
                yield mask


def aligned(
    frames: FrameSource, masks: MaskSource, truth: FrameSource | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Frames with their masks and, if given, the truth, in step.

    Raises:
        InputError: sizes or numbers differ; numbers that are known are compared before the first
            frame is decoded.
    """
    others = [("masks", masks.frames, iter(masks))] + ([("frames", truth, iter(truth))] if truth else [])
    for what, source, _ in others:
        if source.still or not frames.count or not source.count:
            continue
        # A count of packets may exceed the frames that are decoded: too many is then judged at the end.
        exact = bool(frames.images and source.images)
        if source.count < frames.count or (exact and source.count > frames.count):
            _refuse_count(frames, source, what, source.count)

    index = 0
    for index, frame in enumerate(frames):
        matching = [next(iterator, None) for _, _, iterator in others]
        for (what, source, _), image in zip(others, matching, strict=True):
            if image is None:
                _refuse_count(frames, source, what, index)
            elif image.shape[:2] != frame.shape[:2]:
                raise InputError(
                    f"{source.argument}: expected {what} of {frame.shape[1]}x{frame.shape[0]} pixels like "
                    f"{frames.path}, got {image.shape[1]}x{image.shape[0]} at frame {index}"
                )
        yield frame, cast(np.ndarray, matching[0]), matching[1] if truth else None
    for what, source, iterator in others:
        if not source.still and next(iterator, None) is not None:
            _refuse_count(frames, source, what, max(source.count, index + 2), index + 1)


def _refuse_count(
    frames: FrameSource, source: FrameSource, what: str, got: int, expected: int | None = None
) -> None:
    raise InputError(
        f"{source.argument}: expected {expected or frames.count} {what} like the frames of {frames.path}, "
        f"got {got} in {source.path}"
    )


class FrameWriter:
    """Writes frames to a video file or, if the name has no suffix, to a folder of PNG images.

    Everything goes to a temporary name beside the target and is renamed when the ``with`` block
    ends well; otherwise it is removed and an earlier file of that name stays as it was. An existing
    folder is replaced only if it holds nothing but what this class has written.

    Args:
        path: the target.
        rate: frames per second of a video.
        lossless: keep RGB values exactly (Matroska with FFV1) rather than visually (H.264, CRF 18).
        aspect: width of a pixel over its height; .webm files do not keep it.

    Raises:
        InputError: a name that cannot be written to, or a codec that is missing.
        OSError: what the file system answers, such as a full disk.
    """

    def __init__(
        self,
        path: str | Path,
        rate: Fraction = DEFAULT_RATE,
        lossless: bool = False,
        aspect: Fraction = Fraction(1),
    ) -> None:
        self.path = Path(path)
        self.rate = rate
        self.aspect = aspect
        self.codec = "ffv1" if lossless else VIDEOS.get(self.path.suffix.lower())
        self._check_target()
        self.temporary = temporary_name(self.path)
        self.container: av.container.OutputContainer | None = None
        self.stream: av.VideoStream | None = None
        self.count = 0

    def __enter__(self) -> FrameWriter:
        if self.codec is None:
            self.temporary.mkdir()
        else:
            try:
                self.container = av.open(str(self.temporary), "w")
            except BaseException:
                self._remove()
                raise
        return self

    def write(self, frame: np.ndarray) -> None:
        """Append a frame ``[height, width, 3]``."""
        if self.container is None:
            write_image(self.temporary / f"{self.count:06d}.png", frame)
        else:
            if self.stream is None:
                self.stream = self._add_stream(frame.shape[1], frame.shape[0])
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if self.codec != "ffv1":
                # MPEG-4 in AVI cannot say which matrix it means: there it is the old one.
                matrix = "ITU601" if self.codec == "mpeg4" else "ITU709"
                picture = picture.reformat(
                    format=self.stream.pix_fmt, dst_colorspace=matrix, dst_color_range="MPEG"
                )
            self.container.mux(self.stream.encode(picture))
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.container is not None:
                if kind is None and self.stream is not None:
                    self.container.mux(self.stream.encode(None))
                try:
                    self.container.close()
                except (av.FFmpegError, OSError):
                    if kind is None:  # otherwise the first error says more
                        raise
            if kind is None:
                self._publish()
        finally:
            self._remove()  # a no-op once the temporary name has been renamed

    def _check_target(self) -> None:
        """Raise ``InputError`` for a name that would fail, or destroy something, at the very end."""
        path = self.path
        if path.name in ("", ".."):
            raise InputError(f"-o: expected the name of a new folder or of a video, got {path}")
        if not path.parent.is_dir():
            raise InputError(f"-o: the folder {path.parent} does not exist")
        if self.codec is None:
            if path.suffix and not path.is_dir():
                raise InputError(f"-o: expected a folder or a video ({', '.join(VIDEOS)}), got {path.name}")
            if path.exists() and not path.is_dir():
                raise InputError(f"-o: expected a folder or a new name, but {path} is a file")
            if path.is_dir() and any(not re.fullmatch(r"\d{6}\.png", p.name) for p in path.iterdir()):
                raise InputError(f"-o: {path} holds other files than an earlier result; name another folder")
            return
        if path.is_dir():
            raise InputError(f"-o: expected a video, but {path} is a folder")
        try:
            av.Codec(self.codec, "w")
        except ValueError as error:
            raise InputError(f"-o: the installed PyAV cannot encode {path.suffix}: {error}") from error

    def _add_stream(self, width: int, height: int) -> av.VideoStream:
        assert self.container is not None and self.codec is not None
        stream = cast(av.VideoStream, self.container.add_stream(self.codec, rate=self.rate))
        stream.width, stream.height = width, height
        stream.codec_context.sample_aspect_ratio = self.aspect
        if self.codec == "ffv1":
            stream.pix_fmt = "bgr0"
            return stream
        # Halved colour planes want even sizes, except from this encoder, which knows no others.
        odd = (width % 2 or height % 2) and self.codec != "mpeg4"
        stream.pix_fmt = "yuv444p" if odd else "yuv420p"
        if self.codec == "mpeg4":
            stream.options = {"qscale": "3"}
            return stream
        stream.options = {"crf": "18"}
        # Said in the file, so that no player has to guess and shift the colours.
        stream.codec_context.colorspace = BT709
        stream.codec_context.color_range = LIMITED_RANGE
        return stream

    def _publish(self) -> None:
        if self.codec is not None or not self.path.exists():
            os.replace(self.temporary, self.path)
            return
        earlier = self.temporary.with_name(f"{self.temporary.name}.earlier")
        os.replace(self.path, earlier)
        try:
            os.replace(self.temporary, self.path)
        except BaseException:
            os.replace(earlier, self.path)
            raise
        shutil.rmtree(earlier, ignore_errors=True)

    def _remove(self) -> None:
        if self.temporary.is_dir():
            shutil.rmtree(self.temporary, ignore_errors=True)
        else:
            self.temporary.unlink(missing_ok=True)


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes ``path`` if the block ends well."""
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A hidden name beside ``path``, of the same suffix, that no other process uses."""
    return path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an RGB image of the kind that the suffix of ``path`` says.

    Raises:
        OSError: the file system did not take it; a part may have been written, see ``staged``.
    """
    _, data = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    path.write_bytes(data.tobytes())


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that reads digits as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _upright(image: np.ndarray, degrees: int) -> np.ndarray:
    """``image`` turned counterclockwise by a multiple of 90 degrees."""
    return np.ascontiguousarray(np.rot90(image, round(degrees / 90))) if degrees else image
