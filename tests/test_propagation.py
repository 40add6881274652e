"""Propagation without weights, part by part: memory, scenes, choices, blending, what is kept."""

from __future__ import annotations

import doctest
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

cv2 = pytest.importorskip("cv2", reason="the [video] extra is not installed")
pytest.importorskip("av", reason="the [video] extra is not installed")

from test_propagate import COUNT, H, W, blank, box_masks, pan, plane, zoom  # noqa: E402

from gi_model.flow.dis import DISFlow  # noqa: E402
from gi_model.inpainting import inpaint_frame  # noqa: E402
from gi_model.metrics import MaskedQuality  # noqa: E402
from gi_model.propagation import Propagator, VisibilityPolicy, engine  # noqa: E402
from gi_model.propagation.chains import Chains  # noqa: E402
from gi_model.propagation.cuts import same_scene, thumbnail  # noqa: E402
from gi_model.propagation.fusion import Fusion, Sample  # noqa: E402
from gi_model.propagation.membrane import membrane  # noqa: E402
from gi_model.propagation.sampling import Enlarger, bands, regions  # noqa: E402
from gi_model.propagation.stages import Stages  # noqa: E402
from gi_model.propagation.stream import Stream  # noqa: E402


def still(image1: torch.Tensor, image2: torch.Tensor) -> torch.Tensor:
    """An estimator that sees no motion."""
    return torch.zeros(len(image1), 2, *image1.shape[2:])


def psnr(results, frames, masks) -> float:
    quality = MaskedQuality()
    for result, frame, mask in zip(results, frames, masks, strict=True):
        quality.add(result, frame, mask)
    return quality.psnr


def other_scene() -> list[np.ndarray]:
    """The same motion over a plane of other contents."""
    return [255 - np.ascontiguousarray(np.rot90(f, 2)) for f in pan()]


# Memory


def test_the_example():
    assert doctest.testmod(engine).attempted > 0 == doctest.testmod(engine).failed


def test_memory_is_that_of_a_window():
    """Ten times as many frames take the same memory, and no more of them are alive."""
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        pytest.skip("needs /proc to tell how much memory a process holds")
    scene = plane(240, 400)

    def peak(count: int) -> tuple[int, int]:
        alive = most = pages = 0

        def gone() -> None:
            nonlocal alive
            alive -= 1

        def frames():
            nonlocal alive
            for i in range(count):
                frame = scene[:, 2 * (i % 8) : 2 * (i % 8) + 320].copy()  # 230 KB
                weakref.finalize(frame, gone)
                alive += 1
                yield frame

        def masks():
            for i in range(count):
                mask = np.zeros((240, 320), bool)
                mask[8:16, 8:16] = i % 20 == 0
                yield mask

        propagator = Propagator(still, radius=4, policy=VisibilityPolicy(block=4))
        for _ in propagator.run(frames(), masks()):
            most = max(most, alive)
            pages = max(pages, int(statistics.read_text().split()[1]))
        return pages, most

    short, long = peak(60), peak(600)
    assert long[0] < 1.05 * short[0], "to hold all frames takes 120 MB more"
    assert long[1] == short[1] <= 2 * 4 + 4 + 2


def test_finished_frames_are_not_made_again():
    """Cut off after any number of frames, a run ends with the same bits."""

    class Store(dict):
        def put(self, index, image):
            self[index] = image

    frames = pan()
    masks = [np.roll(m, 2 * i, axis=1) for i, m in enumerate(box_masks()[:1] * COUNT)]  # hidden all the time
    policy = VisibilityPolicy(block=5)
    store = Store()
    whole = list(Propagator(policy=policy, radius=3).run(frames, masks, finished=store))
    assert sorted(store) == list(range(COUNT))
    for kept in (1, 3, 6, COUNT):
        rest = Store(list(store.items())[:kept])  # in the order in which they were finished
        propagator = Propagator(policy=policy, radius=3)
        again = list(propagator.run(frames, masks, finished=rest))
        assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))
        assert propagator.masked == sum(m.sum() for m in masks[kept - COUNT :]) * (kept < COUNT)
    marked = Store({i: np.full_like(frames[0], i) for i in range(COUNT)})
    for i, result in enumerate(Propagator(policy=policy).run(frames, masks, finished=marked)):
        assert (result == i).all(), "a finished frame is taken as it is"


def test_stages():
    propagator = Propagator(radius=3)
    list(propagator.run(pan(), box_masks()))
    assert {"read", "prepare", "flow", "chains", "fusion", "fill"} <= set(propagator.stages)
    assert all(seconds >= 0 for seconds in propagator.stages.values())
    assert propagator.stages["flow"] > propagator.stages["read"]


def test_threads_change_nothing(monkeypatch):
    frames, masks = zoom(), box_masks()
    results = []
    for threads in (1, 4):
        monkeypatch.setattr(engine, "DRAFTED", threads)
        results.append(list(Propagator().run(blank(frames, masks), masks)))
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


def test_stages_of_threads_are_apart():
    stages, both = Stages(), threading.Barrier(2)

    def work(name: str) -> None:
        with stages.timed(name):
            both.wait()
            time.sleep(0.05)
            both.wait()

    threads = [threading.Thread(target=work, args=name) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(stages) == {"a", "b"} and min(stages.values()) >= 0.05


def test_a_stage_within_another_is_counted_once():
    stages = Stages()
    with stages.timed("outer"), stages.timed("inner"):
        sum(range(200000))
    assert stages["inner"] > 10 * stages["outer"]


# Scenes


def test_cuts_are_not_crossed():
    """What the other scene shows at the same place is not used, though it would be visible."""
    frames = pan() + other_scene()
    masks = [np.zeros((H, W), bool) for _ in frames]
    for i in range(COUNT):
        masks[i][20:50, 30:60] = True  # the first scene never shows it, the second one always
    results = list(Propagator().run(blank(frames, masks), masks))
    alone = list(Propagator().run(blank(frames[:COUNT], masks[:COUNT]), masks[:COUNT]))
    assert all(np.array_equal(a, b) for a, b in zip(alone, results, strict=False))


def test_a_flash_is_no_cut():
    frames = pan()
    frames[5] = np.full_like(frames[5], 255)
    masks = [np.zeros((H, W), bool) for _ in frames]
    stream = Stream(zip(frames + other_scene(), masks * 2, strict=True), 480)
    stream.read(100)
    assert [stream[i].scene for i in range(2 * COUNT)] == [0] * COUNT + [1] * COUNT


def test_fast_pans_and_brightness_are_no_cuts():
    image = plane(216, 960)
    mask = np.zeros((216, 384), bool)
    mask[60:150, 100:220] = True

    def view(left: int, width: int = 384) -> np.ndarray:
        return np.ascontiguousarray(image[:, left : left + width])

    first = thumbnail(view(0), mask)
    for left in (20, 100, 190):
        assert same_scene(first, thumbnail(view(left), mask)), f"{left} pixels of 384 in one frame"
    assert same_scene(first, thumbnail((view(20) * 0.5).astype(np.uint8), mask))
    assert same_scene(first, thumbnail(np.full_like(view(0), 7), mask)), "nothing to tell them apart"
    assert not same_scene(first, thumbnail(255 - view(500)[::-1, ::-1], mask))


# Choices


def test_policy():
    policy = VisibilityPolicy(block=4, limit=2)
    assert policy.order([1, 5, 9, 2]) == [2, 1, 0, 3]
    assert policy.order([0, 0, 0]) == [0, 1, 2]
    shown = {
        1: np.array([1, 1, 0, 0.0]),
        2: np.array([1, 1, 0.5, 0]),
        5: np.array([0, 0, 0.2, 0.9]),
        6: np.zeros(4),
    }
    assert policy.references(3, shown) == [2, 5], "the second best adds nothing, the third a new pixel"
    assert policy.references(3, {1: np.ones(4), 4: np.ones(4), 9: np.ones(4)}) == [4, 1], (
        "the nearest of equals"
    )
    assert policy.references(3, {}) == []
    with pytest.raises(ValueError, match="limit: expected at least 1, got 0"):
        VisibilityPolicy(limit=0)


def test_another_policy():
    class Nothing(VisibilityPolicy):
        def references(self, target, shown):
            return []

    frames, masks = pan(), box_masks()
    propagator = Propagator(policy=Nothing())
    list(propagator.run(frames, masks))
    assert propagator.unseen == propagator.masked > 0


def test_flow_goes_around_a_frame_that_breaks_the_chain():
    """Noise in between: what lies beyond is reached by flow between the two frames alone."""
    frames = pan()[:5]
    masks = [np.zeros((H, W), bool) for _ in frames]
    for i in range(4):
        masks[i][20:44, 40 - 2 * i : 64 - 2 * i] = True  # the same part of the plane: only frame 4 shows it
    broken = list(frames)
    broken[2] = np.random.default_rng(3).integers(0, 256, frames[0].shape).astype(np.uint8)
    propagator = Propagator()
    results = list(propagator.run(blank(broken, masks), masks))
    assert psnr(results[:2], frames[:2], masks[:2]) > 25


def test_links_are_the_same_whether_flows_were_at_hand_or_not():
    frames, masks = zoom(), box_masks()
    stream = Stream(zip(frames, masks, strict=True), 320)
    stream.read(COUNT)
    box, hole = next(iter(regions(masks[0], 4)))
    with Chains(stream, DISFlow(), Stages()) as chains:
        asked, again = (chains.follow(0, box, hole, 1, 5, 6) for _ in range(2))
    assert len(asked) == len(again) == 5
    for first, second in zip(asked, again, strict=True):
        assert torch.equal(first.flow, second.flow)
        for name in ("error", "shown", "nearness"):
            assert np.array_equal(getattr(first, name), getattr(second, name)), name


# Blending


def test_membrane():
    y, x = np.mgrid[:37, :52].astype(np.float32)
    smooth = np.stack([3 * x - y, x**2 / 20 - y**2 / 20], axis=2)  # both harmonic
    known = np.ones((37, 52), bool)
    known[9:30, 14:41] = False
    filled = membrane(np.where(known[..., None], smooth, 999).astype(np.float32), known)
    assert np.array_equal(filled[known], smooth[known])
    assert np.abs(filled - smooth).max() < 0.01 * np.ptp(smooth)
    assert (membrane(smooth, np.zeros_like(known)) == 0).all()
    assert membrane(smooth[:1, :1], known[:1, :1]).shape == (1, 1, 2)


def scene_with_hole():
    truth = plane(60, 80).astype(np.float32) * 0.7 + 20
    hole = np.zeros((60, 80), bool)
    hole[20:40, 25:55] = True
    ring = cv2.dilate(hole.astype(np.uint8), np.ones((13, 13))) > 0
    return truth, hole, ring & ~hole


def fused(truth, hole, ring, *colours) -> tuple[np.ndarray, np.ndarray]:
    """What several frames that show everything make of the hole."""
    fusion = Fusion(np.where(hole[..., None], 0, truth), hole, ring, 6)
    whole = slice(0, hole.shape[0]), slice(0, hole.shape[1])
    everywhere = np.ones(hole.shape, bool)
    for colour in colours:
        gain, error = fusion.judge(colour[fusion.points], everywhere[fusion.points])
        weight = hole.astype(np.float32)
        fusion.add(Sample(whole, colour * gain, weight, fusion.share(weight, error), everywhere))
    return fusion.blend()


def test_gain_and_lighting_leave_no_seam():
    truth, hole, ring = scene_with_hole()
    shade = np.linspace(-6, 6, 80, dtype=np.float32)[None, :, None]
    for colour, error in ((truth * 0.8, 0.5), (truth + shade, 1.5)):
        filled, seen = fused(truth, hole, ring, colour)
        assert np.array_equal(seen, hole)
        assert np.abs(filled - truth)[hole].mean() < error


def test_what_shows_an_object_beside_the_hole_is_refused_there():
    truth, hole, ring = scene_with_hole()
    passing = truth.copy()
    passing[10:50, 50:70] = 255  # half in the hole, half beside it
    filled, seen = fused(truth, hole, ring, passing)
    assert not seen[20:40, 52:55].any() and seen[20:40, 25:31].all()
    assert np.abs(filled - truth)[seen & (passing == truth).all(axis=2)].mean() < 3


def test_a_frame_that_fits_worse_around_the_hole_counts_less():
    truth, hole, ring = scene_with_hole()
    blurred = cv2.GaussianBlur(truth, (0, 0), 3)
    filled, _ = fused(truth, hole, ring, blurred, truth)
    assert np.abs(filled - truth)[hole].mean() < 0.2 * np.abs(blurred - truth)[hole].mean()


def test_noise_at_the_rim_is_not_smeared():
    truth, hole, ring = scene_with_hole()
    noisy = truth + np.random.default_rng(0).normal(0, 5, truth.shape).astype(np.float32)
    filled, _ = fused(noisy, hole, ring, truth)
    assert np.abs(filled - truth)[hole].mean() < 1


def test_nothing_to_blend():
    truth, hole, ring = scene_with_hole()
    assert not fused(truth, hole, ring)[1].any()
    nothing = np.zeros(hole.shape, np.float32)
    assert not Fusion(truth, hole, ring, 6).share(nothing, nothing + 1).any()


# Results


def test_sixteen_bits():
    frames, masks = zoom(), box_masks()
    deep = [f.astype(np.uint16) * 257 + 100 for f in frames]
    deep = [np.minimum(f, 65000) for f in deep]
    results = list(Propagator().run(deep, masks))
    assert all(r.dtype == np.uint16 for r in results)
    assert all(np.array_equal(r[~m], f[~m]) for r, f, m in zip(results, deep, masks, strict=True))
    assert psnr([(r // 257).astype(np.uint8) for r in results], frames, masks) > 30
    levels = np.unique(np.concatenate([r[m].ravel() for r, m in zip(results, masks, strict=True)]) % 257)
    assert len(levels) > 100, "in between the steps of 8 bits"
    with pytest.raises(TypeError, match="frames: expected uint8 or uint16, got float64 at frame 0"):
        list(Propagator().run([frames[0] / 255], masks[:1]))


@pytest.mark.parametrize("size", [(H, W), (71, 95)])
def test_flow_at_a_part_of_the_size(size):
    frames = [np.ascontiguousarray(f[: size[0], : size[1]]) for f in zoom()]
    masks = [m[: size[0], : size[1]] for m in box_masks()]
    propagator = Propagator(flow_side=40)
    results = list(propagator.run(blank(frames, masks), masks))
    assert all(np.array_equal(r[~m], f[~m]) for r, f, m in zip(results, frames, masks, strict=True))
    assert psnr(results, frames, masks) > 27
    with pytest.raises(ValueError, match="flow_side: expected at least 16, got 8"):
        Propagator(flow_side=8)


def test_between_the_grids_of_frame_and_flow():
    """A flow that is linear in the position is the same on both grids, up to the steps of sampling."""
    box = slice(20, 61), slice(31, 90)
    enlarger = Enlarger(box, (100, 150), (50, 60))
    y, x = np.mgrid[enlarger.small_box].astype(np.float32)
    flow = torch.from_numpy(np.stack([0.1 * x - 2, 0.2 * y + 1])[None])
    rows, columns = np.mgrid[box].astype(np.float32)
    expected_x = columns + 2.5 * (0.1 * ((columns + 0.5) / 2.5 - 0.5) - 2)
    expected_y = rows + 2 * (0.2 * ((rows + 0.5) / 2 - 0.5) + 1)
    for where in (..., (slice(3, 9), slice(2, 40)), (np.array([0, 40]), np.array([58, 0]))):
        found = enlarger.positions(flow, where)
        assert np.abs(found[0] - expected_x[where]).max() < 0.03
        assert np.abs(found[1] - expected_y[where]).max() < 0.03
    mask = np.zeros((41, 59), bool)
    mask[10, 20] = True
    assert 1 <= enlarger.shrink(mask).sum() <= 4


def test_parts_of_a_mask():
    mask = np.zeros((60, 80), bool)
    mask[2:6, 2:6] = mask[9, 4] = True  # near each other
    mask[40:50, 60:80] = True
    parts = regions(mask, 5)
    assert [hole.sum() for _, hole in parts] == [17, 200]
    again = np.zeros_like(mask)
    for box, hole in parts:
        assert not again[box][hole].any()
        again[box] |= hole
    assert np.array_equal(again, mask)
    assert parts[0][0] == (slice(0, 15), slice(0, 11)) and parts[1][0] == (slice(35, 55), slice(55, 80))
    assert regions(np.zeros_like(mask), 5) == []


def test_exposure_is_matched():
    frames = [(f * 0.5 * (1 + 0.3 * np.sin(i)) + 40).astype(np.uint8) for i, f in enumerate(pan())]
    masks = box_masks()
    assert psnr(Propagator().run(blank(frames, masks), masks), frames, masks) > 30


def test_what_no_frame_sees_is_carried():
    """A mask that moves with the scene: the same filling in all frames, moved along, across blocks too."""
    frames = pan()
    masks = [np.zeros((H, W), bool) for _ in frames]
    for i, mask in enumerate(masks):
        mask[20:44, 50 - 2 * i : 70 - 2 * i] = True
    rng = np.random.default_rng(0)
    frames = [np.clip(f + rng.normal(0, 6, f.shape), 0, 255).astype(np.uint8) for f in frames]

    def moved(results) -> float:
        pairs = zip(results, results[1:], range(COUNT), strict=False)
        return float(
            np.mean(
                [
                    np.abs(
                        a[22:42, 52 - 2 * i : 68 - 2 * i].astype(int) - b[22:42, 50 - 2 * i : 66 - 2 * i]
                    ).mean()
                    for a, b, i in pairs
                ]
            )
        )

    results = list(Propagator(policy=VisibilityPolicy(block=5)).run(blank(frames, masks), masks))
    refilled = [inpaint_frame(f, m) for f, m in zip(frames, masks, strict=True)]
    assert moved(results) < 0.3 * moved(refilled)


def test_everything_is_hidden():
    frames = pan()
    masks = [np.ones((H, W), bool) if i > 3 else box_masks()[i] for i in range(COUNT)]
    results = list(Propagator(radius=2).run(blank(frames, masks), masks))
    assert all(r.shape == (H, W, 3) for r in results)
    assert np.array_equal(results[-1], results[6]), "the picture stands"


@pytest.mark.parametrize("seed", range(12))
def test_whatever_comes_in(seed):
    """Random sizes, depths, motions, masks and options: every frame comes out, untouched outside its mask."""
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 70, 2)
    depth = (np.uint8, np.uint16)[seed % 2]
    count = int(random.integers(1, 9))
    first = random.integers(0, np.iinfo(depth).max, (height, width, 3)).astype(depth)
    frames = [np.roll(first, i * int(random.integers(-2, 3)), axis=1) for i in range(count)]
    masks = [random.random((height, width)) < random.choice([0, 0.01, 0.5, 1]) for _ in frames]
    policy = VisibilityPolicy(block=int(random.integers(1, 5)))
    side = int(random.choice([16, 24, 320]))
    propagator = Propagator(radius=int(random.integers(1, 6)), policy=policy, flow_side=side)
    results = list(propagator.run(frames, masks))
    assert len(results) == count
    for result, frame, mask in zip(results, frames, masks, strict=True):
        assert result.dtype == depth and np.array_equal(result[~mask], frame[~mask])
    assert propagator.masked == sum(m.sum() for m in masks) >= propagator.unseen


def test_bands_are_narrow_and_cover_each_pixel_once():
    mask = np.zeros((150, 200), np.uint8)
    cv2.line(mask, (20, 10), (180, 140), 1, 8)
    mask = mask > 0
    count = np.zeros(mask.shape, int)
    for box in bands(mask):
        assert mask[box].any(axis=0)[[0, -1]].all() and mask[box].any(axis=1)[[0, -1]].all()
        count[box] += 1
    assert count.max() == 1 and (count[mask] == 1).all()
    assert count.sum() < 0.4 * 160 * 130
    assert not list(bands(np.zeros_like(mask)))
