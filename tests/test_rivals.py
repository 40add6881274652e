"""Holes that something passes: two motions are followed, and edges continued."""

from __future__ import annotations

import numpy as np
import pytest
import torch

cv2 = pytest.importorskip("cv2", reason="the [video] extra is not installed")
pytest.importorskip("av", reason="the [video] extra is not installed")

from test_propagate import plane  # noqa: E402

from gi_model.inpainting import inpaint_frame  # noqa: E402
from gi_model.metrics import MaskedQuality  # noqa: E402
from gi_model.propagation import Propagator  # noqa: E402
from gi_model.propagation.chains import Chains  # noqa: E402
from gi_model.propagation.edges import continue_edges  # noqa: E402
from gi_model.propagation.fusion import Sample, fill_along_edges  # noqa: E402
from gi_model.propagation.membrane import membrane  # noqa: E402
from gi_model.propagation.neighbours import connect  # noqa: E402
from gi_model.propagation.rivals import Rival, settle  # noqa: E402

# Edges


def stripes(height: int = 60, width: int = 90) -> np.ndarray:
    """Slanting bars."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    bars = 60 + 140 / (1 + np.exp(-4 * np.sin((x + 0.6 * y) / 5)))
    return np.repeat(bars[..., None], 3, axis=2).astype(np.float32)


def band(height: int, width: int, thickness: int) -> np.ndarray:
    """A horizontal stroke across most of the frame."""
    hole = np.zeros((height, width), bool)
    top = (height - thickness) // 2
    hole[top : top + thickness, 8:-8] = True
    return hole


@pytest.mark.parametrize("shape", [(60, 90), (61, 89)])
@pytest.mark.parametrize("turned", [False, True], ids=["", "mirrored"])
def test_edges_cross_a_thin_hole(shape, turned):
    truth, hole = stripes(*shape), band(*shape, 8)
    truth = truth[:, ::-1].copy() if turned else truth
    image = np.where(hole[..., None], 0, truth).astype(np.float32)
    filled, smooth = continue_edges(image, ~hole), membrane(image, ~hole)
    assert filled.dtype == np.float32 and np.array_equal(filled[~hole], truth[~hole])
    errors = [np.sqrt(((x - truth)[hole] ** 2).mean()) for x in (filled, smooth)]
    assert errors[0] < 0.5 * errors[1], errors


def test_a_wide_hole_has_no_steps_at_its_rim():
    truth = plane(120, 160).astype(np.float32)
    hole = np.zeros((120, 160), bool)
    hole[30:90, 40:120] = True
    filled = continue_edges(np.where(hole[..., None], 0, truth).astype(np.float32), ~hole)
    assert np.isfinite(filled).all() and filled.min() > truth.min() - 20 and filled.max() < truth.max() + 20
    usual = np.abs(np.diff(truth[:, 20:30], axis=1)).mean()
    assert np.abs(filled[30:90, 40] - truth[30:90, 39]).mean() < 2 * usual
    smooth = membrane(np.where(hole[..., None], 0, truth).astype(np.float32), ~hole)
    middle = slice(52, 68), slice(72, 88)
    assert np.abs(filled[middle] - smooth[middle]).mean() < 0.25 * truth.std()


def test_holes_without_surroundings():
    image = stripes(20, 20)
    nothing = np.zeros((20, 20), bool)
    assert (continue_edges(image, nothing) == 0).all()
    assert np.array_equal(continue_edges(image, ~nothing), image)
    corner = ~nothing
    corner[1:, 1:] = False
    assert np.isfinite(continue_edges(image, corner)).all()
    assert continue_edges(image[:1, :3], corner[:1, :3]).shape == (1, 3, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_filling_along_edges_keeps_the_depth(dtype):
    levels = 1 if dtype == np.uint8 else 257
    image = (stripes() * levels).astype(dtype)
    hole = band(60, 90, 8)
    filled = fill_along_edges(np.where(hole[..., None], dtype(0), image), hole)
    assert filled.dtype == dtype and np.array_equal(filled[~hole], image[~hole])
    assert np.abs(filled.astype(float) - image)[hole].mean() < 20 * levels
    assert np.unique(fill_along_edges(image, np.ones_like(hole))).size == 1


# Flow


class Motions:
    """An estimator that knows the answer: zero, but ``speed`` pixels per frame to the right in a band."""

    def __init__(self, top: float, bottom: float, speed: float) -> None:
        self.top, self.bottom, self.speed = top, bottom, speed

    def __call__(self, image1: torch.Tensor, image2: torch.Tensor) -> torch.Tensor:
        height, width = image1.shape[2:]
        flow = torch.zeros(2, 2, height, width)
        rows = slice(round(self.top * height), round(self.bottom * height))
        # Not quite at rest elsewhere: where the camera stands nothing else is asked.
        flow[0, 0], flow[1, 0] = 0.2, -0.2
        flow[0, 0, rows], flow[1, 0, rows] = (v * width / 160 for v in (self.speed, -self.speed))
        return flow


def test_both_motions_beside_a_hole_are_known():
    image, mask = plane(120, 160), np.zeros((120, 160), bool)
    mask[54:60, 60:100] = True
    found = connect(Motions(0.5, 0.75, 4.0), (image, image), (mask, mask))
    assert found.beside is not None
    inside = slice(55, 59), slice(65, 95)
    scene, beside = (v.forward[0, 0][inside].float() for v in (found, found.beside))
    assert (scene - 0.2).abs().max() < 0.1  # with the scene, although half of the ring does not
    assert (beside - scene).abs().max() > 0.5
    outside = torch.from_numpy(~cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))).astype(bool))
    assert torch.equal(found.forward[0, :2, outside], found.beside.forward[0, :2, outside])


def test_one_motion_is_enough_where_all_moves_alike():
    image, mask = plane(120, 160), np.zeros((120, 160), bool)
    mask[54:60, 60:100] = True
    assert connect(Motions(0, 1, 4.0), (image, image), (mask, mask)).beside is None
    assert connect(Motions(0.8, 0.95, 4.0), (image, image), (mask, mask)).beside is None  # far away
    nothing = np.zeros_like(mask)
    assert connect(Motions(0.5, 0.75, 4.0), (image, image), (nothing, nothing)).beside is None


# Blending


def rivals(*showings: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What several ways to fill a hole in the stripes come to; each is given what its frames show."""
    truth, hole = stripes(), band(60, 90, 8)
    image = np.where(hole[..., None], 0, truth).astype(np.float32)
    ring = cv2.dilate(hole.astype(np.uint8), np.ones((9, 9))).astype(bool) & ~hole
    ways = []
    for frames in showings:
        ways.append(Rival(image, hole, ring, 6))
        for frame in frames:
            everywhere = np.ones(hole.shape, bool)
            gain, error = ways[-1].judge(frame[ways[-1].points], everywhere[ways[-1].points])
            whole = slice(0, 60), slice(0, 90)
            weight = hole.astype(np.float32)
            share = ways[-1].share(weight, error)
            ways[-1].add(Sample(whole, frame * gain, weight, share, everywhere))
    colour, seen = settle(ways, ~hole)
    return np.where(hole[..., None], colour - truth, 0), hole, seen


def covered(shift: int) -> np.ndarray:
    """The stripes where something grey has come into the hole, but not beside it."""
    frame = stripes()
    frame[26:34, 20 + shift : 50 + shift] = 128
    return frame


def test_the_way_that_does_not_contradict_itself_is_taken():
    error, hole, seen = rivals([covered(0), covered(35)], [stripes(), stripes()])
    assert np.array_equal(seen, hole)
    assert np.abs(error)[hole].mean() < 1


def test_edges_are_continued_where_all_contradict_themselves():
    error, hole, seen = rivals([covered(0), stripes()], [stripes(), covered(0)])
    alone = np.abs(covered(0) - stripes())[hole].mean() / 2  # the mean of the frames
    assert np.array_equal(seen, hole)
    assert np.abs(error)[hole].mean() < 0.6 * alone
    error, _, _ = rivals([stripes()], [stripes()])  # a frame alone does not
    assert np.abs(error)[hole].mean() < 2


def test_nothing_shown_is_nothing_seen():
    _, _, seen = rivals([], [])
    assert not seen.any()


# The whole


def test_a_stroke_between_a_resting_scene_and_what_passes(monkeypatch):
    """A slow pan over a wall and a train before it: better than with one motion only."""
    wall, train = (cv2.GaussianBlur(p, (0, 0), 2) for p in (plane(120, 200), plane(120, 400)[:, ::-1]))
    frames, masks = [], []
    for i in range(14):
        frame = wall.copy()
        frame[66:100] = train[66:100, 3 * i : 3 * i + 200]
        moved = cv2.warpAffine(frame, np.float32([[1, 0, -0.6 * i], [0, 1, 0]]), (200, 120))
        frames.append(np.ascontiguousarray(moved[:, 20:-20]))
        mask = np.zeros((120, 160), np.uint8)
        cv2.line(mask, (30 + i, 60), (120 + i, 94), 1, 8)
        masks.append(mask > 0)
    blank = [np.where(m[..., None], np.uint8(0), f) for f, m in zip(frames, masks, strict=True)]

    def quality(repaired) -> float:
        measured = MaskedQuality()
        for result, frame, mask in zip(repaired, frames, masks, strict=True):
            measured.add(result, frame, mask)
        return measured.psnr

    both = quality(Propagator().run(blank, masks))
    monkeypatch.setattr(Chains, "passed", lambda *_: False)
    one = quality(Propagator().run(blank, masks))
    inpainted = quality(inpaint_frame(b, m) for b, m in zip(blank, masks, strict=True))
    assert both > one + 2 and both > inpainted, (both, one, inpainted)
