"""Fourier transforms of maps against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch

from gi_kernels import native
from gi_kernels.fourier import LARGEST_FACTOR, fourier, fourier_inverse
from gi_kernels.testing import layouts
from gi_kernels.testing.errors import largest_error, magnitude

#: Among them: factors 4, 2, 3, 5, 7, 11, passes of each behind others, and a factor left to PyTorch; one row,
#: one column, one pixel; part of a vector of channels, one and a bit, several groups of them.
SHAPES = [
    (2, 6, 8, 8),
    (1, 40, 7, 9),
    (1, 1, 6, 1),
    (2, 17, 1, 66),
    (1, 33, 1, 1),
    (1, 70, 12, 2),
    (1, 3, 24, 32),
    (1, 5, 10, 34),
]
GIVEN = [layouts.contiguous, layouts.channels_last, layouts.sliced, layouts.strided, layouts.expanded_map]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def exact(x):
    pixels = x.double().permute(0, 2, 3, 1)
    spectrum = torch.fft.rfft2(pixels, dim=(1, 2), norm="ortho")
    return torch.view_as_real(spectrum).flatten(3).permute(0, 3, 1, 2)


def exact_inverse(spectrum, width):
    parts = spectrum.double().permute(0, 2, 3, 1).contiguous().unflatten(3, (-1, 2))
    pixels = torch.fft.irfft2(
        torch.view_as_complex(parts), s=(spectrum.shape[2], width), dim=(1, 2), norm="ortho"
    )
    return pixels.permute(0, 3, 1, 2)


def spectrum_like(shape, dtype):
    """Of numbers that are not the spectrum of any map."""
    B, C, H, W = shape
    return torch.randn(B, 2 * C, H, W // 2 + 1, dtype=dtype)


def assert_near(found, expected, dtype):
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    error = largest_error(found, expected) / magnitude(expected)
    assert error <= TOLERANCE[dtype], f"relative error {error:.3g}"


@pytest.mark.parametrize("arrange", GIVEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@DTYPES
def test_spectrum(way, dtype, shape, arrange):
    x = arrange(torch.randn(shape, dtype=dtype))
    assert_near(fourier(x), exact(x), dtype)


@pytest.mark.parametrize("arrange", GIVEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@DTYPES
def test_inverse(way, dtype, shape, arrange):
    spectrum = arrange(spectrum_like(shape, dtype))
    addend = arrange(torch.randn(shape, dtype=dtype))
    expected = exact_inverse(spectrum, shape[3])
    assert_near(fourier_inverse(spectrum, shape[3]), expected, dtype)
    assert_near(fourier_inverse(spectrum, shape[3], addend), expected + addend.double(), dtype)


@pytest.mark.parametrize("shape", [(1, 2, 4, 6), (2, 1, 5, 3), (1, 2, 3, 1), (1, 2, 1, 2)], ids=str)
def test_gradients(way, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    addend = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    spectrum = spectrum_like(shape, torch.float64).requires_grad_()
    back = lambda *tensors: fourier_inverse(tensors[0], shape[3], *tensors[1:])  # noqa: E731
    for call, given in ((fourier, (x,)), (back, (spectrum,)), (back, (spectrum, addend))):
        assert torch.autograd.gradcheck(call, given)
        assert torch.autograd.gradgradcheck(call, given)
    (alone,) = torch.autograd.grad(back(spectrum.detach(), addend).sum(), addend)
    assert torch.equal(alone, torch.ones_like(addend))


def test_maps_of_a_batch_do_not_depend_on_each_other():
    x = torch.randn(3, 20, 8, 12)
    assert torch.equal(fourier(x)[1:2], fourier(x[1:2]))
    assert torch.equal(fourier_inverse(fourier(x), 12)[1:2], fourier_inverse(fourier(x[1:2]), 12))


def test_no_map():
    spectrum = fourier(torch.zeros(0, 3, 4, 6))
    assert spectrum.shape == (0, 6, 4, 4)
    assert fourier_inverse(spectrum, 6).shape == (0, 3, 4, 6)


def test_long_primes_are_left_to_pytorch(monkeypatch):
    if native.PROBLEM is not None:
        pytest.skip(native.PROBLEM)
    calls = []
    rfft2 = torch.fft.rfft2
    monkeypatch.setattr(torch.fft, "rfft2", lambda *a, **k: calls.append(a) or rfft2(*a, **k))
    fourier(torch.randn(1, 1, 2 * LARGEST_FACTOR, 8))
    assert not calls
    fourier(torch.randn(1, 1, 8, 2 * 17))
    assert calls


def test_compiled():
    x = torch.randn(2, 3, 4, 6, requires_grad=True)
    call = torch.compile(lambda x: fourier_inverse(2 * fourier(x), 6, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(x), 3 * x)
    (gradient,) = torch.autograd.grad(call(x).sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: fourier(x[0]), ValueError, "x: .*4 dim.*got 3"),
        (lambda x: fourier(x.int()), TypeError, "x: .*got torch.int32"),
        (lambda x: fourier(x[..., :0]), ValueError, "x: .*at least 1"),
        (lambda x: fourier_inverse(x, 5), ValueError, r"spectrum: expected shape .*, 3\] .*5 wide, got"),
        (lambda x: fourier_inverse(x[:, :3], 7), ValueError, "spectrum: .*got"),
        (lambda x: fourier_inverse(x, 7, x), ValueError, "addend: "),
        (
            lambda x: fourier_inverse(x, 7, x[:, :2, :, [0]].expand(-1, -1, -1, 7).double()),
            TypeError,
            "addend: ",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(1, 4, 5, 4))
