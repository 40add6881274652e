"""Carrying the edits of keyframes: where they are, how they follow the scene, and what is refused."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch

cv2 = pytest.importorskip("cv2", reason="the [video] extra is not installed")

from gi_model.errors import InputError  # noqa: E402
from gi_model.flow import DISFlow  # noqa: E402
from gi_model.propagation import EditPropagator  # noqa: E402
from gi_model.propagation import edits as edits_module  # noqa: E402
from gi_model.propagation.edits import _Edit, _Layer, _Stack  # noqa: E402
from gi_model.propagation.tracking import Tracker  # noqa: E402

H, W, COUNT = 72, 96, 8
RED = np.array([220, 40, 30])
# What is painted on the scene, in its own coordinates: rows and columns.
PAINT = slice(24, 44), slice(50, 78)


def scene(seed: int = 0, width: int = 3 * W) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(30, 226, (H // 4, width // 4, 3)).astype(np.uint8)
    return cv2.GaussianBlur(cv2.resize(noise, (width, H), interpolation=cv2.INTER_CUBIC), (0, 0), 0.8)


def pan(plane: np.ndarray, count: int = COUNT, step: int = 2) -> list[np.ndarray]:
    return [np.ascontiguousarray(plane[:, step * i : step * i + W]) for i in range(count)]


def painted(plane: np.ndarray, colour: np.ndarray = RED) -> np.ndarray:
    plane = plane.copy()
    plane[PAINT] = colour
    return plane


def recoloured(plane: np.ndarray) -> np.ndarray:
    """Keeps the texture."""
    changed = plane.astype(np.float32)
    changed[PAINT] = changed[PAINT] * 0.6 + (90, 10, 0)
    return changed.round().astype(plane.dtype)


def region(t: int, step: int = 2) -> np.ndarray:
    """Where the paint is in frame ``t`` of the pan."""
    mask = np.zeros((H, 3 * W), bool)
    mask[PAINT] = True
    return mask[:, step * t : step * t + W]


def error(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Mean difference in levels."""
    return float(np.abs(result[mask].astype(float) - truth[mask]).mean())


class Shift:
    """Flow of a pan by whole pixels, found by trying; exact."""

    def __call__(self, image1: torch.Tensor, image2: torch.Tensor) -> torch.Tensor:
        flows = []
        for a, b in zip(image1.float(), image2.float(), strict=True):
            width = a.shape[2]

            def mismatch(d: int, a: torch.Tensor = a, b: torch.Tensor = b, width: int = width) -> float:
                here = slice(max(0, -d), min(width, width - d))
                there = slice(max(0, d), min(width, width + d))
                return float((a[..., here] - b[..., there]).abs().mean())

            best = min(range(-6, 7), key=lambda d: (mismatch(d), abs(d)))
            flows.append(torch.tensor([float(best), 0.0])[:, None, None].expand(2, *a.shape[1:]))
        return torch.stack(flows)


class Kept(dict):
    """Finished frames."""

    def put(self, index: int, image: np.ndarray) -> None:
        self[index] = image.copy()


# What is carried


@pytest.mark.parametrize("change", [painted, recoloured])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("key", [0, 4, 7])
def test_exact_for_a_pan_by_whole_pixels(change, dtype, key):
    plane = scene()
    if dtype == np.uint16:
        plane = plane.astype(np.uint16) * 257 + np.random.default_rng(1).integers(-100, 100, plane.shape)
        plane = plane.astype(np.uint16)
    frames = pan(plane)
    factor = 257 if dtype == np.uint16 else 1
    truth = pan(painted(plane, RED * factor) if change is painted else _recoloured(plane))
    propagator = EditPropagator({key: truth[key]}, Shift())
    results = list(propagator.run(frames))
    assert len(results) == COUNT
    for result, expected in zip(results, truth, strict=True):
        assert result.dtype == dtype
        assert np.array_equal(result, expected)
    assert propagator.unseen == 0 < propagator.masked


def _recoloured(plane: np.ndarray) -> np.ndarray:
    if plane.dtype == np.uint8:
        return recoloured(plane)
    changed = plane.astype(np.float64)
    changed[PAINT] = changed[PAINT] * 0.6 + np.array((90, 10, 0)) * 257
    return changed.round().astype(np.uint16)


def test_a_moving_camera():
    """Zoom and turn by parts of a pixel, with DIS."""
    frames, truth, masks = [], [], []
    plane, edited = scene(), painted(scene())
    mark = np.zeros(plane.shape[:2], np.uint8)
    mark[PAINT] = 255
    for t in range(COUNT):
        matrix = cv2.getRotationMatrix2D((64, H / 2), 0.7 * t, 1.01**t)
        matrix[:, 2] -= (14, 0)
        for images, source in ((frames, plane), (truth, edited), (masks, mark)):
            images.append(cv2.warpAffine(source, matrix, (W, H), flags=cv2.INTER_CUBIC))
    results = list(EditPropagator({0: truth[0]}).run(frames))
    for t in range(1, COUNT):
        inside = cv2.erode(masks[t], np.ones((5, 5))) > 250
        assert error(results[t], truth[t], inside) < 3
        assert error(frames[t], truth[t], inside) > 40
        outside = cv2.dilate(masks[t], np.ones((11, 11))) == 0
        assert np.array_equal(results[t][outside], frames[t][outside])


@pytest.mark.parametrize("size", [(H, W), (71, 95)])
def test_large_frames_are_tracked_at_a_smaller_size(monkeypatch, size):
    """At half of it here; the edit is composited at full size."""
    monkeypatch.setattr(edits_module, "SIDE", H // 2)
    plane = cv2.GaussianBlur(scene(), (0, 0), 1.5)
    frames, truth = (
        [np.ascontiguousarray(f[: size[0], : size[1]]) for f in pan(p)] for p in (plane, painted(plane))
    )
    results = list(EditPropagator({3: truth[3]}).run(frames))
    assert np.array_equal(results[3], truth[3])
    for t in (0, 7):
        inside = cv2.erode(region(t)[: size[0], : size[1]].astype(np.uint8), np.ones((5, 5))) > 0
        assert error(results[t], truth[t], inside) < 3
        outside = cv2.dilate(region(t)[: size[0], : size[1]].astype(np.uint8), np.ones((15, 15))) == 0
        assert np.array_equal(results[t][outside], frames[t][outside])


def test_noise_is_no_edit():
    """Compression changes every pixel a little; only the paint counts."""
    frames = pan(scene())
    edited = painted(scene())[:, :W].astype(int)
    edited += np.random.default_rng(2).integers(-3, 4, edited.shape)
    edited = edited.clip(0, 255).astype(np.uint8)
    results = list(EditPropagator({0: edited}, Shift()).run(frames))
    far = cv2.dilate(region(0).astype(np.uint8), np.ones((17, 17))) == 0
    assert np.array_equal(results[0][far], frames[0][far])
    assert error(results[0], edited, region(0)) < 0.6


@pytest.mark.parametrize("quality", [95, 75])
def test_compression_is_no_edit(quality):
    """A keyframe that was edited and saved as JPEG: its paint counts, its blocks and ringing do not."""
    plane = cv2.GaussianBlur(scene(), (0, 0), 2)
    frame = plane[:, :W]
    coded = cv2.imencode(".jpg", painted(plane)[:, :W], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    edited = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    (result,) = EditPropagator({0: edited}).run([frame])
    # Blocks of 16 pixels that hold a part of the paint ring up to their other end.
    far = cv2.dilate(region(0).astype(np.uint8), np.ones((33, 33))) == 0
    assert np.array_equal(result[far], frame[far])
    assert np.array_equal(result[region(0)], edited[region(0)])


def test_shading_falls_on_the_edit():
    """The light goes down: the paint gets darker with it."""
    plane = scene()
    light = [1 - 0.06 * t for t in range(COUNT)]
    frames = [(f * g).round().astype(np.uint8) for f, g in zip(pan(plane), light, strict=True)]
    truth = [(f * g).round().astype(np.uint8) for f, g in zip(pan(painted(plane)), light, strict=True)]
    results = list(EditPropagator({0: truth[0]}, Shift()).run(frames))
    inside = cv2.erode(region(7).astype(np.uint8), np.ones((3, 3))) > 0
    assert error(results[7], truth[7], inside) < 3
    assert error(results[7], pan(painted(plane))[7], inside) > 20


def test_masks_restrict_the_edit():
    frames = pan(scene())
    truth = pan(painted(scene()))
    masks = [region(t) & (np.arange(H) < 34)[:, None] for t in range(COUNT)]
    results = EditPropagator({3: truth[3]}, Shift()).run(frames, iter(masks))
    for result, frame, mask in zip(results, frames, masks, strict=True):
        assert np.array_equal(result[~mask], frame[~mask])
        assert not np.array_equal(result[mask], frame[mask])


# Where it is hidden


def hidden_for_a_while() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A box passes in front of the paint, covers it, and goes on: frames, and where the box is."""
    frames = pan(scene(), count=20, step=1)
    front = scene(5)[:, :34] // 2 + np.array([0, 100, 0], np.uint8)
    boxes = []
    for t, frame in enumerate(frames):
        left = 12 * t - 50
        box = np.zeros((H, W), bool)
        box[10:60, max(0, left) : max(0, left + 34)] = True
        frame[box] = front[10:60, max(0, -left) : max(0, -left) + box[30].sum()].reshape(-1, 3)
        boxes.append(box)
    return frames, boxes


def test_an_edit_goes_behind_and_comes_back():
    frames, boxes = hidden_for_a_while()
    edited = frames[0].copy()
    edited[region(0)] = RED
    results = list(EditPropagator({0: edited}).run(frames))
    for t in range(1, 20):
        # Flow is no sharper than its patches.
        front = cv2.erode(boxes[t].astype(np.uint8), np.ones((9, 9))) > 0
        on_front = front & region(t, step=1)
        if on_front.any():
            assert error(results[t], frames[t], on_front) < 8, "nothing is painted on what passes"
    last = cv2.erode(region(19, step=1).astype(np.uint8), np.ones((5, 5))) > 0
    assert np.abs(results[19][last].astype(int) - RED).mean() < 12, "the paint is back"


def test_an_edit_leaves_the_frame_and_comes_back():
    plane = cv2.GaussianBlur(scene(), (0, 0), 1)
    lefts = [*range(0, 99, 7), *range(98, -1, -7)]
    frames, truth = (
        [np.ascontiguousarray(p[:, left : left + W]) for left in lefts] for p in (plane, painted(plane))
    )
    results = list(EditPropagator({0: truth[0]}).run(frames))
    assert np.array_equal(results[14], frames[14])
    assert error(results[-1], truth[-1], region(0)) < 3


def test_confidence_falls_where_nothing_matches():
    """A scene that dissolves into another one takes its edit along, without a tear."""
    frames = pan(scene(), count=6, step=0)
    other = scene(9)[:, :W]
    shares = [0, 0.1, 0.3, 0.5, 0.8, 1]
    frames = [(f * (1 - s) + other * s).astype(np.uint8) for f, s in zip(frames, shares, strict=True)]
    edited = frames[0].copy()
    edited[region(0)] = RED
    results = list(EditPropagator({0: edited}).run(frames))
    changed = [error(r, f, region(0)) for r, f in zip(results, frames, strict=True)]
    assert changed[0] > 50
    assert changed[-1] < 0.3 * changed[0]


def test_positions_are_followed_to_parts_of_a_pixel():
    """The camera zooms and turns; where each pixel lies in the keyframe is known."""
    plane = scene()[:, : 2 * W]
    marked = np.zeros((H, W), bool)
    marked[20:52, 30:70] = True

    def camera(t: int) -> np.ndarray:
        matrix = cv2.getRotationMatrix2D((W, H / 2), 0.5 * t, 1.01**t)
        matrix[:, 2] -= (W / 2 - 0.3 * t, 0)
        return np.vstack([matrix, [0, 0, 1]])

    frames = [cv2.warpAffine(plane, camera(t)[:2], (W, H), flags=cv2.INTER_CUBIC) for t in range(9)]
    tracker = Tracker(frames[0], marked, DISFlow())
    for before, frame in itertools.pairwise(frames):
        tracker.advance(before, frame)
    back = camera(0) @ np.linalg.inv(camera(8))
    y, x = np.mgrid[:H, :W]
    truth = np.stack([x, y, np.ones_like(x)], axis=-1) @ back.T
    off = np.linalg.norm(tracker.positions - truth[..., :2], axis=-1)
    inside = cv2.warpAffine(marked.astype(np.uint8), np.linalg.inv(back)[:2], (W, H)) > 0
    assert np.median(off[inside]) < 0.15 and np.quantile(off[inside], 0.95) < 0.5
    assert tracker.confidence[inside].mean() > 0.95


# Several keyframes, and cuts


def test_two_keyframes():
    """Both are met exactly, and between them one turns into the other."""
    frames = pan(scene())
    blue = np.array([30, 60, 210])
    first, last = pan(painted(scene()))[0], pan(painted(scene(), blue))[7]
    results = list(EditPropagator({7: last, 0: first}, Shift()).run(frames))
    assert np.array_equal(results[0], first)
    assert np.array_equal(results[7], last)
    for t in range(COUNT):
        inside = cv2.erode(region(t).astype(np.uint8), np.ones((5, 5))) > 0
        expected = (RED * (7 - t) + blue * t) / 7
        assert np.abs(results[t][inside] - expected).max() < 4


def test_an_edit_that_one_keyframe_lacks_fades():
    frames = pan(scene())
    first, last = pan(painted(scene()))[0], frames[7].copy()
    last[60:68, 4:12] = 0  # another edit
    results = list(EditPropagator({0: first, 7: last}, Shift()).run(frames))
    shown = [
        error(result, frame, region(t)) for t, (result, frame) in enumerate(zip(results, frames, strict=True))
    ]
    assert shown[0] > 50 and shown[7] == 0
    assert all(a >= b for a, b in itertools.pairwise(shown))


def test_cuts_are_not_crossed():
    frames = pan(scene())[:4] + pan(scene(7))[:5]
    edited = frames[5].copy()
    edited[20:40, 40:60] = RED
    results = list(EditPropagator({5: edited}).run(frames))
    for t in range(4):
        assert np.array_equal(results[t], frames[t])
    assert error(results[4], frames[4], np.ones((H, W), bool)) > 1
    assert error(results[8], frames[8], np.ones((H, W), bool)) > 1
    edited = frames[1].copy()
    edited[20:40, 40:60] = RED
    results = list(EditPropagator({1: edited}).run(frames))
    for t in range(4, 9):
        assert np.array_equal(results[t], frames[t])


def test_a_cut_between_two_keyframes():
    """Each edit stays in its scene, and does not fade towards the other."""
    scenes = pan(scene())[:5] + pan(scene(7))[:5]
    first, last = scenes[0].copy(), scenes[9].copy()
    first[region(0)] = last[30:50, 20:40] = RED
    results = list(EditPropagator({0: first, 9: last}, Shift()).run(scenes))
    for t in range(5):
        assert np.abs(results[t][region(t)] - RED.astype(int)).mean() < 2
    where = np.zeros((H, W), bool)
    for t in range(5, 10):
        where[:] = False
        where[32:48, 22 + 2 * (9 - t) : 38 + 2 * (9 - t)] = True
        assert np.abs(results[t][where] - RED.astype(int)).mean() < 2


def test_a_flash_is_passed_over():
    frames = pan(scene())
    frames[3] = np.full_like(frames[3], 255)
    frames[3][::3, ::5] = 0
    edited = pan(painted(scene()))[1]
    results = list(EditPropagator({1: edited}, Shift()).run(frames))
    assert np.array_equal(results[3], frames[3])
    assert error(results[5], pan(painted(scene()))[5], region(5)) < 3


# Sizes, memory, going on


@pytest.mark.parametrize("size", [(71, 95), (33, 90), (72, 41)])
def test_uneven_sizes(size):
    frames = [np.ascontiguousarray(f[: size[0], : size[1]]) for f in pan(scene())[:3]]
    edited = frames[1].copy()
    edited[10:20, 10:24] = RED
    results = list(EditPropagator({1: edited}).run(frames))
    assert [r.shape for r in results] == [(*size, 3)] * 3
    assert np.array_equal(results[1], edited)
    assert all(error(r, f, np.ones(size, bool)) > 0.5 for r, f in zip(results, frames, strict=True))


def test_one_frame():
    frame = scene()[:, :W]
    edited = painted(scene())[:, :W]
    (result,) = EditPropagator({0: edited}).run([frame])
    assert np.array_equal(result, edited)


class Reading:
    """A source that makes its frames when they are read, and counts those that are held at a time."""

    def __init__(self, count: int) -> None:
        self.count, self.plane = count, scene()

    def __iter__(self):
        return self.read(0, self.count)

    def read(self, start, stop):
        for i in range(start, min(stop, self.count)):
            left = abs((i % 40) - 20)
            yield np.ascontiguousarray(self.plane[:, left : left + W])


def still(image1: torch.Tensor, image2: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(image1), 2, *image1.shape[2:])


def test_memory_does_not_grow_with_the_clip():
    def peak(count: int) -> int:
        source = Reading(count)
        edited = next(source.read(count - 1, count)).copy()
        edited[20:40, 30:50] = RED  # all frames are reached backwards
        tracemalloc.start()
        for _ in EditPropagator({count - 1: edited}, still).run(source):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(4)
    assert peak(64) < 1.05 * peak(16)


def test_the_stack_gives_back_what_was_pushed(tmp_path):
    rng = np.random.default_rng(0)
    stack = _Stack(tmp_path)
    layers = {}
    for index in (9, 8, 6, 5):
        box = slice(3, 3 + index), slice(2, 12)
        change = rng.normal(size=(index, 10, 3)).astype(np.float32)
        layers[index] = _Layer(box, rng.integers(0, 256, (20, 30), np.uint8), change, change[..., 0].copy())
    nowhere = np.zeros((0, 0, 3), np.float32)
    layers[6] = _Layer((slice(0, 0), slice(0, 0)), layers[6].confidence, nowhere, nowhere[..., 0])
    for index, layer in layers.items():
        stack.push(index, layer)
    assert stack.pop(4) is None
    for index in (6, 7, 8):  # 5 is left out
        got, pushed = stack.pop(index), layers.get(index)
        assert (got is None) == (pushed is None)
        if pushed is not None:
            assert got.box == pushed.box and np.array_equal(got.confidence, pushed.confidence)
            assert np.array_equal(got.change, pushed.change) and np.array_equal(got.rim, pushed.rim)
    assert stack.pop(9) is not None and stack.pop(9) is None
    assert stack.file.seek(0, 2) == 0, "what has been used is cut off"
    stack.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stopped", [2, 6])
def test_a_run_goes_on(stopped):
    frames = pan(scene())
    truth = pan(painted(scene()))
    edits = {2: truth[2], 6: truth[6]}
    whole = list(EditPropagator(edits).run(frames))
    kept = Kept()
    results = EditPropagator(edits).run(frames, finished=kept)
    for _ in range(stopped):
        next(results)
    results.close()
    assert sorted(kept) == list(range(stopped))
    again = list(EditPropagator(edits).run(frames, finished=kept))
    assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))
    assert sorted(kept) == list(range(COUNT))


def test_finished_stretches_cost_nothing(monkeypatch):
    frames = pan(scene())
    truth = pan(painted(scene()))
    kept = Kept()
    list(EditPropagator({4: truth[4]}, Shift()).run(frames, finished=kept))
    tracked = []
    monkeypatch.setattr(edits_module.Tracker, "advance", lambda *_: tracked.append(1))
    list(EditPropagator({4: truth[4]}, Shift()).run(frames, finished=kept))
    assert not tracked


# What is refused


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({}, "edits: expected at least one edited keyframe, got none"),
        ({-1: np.zeros((H, W, 3), np.uint8)}, "edits: expected indices of frames, got -1"),
        ({8: np.zeros((H, W, 3), np.uint8)}, "edits: expected indices below the number of frames, got 8"),
        (
            {1: np.zeros((H, W - 1, 3), np.uint8)},
            r"edits\[1\]: expected 96x72 pixels like the frames, got 95x72",
        ),
        ({1: np.zeros((H, W), np.uint8)}, r"edits\[1\]: expected \[H,W,3\] of uint8 or uint16"),
        ({1: np.zeros((H, W, 3), np.float32)}, r"edits\[1\]: expected .* got \[72, 96, 3\] of float32"),
    ],
)
def test_wrong_edits(edits, message):
    with pytest.raises(InputError, match=message):
        EditPropagator(edits).run(pan(scene()))


def test_no_difference():
    frames = pan(scene())
    with pytest.raises(ValueError, match=r"edits\[2\]: expected an image that differs from frame 2 by more"):
        EditPropagator({2: frames[2]}).run(frames)
    noisy = frames[2] ^ 1
    with pytest.raises(ValueError, match=r"got at most 1\.0 levels of 255"):
        EditPropagator({2: noisy}).run(frames)


def test_wrong_frames_and_masks():
    frames, edited = pan(scene()), pan(painted(scene()))[0]
    with pytest.raises(TypeError, match="frames: expected a sequence or a source"):
        EditPropagator({0: edited}).run(iter(frames))
    with pytest.raises(ValueError, match="masks: expected one for every frame, got 1"):
        list(EditPropagator({0: edited}, Shift()).run(frames, [region(0)]))
    with pytest.raises(ValueError, match="masks: expected 96x72 pixels like the frames, got 4x4 at frame 0"):
        list(EditPropagator({0: edited}, Shift()).run(frames, [np.zeros((4, 4), bool)]))


def test_the_texture_that_shows_through():
    """Opaque paint covers the frame's texture, a new colour keeps it."""
    frame = pan(scene())[0]
    inner = cv2.erode(region(0).astype(np.uint8), np.ones((9, 9))) > 0
    paint, colour = (_Edit.of(frame, e[:, :W]) for e in (painted(scene()), recoloured(scene())))
    assert paint.keyframe[inner][:, 3].mean() > 0.9
    assert colour.keyframe[inner][:, 3].mean() < 0.5
