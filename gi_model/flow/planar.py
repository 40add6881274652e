"""One homography per pair of frames, from features: needs no weights, and finds large motions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from gi_model.flow.dis import DISStage, bytes_of, grey
from gi_model.flow.stage import by_source, check_frames
from gi_model.inpainting import inpaint_frame


@dataclass(frozen=True)
class _Features:
    """Of a frame: where they are, ``[N,2]`` in pixels, x first, and what they look like, ``[N,128]``."""

    points: np.ndarray
    descriptors: np.ndarray


class PlanarStage(DISStage):
    r"""A :class:`~gi_model.flow.DISStage` for scenes that move like a plane: rotated, scaled, tilted.

    Per pair, SIFT features of what is not masked are matched, and MAGSAC finds a homography ``H`` from the
    target to the source. The flow is :math:`H(p) - p`, inside the mask as well; the error is one number for
    all of the pair's pixels, the mean distance in pixels of matches that agree with ``H``. Where fewer than 6
    agree, ``H`` is a similarity, which turns, scales and moves, found by RANSAC, on which 4 have to agree. A
    pair without one gets flow and error by DIS. Arguments, results and errors are those of its class.

    What is masked has no influence: it is inpainted first, for either method. Frames whose shorter side is
    below 192 pixels are enlarged to find features in them. Results are the same each time; to that end
    OpenCV's random numbers are seeded. Frames on another device are copied to the CPU.

    Sources: Lowe, "Distinctive Image Features from Scale-Invariant Keypoints", 2004; Barath et al.,
    "MAGSAC++, a Fast, Reliable and Accurate Robust Estimator", 2020.
    """

    #: Frames with a shorter side below this many pixels are enlarged.
    SHORTER_SIDE = 192
    #: A match counts if its descriptors' distance is below this part of the second best match's.
    RATIO = 0.8
    #: So many matches have to agree on a homography, which has 8 parameters.
    INLIERS = 6
    #: So many on a similarity, which has 4, and scales by at most ``LARGEST`` or its inverse.
    SIMILAR = 4
    LARGEST = 2.5

    def __init__(self) -> None:
        super().__init__()
        self._sift = cv2.SIFT.create(1000, contrastThreshold=0.001)
        self._matcher = cv2.BFMatcher.create(cv2.NORM_L2)

    @torch.no_grad()
    def __call__(
        self, target: torch.Tensor, sources: torch.Tensor | Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow and error."""
        frames = check_frames(target, sources)
        count, (batch, _, height, width) = len(frames) - 1, frames[0].shape
        inpainted = [torch.stack([_inpainted(one) for one in frame.cpu()]) for frame in frames]
        features = [[self._features(one) for one in frame] for frame in inpainted]
        flow = torch.empty(count * batch, 2, height, width)
        error = torch.empty(count * batch, 1, height, width)
        failed = []
        for pair in range(count * batch):
            t, b = divmod(pair, batch)
            found = self._homography(features[0][b], features[1 + t][b], height, width)
            if found is None:
                failed.append(pair)
            else:
                flow[pair], error[pair] = _flow(found[0], height, width), found[1]
        if failed:
            first = torch.cat([inpainted[0]] * count)[failed]
            dense, dense_error = super().__call__(first, [torch.cat(inpainted[1:])[failed]])
            flow[failed], error[failed] = dense[:, 0], dense_error[:, 0]
        device = frames[0].device
        return by_source(flow.to(device), count), by_source(error.to(device), count)

    def _features(self, frame: torch.Tensor) -> _Features:
        """Those of ``[4,H,W]`` that are not masked."""
        picture = grey(bytes_of(frame[None])[0])
        seen: np.ndarray = np.where(frame[3].numpy() > 0, 0, 255).astype(np.uint8)
        factor = max(1, math.ceil(self.SHORTER_SIDE / min(picture.shape)))
        if factor > 1:
            picture = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
            seen = cv2.resize(seen, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
        # Features of a mask's border would move with the mask.
        seen = cv2.erode(seen, np.ones((5, 5), np.uint8))
        keypoints, descriptors = self._sift.detectAndCompute(picture, seen)
        points = np.array([k.pt for k in keypoints], np.float64).reshape(-1, 2)
        if descriptors is None:
            descriptors = np.empty((0, 128), np.float32)
        return _Features((points + 0.5) / factor - 0.5, descriptors)

    def _homography(
        self, target: _Features, source: _Features, height: int, width: int
    ) -> tuple[np.ndarray, float] | None:
        """``[3,3]`` from the target to the source, and its error in pixels."""
        if min(len(target.points), len(source.points)) < self.SIMILAR:
            return None
        pairs = [
            (best.queryIdx, best.trainIdx)
            for best, second in self._matcher.knnMatch(target.descriptors, source.descriptors, k=2)
            if best.distance < self.RATIO * second.distance
        ]
        if len(pairs) < self.SIMILAR:
            return None
        first, second = (
            points[list(i)]
            for points, i in zip((target.points, source.points), zip(*pairs, strict=True), strict=True)
        )
        # Places are found to about half a pixel, and less exactly for the large features of large frames.
        threshold = 0.5 + 1.5 * min(height, width) / 256
        cv2.setRNGSeed(0)
        found = self._tilted(first, second, threshold, height, width)
        found = found or self._similar(first, second, threshold)
        if found is None:
            return None
        matrix, inside = found
        distances = np.linalg.norm(_moved(matrix, first[inside]) - second[inside], axis=1)
        return matrix, float(distances.mean())

    def _tilted(
        self, first: np.ndarray, second: np.ndarray, threshold: float, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """A homography and which matches agree with it."""
        if len(first) < self.INLIERS:
            return None
        matrix, inliers = cv2.findHomography(first, second, cv2.USAC_MAGSAC, threshold)
        if matrix is None or inliers.sum() < self.INLIERS:
            return None
        corners = np.array([[0, 0], [width, 0], [0, height], [width, height]], np.float64)
        # At zero and below the plane is seen from its edge or from behind.
        if (corners @ matrix[2, :2] + matrix[2, 2]).min() < 0.1:
            return None
        return matrix, inliers.ravel() > 0

    def _similar(
        self, first: np.ndarray, second: np.ndarray, threshold: float
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """A similarity, as a homography, and which matches agree with it."""
        matrix, inliers = cv2.estimateAffinePartial2D(
            first, second, method=cv2.RANSAC, ransacReprojThreshold=threshold
        )
        if matrix is None or inliers.sum() < self.SIMILAR:
            return None
        if not 1 / self.LARGEST < np.sqrt(abs(np.linalg.det(matrix[:, :2]))) < self.LARGEST:
            return None
        return np.vstack([matrix, [0, 0, 1]]), inliers.ravel() > 0


def _inpainted(frame: torch.Tensor) -> torch.Tensor:
    """``[4,H,W]``, RGB and mask -> float32, and independent of what the mask hides."""
    mask = frame[3].float()
    colours = bytes_of(frame[None])[0].permute(1, 2, 0).contiguous().numpy()
    pixels = inpaint_frame(colours, mask.numpy() > 0)
    return torch.cat([torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, mask[None]])


def _flow(matrix: np.ndarray, height: int, width: int) -> torch.Tensor:
    """``[2,H,W]`` float32, x first."""
    places = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float64)
    return torch.from_numpy((_moved(matrix, places) - places).astype(np.float32)).permute(2, 0, 1)


def _moved(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points ``[...,2]`` under a homography."""
    homogeneous = points @ matrix[:, :2].T + matrix[:, 2]
    return homogeneous[..., :2] / homogeneous[..., 2:]
