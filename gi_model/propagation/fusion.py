"""One picture from what several frames show of a hole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import cv2
import numpy as np

from gi_model.propagation.edges import continue_edges
from gi_model.propagation.membrane import membrane
from gi_model.propagation.neighbours import dilate
from gi_model.propagation.sampling import Box, bounding_box, from_levels, to_levels

# Colours are in grey levels of 8 bits, whatever the frames' depth.

# Deviation that noise and rounding cause in any case, in grey levels.
NOISE = 2.0
# Deviation that is assumed where too little of the ring is seen to measure it, in grey levels. Less is never
# a reason to refuse what a frame shows.
UNKNOWN = 10.0
# Pixels of the ring that are needed to measure it, and that are looked at.
FEWEST, MOST = 30, 2000
# As many points near a pixel the mean over the whole ring counts for.
PRIOR = 1.0
# Width in pixels of the rim on which both the frame and the filling are known.
RIM = 4
# Difference across the rim, in grey levels, that may be lighting; what is larger is an object.
RIM_STEP = 12.0
# Difference, in grey levels, from which on two pictures are of different things.
APART = 24.0
# What differs is found on a coarse grid: its cells are the ring's width over this. The deviation, in cells,
# of the blur before pictures are compared, so that detail that lies a pixel beside itself is no difference.
COARSE, DETAIL = 6, 0.7
# Cells around such differences that belong to them: the outlines of what has moved.
MARGIN = 2
# Deviation, as a share of the ring's width, of the blur of differences at the rim, and the share of the rim
# under it below which a pixel is too far from the rim for them.
NEARBY, BEYOND = 1 / 3, 1e-3
# Votes of what lasts, against 1 of a frame beside this one; and the distance in frames at which that has
# halved, because what it shows may have gone.
LASTING, PASSING = 0.5, 5.0
# Votes of a finished frame beside this one for what it shows, and of the picture at the rim.
INERTIA, BORDER = 0.5, 2.0


@dataclass
class Showing:
    """What some frames show of a hole.

    Attributes:
        total, weight: ``[h,w,3]`` and ``[h,w]`` float32: weighted sum of colours, and of the weights.
        vote: ``[h,w]`` float32: how likely it is to hold, from its distance in time alone; 0 where unknown.
            Of use only where the camera stands.
    """

    total: np.ndarray
    weight: np.ndarray
    vote: np.ndarray


@dataclass
class Sample:
    """What one frame shows of a part of a hole.

    Attributes:
        part: rows and columns of the hole's box, ``h`` by ``w``.
        colour: ``[h,w,3]`` float32, its gain applied.
        weight: ``[h,w]`` float32: how far it is trusted, whatever it looks like.
        share: ``[h,w]`` float32: how much it counts, by :meth:`Fusion.share`.
        shown: ``[h,w]`` bool: where there is a colour.
        distance: frames from the one with the hole to it, negative before that.
    """

    part: Box
    colour: np.ndarray
    weight: np.ndarray
    share: np.ndarray
    shown: np.ndarray
    distance: int = 0


class Fusion:
    """Collects what frames show of a hole, and blends it.

    Each frame is judged by the ring around the hole, where the truth is known: its gain is matched to it,
    and its weight is one over the mean square of the difference that is left nearby, whether that comes
    from blur, from flow that has drifted or from something that has moved. Where a smooth filling would be
    as good, the frame shows something else and is refused. At last, what remains of a step at the
    rim is spread over the hole.

    Args:
        image: ``[h,w,3]`` float32, a box of the frame.
        hole, ring: ``[h,w]`` bool: what to fill, and the visible pixels around it.
        cell: pixels over which differences are averaged.
    """

    def __init__(self, image: np.ndarray, hole: np.ndarray, ring: np.ndarray, cell: int) -> None:
        self.image, self.hole, self.cell = image, hole, cell
        self.rim = ring & dilate(hole, RIM)
        rows, columns = np.nonzero(ring)
        step = 1 + len(rows) // MOST
        self.points = rows[::step], columns[::step]
        self.truth = image[self.points]
        self.grid = -(-hole.shape[0] // cell), -(-hole.shape[1] // cell)
        self.cells = self.points[0] // cell * self.grid[1] + self.points[1] // cell
        # Of the coarse grid, width first as OpenCV has it.
        self.size = tuple(max(1, round(side * COARSE / cell)) for side in hole.shape[::-1])
        self.depth = float(cv2.distanceTransform(hole.astype(np.uint8), cv2.DIST_L2, 3).max())
        self.contrast = self._contrast(ring)
        self.sides = [self._nothing()]  # of all frames; with what lasts, of those before and those after
        self.lasting: Showing | None = None

    def _nothing(self) -> Showing:
        shape = self.hole.shape
        return Showing(*(np.zeros(s, np.float32) for s in ((*shape, 3), shape, shape)))

    def judge(self, colour: np.ndarray, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gain per channel of a frame, and its mean squared error ``[h,w]``, infinite where it is refused.

        Args:
            colour, shown: its colours at ``points``, ``[N,3]`` float32, and whether it shows them, ``[N]``.
        """
        if shown.sum() < FEWEST:
            return np.ones(3, np.float32), np.full(self.hole.shape, UNKNOWN**2, np.float32)
        truth, colour = self.truth[shown], colour[shown]
        gain = _gain(colour, truth)
        error = self._nearby(mean_square(colour * gain - truth), shown)
        return gain, np.where(error > np.maximum(self.contrast, UNKNOWN**2), np.inf, NOISE**2 + error)

    def _contrast(self, ring: np.ndarray) -> np.ndarray:
        """``[h,w]``: mean square that a filling would miss which is smooth over the width of the hole."""
        half = int(min(self.depth, *self.hole.shape))  # a hole without a border has no depth
        size = 2 * half + 1, 2 * half + 1
        share = cv2.blur(ring.astype(np.float32), size)[self.points][:, None]
        smooth = cv2.blur(self.image * ring[..., None], size)[self.points] / np.maximum(share, 1e-6)
        return self._nearby(mean_square(self.truth - smooth), np.ones(len(self.truth), bool))

    def _nearby(self, values: np.ndarray, shown: np.ndarray) -> np.ndarray:
        """Means ``[h,w]`` of values ``[N]`` at the points that are ``shown`` ``[N]``, around every pixel."""
        count, total = (
            np.bincount(self.cells[shown], weights, self.grid[0] * self.grid[1]).reshape(self.grid)
            for weights in (None, values)
        )
        count, total = (
            cv2.GaussianBlur(v.astype(np.float32), (0, 0), 1.5, borderType=cv2.BORDER_CONSTANT)
            for v in (count, total)
        )
        mean = (total + PRIOR * (values.mean() if len(values) else 0)) / (count + PRIOR)
        size = self.grid[1] * self.cell, self.grid[0] * self.cell
        height, width = self.hole.shape
        return cv2.resize(mean, size, interpolation=cv2.INTER_LINEAR)[:height, :width]

    def share(self, weight: np.ndarray, error: np.ndarray) -> np.ndarray:
        """How much a frame with a weight and error ``[h,w]`` float32 counts in the blend, ``[h,w]`` float32.

        Beside the hole as much as at the nearest of its pixels, so that a step at the rim is that of the
        frames that fill the hole there.
        """
        return self._extended(weight / error)

    def add(self, sample: Sample) -> None:
        """Add what a frame shows."""
        part, side = sample.part, self.sides[-1 if sample.distance > 0 else 0]
        share = sample.share * sample.shown
        side.total[part] += share[..., None] * sample.colour
        side.weight[part] += share
        if self.lasting is not None:
            vote = np.float32(1 / (1 + (sample.distance / PASSING) ** 2))
            np.maximum(side.vote[part], vote * (share > 0), out=side.vote[part])

    def add_lasting(self, colour: np.ndarray, shown: np.ndarray) -> None:
        """Say first of all what lasts behind all that passes, where a standing camera makes that known.

        What frames before and after show is then not averaged where it differs; see :func:`elect`. In a hole
        no deeper than the ring is wide it is refused beside parts of the rim where the frame shows something
        else, which is likely to reach across; of a deep hole this would fill a part with half a thing.

        Args:
            colour, shown: ``[h,w,3]`` float32, and where it is known ``[h,w]`` bool.
        """
        points = tuple(axis[shown[self.points]] for axis in self.points)
        if len(points[0]) >= FEWEST:
            colour = colour * _gain(colour[points], self.image[points])
        kept = self.hole & ~self._contradicted(colour, shown) if self.depth <= self.cell else self.hole
        weight = self._extended(kept.astype(np.float32)) * shown
        self.lasting = Showing(weight[..., None] * colour, weight, np.float32(LASTING) * weight)
        self.sides.append(self._nothing())

    def _contradicted(self, colour: np.ndarray, shown: np.ndarray) -> np.ndarray:
        """``[h,w]`` bool: near parts of the rim where a picture ``[h,w,3]`` is ``shown`` that differs."""
        rim = (self.rim & shown).astype(np.float32)
        error = mean_square(self.image - colour) * rim
        deviation = NEARBY * self.cell * self.size[0] / self.hole.shape[1]
        share, error = (cv2.GaussianBlur(self._shrunk(v), (0, 0), deviation) for v in (rim, error))
        return self._enlarged((share > BEYOND) & (error > APART**2 * share)) > 0

    def _extended(self, weight: np.ndarray) -> np.ndarray:
        """Weights in the hole, and on the rim as much as at the nearest of its pixels."""
        beside = cv2.dilate(weight, np.ones((2 * RIM + 1, 2 * RIM + 1), np.uint8))
        return np.where(self.hole, weight, np.where(self.rim, beside, 0))

    @property
    def covered(self) -> np.ndarray:
        """``[h,w]`` bool: where frames show the hole or its rim."""
        return np.any([side.weight > 0 for side in self.sides], axis=0)

    @property
    def seen(self) -> np.ndarray:
        """``[h,w]`` bool: where frames show the hole, or it is known what lasts."""
        covered = self.covered if self.lasting is None else self.covered | (self.lasting.weight > 0)
        return self.hole & covered

    def blend(self, finished: Sequence[tuple[np.ndarray, int]] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Colours ``[h,w,3]`` float32 for the hole, and where there are any ``[h,w]`` bool.

        Args:
            finished: what finished frames show at the same place, ``[h,w,3]`` uint8 or uint16, and how many
                frames away they are. Of use where it is known what lasts.
        """
        total, weight = self.sides[0].total, self.sides[0].weight
        if self.lasting is not None:
            total, weight = self._chosen(finished)
        known = weight > 0
        blended = total / np.where(known, weight, 1)[..., None]
        seen = self.hole & known
        return blended + rim_correction(self.image, blended, self.rim & known, seen), seen

    def _chosen(self, finished: Sequence[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Weighted sum of colours ``[h,w,3]``, and of the weights ``[h,w]``, of what is elected.

        Elsewhere of the frames before and after, or of what lasts where these show nothing.
        """
        assert self.lasting is not None
        showings = [*self.sides, self.lasting]
        known = [(self.image, self.rim, BORDER)]
        known += [(to_levels(image), self.hole, INERTIA / distance) for image, distance in finished]
        winner = self._enlarged(
            elect(
                [self._without_detail(showing.total, showing.weight) for showing in showings],
                [self._shrunk(showing.vote) for showing in showings],
                (
                    (self._without_detail(image * where[..., None], where), vote * self._shrunk(where))
                    for image, where, vote in known
                ),
            )
        )
        taken = [(winner == i) & (showing.weight > 0) for i, showing in enumerate(showings)]
        left = ~np.any(taken, axis=0)
        total, weight = np.zeros_like(self.image), np.zeros(self.hole.shape, np.float32)
        for showing, usual, chosen in zip(showings, (left, left, left & ~self.covered), taken, strict=True):
            counts = usual | chosen
            total += showing.total * counts[..., None]
            weight += showing.weight * counts
        return total, weight

    def _shrunk(self, values: np.ndarray) -> np.ndarray:
        """Means of values ``[h,w]`` or ``[h,w,C]`` over the cells of the coarse grid, float32."""
        return cv2.resize(values.astype(np.float32, copy=False), self.size, interpolation=cv2.INTER_AREA)

    def _enlarged(self, cells: np.ndarray) -> np.ndarray:
        """``[h,w]`` uint8 from the cells of the coarse grid."""
        return cv2.resize(cells.astype(np.uint8), self.hole.shape[::-1], interpolation=cv2.INTER_NEAREST)

    def _without_detail(self, total: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Mean colours ``[h,w,3]`` on the coarse grid of a sum ``[h,w,3]`` with these weights ``[h,w]``."""
        total, weight = (cv2.GaussianBlur(self._shrunk(v), (0, 0), DETAIL) for v in (total, weight))
        return total / np.maximum(weight, 1e-9)[..., None]


def elect(
    pictures: Sequence[np.ndarray],
    votes: Sequence[np.ndarray],
    known: Iterable[tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
    """Which of three pictures is to be taken at each pixel ``[h,w]`` uint8, or 3 where they agree.

    Where they differ their mean would be a ghost, half transparent. Such pixels are joined to regions,
    about the outlines of what has moved, and each region is given to one picture: the one that has most
    votes, its own, those of others that agree with it, and those of what is known. Where it shows nothing
    it is the next.

    Args:
        pictures: each ``[h,w,3]`` float32, in grey levels, without detail.
        votes: of each ``[h,w]`` float32, zero where it shows nothing.
        known: pictures that tell what is to be expected, and their votes for what agrees with them.
    """
    there = [vote > 0 for vote in votes]
    totals = [vote.copy() for vote in votes]
    apart = np.zeros(votes[0].shape, bool)
    for i, j in combinations(range(3), 2):
        both = there[i] & there[j]
        same = both & _alike(pictures[i], pictures[j])
        apart |= both & ~same
        totals[i] += votes[j] * same
        totals[j] += votes[i] * same
    if not apart.any():
        return np.full(apart.shape, 3, np.uint8)
    for picture, vote in known:
        for i in range(3):
            totals[i] += vote * (there[i] & _alike(pictures[i], picture))
    apart = dilate(apart, MARGIN)
    count, labels = cv2.connectedComponents(apart.astype(np.uint8))
    polls = np.stack([np.bincount(labels.ravel(), total.ravel(), count) for total in totals])  # [3,count]
    winner = np.where(np.stack(there), polls[:, labels], 0).argmax(axis=0)
    return np.where(apart, winner, 3).astype(np.uint8)


def _alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``[h,w]`` bool: where two pictures ``[h,w,3]`` differ by no more than ``APART`` in any channel."""
    return cv2.inRange(cv2.absdiff(a, b), (0.0,) * 3, (APART,) * 3) > 0


def mean_square(colour: np.ndarray) -> np.ndarray:
    """Over the channels of ``[...,3]`` float32; NumPy's mean over so short an axis takes long."""
    square = colour * colour
    return (square[..., 0] + square[..., 1] + square[..., 2]) / np.float32(3)


def _gain(colour: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Gain per channel ``[3]`` that takes colours ``[N,3]`` to the true ones, whatever has moved."""
    gain = np.ones(3, np.float32)
    for _ in range(4):  # what has moved counts little
        weight = 1 / (NOISE + np.abs(colour * gain - truth))
        gain = (weight * colour * truth).sum(axis=0) / np.maximum((weight * colour**2).sum(axis=0), 1e-6)
        gain = np.clip(gain, 0.5, 2.0).astype(np.float32)
    return gain


def rim_correction(image: np.ndarray, filled: np.ndarray, rim: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """What to add to ``filled`` inside ``hole`` so that no step to ``image`` shows at its ``rim``.

    The difference is averaged along the rim, so that noise is not drawn into the hole, and continued
    into the hole as a membrane.
    """
    if not rim.any() or not hole.any():
        return np.zeros_like(filled)
    difference = np.where(rim[..., None], image - filled, 0).astype(np.float32)
    size = np.sqrt(mean_square(difference))
    weight = np.where(rim, 1 / (1 + (size / RIM_STEP) ** 2), 0).astype(np.float32)
    share = cv2.GaussianBlur(weight, (0, 0), RIM)
    smooth = (
        cv2.GaussianBlur(difference * weight[..., None], (0, 0), RIM) / np.maximum(share, 1e-3)[..., None]
    )
    return membrane(smooth, rim) * hole[..., None]


def fill_along_edges(image: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """``image`` ``[H,W,3]`` uint8 or uint16 with what is ``missing`` continued; grey if it is altogether."""
    return _fill(image, missing, continue_edges)


def fill_smoothly(image: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """``image`` ``[H,W,3]`` uint8 or uint16 with a membrane where ``missing``; grey if it is altogether.

    It is closer to the truth than what OpenCV's inpainting draws into large holes, and has no false edges.
    """
    return _fill(image, missing, membrane)


def _fill(
    image: np.ndarray, missing: np.ndarray, method: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    if not missing.any():
        return image
    if missing.all():
        return np.full_like(image, np.iinfo(image.dtype).max // 2)
    box = bounding_box(missing, RIM)
    filled = method(to_levels(image[box]), ~missing[box])
    image = image.copy()
    image[box] = np.where(missing[box][..., None], from_levels(filled, image.dtype), image[box])
    return image
