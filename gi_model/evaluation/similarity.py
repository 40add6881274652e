"""How similar two images are, pixel by pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gi_kernels import checks

WINDOW = 11  # pixels
SIGMA = 1.5  # of the window, in pixels
C1, C2 = 0.01**2, 0.03**2


def ssim(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each pair of images, as the published evaluation computes it.

    ``mean of (2 m n + C1)(2 c + C2) / ((m^2 + n^2 + C1)(v + w + C2))`` over pixels and channels, with means
    m, n, variances v, w and covariance c in a Gaussian window of 11x11 pixels and sigma 1.5, C1 = 0.01^2,
    C2 = 0.03^2. The window sees zeros outside the images, which biases what is near the border.

    Args:
        images, others: ``[B,C,H,W]`` in [0, 1].

    Returns:
        ``[B]``, 1 for equal images.

    Raises:
        TypeError, ValueError: no floating tensors, of different shapes, or empty.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.
    """
    return ssim_map(images, others).mean(dim=(1, 2, 3))


def ssim_map(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The index of :func:`ssim` at each pixel and channel, ``[B,C,H,W]``; arguments and errors as there."""
    _check(images, others)
    channels = images.shape[1]
    weights = _window(images)

    def mean(x: torch.Tensor) -> torch.Tensor:
        across = weights.expand(channels, 1, 1, WINDOW)
        x = F.conv2d(x, across, padding=(0, WINDOW // 2), groups=channels)
        return F.conv2d(x, across.transpose(2, 3), padding=(WINDOW // 2, 0), groups=channels)

    m, n = mean(images), mean(others)
    v, w = mean(images * images) - m * m, mean(others * others) - n * n
    c = mean(images * others) - m * n
    return (2 * m * n + C1) * (2 * c + C2) / ((m * m + n * n + C1) * (v + w + C2))


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each pair, ``10 log10(1 / mean squared error)``, in dB.

    Args:
        images, others: ``[B,C,H,W]`` in [0, 1].

    Returns:
        ``[B]``, infinite for equal images.

    Raises:
        TypeError, ValueError: no floating tensors, of different shapes, or empty.
    """
    _check(images, others)
    # Late: it takes seconds. Its SSIM and FID are not the published ones (borders, network).
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(images, others, data_range=1.0, reduction="none", dim=(1, 2, 3))


def _window(like: torch.Tensor) -> torch.Tensor:
    """Weights of the window along one axis, sum 1."""
    distance = torch.arange(WINDOW, dtype=like.dtype, device=like.device) - WINDOW // 2
    weights = torch.exp(-distance.square() / (2 * SIGMA**2))
    return weights / weights.sum()


def _check(images: torch.Tensor, others: torch.Tensor) -> None:
    checks.shapes(("images", images, "B C H W"), ("others", others, "B C H W"))
    checks.same_dtype(("images", images), ("others", others))
    checks.nonempty("images", images, 1, 2, 3)
