"""The part of a clip that is held in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from gi_model.propagation.cuts import FLASH, Thumbnail, same_scene, thumbnail
from gi_model.propagation.fusion import fill_smoothly
from gi_model.propagation.neighbours import Flows
from gi_model.propagation.sampling import shrink, to_bytes

# The pixels beside a mask are not copied elsewhere: they are blurred or compressed together with what it
# hides. With those across a corner, so that cubic sampling of the others does not reach into the mask.
BESIDE = np.ones((3, 3), np.uint8)


class Frame:
    """A frame and what is known of it.

    Attributes:
        image: ``[H,W,3]`` uint8 or uint16, as it came.
        mask: ``[H,W]`` bool.
        visible: ``[H,W]`` uint8: 255 where pixels may be taken from, else 0.
        scene: number of the scene.
        small: ``[h,w,3]`` uint8, at the size at which flow is estimated; the hole is filled smoothly.
        small_mask: ``[h,w]`` bool: everything that a masked pixel has a share in.
        small_visible: ``[1,1,h,w]`` float32: 1 where only visible pixels have a share.
        flows: to the next frame and back, once they were asked for.
    """

    def __init__(self, image: np.ndarray, mask: np.ndarray, scene: int, side: int) -> None:
        self.image, self.mask, self.scene = image, mask, scene
        self.visible = 255 - cv2.dilate(mask.astype(np.uint8) * 255, BESIDE)
        self.small_mask = shrink(mask.astype(np.float32), side) > 0
        hidden = shrink((self.visible == 0).astype(np.float32), side) > 0
        self.small_visible = torch.from_numpy(~hidden).float()[None, None]
        self.small = fill_smoothly(shrink(to_bytes(image), side), self.small_mask)
        self.flows: Future[Flows] | None = None


@dataclass
class _Item:
    image: np.ndarray
    mask: np.ndarray
    seen: Thumbnail


class Stream:
    """Frames by their number, from the first that is still needed to the last that was read.

    Args:
        frames: images with their masks, in order.
        side: pixels of the shorter side at which flow is estimated, at most.
    """

    def __init__(self, frames: Iterable[tuple[np.ndarray, np.ndarray]], side: int) -> None:
        self._source = iter(frames)
        self._side = side
        self._held: dict[int, Frame] = {}
        self._stop = 0  # the number of frames that were held so far
        self._ahead: deque[_Item] = deque()  # read to judge a cut, not held yet
        self._scene = 0
        self._anchor: Thumbnail | None = None  # the last frame of the scene that was no flash

    def __getitem__(self, index: int) -> Frame:
        return self._held[index]

    def __contains__(self, index: int) -> bool:
        """Whether that frame is held."""
        return index in self._held

    def same_scene(self, index: int, other: int) -> bool:
        """Whether both frames are held and belong to one scene."""
        return index in self and other in self and self[index].scene == self[other].scene

    def read(self, stop: int) -> None:
        """Hold what comes before frame ``stop``, as far as the clip goes."""
        while self._stop < stop and self._advance():
            pass

    def forget(self, start: int | None = None) -> dict[int, Frame]:
        """Drop the frames before ``start``, or all, and return them."""
        return {i: self._held.pop(i) for i in sorted(self._held) if start is None or i < start}

    def _advance(self) -> bool:
        """Hold one frame more; false at the clip's end."""
        if not self._peek(1):
            return False
        item = self._ahead.popleft()
        if self._anchor is None or same_scene(self._anchor, item.seen):
            self._anchor = item.seen
        elif not any(same_scene(self._anchor, other.seen) for other in self._peek(FLASH)):
            self._scene += 1
            self._anchor = item.seen
        self._held[self._stop] = Frame(item.image, item.mask, self._scene, self._side)
        self._stop += 1
        return True

    def _peek(self, count: int) -> list[_Item]:
        """The next frames of the source, at most ``count``."""
        while len(self._ahead) < count and (item := next(self._source, None)) is not None:
            self._ahead.append(_Item(*item, thumbnail(to_bytes(item[0]), item[1])))
        return list(self._ahead)[:count]
