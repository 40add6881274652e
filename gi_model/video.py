"""Frames in and out: video files and folders of images. RGB, 8 bits, ``[height, width, 3]`` arrays."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
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


class FrameSource:
    """The frames of a video file or of a folder of images, in order, decoded one at a time.

    Attributes:
        count: number of frames; for a video file what its header claims, or 0 if it does not say.
        rate: frames per second.

    Raises:
        InputError: missing, unreadable, empty, or frames of differing sizes.
    """

    def __init__(self, path: str | Path, argument: str) -> None:
        self.path = Path(path)
        self.argument = argument
        self.rate = DEFAULT_RATE
        self.images: list[Path] = []
        if not self.path.exists():
            raise InputError(f"{argument}: {self.path} does not exist")
        if self.path.is_dir():
            self.images = sorted(p for p in self.path.iterdir() if p.suffix.lower() in IMAGES)
            if not self.images:
                raise InputError(f"{argument}: {self.path} holds no images ({', '.join(sorted(IMAGES))})")
            self.count = len(self.images)
        elif self.path.suffix.lower() in IMAGES:
            self.images = [self.path]
            self.count = 1
        else:
            with self._open() as container:
                stream = container.streams.video[0]
                self.count = stream.frames
                self.rate = stream.average_rate or DEFAULT_RATE

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
            image = (
                cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR) if path.stat().st_size else None
            )
            if image is None:
                raise InputError(f"{self.argument}: {path} is not a readable image")
            yield cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    def _decode(self) -> Iterator[np.ndarray]:
        with self._open() as container:
            decoded = False
            try:
                for frame in container.decode(video=0):
                    decoded = True
                    yield frame.to_ndarray(format="rgb24")
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
        return container


class MaskSource:
    """Masks, true where a pixel is to be repaired: a video, a folder of images, or one still image.

    A pixel is masked where any channel is above 127. A still image serves every frame.
    """

    def __init__(self, path: str | Path) -> None:
        self.frames = FrameSource(path, "--masks")

    def check(self, frames: FrameSource) -> None:
        """Raise ``InputError`` unless there is a mask for every frame, as far as the headers say."""
        masks = self.frames
        if not masks.still and masks.count and frames.count and masks.count < frames.count:
            raise InputError(
                f"--masks: expected {frames.count} masks like the frames of {frames.path}, "
                f"got {masks.count} in {masks.path}"
            )

    def __iter__(self) -> Iterator[np.ndarray]:
        for mask in self.frames:
            mask = mask.max(axis=2) > 127
            yield mask
            while self.frames.still:
                yield mask


class FrameWriter:
    """Writes frames to a video file or, if the name has no video suffix, to a folder of PNG images.

    Everything goes to a temporary name beside the target and is renamed when the ``with`` block
    ends well; otherwise it is removed and an earlier file of that name stays as it was.

    Args:
        path: the target.
        rate: frames per second of a video.
        lossless: keep RGB values exactly (Matroska with FFV1) rather than visually (H.264, CRF 18).

    Raises:
        InputError: a suffix that is not known, or a folder that does not exist.
    """

    def __init__(self, path: str | Path, rate: Fraction = DEFAULT_RATE, lossless: bool = False) -> None:
        self.path = Path(path)
        self.rate = rate
        suffix = self.path.suffix.lower()
        if suffix and suffix not in VIDEOS:
            raise InputError(f"-o: expected a folder or a video ({', '.join(VIDEOS)}), got {self.path.name}")
        if not self.path.parent.is_dir():
            raise InputError(f"-o: the folder {self.path.parent} does not exist")
        self.codec = "ffv1" if lossless else VIDEOS.get(suffix)
        self.temporary = self.path.with_name(f".{self.path.stem}.partial{self.path.suffix}")
        self.container: av.container.OutputContainer | None = None
        self.stream: av.VideoStream | None = None
        self.count = 0

    def __enter__(self) -> FrameWriter:
        self._remove()
        if self.codec is None:
            self.temporary.mkdir()
        else:
            self.container = av.open(str(self.temporary), "w")
        return self

    def write(self, frame: np.ndarray) -> None:
        """Append a frame ``[height, width, 3]``."""
        if self.container is None:
            save_image(self.temporary / f"{self.count:06d}.png", frame)
        else:
            if self.stream is None:
                self.stream = self._add_stream(frame.shape[1], frame.shape[0])
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            self.container.mux(self.stream.encode(picture))
        self.count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.container is not None:
                if kind is None and self.stream is not None:
                    self.container.mux(self.stream.encode(None))
                self.container.close()
            if kind is None:
                self._publish()
        except BaseException:
            self._remove()
            raise
        if kind is not None:
            self._remove()

    def _add_stream(self, width: int, height: int) -> av.VideoStream:
        assert self.container is not None and self.codec is not None
        stream = cast(av.VideoStream, self.container.add_stream(self.codec, rate=self.rate))
        stream.width, stream.height = width, height
        if self.codec == "ffv1":
            stream.pix_fmt = "bgr0"
        else:
            # Halved colour planes want even sizes.
            stream.pix_fmt = "yuv420p" if width % 2 == 0 and height % 2 == 0 else "yuv444p"
            stream.options = {"qscale": "3"} if self.codec == "mpeg4" else {"crf": "18"}
        return stream

    def _publish(self) -> None:
        if not self.temporary.is_dir():
            os.replace(self.temporary, self.path)
            return
        earlier = self.path.with_name(f".{self.path.name}.earlier")
        if self.path.is_dir():
            os.replace(self.path, earlier)
        os.replace(self.temporary, self.path)
        shutil.rmtree(earlier, ignore_errors=True)

    def _remove(self) -> None:
        if self.temporary.is_dir():
            shutil.rmtree(self.temporary, ignore_errors=True)
        else:
            self.temporary.unlink(missing_ok=True)


def save_image(path: Path, image: np.ndarray) -> None:
    """Write an RGB image; ``OSError`` if the disk does not take it. Nothing half written."""
    done, data = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not done:
        raise InputError(f"{path}: images of this kind cannot be written")
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        temporary.write_bytes(data.tobytes())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
