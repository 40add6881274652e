"""Training data: masks, distortions, samples, their order, and validation sets made from photos."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from gi_model import cli
from gi_model.data import Distortions, Draw, Draws, Photos, build_mask, find_photos, published_photos
from gi_model.data import distortions as steps
from gi_model.data.loading import loader
from gi_model.errors import InputError

GOLDEN = Path(__file__).parent / "golden"
STATISTICS = np.load(GOLDEN / "mask_statistics.npz")
KINDS = json.loads(str(STATISTICS["meta"]))["kinds"]
AUGMENTED = np.load(GOLDEN / "augment_ops.npz")
CASES = json.loads(str(AUGMENTED["meta"]))["cases"]


class LegacyRandom:
    """The published source of random numbers under the names of a ``numpy.random.Generator``."""

    def __init__(self, seed: int) -> None:
        state = np.random.RandomState(seed)
        self.integers, self.random = state.randint, state.random_sample
        self.choice, self.uniform = state.choice, state.uniform


@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if "error" not in v and "invert" not in k])
def test_masks_of_the_published_draws(kind: str) -> None:
    mask = build_mask(KINDS[kind]["kind"], **KINDS[kind]["kwargs"])
    rng: Any = LegacyRandom(0)
    areas = np.array([mask(rng, 256, 256, i).mean() for i in range(2000)])
    statistics = [areas.mean(), areas.std(), areas.min(), areas.max()]
    if kind == "mixed_ramped":  # counts its masks in another way
        np.testing.assert_allclose(statistics[:2], STATISTICS[f"{kind}/mean_std_min_max"][0, :2], atol=2e-3)
        return
    np.testing.assert_allclose(statistics, STATISTICS[f"{kind}/mean_std_min_max"][0], rtol=1e-6)
    np.testing.assert_allclose(
        np.quantile(areas, np.arange(1, 10) / 10), STATISTICS[f"{kind}/deciles"][0], rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["mixed_ours", "mixed_ours_invert_half"])
def test_mask_statistics(kind: str) -> None:
    mask = build_mask(KINDS[kind]["kind"], **KINDS[kind]["kwargs"])
    rng = np.random.default_rng(5)
    masks = np.stack([mask(rng, 256, 256) for _ in range(2000)])
    areas, published = masks.mean(axis=(1, 2)), STATISTICS[f"{kind}/mean_std_min_max"]
    expected = published.mean(axis=0)
    assert abs(areas.mean() - expected[0]) < 4 * expected[1] / 2000**0.5
    assert abs(areas.std() - expected[1]) < 4 * expected[1] / 4000**0.5
    deciles = np.quantile(areas, np.arange(1, 10) / 10)
    published = STATISTICS[f"{kind}/deciles"]
    assert (np.abs(deciles - published.mean(axis=0)) < 0.01 + 4 * published.std(axis=0)).all()
    coverage = masks.reshape(-1, 8, 32, 8, 32).mean(axis=(0, 2, 4))
    np.testing.assert_allclose(coverage, STATISTICS[f"{kind}/coverage_8x8"], atol=0.03)


def test_grid_and_central_box() -> None:
    rng = np.random.default_rng(0)
    grid = build_mask(irregular_proba=0, box_proba=0, superres_proba=1)
    for _ in range(20):
        mask = grid(rng, 40, 60)
        rows, columns = mask.all(axis=1), mask.all(axis=0)
        assert (mask == rows[:, None] | columns).all() and not mask.all() and mask.any()
    middle = build_mask("dumb", is_training=False)(rng, 100, 100)
    assert middle[26:73, 26:73].all() and middle.sum() == 47**2
    anywhere = [build_mask("dumb")(rng, 64, 128).mean() for _ in range(200)]
    assert 0.09 < min(anywhere) < 0.15 and 0.3 < max(anywhere) < 0.36


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mixd", {}, "unknown: 'mixd'.*mixed"),
        ("mixed", {"iregular_proba": 1}, "'iregular_proba'.*irregular_proba"),
        ("mixed", {"box_kwargs": {"margn": 1}}, "box_kwargs: unknown key 'margn'.*margin"),
        ("mixed", {"segm_proba": 0.5}, "segm_proba.*not supported.*0.5"),
        ("mixed", {"irregular_proba": 0, "box_proba": 0}, "expected a kind with a probability above 0"),
        ("mixed", {"box_proba": -1}, "box_proba: expected at least 0, got -1"),
        ("mixed", {"irregular_kwargs": {"min_times": 3, "max_times": 2}}, "max_times: expected at least 3"),
        ("outpainting", {"max_padding_percent": 2}, "max_padding_percent: expected a number from 0 to 1"),
        ("outpainting", {"is_fixed_randomness": True}, "is_fixed_randomness: expected false"),
    ],
)
def test_unusable_masks_are_named(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_mask(kind, **options)


def test_boxes_say_when_a_frame_is_too_small() -> None:
    with pytest.raises(InputError, match=r"bbox_min_size.*40x40"):
        build_mask(irregular_proba=0, box_proba=1)(np.random.default_rng(0), 40, 40)


@pytest.mark.parametrize("case", CASES)
def test_steps_as_published(case: str) -> None:
    image, given = AUGMENTED["image"], CASES[case]
    if case.startswith("clahe"):
        out = steps.equalize(image, given["clip_limit"])
    elif case.startswith("brightness"):
        out = steps.adjust(image, given["alpha"], given["beta"])
    elif case.startswith("hsv"):
        out = steps.shift_hsv(image, given["hue_shift"], given["sat_shift"], given["val_shift"])
    elif case.startswith("optical"):
        out = steps.bend(image, given["k"])
    elif case.startswith("pad"):
        out = steps.pad(image, given["min_height"], given["min_width"])
    else:
        scale = np.array([given["scale_x"], given["scale_y"]])
        shear = np.array([given["shear_x_deg"], given["shear_y_deg"]])
        matrix = steps.affine_matrix(image.shape[:2], scale, given["rotate_deg"], shear)
        np.testing.assert_allclose(matrix, AUGMENTED[f"{case}_matrix"], atol=1e-4)
        out = steps.turn(image, matrix)
    assert out.shape == AUGMENTED[case].shape
    # Interpolation rounds in another way from one release of OpenCV to the next.
    assert np.abs(out.astype(int) - AUGMENTED[case]).mean() < 0.2


@pytest.mark.parametrize("case", ["perspective_0", "perspective_1"])
def test_perspective_as_published(case: str) -> None:
    image, jitter = AUGMENTED["image"], AUGMENTED[f"{case}_jitter"]
    matrix, size = steps.perspective(*image.shape[:2], jitter)
    np.testing.assert_allclose(matrix, AUGMENTED[f"{case}_matrix"], rtol=1e-9)
    assert size == tuple(AUGMENTED[f"{case}_size_hw"])
    assert np.abs(steps.tilt(image, jitter).astype(int) - AUGMENTED[case]).mean() < 0.2


def test_crops_as_published() -> None:
    for height, width, side, side_too, u, v, *corners in AUGMENTED["crop_coords"]:
        assert side == side_too
        grid = np.stack(np.mgrid[: int(height), : int(width)], axis=-1)
        rng: Any = iter([u, v])
        rng = type("Fixed", (), {"random": lambda self, values=rng: next(values)})()
        out = steps.random_crop(grid, int(side), rng)
        x1, y1, x2, y2 = (int(c) for c in corners)
        assert out.shape[:2] == (side, side) and tuple(out[0, 0]) == (y1, x1)
        assert tuple(out[-1, -1]) == (y2 - 1, x2 - 1)


def test_easy_frames_are_crops_of_one_view() -> None:
    rng = np.random.default_rng(0)
    chain = Distortions(16, easy=True)
    view = chain.shared(rng.integers(0, 256, (50, 70, 3), np.uint8), rng)
    assert view.shape == (41, 41, 3)
    windows = np.lib.stride_tricks.sliding_window_view(view, (16, 16), axis=(0, 1))
    for _ in range(5):
        frame = chain.individual(view, rng).transpose(2, 0, 1)
        assert (windows == frame).all(axis=(2, 3, 4)).any()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six small pictures, one of them deeper."""
    root = tmp_path_factory.mktemp("photos")
    (root / "deep").mkdir()
    for i in range(6):
        image = np.random.default_rng(i).integers(0, 256, (40 + i, 60, 3), np.uint8)
        image = cv2.GaussianBlur(image, (0, 0), 2)
        cv2.imwrite(str(root / ("deep" if i == 5 else ".") / f"{i}.png"), image)
    return root


BOX = {
    "irregular_proba": 0,
    "box_kwargs": {"margin": 1, "bbox_min_size": 4, "bbox_max_size": 20, "min_times": 1},
}


def small(root: Path, **options: Any) -> Photos:
    return Photos(find_photos(root), size=32, mask=build_mask(**BOX), **options)


def test_samples(photos: Path) -> None:
    data = small(photos, references=3)
    sample = data[Draw(7, 2)]
    for name, shape in (("image", (32, 32, 3)), ("srcs", (3, 32, 32, 3))):
        assert sample[name].shape == shape and sample[name].dtype == torch.float32
        assert sample[name].min() >= -1 and sample[name].max() <= 1 and sample[name].std() > 0.05
    for name, shape in (("mask", (32, 32, 1)), ("srcs_masks", (3, 32, 32, 1))):
        assert sample[name].shape == shape and set(sample[name].unique().tolist()) == {-1.0, 1.0}
    masks = torch.cat([sample["mask"][None], sample["srcs_masks"]])
    assert len({m.numpy().tobytes() for m in masks}) == 4, "every frame has a mask of its own"
    again, other = data[Draw(7, 2)], data[Draw(8, 2)]
    assert all(torch.equal(sample[k], again[k]) for k in ("image", "mask", "srcs", "srcs_masks"))
    assert not torch.equal(sample["image"], other["image"])


def test_scaled_frames_are_the_published_ones_by_area(photos: Path) -> None:
    whole, half = (small(photos, scale=scale)[Draw(7, 2)] for scale in (1, 0.5))
    assert half["srcs"].shape == (2, 16, 16, 3) and half["srcs_masks"].shape == (2, 16, 16, 1)
    means = whole["image"].reshape(16, 2, 16, 2, 3).mean(dim=(1, 3))
    assert (half["image"] - means).abs().max() <= 1.01 / 127.5  # rounded to 8 bits
    assert torch.equal(half["mask"], whole["mask"][::2, ::2])
    for scale in (0, 1.5, 0.001):
        with pytest.raises(InputError, match="scale: expected a number above 0, up to 1"):
            small(photos, scale=scale)


def test_workers_and_processes_draw_the_same(photos: Path) -> None:
    data = small(photos)

    def batches(batch_size: int, rank: int = 0, world: int = 1, workers: int = 0, skip: int = 0) -> list:
        draws = Draws(len(data), rank=rank, world=world)
        draws.set_epoch(1, skip)
        return [b["image"] for b in loader(data, draws, batch_size, workers)]

    alone = batches(2)
    assert [len(b) for b in alone] == [2, 2, 2]
    assert all(torch.equal(a, b) for a, b in zip(alone, batches(2, workers=2), strict=True))
    ranks = [batches(1, rank, 2) for rank in range(2)]
    for step, batch in enumerate(alone):
        assert torch.equal(batch, torch.cat([ranks[0][step], ranks[1][step]]))
    resumed = batches(2, skip=2)
    assert all(torch.equal(a, b) for a, b in zip(alone[1:], resumed, strict=True))


def test_order_of_draws() -> None:
    draws = Draws(10)
    first = list(draws)
    draws.set_epoch(1)
    second = list(draws)
    assert sorted(d.photo for d in first) == sorted(d.photo for d in second) == list(range(10))
    assert [d.photo for d in first] != [d.photo for d in second]
    assert [d.number for d in first + second] == list(range(20))
    parts = [list(Draws(7, rank=r, world=3)) for r in range(3)]
    assert [len(p) for p in parts] == [3, 3, 3] and {d.photo for p in parts for d in p} == set(range(7))
    assert [d.photo for d in Draws(4, shuffle=False)] == [0, 1, 2, 3]
    with pytest.raises(InputError, match="rank: expected 0 to 1, got 2"):
        Draws(4, rank=2, world=2)
    with pytest.raises(InputError, match="skip: expected 0 to 10, got 11"):
        draws.set_epoch(0, 11)


def test_unreadable_photos_are_named_and_replaced(
    tmp_path: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken, empty = tmp_path / "broken.jpg", tmp_path / "empty.png"
    broken.write_bytes(b"\xff\xd8\xff\xe0 no picture")
    empty.touch()
    data = small(photos)
    data.paths = [broken, empty, tmp_path / "missing.png", *data.paths]
    with caplog.at_level(logging.WARNING):
        samples = [data[Draw(i, i)] for i in range(len(data))]
    assert [s["unreadable"] > 0 for s in samples] == [True] * 3 + [False] * 6
    for name in ("broken.jpg", "empty.png", "missing.png"):
        assert name in caplog.text
    data.paths = data.paths[:3]
    with pytest.raises(InputError, match="20 in a row"):
        data[0]


def test_lists_and_published_options(tmp_path: Path, photos: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("1.png\n\ndeep/5.png\n")
    assert find_photos(photos, listed) == [photos / "1.png", photos / "deep" / "5.png"]
    assert [p.name for p in find_photos(photos)] == ["0.png", "1.png", "2.png", "3.png", "4.png", "5.png"]
    options = {
        "easy": False, "n_references": 2, "root": str(photos), "filelist": str(listed), "out_size": 64,
        "transform_variant": "distortions", "clean_prob": 0.5, "mask_gen_kwargs": BOX,
    }  # fmt: skip
    assert published_photos(options)[0]["srcs"].shape == (2, 64, 64, 3)
    for wrong, message in (
        ({"fileist": 1}, "unknown key 'fileist'.*filelist"),
        ({"transform_variant": "default"}, "transform_variant: only 'distortions'"),
        ({"root": None}, "expected a root"),
        ({"root": str(tmp_path / "nowhere")}, "root: .*nowhere is not a folder"),
        ({"filelist": str(tmp_path)}, "filelist: cannot read"),
        ({"mask_generator_kind": "boxes"}, "mask_generator_kind: unknown: 'boxes'"),
        ({"n_references": 0}, "references: expected at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            published_photos({**options, **wrong})
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="no photos"):
        find_photos(tmp_path / "nothing")


def test_validation_sets_are_reproducible(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture
) -> None:
    def make(name: str, *more: str) -> int:
        command = ["make-validation", str(photos), "-o", str(tmp_path / name), "--size", "64", *more]
        return cli.main([*command, "--references", "2", "--count", "8"])

    assert make("a") == make("b") == make("c", "--seed", "24") == 0
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(files) == 8 * 6 + 1
    read = {n: [(tmp_path / d / n).read_bytes() for d in "abc"] for n in files}
    assert all(a == b for a, b, _ in read.values())
    assert sum(a != c for a, _, c in read.values()) > 40
    listed = (tmp_path / "a" / "filelist.txt").read_text().splitlines()
    assert sorted([*listed, "filelist.txt"]) == files
    assert listed[:4] == [
        "image_000000_mask.png", "image_000000.png", "image_000000_src_000000_m.png",
        "image_000000_src_000000.png",
    ]  # fmt: skip
    mask = cv2.imread(str(tmp_path / "a" / "image_000003_src_000001_m.png"), cv2.IMREAD_UNCHANGED)
    assert mask.shape == (64, 64) and set(np.unique(mask)) <= {0, 255} and mask.any()
    picture = cv2.imread(str(tmp_path / "a" / "image_000003_src_000001.png"), cv2.IMREAD_UNCHANGED)
    assert picture.shape == (64, 64, 3) and picture[mask > 0].std() > 5, "pictures are whole"

    capsys.readouterr()
    assert make("a") == cli.FAILED and "exists" in capsys.readouterr().err
    assert make("nowhere/d") == cli.FAILED and "does not exist" in capsys.readouterr().err
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_bytes(b"no")
    command = ["make-validation", str(tmp_path / "bad"), "-o", str(tmp_path / "e"), "--size", "64"]
    assert cli.main(command) == cli.FAILED and "1.png" in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name or p.name == "e"], "nothing half written"
