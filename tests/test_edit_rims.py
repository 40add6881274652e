"""Edits beside what passes in front of them, and in the box that is followed, against known truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2", reason="the [video] extra is not installed")

from gi_model.flow import DISFlow  # noqa: E402
from gi_model.propagation import EditPropagator, rims  # noqa: E402
from gi_model.propagation.tracking import Tracker  # noqa: E402

H, W = 200, 320
RED = np.array([220, 40, 30])
# The poster on the plane, rows and columns.
POSTER = slice(70, 130), slice(150, 220)


def texture(seed: int, width: int, grain: int) -> np.ndarray:
    """Smooth noise ``[H,width,3]``."""
    noise = np.random.default_rng(seed).integers(20, 236, (H // grain, width // grain, 3)).astype(np.uint8)
    return cv2.resize(noise, (width, H), interpolation=cv2.INTER_CUBIC)


def with_poster(plane: np.ndarray) -> np.ndarray:
    plane = plane.copy()
    plane[POSTER] = RED
    return plane


def views(plane: np.ndarray, lefts: list[int]) -> list[np.ndarray]:
    return [np.ascontiguousarray(plane[:, left : left + W]) for left in lefts]


def region(left: int) -> np.ndarray:
    """Where the poster is in the view that begins there, ``[H,W]`` bool."""
    mask = np.zeros((H, 4 * W), bool)
    mask[POSTER] = True
    return mask[:, left : left + W]


def shown(result: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Where the poster is rather there than not."""
    colours = result.astype(float)
    return np.abs(colours - RED).sum(axis=2) < np.abs(colours - frame).sum(axis=2)


# What passes in front


@pytest.mark.parametrize(("speed", "step", "most"), [(6, 0, 1.4), (-7, 2, 2.6)])
def test_an_edit_is_seen_up_to_what_passes_in_front(speed, step, most):
    """Mean distances, in pixels, by which it ends early, and by which it reaches over the bar."""
    count, plane, front = 14, texture(0, 2 * W, 5), texture(1, W, 6) // 2
    lefts = [step * t for t in range(count)]
    frames = views(plane, lefts)
    edited = views(with_poster(plane), lefts)[0]
    bars = []
    for t, frame in enumerate(frames):
        left = (115 if speed > 0 else 235) + speed * t
        bars.append((np.abs(np.arange(W) - left)[None] < 16).repeat(H, 0))
        frame[bars[t]] = np.roll(front, left, axis=1)[bars[t]]
    edited = np.where(bars[0][..., None], frames[0], edited)
    results = list(EditPropagator({0: edited}).run(frames))
    early = late = contour = 0
    for t in range(3, count):
        there = shown(results[t], frames[t])
        near = cv2.dilate(bars[t].astype(np.uint8), np.ones((1, 31))) > 0
        early += (region(lefts[t]) & ~bars[t] & near & ~there).sum()
        late += (region(lefts[t]) & bars[t] & (np.abs(results[t].astype(int) - frames[t]).max(2) > 24)).sum()
        beside = cv2.dilate(bars[t].astype(np.uint8), np.ones((1, 3))) > 0
        contour += (region(lefts[t]) & beside & ~bars[t]).sum()
    assert contour > 300
    assert early < most * contour
    assert late < 0.06 * contour


def test_a_rim_is_where_the_continued_motion_fits():
    """The flow beside a bar is wrong by three pixels; further away it is right."""
    plane = texture(3, W, 5).astype(np.float32)
    frame = plane.copy()
    frame[:, 100:140] = texture(4, W, 5)[:, 100:140] // 2
    distance = np.abs(np.arange(W) - 119.5)[None].repeat(H, 0) - 20
    wrong = distance < 5
    expected = np.where(wrong[..., None], np.roll(plane, 3, axis=1), plane)
    agrees = np.where(wrong, 0, 1).astype(np.float32)
    known = rims.certain(agrees)
    assert known is not None and not known[distance < 11].any() and known[distance > 13].all()
    rim = rims.rim(frame, expected, plane, known, agrees, None)
    beside = (distance > 2) & (distance < 5)
    assert rim.where[beside].mean() > 0.95 and rim.seen[beside].min() > 0.9
    assert not rim.where[known].any() and not (rim.seen * rim.where)[distance < -2].round().mean() > 0.05
    assert np.abs(rim.shading[beside] - 1).max() < 0.02


def test_what_moves_with_the_bar_is_no_rim():
    """Both the keyframe and the frame before look like the frame there; only one of them exactly."""
    plane, bar = texture(3, W, 5).astype(np.float32), np.zeros((H, W), bool)
    bar[:, 100:140] = True
    front = np.clip(plane + 12, 0, 255)  # levels: not enough, given the contrast, to tell it from the plane
    frame = np.where(bar[..., None], front, plane)
    before = np.roll(frame, -4, axis=1).astype(np.uint8)
    agrees = (~bar).astype(np.float32)
    flow = np.zeros((H, W, 2), np.float32)
    flow[bar] = -4, 0
    start = np.stack(np.meshgrid(np.arange(W), np.arange(H)), axis=-1).astype(np.float32)
    step = rims.Step(before, start, flow, np.ones((H, W), bool))
    known = rims.certain(agrees)
    assert known is not None
    inside = cv2.erode(bar.astype(np.uint8), np.ones((5, 5))) > 0
    alone, judged = (rims.rim(frame, plane, plane, known, agrees, s).seen for s in (None, step))
    assert alone[inside].mean() > 0.8 and judged[inside].mean() < 0.4


@pytest.mark.parametrize("agrees", [np.ones((20, 20)), np.zeros((20, 20))])
def test_no_rim_where_all_agrees_or_nothing_does(agrees):
    assert rims.certain(agrees.astype(np.float32)) is None


# What is followed


def test_a_box_around_the_region_is_followed():
    lefts = [3 * t for t in range(8)]
    frames = views(texture(0, 2 * W, 5), lefts)
    tracker = Tracker(frames[0], region(0), DISFlow())
    for t in range(1, 8):
        tracker.advance(frames[t - 1], frames[t])
        rows, columns = tracker.box
        assert region(lefts[t])[tracker.box].sum() == region(lefts[t]).sum()
        assert (rows.stop - rows.start) * (columns.stop - columns.start) < 0.6 * H * W
        x = np.arange(columns.start, columns.stop) + lefts[t]
        near = region(lefts[t])[tracker.box]
        assert np.abs(tracker.positions[..., 0] - x)[near].max() < 0.2
        assert tracker.confidence[near].min() > 0.9
    everywhere = tracker.everywhere()
    assert everywhere[region(lefts[7])].min() > 0.9
    # The last columns of the frame are not in the keyframe.
    assert not everywhere[:, W - 19 :].any() and (everywhere[:, columns.stop : W - 23] == 1).all()


def test_what_leaves_the_frame_is_followed_by_all_of_it():
    lefts = [*range(0, 270, 15), *range(255, -1, -15)]
    plane = texture(0, 3 * W, 5)
    frames, truth = views(plane, lefts), views(with_poster(plane), lefts)
    results = list(EditPropagator({0: truth[0]}).run(frames))
    assert not region(lefts[17]).any() and np.array_equal(results[17], frames[17])
    for t in (22, 25, len(lefts) - 1):
        inside = cv2.erode(region(lefts[t]).astype(np.uint8), np.ones((5, 5))) > 0
        assert shown(results[t], frames[t])[inside].mean() > 0.98
        assert not shown(results[t], frames[t])[
            cv2.dilate(region(lefts[t]).astype(np.uint8), np.ones((5, 5))) == 0
        ].any()


def test_an_edit_fades_beyond_the_box_that_another_keyframe_follows():
    """The last keyframe does not show the poster, and its own edit is far from it."""
    lefts = [2 * t for t in range(9)]
    plane = texture(0, 2 * W, 5)
    frames = views(plane, lefts)
    last = frames[8].copy()
    last[180:195, 5:20] = 0
    results = list(EditPropagator({0: views(with_poster(plane), lefts)[0], 8: last}).run(frames))
    change = [
        np.abs(r.astype(int) - f)[region(left)].mean()
        for r, f, left in zip(results, frames, lefts, strict=True)
    ]
    assert change[8] == 0 and all(a > b for a, b in itertools.pairwise(change))
    assert change[4] == pytest.approx(change[0] / 2, rel=0.1)
