"""Masks, and sources that go in step."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from gi_model.errors import InputError
from gi_model.video.images import read_image, read_labels
from gi_model.video.reading import FrameSource


class MaskSource:
    """Masks, true where a pixel is to be repaired: a video, a folder of images, or one still image.

    A PNG with a palette holds labels, as those of DAVIS do: every label but 0 is masked, whatever its
    colour. Elsewhere a pixel is masked where any channel is above half. A still image serves every frame.

    Attributes:
        brightest: the largest channel so far, as a share of white; tells a dark mask from an empty one.
    """

    def __init__(self, path: str | Path, argument: str = "--masks") -> None:
        self.frames = FrameSource(path, argument, decode=_read_mask)
        self.brightest = 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        for image in self.frames:
            mask = image if image.dtype == np.bool_ else self._threshold(image)
            yield mask
            while self.frames.still:
                yield mask

    def _threshold(self, image: np.ndarray) -> np.ndarray:
        white = np.iinfo(image.dtype).max
        brightness = image.max(axis=2)
        self.brightest = max(self.brightest, float(brightness.max()) / white)
        return brightness > white // 2


def _read_mask(path: Path, argument: str) -> np.ndarray:
    """A mask ``[H,W]`` from a palette, or the image itself."""
    labels = read_labels(path, argument)
    return read_image(path, argument) if labels is None else labels != 0


class Step(NamedTuple):
    """A frame with what goes with it.

    Attributes:
        image: ``[H,W,3]``.
        mask: ``[H,W]`` bool.
        truth: the unharmed frame, if it is known.
        time: when it is shown, in seconds, if the file says it.
    """

    image: np.ndarray
    mask: np.ndarray
    truth: np.ndarray | None
    time: Fraction | None


def aligned(
    frames: FrameSource, masks: MaskSource | None, truth: FrameSource | None = None
) -> Iterator[Step]:
    """Frames with their masks, which are empty where there are none, and the truth, in step.

    Raises:
        InputError: sizes or numbers differ; numbers that are known are compared before the first
            frame is decoded.
    """
    others: list[tuple[str, FrameSource, Iterator[np.ndarray]]] = []
    if masks is not None:
        others.append(("masks", masks.frames, iter(masks)))
    if truth is not None:
        others.append(("frames", truth, iter(truth)))
    for what, source, _ in others:
        if source.still or not frames.count or not source.count:
            continue
        # A count of packets may exceed the frames that are decoded: too many is then judged at the end.
        exact = bool(frames.images and source.images)
        if source.count < frames.count or (exact and source.count > frames.count):
            _refuse_count(frames, source, what, source.count)

    index = 0
    for index, (time, frame) in enumerate(frames.timed()):
        matching = [next(iterator, None) for _, _, iterator in others]
        for (what, source, _), image in zip(others, matching, strict=True):
            if image is None:
                _refuse_count(frames, source, what, index)
            elif image.shape[:2] != frame.shape[:2]:
                raise InputError(
                    f"{source.argument}: expected {what} of {frame.shape[1]}x{frame.shape[0]} pixels like "
                    f"{frames.path}, got {image.shape[1]}x{image.shape[0]} at frame {index}"
                )
        mask = np.zeros(frame.shape[:2], bool) if masks is None else cast(np.ndarray, matching[0])
        yield Step(frame, mask, matching[-1] if truth is not None else None, time)
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
