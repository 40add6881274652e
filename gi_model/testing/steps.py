"""One step of propagation to time: flow stage and generator for a target and its references.

Weights are random. Ours keeps what belongs to the references, as between the frames of a video;
published is eager PyTorch in float32, pair by pair, everything computed anew for each target.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from gi_model import build_generator
from gi_model.flow import RAFT, FlowStage
from gi_model.generator import TwoStreamGenerator
from gi_model.testing.published_flow import PublishedFlowStage, published_flow_stage
from gi_model.testing.published_generator import published_generator

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Pair:
    """The same work, ours and as published; each call returns its result."""

    ours: Call
    published: Call


class Steps:
    """A step and its two parts, for ``batch`` targets with ``references`` each.

    Args:
        batch, references: B and T.
        size: height and width of the frames.
        device: where all of it runs.
        iterations: of the flow network.
    """

    def __init__(
        self,
        batch: int = 1,
        references: int = 4,
        size: int = 256,
        device: str | torch.device = "cpu",
        iterations: int = 20,
    ) -> None:
        self.device, self.iterations = torch.device(device), iterations
        target, sources = frames(batch, references, size)
        self.target, self.sources = target.to(self.device), sources.to(self.device)
        self.raft, self.generator = networks(self.device)

    def flow_stage(self, dtype: torch.dtype = torch.float32) -> Pair:
        """Flow to all references, their encodings kept."""
        ours, theirs = self._flow_stages()
        with self._autocast(dtype):
            kept = [ours.encode(s) for s in self.sources.unbind(1)]

        def run() -> torch.Tensor:
            with self._autocast(dtype):
                return torch.cat(ours(self.target, kept), dim=2)

        return Pair(run, lambda: torch.cat(theirs(self.target, self.sources), dim=2))

    def generation(self, dtype: torch.dtype = torch.float32) -> Pair:
        """Filling the targets by the generator, their references encoded."""
        fast, baseline = self._fast(dtype), published_generator(self.generator)
        target, sources = blanked(self.target), blanked(self.sources)
        flows, errors = self.flows
        with torch.no_grad():
            references = fast.encode_references(sources)

        @torch.no_grad()
        def run() -> torch.Tensor:
            return fast(target, references=references, flows=flows, flow_errs=errors)

        @torch.no_grad()
        def published() -> torch.Tensor:
            return baseline(target, sources, flows, errors)

        return Pair(run, published)

    def whole(self, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Pair:
        """Flow and generator for new targets, everything of the references kept.

        ``compiled``: the published step under ``torch.compile(mode="max-autotune")``.
        """
        stage, flow_baseline = self._flow_stages()
        fast, baseline = self._fast(dtype), published_generator(self.generator)
        with torch.no_grad(), self._autocast(dtype):
            kept = [stage.encode(s) for s in self.sources.unbind(1)]
        with torch.no_grad():
            references = fast.encode_references(blanked(self.sources))

        @torch.no_grad()
        def run() -> torch.Tensor:
            with self._autocast(dtype):
                flows, errors = stage(self.target, kept)
            return fast(blanked(self.target), references=references, flows=flows, flow_errs=errors)

        def step(target: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
            flows, errors = flow_baseline(target, sources)
            return baseline(blanked(target), blanked(sources), flows, errors)

        if compiled:
            step = torch.compile(step, mode="max-autotune")

        @torch.no_grad()
        def published() -> torch.Tensor:
            return step(self.target, self.sources)

        return Pair(run, published)

    @cached_property
    def flows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Flows [B,T,2,H,W] and errors [B,T,1,H,W], of noise."""
        B, T, _, H, W = self.sources.shape
        random = torch.Generator().manual_seed(2)
        flows = 4 * torch.randn(B, T, 2, H, W, generator=random)
        return flows.to(self.device), torch.rand(B, T, 1, H, W, generator=random).to(self.device)

    def _flow_stages(self) -> tuple[FlowStage, PublishedFlowStage]:
        ours = FlowStage(self.raft, iterations=self.iterations)
        return ours, published_flow_stage(self.raft, iterations=self.iterations)

    def _fast(self, dtype: torch.dtype) -> TwoStreamGenerator:
        fast = self.generator.for_inference(None if dtype == torch.float32 else dtype)
        assert isinstance(fast, TwoStreamGenerator)
        return fast

    def _autocast(self, dtype: torch.dtype) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def frames(batch: int, references: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets [B,4,H,W] and sources [B,T,4,H,W]: smooth noise that moves, and a box to be filled."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, size // 8, size // 8, generator=random)
    image = F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)
    moved = torch.stack([image.roll((2 * t, 3 * t), (2, 3)) for t in range(references + 1)], dim=1)
    masks = torch.zeros(batch, references + 1, 1, size, size)
    masks[:, 0, :, 3 * size // 8 : 5 * size // 8, 5 * size // 16 : 11 * size // 16] = 1
    rgba = torch.cat([moved, masks], dim=2)
    return rgba[:, 0], rgba[:, 1:]


def networks(device: torch.device) -> tuple[RAFT, TwoStreamGenerator]:
    """Flow network and generator, with weights of a size that keeps activations alive."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        raft, generator = RAFT(), build_generator("ours").eval()
        assert isinstance(generator, TwoStreamGenerator)
        for module in (*raft.modules(), *generator.modules()):
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.6 / module.weight[0].numel() ** 0.5)
    return raft.to(device), generator.to(device)


def blanked(rgba: torch.Tensor) -> torch.Tensor:
    """Frames with their holes set to zero, as the generator wants them."""
    colours, mask = rgba.split([3, 1], dim=-3)
    return torch.cat([colours * (1 - mask), mask], dim=-3)
