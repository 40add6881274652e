"""Every choice of frames that propagation makes, in one replaceable object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Policy(Protocol):
    """Decides which frames are finished when, and from which others each is filled."""

    @property
    def block(self) -> int:
        """Frames that are finished together; one of them is the keyframe."""
        ...

    def order(self, missing: Sequence[int]) -> list[int]:
        """Order in which the frames of a block are finished, the keyframe first.

        It matters where what no frame shows is carried from finished frames to others, so not to
        :class:`~gi_model.propagation.LearnedPropagator`. Each but the first must have a neighbour that
        comes before it.

        Args:
            missing: for every frame, how many pixels no other frame shows.
        """
        ...

    def references(self, target: int, shown: Mapping[int, np.ndarray]) -> list[int]:
        """Frames from which ``target`` is filled, the best first. It may be asked by several threads at once.

        Args:
            shown: for every frame that can be reached, how well it shows each pixel of the target's
                hole: ``[N]`` float32 from 0 (not at all) to 1. All have the same N.
        """
        ...


@dataclass(frozen=True)
class VisibilityPolicy:
    """Keyframes where most is missing, references by what they show under the flow.

    Args:
        block: frames that share a keyframe.
        limit: references of a frame, at most. Where colours are copied each frame costs little.
    """

    block: int = 8
    limit: int = 40

    def __post_init__(self) -> None:
        for name in ("block", "limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def order(self, missing: Sequence[int]) -> list[int]:
        """The frame where most is missing, then outward; the earlier of equals."""
        key = max(range(len(missing)), key=lambda i: (missing[i], -i))
        return [*range(key, -1, -1), *range(key + 1, len(missing))]

    def references(self, target: int, shown: Mapping[int, np.ndarray]) -> list[int]:
        """Greedily the frame that adds most; what is shown twice already counts a third."""
        chosen: list[int] = []
        left = {index: values for index, values in shown.items() if values.any()}
        covered = np.zeros(())
        while left and len(chosen) < self.limit:
            adds = {index: float((values / (1 + covered)).sum()) for index, values in left.items()}
            best = max(adds, key=lambda index: (adds[index], -abs(index - target)))
            chosen.append(best)
            covered = covered + left.pop(best)
        return chosen
