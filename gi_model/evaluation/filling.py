"""A generator and its flow as one: samples of a validation set in, filled images out."""

from __future__ import annotations

from pathlib import Path

import torch

from gi_model.checkpoints import CheckpointError, load_checkpoint
from gi_model.configs import build_generator
from gi_model.errors import InputError
from gi_model.flow import RAFT, FlowStage, Stage, stage_without_weights
from gi_model.generator import Generator
from gi_model.published import load_published


class Filler:
    """Fills targets as the published evaluation does.

    The generator sees targets and references without their masked pixels; the flow stage sees all pixels,
    also those that are to be filled, as published.

    Args:
        generator: in eval mode, or a copy ``for_inference``.
        stage: flow and error from a target to its references; ``None`` for generators without flow.
    """

    def __init__(self, generator: Generator, stage: Stage | None) -> None:
        if generator.training:
            raise ValueError("generator: expected eval mode, got training mode")
        self.generator, self.stage = generator, stage
        self.step = 2**generator.downsamplings

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, masks: torch.Tensor, srcs: torch.Tensor, srcs_masks: torch.Tensor
    ) -> torch.Tensor:
        """Predictions ``[B,3,H,W]``, also where nothing is masked.

        Args:
            images: ``[B,3,H,W]`` in [0, 1]; masks: ``[B,1,H,W]``, 1 to be filled; srcs: ``[B,T,3,H,W]``;
                srcs_masks: ``[B,T,1,H,W]``.

        Raises:
            InputError: sizes that the generator cannot work with.
        """
        height, width = images.shape[-2:]
        if height % self.step or width % self.step or min(height, width) < 2 * self.step:
            raise InputError(
                f"data: expected sides that are multiples of {self.step}, at least {2 * self.step}, got "
                f"{width}x{height} pixels; see --multiple"
            )
        flows = errors = None
        if self.stage is not None:
            flows, errors = self.stage(
                torch.cat([images, masks], dim=1), torch.cat([srcs, srcs_masks], dim=2)
            )
        blanked = torch.cat([images * (1 - masks), masks], dim=1)
        references = torch.cat([srcs * (1 - srcs_masks), srcs_masks], dim=2)
        filled = self.generator(blanked, references, flows, errors)
        assert isinstance(filled, torch.Tensor)
        return filled


def load_filler(
    config: str | Path,
    checkpoint: str | Path,
    flow_checkpoint: str | Path | None = None,
    flow: str = "raft",
    device: str | torch.device = "cpu",
) -> Filler:
    """The generator of a checkpoint with its flow.

    Args:
        config: see ``build_generator``.
        checkpoint: with the generator's weights below ``generator``.
        flow_checkpoint: weights of RAFT, or ``None`` for those below ``flow.raft`` in ``checkpoint``.
        flow: ``raft``, as published, or ``dis`` or ``planar``, which need no weights.
        device: where to compute.

    Raises:
        InputError: a file cannot be read or does not fit, an unknown configuration, or no weights of RAFT.
    """
    generator = build_generator(config)
    load_published(generator, load_checkpoint(checkpoint, part="generator"))
    stage: Stage | None = None
    if generator.needs_flow:
        stage = stage_without_weights(flow) or _raft_stage(checkpoint, flow_checkpoint).to(device)
    return Filler(generator.eval().for_inference().to(device), stage)


def _raft_stage(checkpoint: str | Path, flow_checkpoint: str | Path | None) -> FlowStage:
    if flow_checkpoint is not None:
        state = load_checkpoint(flow_checkpoint)
    else:
        try:
            state = load_checkpoint(checkpoint, part="flow.raft")
        except CheckpointError as error:
            raise InputError(
                f"--flow-checkpoint: expected weights of RAFT, {checkpoint} has none ({error}); "
                "with --flow dis or planar flow needs no weights, but it is not the published one"
            ) from error
    return FlowStage(RAFT.of_published(state))
