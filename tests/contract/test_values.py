"""Values and gradients against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from cases import Case, cases, first

from gi_kernels.checks import FLOATING
from gi_kernels.spec import Argument
from gi_kernels.testing import errors
from gi_kernels.testing.calls import Outcome, map_tensors, tensors

DTYPES = pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d).split(".")[1])


@cases(thorough=True)
@DTYPES
def test_value_and_gradient(case: Case, dtype: torch.dtype) -> None:
    case.check(case.sample.make(dtype))


@cases(first(2))
def test_gradient_of_one_argument_alone(case: Case) -> None:
    """A gradient does not depend on which others are asked for, but for the order of its sums."""
    arguments = case.sample.make(torch.float32)
    every = case.run(arguments)
    for name in case.differentiable:
        alone = case.run(arguments, [name])
        for path, gradient in alone.gradients.items():
            allowed = case.spec.tolerance[torch.float32] * errors.magnitude(gradient)
            assert errors.largest_error(gradient, every.gradients[path]) <= allowed, path


@cases(first(2))
@DTYPES
def test_arguments_are_not_changed(case: Case, dtype: torch.dtype) -> None:
    arguments = case.sample.make(dtype)
    case.run(arguments)
    again = case.sample.make(dtype)
    for (path, tensor), untouched in zip(tensors(arguments).items(), tensors(again).values(), strict=True):
        assert torch.equal(tensor, untouched), path


@cases()
@DTYPES
def test_gradients_have_the_arguments_dtype_and_shape(case: Case, dtype: torch.dtype) -> None:
    arguments = case.sample.make(dtype)
    outcome = case.run(arguments)
    for path, tensor in tensors(arguments).items():
        if path in outcome.gradients:
            assert outcome.gradients[path].dtype == tensor.dtype, path
            assert outcome.gradients[path].shape == tensor.shape, path


@cases(first(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_large_numbers(case: Case, dtype: torch.dtype) -> None:
    """Exponentials of large logits do not overflow; they round in proportion to the logits."""
    arguments, factor = case.sample.make(dtype), 50 if dtype == torch.float32 else 500
    for name, declared in case.sample.arguments.items():
        first_part = declared[0] if isinstance(declared, list) else declared
        if isinstance(first_part, Argument) and first_part.storage and first_part.draw == "normal":
            arguments |= map_tensors(lambda _, t: t * factor, {name: arguments[name]})
    outcome = case.run(arguments)
    assert all(gradient.isfinite().all() for gradient in outcome.gradients.values())
    value = Outcome(
        outcome.value, {}
    )  # gradients cancel where a softmax chooses one: no scale to hold them to
    errors.check(case.spec, value, case.expected(arguments, outcome), condition=100 * case.sample.condition)
