"""The distance of two sets of features."""

from __future__ import annotations

import torch


def frechet_distance(features: torch.Tensor, others: torch.Tensor) -> float:
    """Fréchet distance of two Gaussians with the sets' means and covariances; with Inception's features, FID.

    ``|m - n|^2 + tr S + tr T - 2 tr (S T)^(1/2)`` with unbiased covariances S, T. In float64. The last trace
    is the sum of singular values of ``X Y^T``, where X and Y are the centred features over the root of their
    number less one; this needs no root of a singular matrix, whatever the number of samples.

    Args:
        features, others: ``[N,D]`` and ``[M,D]``, at least two rows each.

    Raises:
        TypeError, ValueError: no floating matrices, of different widths, or too few rows.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium", 2017.
    """
    for name, matrix in (("features", features), ("others", others)):
        if not isinstance(matrix, torch.Tensor) or not matrix.is_floating_point():
            raise TypeError(
                f"{name}: expected a floating tensor, got {getattr(matrix, 'dtype', type(matrix))}"
            )
        if matrix.dim() != 2 or matrix.shape[0] < 2 or matrix.shape[1] != features.shape[-1]:
            raise ValueError(
                f"{name}: expected [N,{features.shape[-1]}] with at least 2 rows, got {list(matrix.shape)}"
            )
    (mean, X), (other_mean, Y) = _centred(features), _centred(others)
    traces = X.square().sum() + Y.square().sum()
    root = torch.linalg.svdvals(_short(X) @ _short(Y).T).sum()
    return float((mean - other_mean).square().sum() + traces - 2 * root)


def _centred(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean ``[D]`` and ``X [N,D]`` with covariance ``X^T X``."""
    features = features.double()
    mean = features.mean(dim=0)
    return mean, (features - mean) / (features.shape[0] - 1) ** 0.5


def _short(X: torch.Tensor) -> torch.Tensor:
    """A matrix of at most as many rows as columns with the same covariance."""
    return torch.linalg.qr(X, mode="r").R if X.shape[0] > X.shape[1] else X
