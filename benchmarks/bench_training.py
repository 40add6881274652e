"""Images per second and peak memory of a whole training step, and images per second of data loading.

    python -m benchmarks.bench_training

A step is what the published recipe does with a batch of 256x256 targets with two references: flow on the
fly by RAFT, the generator's pass with all terms of the objective, the discriminator's pass with its
penalty, and both optimizers. The published formulation estimates the flow in both passes, pair by pair, and
runs flow network and generator as in :mod:`gi_model.testing`; objective and discriminator are the same.
Weights are random. Data loading is timed on one core, from JPEG files of 683x512 pixels, as those of
Places365 are. Writes ``training.json`` beside the other results of this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.bench_propagation import Size, pan
from gi_kernels.testing import machine, timing
from gi_kernels.testing.memory import peak_extra_bytes
from gi_model import build_generator
from gi_model.data import Photos
from gi_model.discriminator import Discriminator
from gi_model.flow import RAFT, FlowStage, Stage
from gi_model.testing.published_flow import published_flow_stage
from gi_model.testing.published_generator import published_generator
from gi_model.training import Alternation, Batch, Objective, PerceptualLoss, Step

HERE = Path(__file__).resolve().parent
CORES, BATCH = 16, 8  # of the machine with one large GPU for which the bound on data loading is computed


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_training", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="default: a GPU if there is one")
    parser.add_argument("--batch", type=int, help="images (default: 8 on a GPU, 1 on a CPU)")
    parser.add_argument("--seconds", type=float, default=30, help="for the rounds of the steps (default 30)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    cases = steps(device, options.batch or (1 if device.type == "cpu" else BATCH), options.seconds)
    for case in cases:
        print(f"{case['id']}: {case['images_per_second']:.3g} images per second, ", end="")
        print(f"{case['peak_bytes'] / 2**20:.0f} MiB")
    loading = data_loading()
    print(f"data loading: {loading['images_per_second_per_core']:.1f} images per second and core; ", end="")
    print(f"computed for {CORES} cores: {loading['computed_images_per_second']:.0f}")
    about = machine.describe()
    file = options.results / about["slug"] / "training.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {
        "machine": about,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cases": cases,
        "loading": loading,
    }
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"results: {file} (python -m benchmarks.report makes the table)")
    return 0


def steps(
    device: torch.device, batch: int, budget: float = 30, size: int = 256, generator: Any = "ours"
) -> list[dict[str, Any]]:
    """Measure a step in every style, the styles in turns.

    Args:
        batch, size: images, and pixels of their sides.
        budget: seconds for all rounds; there are at least three.
        generator: a configuration.
    """
    torch.manual_seed(0)
    raft, network = RAFT().to(device), build_generator(generator).to(device).train()
    ours = FlowStage(raft)
    published = published_flow_stage(raft)
    samples = {name: values.to(device) for name, values in draw(batch, size).items()}

    def learn(network: nn.Module, stage: Stage, passes: int, dtype: torch.dtype) -> Callable[[], object]:
        """A step that estimates flow so many times."""
        discriminator = Discriminator().to(device)
        step = Step(network, discriminator, Objective(perceptual=PerceptualLoss()).to(device))
        optimizers = tuple(torch.optim.Adam(n.parameters(), lr=1e-5) for n in (network, discriminator))
        alternation = Alternation(step, optimizers, lambda n: 1.0)  # type: ignore[arg-type]

        def call() -> None:
            made = [Batch.of_samples(samples, stage) for _ in range(passes)]
            low = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
            with low:
                alternation.batch(made[-1], 0, last=True)

        return call

    styles = {
        "published": learn(published_generator(network), published, 2, torch.float32),
        "ours": learn(network, ours, 1, torch.float32),
        "ours, bfloat16": learn(build_generator(generator).to(device).train(), ours, 1, torch.bfloat16),
    }
    times = timing.interleave(styles, device, budget)
    return [
        {
            "id": f"train-{style}",
            "style": style,
            "device": device.type,
            "batch": batch,
            "size": size,
            "seconds": times[style].seconds,
            "images_per_second": batch / times[style].median,
            "peak_bytes": peak_extra_bytes(call, device),
        }
        for style, call in styles.items()
    ]


def draw(batch: int, size: int) -> dict[str, torch.Tensor]:
    """A collated batch of training samples."""
    with tempfile.TemporaryDirectory() as name:
        photos = Photos(write_photos(Path(name), 2), size=size)
        made = torch.utils.data.default_collate([photos[i % len(photos)] for i in range(batch)])
    return {name: made[name] for name in ("image", "mask", "srcs", "srcs_masks")}


def data_loading(seconds: float = 10, photos: int = 8) -> dict[str, Any]:
    """Training samples per second that one core makes, and what many cores would by that number."""
    import cv2

    threads = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as name:
            data = Photos(write_photos(Path(name), photos))
            data[0]
            made, taken = 0, 0.0
            while taken < seconds:
                taken += timing.seconds(lambda made=made: data[made % photos])  # type: ignore[misc]
                made += 1
    finally:
        cv2.setNumThreads(threads[0])
        torch.set_num_threads(threads[1])
    per_core = made / taken
    return {
        "images_per_second_per_core": per_core,
        "cores": CORES,
        "batch": BATCH,
        "computed_images_per_second": CORES * per_core,
        "computed_seconds_per_batch": BATCH / (CORES * per_core),
    }


def write_photos(folder: Path, count: int) -> list[Path]:
    """JPEG files with detail at all scales."""
    import cv2

    paths = []
    for i, frame in enumerate(pan(Size("photos", 683, 512, count))):
        paths.append(folder / f"{i}.jpg")
        paths[-1].write_bytes(cv2.imencode(".jpg", frame)[1].tobytes())
    return paths


if __name__ == "__main__":
    sys.exit(main())
