"""Error measures, and the rules that results must keep."""

from __future__ import annotations

from math import isfinite

import torch

from gi_kernels.spec import OperatorSpec
from gi_kernels.testing.calls import Outcome

#: Magnitude below which errors are absolute: the inputs of the samples are of order one.
SMALLEST_SCALE = 0.1
#: Rounding once to the storage dtype costs half an epsilon; a little more for double rounding.
ROUNDING = 0.51
COSINE = 0.999
#: How many standard errors the mean error may be off zero.
BIAS = 5.0
#: Fewest numbers for which means say something.
FEWEST = 64


def check(
    spec: OperatorSpec,
    actual: Outcome,
    expected: Outcome,
    raw: Outcome | None = None,
    condition: float = 1.0,
    independent: bool = True,
    cancelling: bool = False,
) -> None:
    """Raise ``AssertionError`` unless ``actual`` keeps the operator's accuracy rule.

    Without ``raw`` (float32, float64): an error of at most ``condition`` times ``spec.tolerance``,
    relative to the largest expected magnitude. With ``raw``, the definition run in eager PyTorch at
    the same low precision: at most twice its error, the largest and the root mean square one, but for
    one rounding of the result and float32 sums; and gradients that point the right way without bias.
    The last rules are for numbers that round independently: ``independent=False`` leaves only the
    largest error. With ``cancelling`` numbers, equal ones say, sums of large terms may be small: errors
    are then relative to the largest magnitude in the result and all gradients.
    """
    reference = dict(expected.items())
    eager = dict(raw.items()) if raw is not None else {}
    largest = max(magnitude(t) for t in reference.values())
    for name, tensor in actual.items():
        wanted = reference[name]
        assert tensor.shape == wanted.shape, f"{name}: shape {list(tensor.shape)}, not {list(wanted.shape)}"
        error, scale = largest_error(tensor, wanted), largest if cancelling else magnitude(wanted)
        if raw is None:
            allowed = condition * spec.tolerance[tensor.dtype] * scale
        else:
            dtype = actual.value.dtype if spec.stores_intermediates else tensor.dtype
            once = ROUNDING * torch.finfo(dtype).eps + condition * spec.tolerance[torch.float32]
            eager_error = largest_error(eager[name], wanted)
            allowed = (2 * eager_error if isfinite(eager_error) else 0.0) + once * scale
        assert error <= allowed, (
            f"{name}: largest error {error:.3g}, allowed {allowed:.3g} (magnitude {scale:.3g}, "
            f"{_where(tensor, wanted)})"
        )
        if raw is not None and independent:
            _check_spread(name, tensor, wanted, eager[name])
            if name != "value":
                _check_direction(name, tensor, wanted)


def largest_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference; infinite where one is not finite and the other is another value."""
    difference = _difference(actual, expected)
    return difference.max().item() if difference.numel() else 0.0


def magnitude(expected: torch.Tensor) -> float:
    """Largest finite magnitude, at least ``SMALLEST_SCALE``."""
    finite = expected[expected.isfinite()].abs()
    return max(finite.max().item(), SMALLEST_SCALE) if finite.numel() else SMALLEST_SCALE


def root_mean_square(values: torch.Tensor) -> float:
    """Root of the mean square."""
    return values.double().square().mean().sqrt().item()


def cosine(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Cosine of the angle between two tensors as vectors; 1 where both are zero."""
    a, e = actual.double().flatten(), expected.double().flatten()
    norms = a.norm() * e.norm()
    return (a @ e / norms).item() if norms > 0 else float(a.norm() == e.norm())


def bias(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean error in units of its standard error: of order one where errors are independent."""
    error = actual.double() - expected.double()
    spread = error.square().mean().sqrt() / error.numel() ** 0.5
    return (error.mean().abs() / spread).item() if spread > 0 else 0.0


def growth(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean error away from zero in units of its standard error.

    Truncation errs towards zero: its mean error vanishes where signs are mixed, this one does not.
    """
    return bias(actual.double() * expected.sign(), expected.double().abs())


def _check_spread(name: str, actual: torch.Tensor, expected: torch.Tensor, raw: torch.Tensor) -> None:
    if expected.numel() < FEWEST or not expected.isfinite().all() or not raw.isfinite().all():
        return
    rounding = 0.3 * torch.finfo(actual.dtype).eps * root_mean_square(expected)
    allowed = max(2 * root_mean_square(raw.double() - expected), rounding, 1e-6)
    error = root_mean_square(actual.double() - expected)
    assert error <= allowed, f"{name}: root mean square error {error:.3g}, allowed {allowed:.3g}"


def _check_direction(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    if expected.numel() == 0 or not expected.isfinite().all():
        return
    if expected.abs().max() < 1e-6:  # zero by definition: only rounding noise points anywhere
        return
    similarity, offset = cosine(actual, expected), bias(actual, expected)
    assert similarity > COSINE, f"{name}: cosine {similarity:.6f} with the float64 gradient"
    if expected.numel() >= FEWEST:
        assert offset < BIAS, f"{name}: mean error is {offset:.1f} standard errors off zero"
        if actual.element_size() == 2:  # of float32 gradients, errors of the positions are common to all
            size = growth(actual, expected)
            assert size < BIAS, f"{name}: mean error of the size is {size:.1f} standard errors off zero"


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    a, e = actual.detach().double(), expected.detach().double()
    same = (a == e) | (a.isnan() & e.isnan())
    return torch.where(same, 0.0, torch.nan_to_num((a - e).abs(), nan=float("inf")))


def _where(actual: torch.Tensor, expected: torch.Tensor) -> str:
    difference = _difference(actual, expected)
    position = torch.unravel_index(difference.argmax(), difference.shape)
    at = tuple(int(p) for p in position)
    return f"at {list(at)}: {actual[at].item():.6g}, expected {expected[at].item():.6g}"
