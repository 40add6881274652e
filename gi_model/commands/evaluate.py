"""Measure a generator on a validation set as published: SSIM, LPIPS, FID and their combination, and PSNR, of
raw predictions and of predictions stitched into the image, over all images and per share that is masked.

Writes results.csv, results.json and cases.html, a page of the best and worst images. A stopped run goes on
where it was if it is started again, with the same result. Several GPUs: torchrun --nproc-per-node N
--no-python gi-model evaluate ...; the result is that of one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gi_model.errors import InputError
from gi_model.progress import progress

if TYPE_CHECKING:
    import numpy as np

    from gi_model.data.validation import ValidationSet
    from gi_model.evaluation.report import Result

NAME = "evaluate"
SUMMARY = "measure a generator on a validation set: SSIM, LPIPS, FID, PSNR"
EXTRA = "evaluation"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add(
        "--checkpoint", required=True, metavar="FILE", help="weights of a generator, such as a released .ckpt"
    )
    add("--data", required=True, metavar="DIR", help="a folder in the published format, or a list of files")
    add("--config", default="ours", metavar="NAME", help="of the checkpoint: a name or a file (default ours)")
    add("--references", type=int, nargs="+", default=[2, 4], metavar="N", help="of each image (default 2 4)")
    add("--flow-checkpoint", metavar="FILE", help="weights of RAFT, where the checkpoint holds none")
    add(
        "--flow",
        choices=("raft", "dis", "planar"),
        default="raft",
        help="dis and planar need no weights, but are not as published",
    )
    add("--lpips", nargs="+", metavar="FILE", help="weights of VGG16 and heads (default: of fetch-lpips)")
    add("--inception", metavar="FILE", help="for FID: pt_inception-2015-12-05-6726825d.pth")
    add("-o", "--output", default="evaluation", metavar="DIR", help="where to write (default evaluation)")
    add("--restart", action="store_true", help="forget what an earlier run has measured in --output")
    add("--batch-size", type=int, default=8, metavar="N", help="images at once (default 8)")
    add("--multiple", type=int, metavar="N", help="pad images, mirrored, to multiples of N pixels")
    add("--device", metavar="NAME", help="such as cuda or cpu (default: a GPU if there is one)")
    add("--workers", type=int, default=4, metavar="N", help="processes that read images (default 4)")
    add("--cases", type=int, default=4, metavar="N", help="best and worst images on the page (default 4)")
    add(
        "--legacy-names",
        action="store_true",
        help="name the first data set two and the second four whatever they hold, as the published code does",
    )
    parser.set_defaults(left="what was measured is kept, start again to go on")


def run(options: argparse.Namespace) -> int:
    """``gi-model evaluate``."""
    from gi_model.data.validation import ValidationSet
    from gi_model.evaluation.filling import load_filler
    from gi_model.evaluation.images import batches_of, measure
    from gi_model.evaluation.journal import Journal
    from gi_model.evaluation.loading import chosen_device, load_measures
    from gi_model.evaluation.page import write_cases
    from gi_model.evaluation.report import counted

    for name in ("batch_size", "multiple"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if len(set(options.references)) != len(options.references):
        raise InputError(f"--references: expected each number once, got {options.references}")
    sets = {n: ValidationSet(options.data, n, multiple=options.multiple) for n in options.references}
    measures, weights, not_computed = load_measures(options.lpips, options.inception)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = chosen_device(options.device)
    settings = {**_settings(options, sets[options.references[0]], weights), "device": device.type}
    output = Path(options.output)
    barrier = _barrier(world)
    filler = load_filler(options.config, options.checkpoint, options.flow_checkpoint, options.flow, device)
    for metric in (measures.lpips, measures.inception):
        if metric is not None:
            metric.to(device)

    if options.restart and rank:  # the first process forgets, before the others look
        barrier()
    journals = {
        n: Journal(output / "measured" / f"{n}-references", settings, options.restart and not rank)
        for n in sets
    }
    if options.restart and not rank:
        barrier()
    batches = batches_of(next(iter(sets.values())), options.batch_size)
    for n, samples in sets.items():
        own = [batch if i % world == rank else range(0) for i, batch in enumerate(batches)]
        left = sum(1 for i, batch in enumerate(own) if len(batch) and not journals[n].has(i))
        done = measure(filler, samples, measures, journals[n], own, device, options.workers)
        for _ in progress(done, left, counted(n, "reference")):
            pass
    barrier()
    if rank == 0:
        measured = {n: journals[n].read(range(len(batches))) for n in sets}
        _report(options, output, measured, not_computed, settings)
        if options.cases > 0:
            title = f"{options.checkpoint} on {options.data}"
            write_cases(output / "cases.html", title, sets, measured, filler, device, options.cases)
            print(f"wrote {output / 'cases.html'}")
    barrier()
    return 0


def _barrier(world: int) -> Callable[[], object]:
    """A function that waits until all processes have called it."""
    if world == 1:
        return lambda: None
    from datetime import timedelta

    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=7))
    return dist.barrier


def _settings(
    options: argparse.Namespace, samples: ValidationSet, weights: dict[str, str | None]
) -> dict[str, Any]:
    """All that results depend on but for the number of references."""
    from gi_model.evaluation.journal import digest

    files = "\n".join(
        f"{t.mask.name} {t.mask.stat().st_size} {t.image.stat().st_size}" for t in samples.targets
    )
    config = Path(options.config)
    return {
        "data": hashlib.sha256(files.encode()).hexdigest(),
        "config": digest(config) if config.is_file() else options.config,
        "checkpoint": digest(options.checkpoint),
        "flow": options.flow,
        "flow_checkpoint": digest(options.flow_checkpoint) if options.flow_checkpoint else None,
        "batch_size": options.batch_size,
        "multiple": options.multiple,
        **weights,
    }


def _report(
    options: argparse.Namespace,
    output: Path,
    measured: dict[int, dict[str, np.ndarray]],
    not_computed: dict[str, str],
    settings: dict[str, Any],
) -> None:
    from gi_model.evaluation.report import print_results, result_of, write_csv, write_json
    from gi_model.evaluation.scores import reference_key

    results: list[Result] = []
    for place, (n, numbers) in enumerate(measured.items()):
        key = reference_key(n)
        if options.legacy_names:
            key = ("two", "four")[place] if place < 2 else str(place)
        results.append(result_of(key, n, numbers))
    print_results(results, not_computed)
    write_csv(output / "results.csv", results)
    write_json(output / "results.json", results, not_computed, settings)
    print(f"wrote {output / 'results.csv'}, {output / 'results.json'}")
