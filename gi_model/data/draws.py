"""Which photo is drawn when: the same for any number of processes and workers, and after a resume."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from gi_model.errors import InputError


class Draw(NamedTuple):
    """A sample to be made.

    Attributes:
        number: its number in the whole run, which seeds its random numbers.
        photo: its index.
    """

    number: int
    photo: int


class Batches(Sampler[list[Draw]]):
    """The batches of one process, from one epoch into the next without end.

    The last batch of an epoch may be small.

    Args:
        draws: of this process.
        size: of a batch.
        epoch, number: of the first batch.
    """

    def __init__(self, draws: Draws, size: int, epoch: int = 0, number: int = 0) -> None:
        if size < 1:
            raise InputError(f"batch_size: expected at least 1, got {size}")
        self.draws, self.size, self.epoch, self.number = draws, size, epoch, number
        self.per_epoch = -(-len(draws) // size)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, number = self.epoch, self.number
        while True:
            self.draws.set_epoch(epoch, min(number * self.size, len(self.draws)))
            draws = iter(self.draws)
            while batch := list(islice(draws, self.size)):
                yield batch
            epoch, number = epoch + 1, 0


class Draws(Sampler[Draw]):
    """The shuffled draws of one process in one epoch.

    All processes together go through every photo once; if their number does not divide that of the
    photos, some are drawn twice. Process ``rank`` of ``world`` has every ``world``-th draw, so together
    the processes see in a step what one process with batches ``world`` times as large would see.

    Args:
        count: photos.
        seed: of the order.
        rank, world: of this process, and how many there are.
        shuffle: otherwise every epoch has the order of the photos.
    """

    def __init__(
        self, count: int, seed: int = 23, rank: int = 0, world: int = 1, shuffle: bool = True
    ) -> None:
        if count < 1:
            raise InputError(f"count: expected at least 1, got {count}")
        if not 0 <= rank < world:
            raise InputError(f"rank: expected 0 to {world - 1}, got {rank}")
        self.count, self.seed, self.rank, self.world, self.shuffle = count, seed, rank, world, shuffle
        self.epoch = self.skipped = 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Go on with ``epoch``, after the first ``skip`` draws of this process."""
        if not 0 <= skip <= len(self):
            raise InputError(f"skip: expected 0 to {len(self)}, got {skip}")
        self.epoch, self.skipped = epoch, skip

    def __len__(self) -> int:
        return -(-self.count // self.world)

    def __iter__(self) -> Iterator[Draw]:
        total = len(self) * self.world
        order = np.arange(self.count)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        for place in range(self.rank + self.skipped * self.world, total, self.world):
            yield Draw(self.epoch * total + place, int(order[place % self.count]))
