"""The test phase: what a run has made, measured by the published evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from gi_model.evaluation.filling import Filler
from gi_model.evaluation.images import batches_of, measure
from gi_model.evaluation.journal import Journal
from gi_model.evaluation.loading import load_measures
from gi_model.evaluation.report import Result, print_results, result_of, write_csv, write_json
from gi_model.flow import Stage
from gi_model.generator import Generator
from gi_model.training.configuration import Configuration
from gi_model.training.run import validation_sets


def measure_test_sets(
    configuration: Configuration,
    generator: Generator,
    stage: Stage | None,
    folder: Path,
    device: torch.device,
) -> list[Result]:
    """Measure ``generator`` on the sets of ``data.test``; write ``results.csv`` and ``results.json``.

    Args:
        configuration: of the run; scores whose weights it does not name, or that are not fetched, are named
            as not computed.
        generator: is left as it was.
        stage: estimates its flow; None for generators without.
        folder: to write in; made if it is missing.
        device: where to compute, and where ``stage`` is.

    Raises:
        InputError: a set or weights cannot be read.
    """
    sets = validation_sets(configuration.data.test)
    measures, hashes, not_computed = load_measures(None, configuration.inception)
    for metric in (measures.lpips, measures.inception):
        if metric is not None:
            metric.to(device)
    mode = generator.training
    filler = Filler(generator.eval().for_inference().to(device), stage)
    generator.train(mode)
    results = []
    for name, samples in sets.items():
        batches = batches_of(samples, configuration.data.batch_size)
        journal = Journal(folder / "measured", {}, restart=True)
        for _ in measure(filler, samples, measures, journal, batches, device, configuration.data.workers):
            pass
        references = configuration.data.test[name].references
        results.append(result_of(name, references, journal.read(range(len(batches)))))
        shutil.rmtree(journal.folder)
    print_results(results, not_computed)
    write_csv(folder / "results.csv", results)
    write_json(folder / "results.json", results, not_computed, dict(hashes))
    return results
