"""Random masks of training: strokes, boxes, borders, grids and mixtures of them.

Distributions and parameters are those of the published generators (after LaMa's: Suvorov et al.,
"Resolution-robust Large Mask Inpainting with Fourier Convolutions", 2022). Every draw comes from the
generator that is handed in, in the published order, so a mask is a function of its seed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import cv2
import numpy as np

from gi_model.errors import InputError
from gi_model.published import nearest


class Mask(Protocol):
    """A kind of masks."""

    def __call__(self, rng: np.random.Generator, height: int, width: int, iteration: int = 0) -> np.ndarray:
        """A mask [height,width] bool, true where pixels are missing.

        ``iteration``: how many masks were drawn before, which only a ramp looks at.
        """
        ...


def build_mask(kind: str | None = "mixed", **options: Any) -> Mask:
    """A kind of masks by its published name: ``mixed`` (also for None), ``outpainting`` or ``dumb``.

    Options are the published keyword arguments of that kind, see :class:`Mixed`, :class:`Outpainting`
    and :class:`CentralBox`.

    Raises:
        InputError: an unknown kind or option, or values that do not go together.
    """
    kinds: dict[str, Callable[..., Mask]] = {
        "mixed": Mixed,
        "outpainting": Outpainting,
        "dumb": CentralBox,
    }
    kind = kind or "mixed"
    if kind not in kinds:
        raise InputError(
            f"mask_generator_kind: unknown: {kind!r}{nearest(kind, kinds)}; known: {', '.join(kinds)}"
        )
    return _build(kinds[kind], options, "mask_gen_kwargs")


class Mixed:
    """One of several kinds for each mask.

    Options come in pairs, ``X_proba`` and ``X_kwargs``: a probability, up to a common factor, and the
    arguments of the kind. Kinds X are ``irregular`` (1/3) and ``squares`` (0), both :class:`Strokes`,
    ``box`` (1/3) :class:`Boxes`, ``superres`` (0) :class:`Grid`, ``outpainting`` (0)
    :class:`Outpainting`. ``segm`` moves silhouettes found by a segmentation network, which is not
    supported: its probability must be 0, which no published configuration changes.

    Args:
        invert_proba: probability that the mask is inverted.
    """

    def __init__(self, *, invert_proba: float = 0, segm_proba: float = 0, **options: Any) -> None:
        if segm_proba:
            raise InputError(
                f"mask_gen_kwargs: segm_proba: masks from a segmentation network are not supported: "
                f"expected 0, got {segm_proba}"
            )
        options.pop("segm_kwargs", None)
        kinds: dict[str, tuple[float, Callable[..., Mask], dict[str, Any]]] = {
            "irregular": (1 / 3, Strokes, {}),
            "box": (1 / 3, Boxes, {}),
            "squares": (0, Strokes, {"brush": "square"}),
            "superres": (0, Grid, {}),
            "outpainting": (0, Outpainting, {}),
        }
        known = [f"{kind}_{end}" for kind in kinds for end in ("proba", "kwargs")]
        for key in options:
            if key not in known:
                names = [*known, "invert_proba", "segm_proba", "segm_kwargs"]
                raise InputError(f"mask_gen_kwargs: unknown key {key!r}{nearest(key, names)}")
        self.invert = _probability("invert_proba", invert_proba)
        self.kinds: list[Mask] = []
        shares = []
        for kind, (default, build, fixed) in kinds.items():
            share = options.get(f"{kind}_proba", default)
            if share < 0:
                raise InputError(f"mask_gen_kwargs: {kind}_proba: expected at least 0, got {share}")
            if share > 0:
                given = {**fixed, **(options.get(f"{kind}_kwargs") or {})}
                self.kinds.append(_build(build, given, f"{kind}_kwargs"))
                shares.append(share)
        if not shares:
            raise InputError("mask_gen_kwargs: expected a kind with a probability above 0, got none")
        self.shares = np.array(shares) / sum(shares)

    def __call__(self, rng: np.random.Generator, height: int, width: int, iteration: int = 0) -> np.ndarray:
        kind = self.kinds[rng.choice(len(self.kinds), p=self.shares)]
        mask = kind(rng, height, width, iteration)
        return ~mask if self.invert > 0 and rng.random() < self.invert else mask


class Strokes:
    """Broken lines of a thick brush.

    Lines go in four directions only, and there are up to ``max_times + 1`` of them: so it was
    published, and so the statistics of training come out.

    Args:
        max_angle: angles are 0.01 + 0, 1, ... radians, this many of them.
        max_len: pixels; segments have 10 to ``max_len + 9``.
        max_width: pixels; brushes have 5 to ``max_width + 4``.
        min_times, max_times: lines per mask.
        brush: ``line``, ``circle`` (at the start of each segment) or ``square`` (likewise).
        ramp_kwargs: see :class:`Ramp`; shrinks lengths, widths and times.
    """

    def __init__(
        self,
        max_angle: int = 4,
        max_len: int = 60,
        max_width: int = 20,
        min_times: int = 0,
        max_times: int = 10,
        ramp_kwargs: Mapping[str, Any] | None = None,
        brush: str = "line",
    ) -> None:
        _at_least_one("max_angle", max_angle)
        _ordered("min_times", min_times, "max_times", max_times)
        if brush not in ("line", "circle", "square"):
            raise InputError(f"brush: expected line, circle or square, got {brush!r}")
        self.max_angle, self.max_len, self.max_width = max_angle, max_len, max_width
        self.min_times, self.max_times = min_times, max_times
        self.brush = brush
        self.ramp = Ramp(**(ramp_kwargs or {}))

    def __call__(self, rng: np.random.Generator, height: int, width: int, iteration: int = 0) -> np.ndarray:
        share = self.ramp(iteration)
        longest, widest = (int(max(1, n * share)) for n in (self.max_len, self.max_width))
        times = int(self.min_times + 1 + (self.max_times - self.min_times) * share)
        mask = np.zeros((height, width), np.uint8)
        for i in range(rng.integers(self.min_times, times + 1)):
            x, y = int(rng.integers(width)), int(rng.integers(height))
            for _ in range(1 + rng.integers(5)):
                angle = 0.01 + rng.integers(self.max_angle)
                if i % 2 == 0:
                    angle = 2 * 3.1415926 - angle
                length = 10 + rng.integers(longest)
                size = int(5 + rng.integers(widest))
                end_x = int(np.clip(int(x + length * np.sin(angle)), 0, width))
                end_y = int(np.clip(int(y + length * np.cos(angle)), 0, height))
                if self.brush == "line":
                    cv2.line(mask, (x, y), (end_x, end_y), 1, size)
                elif self.brush == "circle":
                    cv2.circle(mask, (x, y), size, 1, -1)
                else:
                    reach = size // 2
                    mask[max(0, y - reach) : y + reach, max(0, x - reach) : x + reach] = 1
                x, y = end_x, end_y
        return mask > 0


class Boxes:
    """Upright boxes.

    Args:
        margin: pixels that stay free along the border.
        bbox_min_size, bbox_max_size: pixels per side; the longest is as long as the frame without its
            margins.
        min_times, max_times: boxes per mask.
        ramp_kwargs: see :class:`Ramp`; shrinks the longest side and times.
    """

    def __init__(
        self,
        margin: int = 10,
        bbox_min_size: int = 30,
        bbox_max_size: int = 100,
        min_times: int = 0,
        max_times: int = 3,
        ramp_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        _ordered("min_times", min_times, "max_times", max_times)
        _at_least_one("bbox_min_size", bbox_min_size)
        _ordered("bbox_min_size", bbox_min_size, "bbox_max_size", bbox_max_size)
        self.margin, self.smallest, self.largest = margin, bbox_min_size, bbox_max_size
        self.min_times, self.max_times = min_times, max_times
        self.ramp = Ramp(**(ramp_kwargs or {}))

    def __call__(self, rng: np.random.Generator, height: int, width: int, iteration: int = 0) -> np.ndarray:
        share = self.ramp(iteration)
        largest = int(self.smallest + 1 + (self.largest - self.smallest) * share)
        largest = min(largest, height - 2 * self.margin, width - 2 * self.margin)
        if largest <= self.smallest:
            raise InputError(
                f"bbox_min_size: expected less than a frame of {width}x{height} pixels without margins "
                f"of {self.margin} holds, got {self.smallest}"
            )
        mask = np.zeros((height, width), bool)
        times = int(self.min_times + (self.max_times - self.min_times) * share)
        for _ in range(rng.integers(self.min_times, times + 1)):
            w, h = rng.integers(self.smallest, largest), rng.integers(self.smallest, largest)
            x = rng.integers(self.margin, width - self.margin - w + 1)
            y = rng.integers(self.margin, height - self.margin - h + 1)
            mask[y : y + h, x : x + w] = True
        return mask


class Outpainting:
    """Strips along the borders, at least one.

    Args:
        min_padding_percent, max_padding_percent: width of a strip, as a share of the side from 0 to 1.
        left_padding_prob, top_padding_prob, right_padding_prob, bottom_padding_prob: probabilities of
            the strips.
        is_fixed_randomness: accepted if false: a mask is a function of its seed here anyway.
    """

    def __init__(
        self,
        min_padding_percent: float = 0.04,
        max_padding_percent: float = 0.25,
        left_padding_prob: float = 0.5,
        top_padding_prob: float = 0.5,
        right_padding_prob: float = 0.5,
        bottom_padding_prob: float = 0.5,
        is_fixed_randomness: bool = False,
    ) -> None:
        for name, value in (("min", min_padding_percent), ("max", max_padding_percent)):
            _probability(f"{name}_padding_percent", value)
        _ordered("min_padding_percent", min_padding_percent, "max_padding_percent", max_padding_percent)
        sides = (left_padding_prob, top_padding_prob, right_padding_prob, bottom_padding_prob)
        for name, value in zip(("left", "top", "right", "bottom"), sides, strict=True):
            _probability(f"{name}_padding_prob", value)
        if max_padding_percent <= 0 or sum(sides) <= 0:
            raise InputError(
                "outpainting: expected max_padding_percent and a side's probability above 0, "
                f"got {max_padding_percent} and {', '.join(map(str, sides))}"
            )
        if is_fixed_randomness:
            raise InputError("is_fixed_randomness: expected false: masks are functions of their seeds here")
        self.smallest, self.largest = min_padding_percent, max_padding_percent
        self.sides = np.array(sides)

    def __call__(self, rng: np.random.Generator, height: int, width: int, iteration: int = 0) -> np.ndarray:
        # Widths of left and right strips are drawn in steps of the height and the others in steps of the
        # width, as published: it makes no difference to squares.
        left, top, right, bottom = (self._share(rng, side) for side in (height, width, height, width))
        mask = np.zeros((height, width), bool)
        strips: tuple[Any, ...] = (
            np.s_[:, : int(left * width)],
            np.s_[: int(top * height)],
            np.s_[:, int((1 - right) * width) :],
            np.s_[int((1 - bottom) * height) :],
        )
        chosen = [strip for strip, p in zip(strips, self.sides, strict=True) if rng.random() < p]
        for strip in chosen or [strips[rng.choice(4, p=self.sides / self.sides.sum())]]:
            mask[strip] = True
        return mask

    def _share(self, rng: np.random.Generator, side: int) -> float:
        low, high = int(self.smallest * side), int(self.largest * side)
        return float(rng.integers(low, max(low + 1, high)) / side)


class Grid:
    """Rows and columns at regular distances, as if the frame had been enlarged.

    Args:
        min_step, max_step: pixels from line to line, below ``max_step``.
        min_width, max_width: pixels of a line, below ``max_width`` and below the step.
    """

    def __init__(self, min_step: int = 2, max_step: int = 5, min_width: int = 1, max_width: int = 4) -> None:
        _at_least_one("min_width", min_width)
        _ordered("min_width", min_width + 1, "max_width", max_width)
        _ordered("min_width", min_width + 1, "min_step", min_step)
        _ordered("min_step", min_step + 1, "max_step", max_step)
        self.steps, self.widths = (min_step, max_step), (min_width, max_width)

    def __call__(self, rng: np.random.Generator, height: int, width: int, iteration: int = 0) -> np.ndarray:
        columns, rows = self._lines(rng, width), self._lines(rng, height)
        return rows[:, None] | columns

    def _lines(self, rng: np.random.Generator, length: int) -> np.ndarray:
        step = int(rng.integers(*self.steps))
        size = int(rng.integers(self.widths[0], min(step, self.widths[1])))
        offset = int(rng.integers(0, step))
        return (np.arange(length) >= offset) & ((np.arange(length) - offset) % step < size)


class CentralBox:
    """One box: anywhere, each side a share of sqrt(0.1) to sqrt(0.35) of the frame's, or in the middle.

    Args:
        is_training: anywhere; otherwise a box of 0.225 of the area in the middle.
    """

    def __init__(self, is_training: bool = True) -> None:
        self.anywhere = is_training

    def __call__(self, rng: np.random.Generator, height: int, width: int, iteration: int = 0) -> np.ndarray:
        sides = []
        for length in (height, width):
            share = rng.uniform(0.1**0.5, 0.35**0.5) if self.anywhere else 0.225**0.5
            size = round(share * length)
            start = int(rng.integers(0, length - size + 1)) if self.anywhere else (length - size) // 2
            sides.append(slice(start, start + size))
        mask = np.zeros((height, width), bool)
        mask[sides[0], sides[1]] = True
        return mask


class Ramp:
    """A factor that grows with the number of masks drawn: linear between two iterations.

    Args:
        start_value, end_value: up to ``start_iter`` and from ``end_iter`` on.
    """

    def __init__(
        self, start_value: float = 1, end_value: float = 1, start_iter: int = 0, end_iter: int = 0
    ) -> None:
        _ordered("start_iter", start_iter, "end_iter", end_iter)
        self.values, self.iterations = (start_value, end_value), (start_iter, end_iter)

    def __call__(self, iteration: int) -> float:
        if iteration >= self.iterations[1]:
            return self.values[1]
        return float(np.interp(iteration, self.iterations, self.values))


def _build(kind: Callable[..., Mask], options: Mapping[str, Any], where: str) -> Mask:
    """``kind(**options)``; what it does not know is named."""
    parameters = inspect.signature(kind).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for key in options:
        if key not in parameters and not open_ended:
            raise InputError(
                f"{where}: unknown key {key!r}{nearest(str(key), parameters)}; known: {', '.join(parameters)}"
            )
    try:
        return kind(**options)
    except TypeError as error:
        raise InputError(f"{where}: {error}") from error


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise InputError(f"{name}: expected a number from 0 to 1, got {value}")
    return value


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name}: expected at least 1, got {value}")


def _ordered(low: str, smaller: float, high: str, larger: float) -> None:
    if smaller > larger:
        raise InputError(f"{high}: expected at least {smaller} because of {low}, got {larger}")
