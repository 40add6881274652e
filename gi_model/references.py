"""What a generator keeps of reference frames, so that they serve many target frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from gi_kernels.nn import KeysValues


@dataclass(frozen=True)
class Crossing:
    """What the targets of one crossed block see of the references.

    Attributes:
        attention: keys and values ``[B,T,heads,N,d]`` of the latents; None if the generator does not
            attend to references.
        aggregation: keys and values ``[B,T,C,h,w]``, channels-last, of the features; None if the
            generator does not aggregate.
    """

    attention: KeysValues | None = None
    aggregation: KeysValues | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        """All tensors; the references are dimension 1 of each."""
        for pair in (self.attention, self.aggregation):
            if pair is not None:
                yield from pair


@dataclass(frozen=True)
class References:
    """Encoded reference frames of a batch; made by ``encode_references`` of a generator.

    They never change: ``append``, ``drop`` and ``reorder`` return others, and compute nothing anew.
    ``len()`` is ``T``, the number of references.

    Attributes:
        batch: ``B``.
        count: ``T``.
        size: height and width of the frames.
        crossings: what each crossed block keeps.
        frames: the frames themselves with their masks, ``[B,T,4,H,W]``, for generators that propagate pixels.
    """

    batch: int
    count: int
    size: tuple[int, int]
    crossings: tuple[Crossing, ...]
    frames: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> References:
        """The same references on ``device``."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def append(self, other: References) -> References:
        """These references, then ``other``: further frames for the same targets, from the same generator.

        Raises:
            TypeError: ``other`` is not references.
            ValueError: of another batch, frame size, device or dtype, or from another kind of generator.
        """
        if not isinstance(other, References):
            raise TypeError(f"other: expected References, got {type(other).__name__}")
        if self._kind() != other._kind():
            raise ValueError(f"other: expected references like these: {self._kind()}, got {other._kind()}")
        return References.join([self, other])

    @staticmethod
    def join(parts: Sequence[References]) -> References:
        """All of ``parts`` in a row, at least one; they must go together, see :meth:`append`."""
        if len(parts) == 1:
            return parts[0]
        crossings = tuple(
            Crossing(_joined([c.attention for c in row]), _joined([c.aggregation for c in row]))
            for row in zip(*(part.crossings for part in parts), strict=True)
        )
        frames = [part.frames for part in parts if part.frames is not None]
        joined = _in_memory_order(_cat, *frames) if frames else None
        return replace(parts[0], count=sum(map(len, parts)), crossings=crossings, frames=joined)

    def drop(self, *indices: int) -> References:
        """All references but those at ``indices``; at least one must remain.

        Raises:
            IndexError: an index out of range.
            ValueError: none would remain.
        """
        dropped = {self._index(i) for i in indices}
        remaining = [i for i in range(len(self)) if i not in dropped]
        if not remaining:
            raise ValueError(f"indices: expected at least one reference to remain of {len(self)}")
        return self._select(remaining)

    def reorder(self, order: Sequence[int]) -> References:
        """Reference ``order[i]`` becomes the i-th.

        Raises:
            IndexError: an index out of range.
            ValueError: not a permutation.
        """
        indices = [self._index(i) for i in order]
        if sorted(indices) != list(range(len(self))):
            raise ValueError(f"order: expected a permutation of 0 ... {len(self) - 1}, got {list(order)}")
        return self._select(indices)

    def _index(self, i: int) -> int:
        if not -len(self) <= i < len(self):
            raise IndexError(f"indices: expected indices of {len(self)} references, got {i}")
        return i % len(self)

    def _select(self, indices: list[int]) -> References:
        def chosen(tensor: torch.Tensor) -> torch.Tensor:
            return _in_memory_order(
                lambda parts, t: parts[0].index_select(t, torch.tensor(indices, device=tensor.device)), tensor
            )

        return replace(self._map(chosen), count=len(indices))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> References:
        def changed(pair: KeysValues | None) -> KeysValues | None:
            return None if pair is None else (change(pair[0]), change(pair[1]))

        crossings = (Crossing(changed(c.attention), changed(c.aggregation)) for c in self.crossings)
        frames = None if self.frames is None else change(self.frames)
        return replace(self, crossings=tuple(crossings), frames=frames)

    def _tensors(self) -> Iterator[torch.Tensor]:
        """All tensors; the references are dimension 1 of each."""
        for crossing in self.crossings:
            yield from crossing.tensors()
        if self.frames is not None:
            yield self.frames

    def _kind(self) -> str:
        """What must agree between references that go together."""
        tensors = list(self._tensors())
        shapes = [(*t.shape[:1], "T", *t.shape[2:]) for t in tensors]
        where = {f"{t.dtype} on {t.device}" for t in tensors}
        size = "x".join(map(str, self.size))
        return f"batch {self.batch}, frames {size}, kept {shapes}, {', '.join(sorted(where)) or 'nothing'}"


def _joined(pairs: Sequence[KeysValues | None]) -> KeysValues | None:
    present = [pair for pair in pairs if pair is not None]
    if not present:
        return None
    keys, values = (_in_memory_order(_cat, *tensors) for tensors in zip(*present, strict=True))
    return keys, values


def _in_memory_order(
    change: Callable[[Sequence[torch.Tensor], int], torch.Tensor], *tensors: torch.Tensor
) -> torch.Tensor:
    """``change(tensors, 1)`` along the references, the layout in memory kept: kernels rely on it."""
    strides = tensors[0].stride()
    order = [0, 1, *sorted(range(2, len(strides)), key=lambda d: -strides[d])]
    moved = change([t.permute(order) for t in tensors], 1)
    return moved.permute([order.index(d) for d in range(len(order))])


def _cat(tensors: Sequence[torch.Tensor], dimension: int) -> torch.Tensor:
    return torch.cat(list(tensors), dimension)
