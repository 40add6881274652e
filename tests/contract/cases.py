"""What the contract suite is run on: operators, samples, backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch

import gi_kernels
from gi_kernels.spec import OperatorSpec, Sample, all_specs
from gi_kernels.testing import errors
from gi_kernels.testing.calls import Outcome, evaluate, oracle, tensors

SPECS = all_specs()


@dataclass(frozen=True)
class Case:
    """One sample of one operator on one backend."""

    spec: OperatorSpec
    sample: Sample
    backend: str

    def __str__(self) -> str:
        return f"{self.spec.name}-{self.sample.name}-{self.backend}"

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Arguments whose gradient is under test."""
        return self.spec.differentiable

    def run(self, arguments: dict, differentiable: Sequence[str] | None = None, **options) -> Outcome:
        """Result and gradients of the public function on this case's backend."""
        names = self.differentiable if differentiable is None else differentiable
        with gi_kernels.backend(self.backend):
            return evaluate(self.spec.function, arguments, names, **options)

    def expected(self, arguments: dict, actual: Outcome, **options) -> Outcome:
        """Result and gradients of the definition in float64."""
        return oracle(self.spec, arguments, actual.value.dtype, self.differentiable, **options)

    def check(
        self, arguments: dict, independent: bool = True, cancelling: bool = False, **options
    ) -> Outcome:
        """Run the case and hold it against the definition, by the rule for its dtype."""
        actual = self.run(arguments, **options)
        errors.check(
            self.spec,
            actual,
            self.expected(arguments, actual, **options),
            self.raw(arguments, **options),
            self.sample.condition,
            independent and self.backend not in self.spec.composed,
            cancelling,
        )
        return actual

    def raw(self, arguments: dict, **options) -> Outcome | None:
        """Result and gradients of the definition in eager PyTorch at a low-precision dtype."""
        low = any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors(arguments).values())
        return evaluate(self.spec.reference, arguments, self.differentiable, **options) if low else None


def cases(
    choose: Callable[[OperatorSpec], Sequence[Sample]] = lambda spec: spec.of_size("small"),
    *,
    compiled_only: bool = False,
    where: Callable[[OperatorSpec], bool] = lambda spec: True,
    thorough: bool = False,
) -> pytest.MarkDecorator:
    """Parametrise a test by ``case``: chosen samples of every operator on every backend there is.

    Triton's interpreter takes a tenth of a second where kernels take microseconds. On it a test runs on
    small samples only, and on the first of those chosen per way of serving; all of them if ``thorough``,
    unless it is made of several operators.
    """
    found = []
    for spec in SPECS.values():
        if where(spec):
            interpreted = set()
            for sample in choose(spec):
                for backend in backends(spec, sample):
                    if backend == "triton":
                        every = thorough and backend not in spec.composed  # of kernels tested by themselves
                        if sample.size != "small" or (sample.served_by in interpreted and not every):
                            continue
                        interpreted.add(sample.served_by)
                    if not (compiled_only and backend == "reference"):
                        found.append(Case(spec, sample, backend))
    return pytest.mark.parametrize("case", found, ids=str)


def backends(spec: OperatorSpec, sample: Sample) -> list[str]:
    """The backends that can run a sample on the CPU."""
    return gi_kernels.available_backends(sample.served_by or spec.name)


def first(count: int) -> Callable[[OperatorSpec], Sequence[Sample]]:
    """The first ``count`` small samples that are not degenerate."""
    return lambda spec: [s for s in spec.of_size("small") if _substantial(s)][:count]


def _substantial(sample: Sample) -> bool:
    return all(0 not in a.shape for v in sample.arguments.values() for a in _arguments(v))


def _arguments(value: object) -> Iterator:
    if isinstance(value, list):
        for v in value:
            yield from _arguments(v)
    elif hasattr(value, "shape"):
        yield value
