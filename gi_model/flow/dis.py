"""Dense inverse search, from OpenCV: needs no weights."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch

from gi_kernels import checks
from gi_kernels.precision import accumulation_dtype
from gi_model.flow.stage import by_source, check_frames, complete_both, consistency_error


class DISFlow:
    """Optical flow by Kroeger et al., "Fast Optical Flow using Dense Inverse Search", 2016."""

    #: The patches of the coarsest level need about this many pixels along each side.
    SMALLEST = 32

    def __init__(self) -> None:
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        # The preset stops at half resolution. Chained over many frames, its errors add up.
        self._dis.setFinestScale(0)

    def __call__(self, image1: torch.Tensor, image2: torch.Tensor) -> torch.Tensor:
        """Flow ``[B,2,H,W]`` in pixels, x first, from ``image1`` to ``image2`` (``[B,3,H,W]`` uint8)."""
        flows = [self._estimate(grey(a), grey(b)) for a, b in zip(image1, image2, strict=True)]
        return torch.from_numpy(np.stack(flows))

    def _estimate(self, image1: np.ndarray, image2: np.ndarray) -> np.ndarray:
        height, width = image1.shape
        bottom, right = max(0, self.SMALLEST - height), max(0, self.SMALLEST - width)
        padded = [cv2.copyMakeBorder(i, 0, bottom, 0, right, cv2.BORDER_REPLICATE) for i in (image1, image2)]
        flow = self._dis.calc(padded[0], padded[1], None)[:height, :width]  # type: ignore[call-overload]
        return flow.transpose(2, 0, 1)


class DISStage:
    r"""A :class:`~gi_model.flow.FlowStage` without a network: the same arguments and results by DIS.

    Flows are estimated at the frames' own size, then completed inside the target's mask; the error is
    :math:`\tfrac{1}{2} \sum_i |f_i + b_i(p + f)|`. Frames on another device are copied to the CPU.
    """

    def __init__(self) -> None:
        self.estimator = DISFlow()

    @torch.no_grad()
    def __call__(
        self, target: torch.Tensor, sources: torch.Tensor | Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow and error.

        Args:
            target: ``[B,4,H,W]``, RGB and mask in [0, 1], any floating dtype.
            sources: ``[B,T,4,H,W]``, or a sequence of T frames ``[B,4,H,W]``.

        Returns:
            Flow ``[B,T,2,H,W]`` in pixels, x first, and error ``[B,T,1,H,W]``, both float32.

        Raises:
            TypeError, ValueError: an argument of the wrong type, rank, size or device; before any work.
        """
        target, *others = check_frames(target, sources)
        mask = target[:, 3:].to(accumulation_dtype(target.dtype))
        first, second = bytes_of(torch.cat([target] * len(others))), bytes_of(torch.cat(others))
        flow, backward = (
            self.estimator(*pair).to(target.device) for pair in ((first, second), (second, first))
        )
        flow, backward = complete_both(flow, backward, mask)
        return by_source(flow, len(others)), by_source(consistency_error(flow, backward), len(others))

    def encode(self, rgba: torch.Tensor) -> torch.Tensor:
        """Frames ``[B,4,H,W]`` as they are: DIS has no work to keep."""
        checks.shapes(("rgba", rgba, "B 4 H W"))
        return rgba


def grey(image: torch.Tensor) -> np.ndarray:
    """``[3,H,W]`` RGB -> ``[H,W]``."""
    return cv2.cvtColor(np.ascontiguousarray(image.numpy().transpose(1, 2, 0)), cv2.COLOR_RGB2GRAY)


def bytes_of(frames: torch.Tensor) -> torch.Tensor:
    """Colours of ``[N,4,H,W]`` in [0, 1] -> ``[N,3,H,W]`` uint8."""
    return (255 * frames[:, :3].float().cpu()).round().clamp(0, 255).byte()
