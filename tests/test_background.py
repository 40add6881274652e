"""Propagation where the camera stands: the background, and the choice between what differs."""

from __future__ import annotations

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2", reason="the [video] extra is not installed")
pytest.importorskip("av", reason="the [video] extra is not installed")

from test_propagate import H, W, pan, plane  # noqa: E402

from gi_model.propagation import Propagator, VisibilityPolicy  # noqa: E402
from gi_model.propagation.background import EVERY, KEPT, LEAST, Background, prevailing  # noqa: E402
from gi_model.propagation.fusion import INERTIA, LASTING, Fusion, elect  # noqa: E402
from gi_model.propagation.stream import Stream  # noqa: E402

SCENE = np.ascontiguousarray(plane()[:, :W])
HOLE = np.zeros((H, W), bool)
HOLE[28:44, 40:56] = True
NOTHING = np.zeros((H, W), bool)
#: Everything.
ALL = ~NOTHING


class Store(dict):
    """Finished frames, in memory."""

    def put(self, index: int, image: np.ndarray) -> None:
        self[index] = image


def watched(frames, masks) -> Background:
    """A background that has seen everything, as the engine shows it: block by block."""
    stream, background = Stream(zip(frames, masks, strict=True), 320), Background()
    for start in range(0, len(frames), 8):
        stream.read(start + 8)
        background.watch(stream, start, start + 8)
        stream.forget(start)
    return background


def test_what_passes_and_what_is_hidden_is_no_background():
    frames = [SCENE.copy() for _ in range(6 * EVERY + 1)]
    masks = [NOTHING for _ in frames]
    frames[2 * EVERY][10:30, 10:20] = 255  # passes
    for i in range(4 * EVERY + 1):
        frames[i][HOLE], masks[i] = 0, HOLE
    picture = watched(frames, masks).picture(0, ALL)
    assert picture is not None
    image, known = picture
    assert np.array_equal(image[known], SCENE[known])
    assert not known[HOLE].any() and LEAST == 3, "it was seen twice"
    assert known[0, 0]


def test_no_background_where_the_camera_moves_or_before_it_stands():
    assert watched(pan(), [HOLE] * len(pan())).picture(0, HOLE) is None
    moving = pan()[: 2 * EVERY]
    frames = moving + [moving[-1]] * (6 * EVERY)
    background = watched(frames, [NOTHING] * len(frames))
    assert background.picture(EVERY, HOLE) is None
    assert background.picture(3 * EVERY, HOLE) is not None


def test_the_background_is_of_the_last_colours():
    """Light that rises slowly: the oldest colours make room."""
    count = EVERY * 2 * KEPT
    frames = [SCENE // 2 + np.uint8(i // EVERY) for i in range(count)]
    picture = watched(frames, [NOTHING] * count).picture(0, HOLE)
    assert picture is not None
    mean = KEPT + (KEPT - 1) / 2
    assert np.abs(picture[0][HOLE] - (SCENE[HOLE] // 2 + mean)).max() <= 0.5
    assert picture[1][HOLE].all() and not picture[1][~HOLE].any()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_of_what_was_seen_equally_often_that_which_rests_is_background(dtype):
    scale = 1 if dtype == np.uint8 else 257
    rests, moves = [100, 101, 99, 100], [20, 35, 10, 60]
    for seen in (rests + moves, moves + rests, moves[:1] + rests + moves[1:]):
        colours = np.full((8, 2, 3), 255, dtype)
        colours[:, 0] = np.array(seen, dtype)[:, None] * dtype(scale)
        colours[:2, 1] = 7 * scale  # the others were not seen
        assert prevailing(colours, np.array([8, 2])).tolist() == [[100 * scale] * 3, [7 * scale] * 3]


def test_a_place_seen_long_ago_is_remembered():
    """It was seen at the start only, long before the reach of the flow."""
    frames, masks = [SCENE.copy() for _ in range(30)], [NOTHING] * 9 + [HOLE] * 21
    for i in range(9, 30):
        frames[i][HOLE] = 0
    propagator = Propagator(radius=3, policy=VisibilityPolicy(block=4))
    for result in propagator.run(frames, masks):
        assert np.abs(result.astype(int) - SCENE).max() <= 1
    assert propagator.unseen == 0


def passed() -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """A standing scene, its frames with a hole, and masks.

    A light block stands there before the hole covers it, and is gone when the hole is. The scene is smooth,
    so that colours tell what is seen.
    """
    scene = cv2.GaussianBlur(SCENE, (0, 0), 6) // 3
    frames, masks = [], []
    for i in range(32):
        frame, mask = scene.copy(), NOTHING.copy()
        if i < 16:
            frame[28:44, 36:52] = 240
        if 8 <= i < 24:
            mask[16:56, 28:60] = True
        frame[mask] = 0
        frames.append(frame)
        masks.append(mask)
    return scene, frames, masks


def test_what_passes_is_there_or_is_not():
    scene, frames, masks = passed()
    level = scene.mean(axis=2)
    mixed = total = 0
    for result, mask in zip(Propagator().run(frames, masks), masks, strict=True):
        inside = cv2.erode(mask.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
        value = result.mean(axis=2)
        mixed += int((inside & (value > level + 30) & (value < 210)).sum())
        total += inside.sum()
    # The block is a third of them; its outline may be soft by a pixel.
    assert mixed < 0.03 * total, f"{mixed} of {total} pixels show both"


def test_a_run_that_goes_on_chooses_the_same():
    _, frames, masks = passed()

    def repaired(store: Store) -> list[np.ndarray]:
        return list(Propagator(radius=6).run(frames, masks, finished=store))

    store = Store()
    whole = repaired(store)
    for kept in (5, 11, 18):
        again = repaired(Store(list(store.items())[:kept]))  # in the order in which they were finished
        assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True)), kept


EMPTY = SCENE.astype(np.float32) / 2
PERSON = np.zeros((H, W), bool)
PERSON[20:40, 30:42] = True
#: The scene with a person.
PASSED = np.where(PERSON[..., None], np.float32(250), EMPTY)
#: What is certainly no part of the person.
ELSEWHERE = cv2.dilate(PERSON.astype(np.uint8), np.ones((15, 15), np.uint8)) == 0
BEFORE, AFTER, LASTS, MEAN = range(4)


def votes(*values: float) -> list[np.ndarray]:
    return [np.full((H, W), value, np.float32) for value in values]


def test_what_differs_is_not_averaged():
    pictures = [PASSED, EMPTY, EMPTY]
    winner = elect(pictures, votes(0.9, 0.05, LASTING), [])
    assert (winner[PERSON] == BEFORE).all(), "it was here only now"
    assert (winner[ELSEWHERE] == MEAN).all()
    assert (elect(pictures, votes(0.15, 0.05, LASTING), [])[PERSON] != BEFORE).all(), "it was here long ago"


def test_what_is_known_decides():
    for known in (PASSED, EMPTY):
        winner = elect([PASSED, EMPTY, EMPTY], votes(0.3, 0.05, LASTING), [(known, votes(INERTIA)[0])])
        assert ((winner[PERSON] == BEFORE) == (known is PASSED)).all()


def test_where_the_chosen_shows_nothing_another_one_does():
    light, (some, few, none) = np.full_like(EMPTY, 250), votes(1, 0.2, 0)
    some[:, W // 2 :] = 0
    few[:10] = 0
    winner = elect([light, EMPTY, EMPTY], [some, few, none], [])
    assert (winner[20:, : W // 2] == BEFORE).all()
    assert (winner[20:, W // 2 : W // 2 + 2] == AFTER).all(), "of the same region"
    assert (winner[20:, W // 2 + 8 :] == MEAN).all()


def test_what_agrees_is_averaged():
    noisy = EMPTY + np.random.default_rng(0).integers(0, 6, SCENE.shape).astype(np.float32)
    assert (elect([noisy, EMPTY, EMPTY], votes(1, 0.5, LASTING), []) == MEAN).all()


@pytest.mark.parametrize("depth", [4, 30])
def test_what_lasts_is_refused_where_something_reaches_across_a_narrow_hole(depth):
    """Behind the middle of a hole there stands something that goes on above and below it."""
    hole, stands, cell = np.zeros((100, 160), bool), np.s_[:, 70:90], 12
    hole[50 - depth : 50 + depth, 20:140] = True
    ring = cv2.dilate(hole.astype(np.uint8), np.ones((25, 25), np.uint8)).astype(bool) & ~hole
    lasts = np.full((100, 160, 3), 90, np.float32)
    image = lasts.copy()
    image[stands] = 20
    fusion = Fusion(image, hole, ring, cell)
    fusion.add_lasting(lasts, np.ones_like(hole))
    across = np.zeros_like(hole)
    across[stands] = True
    across &= hole
    assert fusion.seen[across].all() == (depth > cell)
    assert fusion.seen[across].any() == (depth > cell)
    assert fusion.seen[hole & (np.abs(np.arange(160) - 80) > 30)].all()
