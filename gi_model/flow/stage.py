"""From frames to what the generator reads: flows to the references, completed, and their errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gi_kernels import checks, complete_flow, flow_warp
from gi_kernels.nn import resize, scale_flow
from gi_kernels.precision import accumulation_dtype
from gi_model.flow.raft import RAFT, ImageEncoding
from gi_model.graphs import Graphs


@dataclass(frozen=True)
class FrameEncoding:
    """What :class:`FlowStage` needs to know of frames, as target or as source.

    Attributes:
        image: what RAFT found in them, at the stage's resolution.
        mask: ``[B,1,H,W]``, at the frames' own size; 1 where a frame is to be filled.
    """

    image: ImageEncoding
    mask: torch.Tensor


class FlowStage(nn.Module):
    r"""Flow from a target to each of its references, completed inside the mask, and its error.

    At ``resolution``, of h x w pixels, RAFT finds flow ``f`` from the target to a reference and ``b``
    back; both are resized to the frames' H x W pixels (bilinear, ``align_corners=True``), their
    components scaled by ``W/w`` and ``H/h``, and completed inside the *target's* mask. Then

    .. math:: error = \tfrac{1}{2} \left( \tfrac{W}{w} |f_x + b_x(p + f)| + \tfrac{H}{h} |f_y + b_y(p + f)|
        \right)

    which scales a second time, as published. All pairs and both directions are one batch.

    A frame is encoded once, whatever the number of pairs it is part of. To keep encodings between the
    frames of a video, hold on to what ``encode`` returns and pass it instead of the image, as target,
    as source, or both by turns; the stage itself keeps nothing::

        kept = [stage.encode(frame) for frame in window]
        flow, error = stage(kept[0], kept[1:])

    The result is bit-equal to that from images on the CPU.

    Runs without gradients and freezes ``raft``'s parameters. On a GPU its work is launched as one CUDA
    graph per size, see :class:`~gi_model.graphs.Graphs`.

    Args:
        raft: the network; moved to bfloat16, or under autocast, the flow is still float32.
        resolution: height and width at which it sees the frames.
        iterations: of the network.

    Source: the flow stage of Esser, Michael, Sengupta, "Towards Unified Keyframe Propagation Models", 2022.
    """

    def __init__(self, raft: RAFT, resolution: tuple[int, int] = (256, 256), iterations: int = 20) -> None:
        super().__init__()
        if not isinstance(raft, RAFT):
            raise TypeError(f"raft: expected a RAFT, got {type(raft).__name__}")
        if not isinstance(resolution, tuple | list) or len(resolution) != 2:
            raise TypeError(f"resolution: expected a pair (height, width), got {resolution!r}")
        for length in resolution:
            checks.positive("resolution", length)
        checks.positive("iterations", iterations)
        self.raft = raft.requires_grad_(False)
        self.resolution = (resolution[0], resolution[1])
        self.iterations = iterations
        self.graphs = Graphs()

    @torch.no_grad()
    def forward(
        self,
        target: torch.Tensor | FrameEncoding,
        sources: torch.Tensor | Sequence[torch.Tensor | FrameEncoding],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow and error.

        Args:
            target: ``[B,4,H,W]``, RGB and mask in [0, 1]; RAFT sees RGB as it is, also in the hole.
            sources: ``[B,T,4,H,W]``, or a sequence of T frames ``[B,4,H,W]``. Instead of a target or
                of any of the T frames, the result of ``encode``.

        Returns:
            Flow ``[B,T,2,H,W]`` in pixels, x first, and error ``[B,T,1,H,W]``, both float32 (float64
            where the network is).

        Raises:
            TypeError, ValueError: an argument of the wrong type, rank, size or device; before any work.
        """
        return self._launch(self._flows, target, sources)

    @torch.no_grad()
    def both_ways(
        self,
        target: torch.Tensor | FrameEncoding,
        sources: torch.Tensor | Sequence[torch.Tensor | FrameEncoding],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Flow and error as from a call, then flow and error from each source back to the target."""
        return self._launch(self._flows_both_ways, target, sources)

    @torch.no_grad()
    def encode(self, rgba: torch.Tensor) -> FrameEncoding:
        """Frames ``[B,4,H,W]`` -> their encoding, which can stand for them in later calls."""
        checks.shapes(("rgba", rgba, "B 4 H W"))
        checks.nonempty("rgba", rgba, 2, 3)
        return self._launch(self._encode, rgba)

    def published_names(self) -> dict[str, tuple[str, ...]]:
        """Own state-dict keys -> the published keys, in a checkpoint behind ``flow.``."""
        return {
            f"raft.{key}": tuple(f"raft.{name}" for name in names)
            for key, names in self.raft.published_names().items()
        }

    def _launch(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)`` through CUDA graphs."""
        return self.graphs.run(
            function, *arguments, weights=lambda: [*self.raft.parameters(), *self.raft.buffers()]
        )

    def _flows(self, target: Any, sources: Any) -> tuple[torch.Tensor, torch.Tensor]:
        flow, backward, count, scale = self._completed(target, sources)
        error = consistency_error(flow, backward, scale)
        return by_source(flow, count), by_source(error, count)

    def _flows_both_ways(self, target: Any, sources: Any) -> tuple[torch.Tensor, ...]:
        flow, backward, count, scale = self._completed(target, sources)
        results = (
            flow,
            consistency_error(flow, backward, scale),
            backward,
            consistency_error(backward, flow, scale),
        )
        return tuple(by_source(each, count) for each in results)

    def _encode(self, rgba: torch.Tensor) -> FrameEncoding:
        rgba = rgba.to(accumulation_dtype(rgba.dtype))
        image = self.raft.encode(2 * resize(rgba[:, :3], self.resolution) - 1)
        return FrameEncoding(image, rgba[:, 3:].to(accumulation_dtype(image.features.dtype)))

    def _completed(
        self,
        target: torch.Tensor | FrameEncoding,
        sources: torch.Tensor | Sequence[torch.Tensor | FrameEncoding],
    ) -> tuple[torch.Tensor, torch.Tensor, int, tuple[float, float]]:
        """Flows ``[T*B,2,H,W]`` both ways, T, and the scale of their x and y components."""
        frames = check_frames(target, sources, FrameEncoding)
        first, *others = (f if isinstance(f, FrameEncoding) else self._encode(f) for f in frames)
        self._check_encodings(first, others)
        H, W = first.mask.shape[2:]
        scale = W / self.resolution[1], H / self.resolution[0]
        flow, backward = self.raft.match_both_ways(
            ImageEncoding.join([first.image] * len(others)),
            ImageEncoding.join([other.image for other in others]),
            self.iterations,
        )
        flow, backward = (scale_flow(resize(each, (H, W)), *scale) for each in (flow, backward))
        flow, backward = complete_both(flow, backward, first.mask)
        return flow, backward, len(others), scale

    def _check_encodings(self, target: FrameEncoding, sources: Sequence[FrameEncoding]) -> None:
        """Raise where an encoding is of another stage or precision; images were checked before."""
        for name, frame in zip(frame_names(len(sources)), [target, *sources], strict=True):
            if frame.image.size != self.resolution:
                raise ValueError(
                    f"{name}: expected an encoding at resolution {self.resolution}, got {frame.image.size}"
                )
            checks.same_dtype(("target", target.image.features), (name, frame.image.features))


def check_frames(
    target: torch.Tensor | FrameEncoding,
    sources: torch.Tensor | Sequence[torch.Tensor | FrameEncoding],
    encoding: type[FrameEncoding] | None = None,
) -> list[Any]:
    """The target and T sources, each ``[B,4,H,W]`` or an encoding of such; raise if they do not fit."""
    if isinstance(sources, torch.Tensor):
        checks.shapes(("sources", sources, "B T 4 H W"))
        sources = list(sources.unbind(1))
    if not isinstance(sources, list | tuple):
        raise TypeError(f"sources: expected a tensor or a sequence of frames, got {type(sources).__name__}")
    if len(sources) == 0:
        raise ValueError("sources: expected at least one source, got none")
    frames = [target, *sources]
    arguments = []
    for name, frame in zip(frame_names(len(sources)), frames, strict=True):
        if isinstance(frame, torch.Tensor):
            arguments.append((name, frame, "B 4 H W"))
        elif encoding is not None and isinstance(frame, encoding):
            arguments.append((name, frame.mask, "B 1 H W"))
        else:
            expected = "a torch.Tensor" + (f" or a {encoding.__name__}" if encoding else "")
            raise TypeError(f"{name}: expected {expected}, got {type(frame).__name__}")
    checks.shapes(*arguments)
    checks.nonempty("target", arguments[0][1], 2, 3)
    return frames


def frame_names(count: int) -> list[str]:
    """What the frames of ``check_frames`` are called in messages."""
    return ["target", *(f"sources[{t}]" for t in range(count))]


def complete_both(
    flow: torch.Tensor, backward: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flows ``[T*B,2,H,W]``, source by source, completed inside ``mask`` ``[B,1,H,W]``."""
    count = len(flow) // max(1, len(mask))
    both = complete_flow(torch.cat([flow, backward]), mask.to(flow.dtype).repeat(2 * count, 1, 1, 1))
    return both[: len(flow)], both[len(flow) :]


def consistency_error(
    flow: torch.Tensor, backward: torch.Tensor, scale: tuple[float, float] = (1.0, 1.0)
) -> torch.Tensor:
    """Mean over x and y of ``scale * abs(flow + backward sampled along flow)``: ``[N,1,H,W]``.

    Not ``gi_kernels.flow_consistency``, which is that mean with a scale of one.
    """
    with torch.autocast(flow.device.type, enabled=False):  # flows keep their precision
        deviation = (flow + flow_warp(backward, flow)).abs()
    return scale_flow(deviation, *scale).mean(dim=1, keepdim=True)


def by_source(maps: torch.Tensor, count: int) -> torch.Tensor:
    """``[T*B,C,H,W]``, source by source -> ``[B,T,C,H,W]``."""
    return maps.unflatten(0, (count, len(maps) // count)).transpose(0, 1)
