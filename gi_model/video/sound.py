"""Copying the sound of a video, without decoding it."""

from __future__ import annotations

import io
from collections.abc import Generator
from fractions import Fraction
from pathlib import Path
from typing import cast

import av

from gi_model.errors import InputError


class Sound:
    """The sound of a video file on its way into another one.

    Args:
        path: the video that is read.
        output: the file that it is written to.

    Raises:
        InputError: such a file cannot hold this sound.
    """

    def __init__(self, path: Path, output: Path) -> None:
        self.path = path
        self.source = cast(av.container.InputContainer, av.open(str(path)))
        self.origin = max(Fraction(0), Fraction(self.source.start_time or 0, av.time_base))
        self.targets: dict[int, av.AudioStream] = {}
        self.container: av.container.OutputContainer | None = None
        self._packets = self._read()
        self._next: av.Packet | None = None
        try:
            self._check(output)
        except BaseException:
            self.close()
            raise

    def add_to(self, container: av.container.OutputContainer) -> None:
        """Add the streams to a file that has no packets yet."""
        self.container = container
        for stream in self.source.streams.audio:
            self.targets[stream.index] = container.add_stream_from_template(stream)
        self._next = next(self._packets, None)

    def mux_until(self, time: Fraction) -> None:
        """Write what comes before ``time``, in seconds."""
        while self._next is not None:
            if cast(int, self._next.dts) * cast(Fraction, self._next.time_base) > time:
                return
            self._mux_next()

    def mux_rest(self) -> None:
        """Write what is left."""
        while self._next is not None:
            self._mux_next()

    def close(self) -> None:
        """Close the file that is read."""
        self._packets.close()
        self.source.close()

    def _mux_next(self) -> None:
        assert self.container is not None and self._next is not None
        packet, self._next = self._next, None
        packet.stream = self.targets[packet.stream_index]
        try:
            self.container.mux_one(packet)
        except av.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise self._damaged(error) from error
        self._next = next(self._packets, None)

    def _read(self) -> Generator[av.Packet, None, None]:
        if not self.source.streams.audio:
            return
        try:
            for packet in self.source.demux(audio=list(range(len(self.source.streams.audio)))):
                if packet.dts is None or not packet.size:
                    continue
                shift = round(self.origin / cast(Fraction, packet.time_base))
                packet.dts -= shift
                packet.pts = packet.dts if packet.pts is None else packet.pts - shift
                yield packet
        except av.FFmpegError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: av.FFmpegError) -> InputError:
        return InputError(
            f"VIDEO: the sound of {self.path} is damaged: {error.strerror}; --no-sound leaves it out"
        )

    def _check(self, output: Path) -> None:
        """Raise ``InputError`` if ``output`` cannot hold the sound, by trying it in memory."""
        for stream in self.source.streams.audio:
            name = stream.codec_context.name if stream.codec_context is not None else "of an unknown kind"
            try:
                with av.open(io.BytesIO(), "w", format=FORMATS[output.suffix.lower()]) as trial:
                    trial.add_stream_from_template(stream)
                    trial.start_encoding()
            except (av.FFmpegError, ValueError, OSError) as error:
                raise InputError(
                    f"-o: {output.suffix} files cannot hold the sound of {self.path} ({name}): name a .mkv "
                    "file, or leave the sound out with --no-sound"
                ) from error


# FFmpeg's names of the formats of video files.
FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".avi": "avi"}
