"""A small generator that learns within minutes on a CPU: ``python -m benchmarks.tiny FOLDER``.

Fetches free photos (``apt-get download``; Debian or Ubuntu, no root), splits them into those to learn from
and those held out, trains ``gi_model/configs/tiny.yaml`` on the first, and compares its composites on the
second with OpenCV's inpainting, weights-free propagation and references warped by the same flow, inside the
masks, with two references under the published distortions. Writes ``table.md``, ``results.json``,
``curve.png`` and ``pictures.jpg`` to ``--output``. Photos and a finished training in ``FOLDER`` are kept and
used again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from gi_model.checkpoints import load_checkpoint
from gi_model.configs import build_generator
from gi_model.data import Photos, ValidationSet, find_photos
from gi_model.data.making import make_validation
from gi_model.evaluation.filling import Filler
from gi_model.evaluation.lpips import lpips
from gi_model.evaluation.similarity import ssim_map
from gi_model.evaluation.video import masked_lpips
from gi_model.flow import PlanarStage, Stage
from gi_model.inpainting import inpaint_frame
from gi_model.pixels import align
from gi_model.propagation import Propagator
from gi_model.published import load_published
from gi_model.sheet import tabulate
from gi_model.staging import staged, staged_folder
from gi_model.training.configuration import configuration, merged, read_tree
from gi_model.training.run import train

CONFIGURATION = Path(build_generator.__code__.co_filename).with_name("tiny.yaml")
NETWORK = "alexnet"  # of LPIPS
SEED = 7  # of the held-out samples
SAMPLES = 96
SHOWN, ENLARGED = 8, 2  # rows of the picture, and how much larger it is than the frames
SIDE = 512  # pixels of the photos' shorter side, a little more than the view that frames are cut from

#: Below a package's root: where the photos are, those to learn from, and those held out.
PACKAGES: dict[str, tuple[str, str, str]] = {
    "plasma-workspace-wallpapers": (
        "usr/share/wallpapers/{}/contents/images/*",
        "Altai Autumn Canopee Cascade Cluster ColdRipple ColorfulCups DarkestHour FallenLeaf Flow Grey "
        "Honeywave IceCold Kay Kite Kokkini MilkyWay Opal PastelHills Patak Shell Volna summer_1am",
        "BytheWater EveningGlow OneStandsOut Path",
    ),
    "mate-backgrounds": (
        "usr/share/backgrounds/mate/nature/{}.jpg",
        "Aqua Blinds GreenMeadow RainDrops Storm TwoWings Wood YellowFlower",
        "Dune Garden LadyBird",
    ),
    "lomiri-wallpapers-16.04": (
        "usr/share/backgrounds/{}.jpg",
        "Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Picture_0B_by_freespace Picture_1A_by_freespace "
        "aitzgorri_by_Aitzol_Berasategi free_by_Peter_Nerlich life_by_Aitzol_Berasategi "
        "seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi",
        "Wine_by_Jakkub_Mede friends_by_Aitzol_Berasategi greentock_by_Peter_Nerlich "
        "picosdeeuropa_by_Aitzol_Berasategi",
    ),
    "lxqt-themes": (
        "usr/share/lxqt/wallpapers/{}.*",
        "Valendas after-the-rain appleflower beam butterfly cloud drop fog this-is-not-windows",
        "flowers",
    ),
}
Results = Mapping[str, Sequence[np.ndarray]]  # composites [H,W,3] uint8 of the samples, by method
OURS, WARP, TELEA, PROPAGATION = "ours", "planar warp", "Telea", "weights-free"


@dataclass(frozen=True)
class Sample:
    """Frames ``[H,W,3]`` and masks ``[H,W]`` of a target and its references, uint8 RGB and bool."""

    frames: list[np.ndarray]
    masks: list[np.ndarray]

    @property
    def blanked(self) -> list[np.ndarray]:
        """The frames, black where they are masked."""
        return [
            np.where(m[..., None], 0, f).astype(np.uint8)
            for f, m in zip(self.frames, self.masks, strict=True)
        ]


def main(arguments: list[str] | None = None) -> int:
    """Prepare, train, compare; the exit code is 1 if ours is behind Telea or weights-free propagation."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiny", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="photos, validation set and run")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/tiny"), help="where to write")
    options = parser.parse_args(arguments)
    folder = options.folder
    prepare(folder)
    run = folder / "run"
    if not (folder / "seconds").is_file():
        learn(folder, run)
    seconds = float((folder / "seconds").read_text())
    samples = read_samples(folder / "validation")
    results = fill(samples, run / "checkpoints" / "last.ckpt")
    rows = measure(samples, results)
    options.output.mkdir(parents=True, exist_ok=True)
    text, won = report(rows, len(samples), seconds)
    with staged(options.output / "table.md") as path:
        path.write_text(text, encoding="utf-8")
    with staged(options.output / "results.json") as path:
        found = {"samples": len(samples), "seed": SEED, "seconds": seconds, "methods": rows}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    save_pictures(samples, results, options.output / "pictures.jpg")
    save_curve(run, rows, options.output / "curve.png")
    print(text)
    return 0 if won else 1


def prepare(folder: Path) -> None:
    """``photos/train``, ``photos/held-out`` and ``validation``, whichever are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "photos").is_dir():
        with staged_folder(folder / "photos") as photos, tempfile.TemporaryDirectory() as scratch:
            for package, (pattern, *names) in PACKAGES.items():
                root = _fetched(package, Path(scratch))
                for part, some in zip(("train", "held-out"), names, strict=True):
                    (photos / part).mkdir(exist_ok=True)
                    for name in some.split():
                        found = max(root.glob(pattern.format(name)), key=lambda path: path.stat().st_size)
                        _shrink(found, photos / part / f"{name}.jpg")
    if not (folder / "validation").is_dir():
        data = configuration(read_tree([str(CONFIGURATION)])).data
        photos = Photos(
            find_photos(folder / "photos" / "held-out"),
            size=data.size,
            scale=data.scale,
            references=data.references,
            seed=SEED,
        )
        for _ in make_validation(photos, folder / "validation", SAMPLES):
            pass


def learn(folder: Path, run: Path) -> None:
    """Train; a stopped run goes on. ``seconds`` says how long it took, stopped runs included."""
    given = {
        "data": {
            "photos": str(folder / "photos" / "train"),
            "validation": {"default": {"data": str(folder / "validation")}},
        }
    }
    last = run / "checkpoints" / "last.ckpt"
    spent = folder / "seconds-so-far"
    begun = time.monotonic() - (float(spent.read_text()) if last.is_file() and spent.is_file() else 0)
    try:
        train(
            configuration(merged(read_tree([str(CONFIGURATION)]), given)),
            run,
            resume=last if last.is_file() else None,
        )
    finally:
        spent.write_text(f"{time.monotonic() - begun:.0f}")
    spent.rename(folder / "seconds")


def read_samples(folder: Path) -> list[Sample]:
    """The held-out samples."""
    samples = []
    for raw in ValidationSet(folder, 2):
        frames = np.concatenate([raw["image"][None], raw["srcs"]])
        masks = np.concatenate([raw["mask"][None], raw["srcs_masks"]])
        pixels = np.round((frames + 1) * 127.5).astype(np.uint8)
        samples.append(Sample(list(pixels), list(masks[..., 0] > 0)))
    return samples


def fill(samples: Sequence[Sample], checkpoint: Path) -> dict[str, list[np.ndarray]]:
    """Composites of each method, ``[H,W,3]`` uint8."""
    generator = build_generator("tiny")
    load_published(generator, load_checkpoint(checkpoint, part="generator_average"))
    stage = PlanarStage()
    filler = Filler(generator.eval(), stage)
    results: dict[str, list[np.ndarray]] = {name: [] for name in (OURS, WARP, TELEA, PROPAGATION)}
    for sample in samples:
        image, *references = sample.blanked
        mask, *hidden = sample.masks
        filled = filler(*_tensors(sample))[0].permute(1, 2, 0).numpy()
        pixels = np.round(255 * filled).clip(0, 255).astype(np.uint8)
        results[OURS].append(np.where(mask[..., None], pixels, image))
        results[WARP].append(warp(sample, stage))
        results[TELEA].append(inpaint_frame(image, mask))
        # The target stands between its references, as near to both as can be.
        frames, masks = [references[0], image, references[1]], [hidden[0], mask, hidden[1]]
        results[PROPAGATION].append(list(Propagator(radius=2).run(frames, masks))[1])
    return results


def warp(sample: Sample, stage: Stage) -> np.ndarray:
    """The mean of the references, moved by ``stage``, where they are seen; Telea's inpainting elsewhere."""
    images, masks, references, hidden = _tensors(sample)
    shown = torch.cat([references, hidden], dim=2)
    flow, _ = stage(torch.cat([images, masks], dim=1), shown)
    colours, seen = (part[0] for part in align(shown, flow))
    mean = colours.sum(dim=0) / seen.sum(dim=0).clamp(min=1)
    warped = np.round(255 * mean.permute(1, 2, 0).numpy()).clip(0, 255).astype(np.uint8)
    image, mask = sample.blanked[0], sample.masks[0]
    rest = mask & ~(seen.sum(dim=0)[0] > 0).numpy()
    return inpaint_frame(np.where((mask & ~rest)[..., None], warped, image), rest)


def measure(samples: Sequence[Sample], results: Results) -> dict[str, dict[str, float]]:
    """Means over samples of PSNR in dB, SSIM and LPIPS inside the masks, by method."""
    metric = lpips(NETWORK)
    names = list(results)
    values: list[list[list[float]]] = []
    for i, sample in enumerate(samples):
        truth, mask = sample.frames[0], sample.masks[0]
        if not mask.any():
            continue
        made = [results[name][i] for name in names]
        distances = masked_lpips(metric, made, truth, mask)
        rows = []
        for picture, distance in zip(made, distances, strict=True):
            error = np.square(picture[mask].astype(np.float64) - truth[mask]).mean() / 255**2
            similar = ssim_map(_channels_first(picture), _channels_first(truth))[0].mean(dim=0)
            rows.append([-10 * np.log10(max(error, 1e-10)), float(similar.numpy()[mask].mean()), distance])
        values.append(rows)
    means = np.mean(values, axis=0)
    return {
        name: dict(zip(("psnr", "ssim", "lpips"), map(float, row), strict=True))
        for name, row in zip(names, means, strict=True)
    }


def report(rows: Mapping[str, Mapping[str, float]], count: int, seconds: float) -> tuple[str, bool]:
    """The table, and whether ours is ahead of Telea and weights-free propagation in PSNR and LPIPS."""
    lines = ["| method | PSNR (dB) | SSIM | LPIPS (AlexNet) |", "|---|---:|---:|---:|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {row['psnr']:.2f} | {row['ssim']:.3f} | {row['lpips']:.3f} |")
    won = all(
        rows[OURS]["psnr"] > rows[other]["psnr"] and rows[OURS]["lpips"] < rows[other]["lpips"]
        for other in (TELEA, PROPAGATION)
    )
    options = configuration(read_tree([str(CONFIGURATION)]))
    size = sum(p.numel() for p in build_generator("tiny").parameters()) / 1e6
    held_out = sum(len(names.split()) for _, _, names in PACKAGES.values())
    data = options.data
    lines += [
        "",
        f"Means over {count} samples (seed {SEED}) of {held_out} held-out photos, inside the masks, with two",
        f"references, published distortions and masks at {data.size} pixels, then scaled by {data.scale}.",
        f"The generator has {size:.1f} million parameters and was trained {options.steps} steps of",
        f"{data.batch_size} samples in {seconds / 60:.1f} minutes, validation included.",
        "Nothing that is hidden has an influence on any of the results.",
        f'"{WARP}" is the mean of the references, moved by the flow that "{OURS}" is given, where they are',
        f"seen, and {TELEA} elsewhere. The generator is {'ahead of' if won else 'not ahead of'} {TELEA} and",
        f"{PROPAGATION} propagation in both PSNR and LPIPS.",
    ]
    return "\n".join(lines) + "\n", won


def save_pictures(samples: Sequence[Sample], results: Results, path: Path) -> None:
    """A sheet of the first samples, each of another photo: what is seen, each method's, the truth."""
    titles = ("target", "reference", "reference", TELEA, PROPAGATION, WARP, OURS, "truth")
    rows = []
    for i in range(min(SHOWN, len(samples))):
        made = [results[name][i] for name in (TELEA, PROPAGATION, WARP, OURS)]
        pictures = [*samples[i].blanked, *made, samples[i].frames[0]]
        rows.append(
            [cv2.resize(p, None, fx=ENLARGED, fy=ENLARGED, interpolation=cv2.INTER_CUBIC) for p in pictures]
        )
    sheet = tabulate(titles, rows)
    with staged(path) as temporary:
        cv2.imwrite(str(temporary), sheet[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])


def save_curve(run: Path, rows: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """PSNR of validations and the L1 term over steps, with the others' PSNR."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    logged = []
    for part in run.rglob("metrics.csv"):  # one for each time that it was started
        with open(part, newline="") as file:
            logged += csv.DictReader(file)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, key, label in (
        (left, "train/gen_l1", "L1 term"),
        (right, "val/default/psnr", "PSNR in the mask, dB"),
    ):
        points = sorted((float(line["step"]), float(line[key])) for line in logged if line.get(key))
        axes.plot(*zip(*points, strict=True), label="ours")
        axes.set(xlabel="steps", ylabel=label)
    for name, style in ((TELEA, ":"), (PROPAGATION, "--"), (WARP, "-.")):
        right.axhline(rows[name]["psnr"], linestyle=style, color="grey", label=name)
    right.legend()
    with staged(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)


def _fetched(package: str, scratch: Path) -> Path:
    """The extracted files of a package of Debian."""
    print(package)
    subprocess.run(["apt-get", "-q", "download", package], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    (archive,) = scratch.glob(f"{package}_*.deb")
    subprocess.run(["dpkg-deb", "-x", archive.name, package], cwd=scratch, check=True)
    return scratch / package


def _shrink(path: Path, target: Path) -> None:
    picture = cv2.imread(str(path))
    factor = SIDE / min(picture.shape[:2])
    picture = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(target), picture, [cv2.IMWRITE_JPEG_QUALITY, 95])


def _tensors(sample: Sample) -> tuple[torch.Tensor, ...]:
    """A sample as a batch of one for ``Filler``."""
    frames = torch.from_numpy(np.stack(sample.frames)).permute(0, 3, 1, 2).float() / 255
    masks = torch.from_numpy(np.stack(sample.masks))[:, None].float()
    return frames[:1], masks[:1], frames[None, 1:], masks[None, 1:]


def _channels_first(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255


if __name__ == "__main__":
    sys.exit(main())
