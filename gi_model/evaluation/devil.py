"""Scores of repaired videos, as the DEVIL benchmark defines them.

Frames are ``[H,W,3]`` float32 in [0, 1], masks ``[H,W]`` bool, true where a frame was repaired.

Source: Szeto, Corso, "The DEVIL is in the Details: A Diagnostic Evaluation Benchmark for Video Inpainting",
2022, and its evaluation code, whose less obvious choices are named below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from gi_model.evaluation.i3d import CLIP, I3D, clip_distance
from gi_model.evaluation.inception import Inception
from gi_model.evaluation.lpips import LPIPS
from gi_model.evaluation.precision import full_float32
from gi_model.evaluation.video import motion, warp_error

WINDOW = 7  # pixels of a side, of SSIM
SEED = 1234  # of the random patches
PATCH = 50  # pixels of a patch's side
SEARCH = 20  # pixels around a patch's place in which the next frame is searched

#: Per video, in the order of the table; of the whole split: fid, vfid.
PER_VIDEO = (
    "psnr",
    "ssim",
    "lpips",
    "pvcs",
    "warp_error",
    "warp_error_mask",
    "pcons_psnr",
    "pcons_ssim",
    "pcons_psnr_mask",
)
NEED_MASKS = ("warp_error_mask", "pcons_psnr_mask")

Corner = tuple[int, int]  # row and column of a patch's first pixel


@dataclass
class VideoMeasures:
    """Measures one video; what has no weights, ``None`` here, is left out."""

    lpips: LPIPS | None = None
    inception: Inception | None = None
    i3d: I3D | None = None
    device: str | torch.device = "cpu"

    @torch.no_grad()
    @full_float32()
    def __call__(
        self,
        result: Sequence[np.ndarray],
        truth: Sequence[np.ndarray],
        masks: Sequence[np.ndarray] | None,
        corners: Sequence[Corner] | None,
    ) -> dict[str, np.ndarray]:
        """Scores ``[1]`` by name, and features: ``fid/result [N,2048]``, ``vfid/result [1,1024]``, ...

        Args:
            result, truth: N frames each; result is measured as it is.
            masks: of the frames; without them, scores of ``NEED_MASKS`` are left out.
            corners: N - 1 places of patches, of ``random_corners``; ``None``: ``pcons_psnr`` and
                ``pcons_ssim`` are NaN.
        """
        scores = {
            "psnr": np.mean([psnr(a, b) for a, b in zip(truth, result, strict=True)]),
            "ssim": np.mean([ssim(a, b) for a, b in zip(truth, result, strict=True)]),
        }
        levels = [np.rint(255 * frame).astype(np.uint8) for frame in result]
        steps = motion([np.rint(255 * frame).astype(np.uint8) for frame in truth])
        everywhere = [np.ones(frame.shape[:2], bool) for frame in result]
        scores["warp_error"] = np.float64(warp_error(levels, everywhere, steps))
        scores["pcons_psnr"] = np.float64(patch_consistency(result, corners or [], patch_psnr))
        scores["pcons_ssim"] = np.float64(patch_consistency(result, corners or [], patch_ssim))
        if masks is not None:
            scores["warp_error_mask"] = np.float64(warp_error(levels, masks, steps))
            scores["pcons_psnr_mask"] = np.float64(
                patch_consistency(result, masked_corners(masks), patch_psnr)
            )
        features: dict[str, torch.Tensor] = {}
        pairs = [(self._tensor(a), self._tensor(b)) for a, b in zip(result, truth, strict=True)]
        if self.lpips:
            scores["lpips"] = np.mean([float(self.lpips(a, b)) for a, b in pairs])
        if self.inception:
            features["fid/result"] = torch.cat([self.inception(a) for a, _ in pairs])
            features["fid/truth"] = torch.cat([self.inception(b) for _, b in pairs])
        if self.i3d:
            clips = [torch.stack([pair[i] for pair in pairs], dim=2) for i in (0, 1)]
            scores["pvcs"] = np.float64(pvcs(self.i3d, *clips))
            for name, clip in zip(("vfid/result", "vfid/truth"), clips, strict=True):
                features[name] = self.i3d(clip)[-1].mean(dim=(2, 3, 4))
        measured = {name: np.array([value], np.float64) for name, value in scores.items()}
        measured["frames"] = np.array([len(result)])
        return measured | {name: tensor.float().cpu().numpy() for name, tensor in features.items()}

    def _tensor(self, frame: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(frame).permute(2, 0, 1)[None].contiguous().to(self.device)


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    """``10 log10(1 / mean squared error)`` in dB, infinite for equal frames."""
    error = np.mean((image.astype(np.float64) - other) ** 2)
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def ssim(image: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity in windows of 7x7 pixels, all of equal weight, that lie within the frame.

    Unbiased variances; the constants are those of a range of 2, which scikit-image 0.17 takes for floating
    images, as DEVIL does: larger than of the range of 1 that the frames have.
    """
    x, y = image.astype(np.float64), other.astype(np.float64)

    def mean(v: np.ndarray) -> np.ndarray:
        return cv2.blur(v, (WINDOW, WINDOW))[3:-3, 3:-3]

    return float(_index(mean(x), mean(y), mean(x * x), mean(y * y), mean(x * y)).mean())


def _index(m: Any, n: Any, xx: Any, yy: Any, xy: Any) -> Any:
    """SSIM in windows from their means of x, y, x^2, y^2 and xy; arrays or tensors."""
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    v, w, c = unbiased * (xx - m * m), unbiased * (yy - n * n), unbiased * (xy - m * n)
    return (2 * m * n + c1) * (2 * c + c2) / ((m * m + n * n + c1) * (v + w + c2))


def pvcs(network: I3D, result: torch.Tensor, truth: torch.Tensor) -> float:
    """Perceptual distance of all clips of 10 consecutive frames, averaged; shorter videos repeat their last.

    Args:
        result, truth: ``[1,3,T,H,W]``.
    """
    missing = CLIP - result.shape[2]
    if missing > 0:
        result, truth = (torch.cat([v, *[v[:, :, -1:]] * missing], dim=2) for v in (result, truth))
    count = result.shape[2] - CLIP + 1
    distances = [
        clip_distance(network(result[:, :, i : i + CLIP]), network(truth[:, :, i : i + CLIP]))
        for i in range(count)
    ]
    return float(torch.cat(distances).double().mean())


def random_corners(videos: Sequence[tuple[int, int, int]], seed: int = SEED) -> list[list[Corner] | None]:
    """Places of the patches of all videos of a split, drawn in order as DEVIL does.

    Args:
        videos: number of frames, height and width of each.

    Returns:
        Per video one place per pair of frames, or ``None`` where frames are too small for a patch.
    """
    draw = np.random.default_rng(seed)
    places: list[list[Corner] | None] = []
    for count, height, width in videos:
        if min(height, width) <= PATCH:
            places.append(None)
            continue
        some = [(draw.integers(height - PATCH), draw.integers(width - PATCH)) for _ in range(count - 1)]
        places.append([(int(row), int(column)) for row, column in some])
    return places


def masked_corners(masks: Sequence[np.ndarray]) -> list[Corner | None]:
    """Places of patches around the centre of mass of each mask but the last, within the frame.

    ``None`` for an empty mask or where frames are too small.
    """
    corners: list[Corner | None] = []
    for mask in masks[:-1]:
        rows, columns = np.nonzero(mask)
        height, width = mask.shape
        if not len(rows) or min(height, width) < PATCH:
            corners.append(None)
            continue
        row, column = (int(np.floor(i.mean() - PATCH / 2)) for i in (rows, columns))
        corners.append((min(max(row, 0), height - PATCH), min(max(column, 0), width - PATCH)))
    return corners


def patch_consistency(
    result: Sequence[np.ndarray],
    corners: Sequence[Corner | None],
    similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> float:
    """How well patches are found again in the next frame: similarity of the best match, averaged over pairs.

    A patch of 50x50 pixels is compared with those of the next frame up to 20 pixels before and 19 behind its
    place, in rows and columns. NaN without any patch.

    Args:
        corners: for each frame but the last a place, or ``None`` to pass over it.
        similarity: of a patch ``[3,50,50]`` and every patch in an area ``[3,h,w]``, float64:
            ``patch_psnr`` or ``patch_ssim``.
    """
    found = []
    for frame, following, corner in zip(result[:-1], result[1:], corners, strict=False):
        if corner is None:
            continue
        row, column = corner
        top, left = max(row - SEARCH, 0), max(column - SEARCH, 0)
        patch = frame[row : row + PATCH, column : column + PATCH]
        area = following[top : row + SEARCH - 1 + PATCH, left : column + SEARCH - 1 + PATCH]
        pair = (torch.from_numpy(part).permute(2, 0, 1).double() for part in (patch, area))
        found.append(float(similarity(*pair).max()))
    return float(np.mean(found)) if found else float("nan")


def patch_psnr(patch: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """PSNR in dB, ``[rows,columns]``, infinite for equal patches."""
    rows = [(row - patch[:, None]).square().mean(dim=(0, 2, 3)) for row in _rows(area, PATCH)]
    return -10 * torch.stack(rows).log10()


def patch_ssim(patch: torch.Tensor, area: torch.Tensor) -> torch.Tensor:
    """SSIM, ``[rows,columns]``, as ``ssim``."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, WINDOW, stride=1)

    m, xx = mean(patch)[:, None], mean(patch * patch)[:, None]
    inner = PATCH - WINDOW + 1
    windows = zip(_rows(area, PATCH), _rows(mean(area), inner), _rows(mean(area * area), inner), strict=True)
    rows = [_index(m, n, xx, yy, mean(patch[:, None] * y)).mean(dim=(0, 2, 3)) for y, n, yy in windows]
    return torch.stack(rows)


def _rows(area: torch.Tensor, side: int) -> Iterator[torch.Tensor]:
    """Squares of ``side`` pixels in ``[3,h,w]``, a row of them at a time: ``[3,columns,side,side]``."""
    for top in range(area.shape[1] - side + 1):
        yield area[:, top : top + side].unfold(2, side, 1).permute(0, 2, 1, 3)
