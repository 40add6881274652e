"""Fourier transforms of maps whose spectra are maps as well: real and imaginary parts are channels.

Of real maps, rows and columns, orthonormal: those of ``torch.fft.rfft2(..., norm="ortho")`` and its inverse.
The kernels transform vectors of channels where they are, which PyTorch copies to lines of pixels.
"""

from __future__ import annotations

import torch

from gi_kernels import checks, native
from gi_kernels.precision import accumulation_dtype

#: Lengths with a larger prime factor are left to PyTorch, which takes fewer operations for these.
LARGEST_FACTOR = 13


def fourier(x: torch.Tensor) -> torch.Tensor:
    """Spectrum ``[B,2C,H,W//2+1]`` of ``x`` [B,C,H,W]; channels 2c, 2c+1 are the parts of that of channel c.

    float32, float64, bfloat16 or float16, computed in float32 (float64 for float64) and rounded once;
    channels-last. Differentiable.

    Raises:
        TypeError, ValueError: ``x`` of the wrong type or rank, or without pixels.
    """
    checks.shapes(("x", x, "B C H W"))
    checks.nonempty("x", x, 2, 3)
    if _serves(x, x.shape[3]):
        return torch.ops.gi.fourier(x, 1.0)
    pixels = x.to(accumulation_dtype(x.dtype)).permute(0, 2, 3, 1)
    spectrum = torch.fft.rfft2(pixels, dim=(1, 2), norm="ortho")
    # With the channels last, complex numbers in memory are the interleaved channels already.
    return torch.view_as_real(spectrum).flatten(3).permute(0, 3, 1, 2).to(x.dtype)


def fourier_inverse(spectrum: torch.Tensor, width: int, addend: torch.Tensor | None = None) -> torch.Tensor:
    """Map ``[B,C,H,width]`` of a spectrum ``[B,2C,H,width//2+1]`` as of :func:`fourier`, plus ``addend``.

    Of numbers that would be real in the spectrum of a map, the imaginary part counts for nothing. Dtypes
    and layout as for :func:`fourier`. Differentiable.

    Raises:
        TypeError, ValueError: a tensor of the wrong type, rank, size or dtype.
    """
    checks.shapes(("spectrum", spectrum, "B C2 H V"))
    checks.nonempty("spectrum", spectrum, 2, 3)
    B, channels, H, frequencies = spectrum.shape
    if channels % 2 or width < 1 or frequencies != width // 2 + 1:
        raise ValueError(
            f"spectrum: expected shape [B, 2C, H, {width // 2 + 1}] for a map {width} wide, "
            f"got {list(spectrum.shape)}"
        )
    if addend is not None:
        checks.shapes(("addend", addend, f"{B} {channels // 2} {H} {width}"))
        checks.same_dtype(("spectrum", spectrum), ("addend", addend))
    if _serves(spectrum, width):
        return torch.ops.gi.fourier_inverse(spectrum, width, addend, 1.0)
    parts = spectrum.to(accumulation_dtype(spectrum.dtype)).permute(0, 2, 3, 1).contiguous()
    numbers = torch.view_as_complex(parts.unflatten(3, (-1, 2)))
    pixels = torch.fft.irfft2(numbers, s=(H, width), dim=(1, 2), norm="ortho").permute(0, 3, 1, 2)
    pixels = pixels if addend is None else pixels + addend
    return pixels.to(dtype=spectrum.dtype, memory_format=torch.channels_last)


def _serves(x: torch.Tensor, width: int) -> bool:
    """Whether the kernels transform maps of the height of ``x`` and this width, and fast."""
    on_kernel = native.PROBLEM is None and x.device.type == "cpu"
    return on_kernel and all(_largest_factor(n) <= LARGEST_FACTOR for n in (x.shape[2], width))


def _largest_factor(n: int) -> int:
    factor = 2
    while factor * factor <= n:
        if n % factor:
            factor += 1
        else:
            n //= factor
    return n


def _fake(x, inner):
    B, C, H, W = x.shape
    return x.new_empty(B, H, W // 2 + 1, 2 * C).permute(0, 3, 1, 2)


def _fake_inverse(spectrum, width, addend, inner):
    B, channels, H, _ = spectrum.shape
    return spectrum.new_empty(B, H, width, channels // 2).permute(0, 3, 1, 2)


# Each is the other's adjoint, but that columns of a spectrum which stand for two count twice in a map.
def _setup_context(ctx, inputs, output):
    ctx.width, ctx.inner = inputs[0].shape[3], inputs[1]


def _backward(ops, ctx, grad):
    return ops.fourier_inverse(grad, ctx.width, None, ctx.inner / 2), None


def _setup_context_inverse(ctx, inputs, output):
    ctx.inner = inputs[3]


def _backward_inverse(ops, ctx, grad):
    spectrum = ops.fourier(grad, 2 * ctx.inner) if ctx.needs_input_grad[0] else None
    return spectrum, None, grad if ctx.needs_input_grad[2] else None, None


native.register("fourier", _fake, _setup_context, _backward)
native.register("fourier_inverse", _fake_inverse, _setup_context_inverse, _backward_inverse)
