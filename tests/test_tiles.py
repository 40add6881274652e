"""Tiles of large frames: where they lie, how they blend, what is cut out and kept for them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

cv2 = pytest.importorskip("cv2", reason="the [video] extra is not installed")
pytest.importorskip("av", reason="the [video] extra is not installed")

from test_learned_propagation import propagator, small_generator  # noqa: E402

from gi_model.flow import DISStage  # noqa: E402
from gi_model.propagation import LearnedPropagator  # noqa: E402
from gi_model.propagation.tiles import ReferenceCache, Tile, crop_flow, plan, windows_of  # noqa: E402

SIZE, CONTEXT = 64, 8
H, W = 120, 170


def texture(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(3).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def clip(height: int = H, width: int = W, count: int = 3) -> list[np.ndarray]:
    plane = texture(height, width + 20)
    return [np.ascontiguousarray(plane[:, 3 * i : 3 * i + width]) for i in range(count)]


def hole(*boxes: tuple[int, int, int, int], height: int = H, width: int = W) -> np.ndarray:
    """Top, bottom, left, right of each."""
    mask = np.zeros((height, width), bool)
    for top, bottom, left, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


SMALL, LARGE, TWO = (
    hole((50, 80, 60, 90)),
    hole((10, 110, 20, 160)),
    hole((5, 25, 5, 25), (90, 119, 140, 169)),
)


# Where tiles lie


@pytest.mark.parametrize("mask", [SMALL, LARGE, TWO, hole((0, H, 0, W)), hole((0, 1, 0, 1))])
def test_tiles_cover_the_mask_and_nothing_else(mask):
    covered, holes = np.zeros_like(mask), np.zeros(mask.shape, int)
    for region in plan(mask, SIZE, CONTEXT):
        holes += region.hole
        for tile in region.tiles:
            assert 0 <= tile.top <= H - SIZE and 0 <= tile.left <= W - SIZE
            assert region.hole[tile.box].any(), "tiles that do not touch the mask are left out"
            covered[tile.box] = True
    assert np.array_equal(holes, mask), "every masked pixel belongs to one region"
    assert covered[mask].all()


@pytest.mark.parametrize(("top", "left"), [(30, 40), (33, 47), (40, 90), (0, 0)])
def test_what_fits_into_a_tile_gets_one_with_its_surroundings(top, left):
    (region,) = plan(hole((top, top + 36, left, left + 20)), SIZE, CONTEXT)
    assert region.whole
    tile = region.tiles[0]
    inside = tile.box
    assert inside[0].start <= max(0, top - CONTEXT) and inside[0].stop >= min(H, top + 36 + CONTEXT)
    assert inside[1].start <= max(0, left - CONTEXT) and inside[1].stop >= min(W, left + 20 + CONTEXT)


def test_tiles_stay_where_they_are_while_the_mask_moves_a_little():
    places = {plan(hole((50, 70, 60 + i, 80 + i)), SIZE, CONTEXT)[0].tiles[0] for i in range(16)}
    assert len(places) <= 3


def test_neighbours_overlap():
    (region,) = plan(LARGE, SIZE, CONTEXT)
    lefts = sorted({tile.left for tile in region.tiles})
    assert len(lefts) > 1
    assert all(a + SIZE - b >= 2 * CONTEXT for a, b in itertools.pairwise(lefts))


def test_windows_sum_up_to_one():
    (region,) = plan(LARGE, SIZE, CONTEXT)
    total = np.zeros((H, W))
    for tile, window in zip(region.tiles, windows_of(region.tiles, 2 * CONTEXT), strict=True):
        assert window.shape == (SIZE, SIZE) and window.min() >= 0
        steps = max(np.abs(np.diff(window, axis=axis)).max() for axis in (0, 1))
        assert steps < 0.2, "no seam"
        total[tile.box] += window
    covered = total > 0
    assert covered[LARGE].all()
    assert np.abs(total[covered] - 1).max() < 1e-6
    (alone,) = windows_of([Tile(8, 16, SIZE)], 2 * CONTEXT)
    assert (alone == 1).all(), "a tile alone is taken as it is"


def test_where_a_hole_goes_on_beyond_a_tile():
    (region,) = plan(LARGE, SIZE, CONTEXT)
    first = region.tiles[0]
    outer = region.outer(first, CONTEXT)
    assert outer[:, -CONTEXT:][LARGE[first.box][:, -CONTEXT:]].all()
    assert not outer[:-CONTEXT, :-CONTEXT].any()
    (region,) = plan(SMALL, SIZE, CONTEXT)
    assert not region.outer(region.tiles[0], CONTEXT).any()


# What is cut out and kept


@pytest.mark.parametrize("channels", [1, 2])
def test_flow_of_a_tile(channels):
    """A flow that is linear in space is the same one, wherever it was sampled."""
    small = (60, 85)
    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in small), indexing="ij")
    flow = torch.stack([0.03 * x + 0.1 * y - 4, 0.2 * y - 0.05 * x])[:channels].expand(1, 2, -1, -1, -1)
    tile = Tile(24, 40, SIZE)
    cut = crop_flow(flow, (2 * small[0], 2 * small[1]), tile)
    y, x = torch.meshgrid(
        (torch.arange(24, 24 + SIZE) + 0.5) / 2, (torch.arange(40, 40 + SIZE) + 0.5) / 2, indexing="ij"
    )
    expected = 2 * torch.stack([0.03 * x + 0.1 * y - 4, 0.2 * y - 0.05 * x])[:channels]
    assert cut.shape == (1, 2, channels, SIZE, SIZE)
    assert float((cut[0, 0] - expected).abs().max()) < 1e-4
    assert torch.equal(crop_flow(flow, small, Tile(0, 0, 60)), flow[..., :60, :60]), (
        "at the same size as it is"
    )


def encoded(seed: int, size: int = 32):
    torch.manual_seed(seed)
    return small_generator().encode_references(torch.rand(1, 1, 4, size, size))


def test_the_cache_is_bounded_and_drops_what_was_used_least_recently():
    parts = [encoded(i) for i in range(4)]
    cache = ReferenceCache(2 * parts[0].nbytes)
    made = []

    def get(i: int):
        return cache.get(i, lambda: made.append(i) or parts[i])

    for i in (0, 1, 0, 2, 0, 1):
        assert get(i) is parts[i]
        assert cache.nbytes <= cache.limit
    assert made == [0, 1, 2, 1]
    assert (cache.hits, cache.misses) == (2, 4)
    assert cache.nbytes == sum(p.nbytes for p in parts[:2])
    tiny = ReferenceCache(1)
    assert tiny.get("a", lambda: parts[0]) is parts[0]
    assert tiny.nbytes == 0
    with pytest.raises(ValueError, match="limit: expected a number of bytes, got -1"):
        ReferenceCache(-1)


# The propagator


def test_a_frame_of_a_tiles_size_is_filled_as_without_tiles():
    frames = clip(SIZE, SIZE)
    for mask in (
        hole((20, 40, 22, 50), height=SIZE, width=SIZE),
        hole((0, 60, 0, 60), height=SIZE, width=SIZE),
    ):
        runs = [
            list(propagator(size=SIZE, radius=2, tiled=tiled).run(frames, [mask] * 3))
            for tiled in (True, False)
        ]
        assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_frame_of_256_pixels_is_filled_as_without_tiles():
    frames = clip(256, 256, count=2)
    masks = [hole((60, 130, 70, 150), height=256, width=256), np.zeros((256, 256), bool)]
    runs = [list(propagator(radius=1, tiled=t).run(frames, masks)) for t in (True, False)]
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_only_the_mask_changes(dtype):
    frames = [f.astype(dtype) * (257 if dtype == np.uint16 else 1) for f in clip()]
    masks = [SMALL, LARGE, TWO]
    results = list(propagator(size=SIZE, radius=2, references=1).run(frames, masks))
    for frame, mask, result in zip(frames, masks, results, strict=True):
        assert result.dtype == dtype
        assert np.array_equal(result[~mask], frame[~mask])
        assert (result[mask] != frame[mask]).mean() > 0.9


def test_what_the_mask_hides_does_not_matter():
    masks = [SMALL, LARGE, TWO]
    runs = []
    for value in (0, 200):
        frames = [
            np.where(m[..., None], value, f).astype(np.uint8) for f, m in zip(clip(), masks, strict=True)
        ]
        runs.append(list(propagator(size=SIZE, radius=2, references=1).run(frames, masks)))
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


def test_only_tiles_that_touch_the_mask_are_computed():
    made = propagator(size=SIZE, radius=2, references=1)
    shapes = []
    generator = made.generator
    made.generator = _Spy(generator, shapes)
    masks = [np.zeros((H, W), bool), SMALL, np.zeros((H, W), bool)]
    list(made.run(clip(), masks))
    assert shapes == [(1, 4, SIZE, SIZE)]
    shapes.clear()
    list(made.run(clip(), [LARGE, *masks[::2]]))
    tiles = plan(LARGE, SIZE, made.context)[0].tiles
    assert len(shapes) == 1 + len(tiles), "the whole frame first, to guide the tiles"
    assert shapes[0] == (1, 4, *made._size(clip()[0]))


class _Spy:
    """A generator that tells the shapes of its targets."""

    def __init__(self, generator, shapes) -> None:
        self.generator, self.shapes = generator, shapes
        self.encode_references = generator.encode_references

    def __call__(self, rgba, **arguments):
        self.shapes.append(tuple(rgba.shape))
        return self.generator(rgba, **arguments)


def test_the_cache_serves_many_targets_and_changes_nothing():
    frames, masks = clip(count=5), [SMALL] * 5
    kept, nothing = (propagator(size=SIZE, radius=4, references=2, cache=limit) for limit in (1 << 28, 1))
    results = [list(p.run(frames, masks)) for p in (kept, nothing)]
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
    assert kept.encoded.hits > 0 and kept.encoded.nbytes > 0
    assert nothing.encoded.hits == 0 and nothing.encoded.nbytes == 0


def test_the_cache_stays_within_its_bytes():
    frames, masks = clip(count=6), [SMALL] * 6
    made = propagator(size=SIZE, radius=5, references=2, cache=3 * encoded(0, SIZE).nbytes)
    for _ in made.run(frames, masks):
        assert made.encoded.nbytes <= made.encoded.limit


def test_finished_frames_are_not_made_again():
    class Kept(dict):
        put = dict.__setitem__

    frames, masks = clip(), [SMALL] * 3
    kept = Kept()
    results = list(propagator(size=SIZE, radius=2).run(frames, masks, finished=kept))
    del kept[1]
    made, shapes = propagator(size=SIZE, radius=2), []
    made.generator = _Spy(made.generator, shapes)
    again = list(made.run(frames, masks, finished=kept))
    assert all(np.array_equal(a, b) for a, b in zip(results, again, strict=True))
    assert len(shapes) == 1 and sorted(kept) == [0, 1, 2]


def test_references_are_of_the_same_scene():
    frames = clip(count=2) + [255 - f[::-1, ::-1] for f in clip(count=2)]
    made = propagator(size=SIZE, radius=3)
    seen = []
    choose = made._choose
    made._choose = lambda window, centre: (
        seen.append((window[centre].index, sorted(f.index for f in choose(window, centre))))
        or choose(window, centre)
    )
    list(made.run(frames, [SMALL] * 4))
    assert seen == [(0, [1]), (1, [0]), (2, [3]), (3, [2])]


def test_the_policy_chooses():
    class Last:
        block = 1

        def order(self, missing):
            return list(range(len(missing)))

        def references(self, target, shown):
            return [max(shown)]

    made, seen = propagator(size=SIZE, radius=3, policy=Last()), []
    made._for_flow, for_flow = (lambda frame: seen.append(frame.index) or for_flow(frame)), made._for_flow
    list(made.run(clip(count=4), [SMALL] * 4))
    assert seen == [0, 3, 1, 3, 2, 3, 3, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context: expected 1 to 64, got 0"),
        ({"context": 100}, "context: expected 1 to 64, got 100"),
        ({"cache": 0}, "cache: expected at least 1, got 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        LearnedPropagator(small_generator(), DISStage(), **options)
