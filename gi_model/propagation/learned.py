"""Propagation with weights: the two-stream generator fills the mask from frames around it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch

from gi_model.errors import InputError
from gi_model.flow import Stage
from gi_model.generator import CrossingGenerator
from gi_model.propagation.engine import inpaint_frame, windows, with_masks
from gi_model.references import References


@dataclass
class _Frame:
    image: np.ndarray  # [H,W,3] uint8
    mask: np.ndarray  # [H,W] bool
    # At the generator's size, made when they are first needed and kept while the frame is in the window.
    small_mask: np.ndarray | None = None
    kept: dict[str, Any] = field(default_factory=dict)


class LearnedPropagator:
    """Fills masked frames in order by a generator, with the frames around each as references.

    A frame is scaled so that its shorter side is at most ``size`` and both are multiples of the
    generator's step; what comes back is scaled up and put inside the mask only. References are, of at
    most ``radius`` frames back and ahead, those that hide least of what is to be filled, the nearest
    first. A frame is encoded once as a reference, and once for the flow.

    Memory is that of ``2 * radius + 1`` frames and their encodings, whatever the length of the clip.

    Args:
        generator: in eval mode, or a copy ``for_inference``.
        stage: flow and error from a target to its references.
        radius: how many frames to look back and ahead.
        references: how many of them serve as references, at most.
        size: pixels of the shorter side, at most; generators were trained at 256.

    Attributes:
        masked, unseen: masked pixels so far, and those of them in frames without any reference, which
            are inpainted.
    """

    def __init__(
        self,
        generator: CrossingGenerator,
        stage: Stage,
        radius: int = 15,
        references: int = 4,
        size: int = 256,
    ) -> None:
        for name, value in (("radius", radius), ("references", references)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.step = 2**generator.downsamplings
        if size < 2 * self.step:
            raise ValueError(f"size: expected at least {2 * self.step}, got {size}")
        if generator.training:
            raise ValueError("generator: expected eval mode, got training mode")
        self.generator, self.stage = generator, stage
        self.radius, self.references, self.size = radius, references, size
        self.masked = self.unseen = 0

    @torch.no_grad()
    def run(self, frames: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield repaired frames in order.

        Args:
            frames: ``[H,W,3]`` uint8 RGB images of one size.
            masks: ``[H,W]`` bool, true where a pixel is to be repaired; at least one per frame.

        Raises:
            ValueError: a mask is missing or of another size than its frame.
        """
        prepared = (_Frame(image, mask) for image, mask in with_masks(frames, masks))
        for window, centre in windows(prepared, self.radius):
            yield self._repair(window, centre)

    def _repair(self, window: deque[_Frame], centre: int) -> np.ndarray:
        frame = window[centre]
        if not frame.mask.any():
            return frame.image
        self.masked += int(frame.mask.sum())
        chosen = self._choose(window, centre)
        if not chosen:
            self.unseen += int(frame.mask.sum())
            return inpaint_frame(frame.image, frame.mask)
        references = References.join([self._encoded(f) for f in chosen])
        flows, errors = self.stage(self._for_flow(frame), [self._for_flow(f) for f in chosen])
        out = self.generator(self._blanked(frame), references=references, flows=flows, flow_errs=errors)
        height, width = frame.mask.shape
        filled = (255 * out[0].float().permute(1, 2, 0).numpy()).round().clip(0, 255).astype(np.uint8)
        filled = cv2.resize(filled, (width, height), interpolation=cv2.INTER_CUBIC)
        return np.where(frame.mask[..., None], filled, frame.image)

    def _choose(self, window: deque[_Frame], centre: int) -> list[_Frame]:
        """The frames that hide least of the hole; of equals the nearest."""
        hole = self._small_mask(window[centre])
        others = [i for i in range(len(window)) if i != centre and abs(i - centre) <= self.radius]
        hidden = {i: int((hole & self._small_mask(window[i])).sum()) for i in others}
        others.sort(key=lambda i: (hidden[i], abs(i - centre)))
        return [window[i] for i in others[: self.references]]

    def _encoded(self, frame: _Frame) -> References:
        if "references" not in frame.kept:
            frame.kept["references"] = self.generator.encode_references(self._blanked(frame)[:, None])
        return frame.kept["references"]

    def _for_flow(self, frame: _Frame) -> Any:
        """What the flow stage makes of a frame; the hole is inpainted, its content must not matter."""
        if "flow" not in frame.kept:
            colours = self._small(inpaint_frame(frame.image, frame.mask))
            frame.kept["flow"] = self.stage.encode(self._rgba(colours, frame))
        return frame.kept["flow"]

    def _blanked(self, frame: _Frame) -> torch.Tensor:
        colours = self._small(frame.image)  # what the hole has a share in is blanked anyway
        return self._rgba(np.where(self._small_mask(frame)[..., None], 0, colours), frame)

    def _rgba(self, colours: np.ndarray, frame: _Frame) -> torch.Tensor:
        """``[1,4,h,w]`` in [0, 1]."""
        rgb = torch.from_numpy(np.ascontiguousarray(colours)).permute(2, 0, 1).float() / 255
        mask = torch.from_numpy(self._small_mask(frame)).float()
        return torch.cat([rgb, mask[None]])[None]

    def _small(self, image: np.ndarray) -> np.ndarray:
        height, width = self._size(image)
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)

    def _small_mask(self, frame: _Frame) -> np.ndarray:
        """Everything that a masked pixel has a share in."""
        if frame.small_mask is None:
            frame.small_mask = self._small(frame.mask.astype(np.float32)) > 0
        return frame.small_mask

    def _size(self, image: np.ndarray) -> tuple[int, int]:
        scale = min(1.0, self.size / min(image.shape[:2]))
        height, width = (max(2, round(n * scale / self.step)) * self.step for n in image.shape[:2])
        return height, width


def load_propagator(
    checkpoint: str, flow_checkpoint: str | None, config: str, radius: int
) -> LearnedPropagator:
    """The generator of a checkpoint, with RAFT of another or, without one, with DIS.

    Raises:
        InputError: a checkpoint cannot be read or does not fit, or the configuration is unknown or one
            that sees no references.
    """
    from gi_model import build_generator, load_checkpoint, load_published
    from gi_model.flow import RAFT, DISStage, FlowStage

    generator = build_generator(config)
    if not isinstance(generator, CrossingGenerator):
        raise InputError(f"--config: expected a generator that looks at references, got {config}")
    load_published(generator, load_checkpoint(checkpoint, part="generator"))
    stage: Stage = DISStage()
    if flow_checkpoint is not None:
        state = load_checkpoint(flow_checkpoint)
        raft = RAFT(small="update_block.mask.0.weight" not in state)
        load_published(raft, state)
        stage = FlowStage(raft)
    fast = generator.eval().for_inference()
    assert isinstance(fast, CrossingGenerator)
    return LearnedPropagator(fast, stage, radius)
