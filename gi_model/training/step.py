"""One batch of the published training: a pass for the generator, then one for the discriminator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gi_model.discriminator import Discriminator
from gi_model.flow import Stage
from gi_model.training.objective import Objective, Terms


@dataclass(frozen=True)
class Batch:
    """Frames in [0, 1], masks 1 where pixels are missing.

    Attributes:
        image, mask: of the target, ``[B,3,H,W]`` and ``[B,1,H,W]``.
        srcs, srcs_masks: of the references, ``[B,T,3,H,W]`` and ``[B,T,1,H,W]``.
        flows, errors: from the target to each reference, ``[B,T,2,H,W]`` and ``[B,T,1,H,W]``, in pixels.
    """

    image: torch.Tensor
    mask: torch.Tensor
    srcs: torch.Tensor
    srcs_masks: torch.Tensor
    flows: torch.Tensor | None = None
    errors: torch.Tensor | None = None

    @staticmethod
    def of_samples(
        samples: Mapping[str, torch.Tensor], stage: Stage | None = None, sees_hidden: bool = True
    ) -> Batch:
        """From collated samples, channels last in [-1, 1]; the flow, if a stage is given, is estimated once.

        As published, the flow network sees whole frames, the target's hidden pixels among them; otherwise
        hidden pixels are black for it. The flow inside the target's mask is completed from outside all the
        same.
        """
        named = {name: samples[name] for name in ("image", "mask", "srcs", "srcs_masks")}
        frames = {name: (value.movedim(-1, -3) + 1) / 2 for name, value in named.items()}
        flows = errors = None
        if stage is not None:
            with torch.no_grad():
                flows, errors = stage(
                    *(
                        torch.cat(
                            [frames[k] if sees_hidden else frames[k] * (1 - frames[m]), frames[m]], dim=-3
                        )
                        for k, m in (("image", "mask"), ("srcs", "srcs_masks"))
                    )
                )
        return Batch(**frames, flows=flows, errors=errors)

    @property
    def input(self) -> torch.Tensor:
        """The masked target with its mask, ``[B,4,H,W]``."""
        return torch.cat([self.image * (1 - self.mask), self.mask], dim=1)

    @property
    def references(self) -> torch.Tensor:
        """The masked references with their masks, ``[B,T,4,H,W]``."""
        return torch.cat([self.srcs * (1 - self.srcs_masks), self.srcs_masks], dim=2)

    def composite(self, predicted: torch.Tensor) -> torch.Tensor:
        """``predicted`` inside the target's mask, the target outside."""
        return self.mask * predicted + (1 - self.mask) * self.image


class Step(nn.Module):
    """The two passes of a batch.

    The generator runs in both: in the second one with the weights that the first may have changed, and
    without gradients. Networks stay in the mode they are in, which in the published training is training
    mode throughout, so that batch norms update their statistics in every run.

    Args:
        generator: called as ``generator(input, srcs, flows=..., flow_errs=...)``.
        discriminator, objective: what judges it.
    """

    def __init__(self, generator: nn.Module, discriminator: Discriminator, objective: Objective) -> None:
        super().__init__()
        self.generator, self.discriminator, self.objective = generator, discriminator, objective

    def predict(self, batch: Batch) -> torch.Tensor:
        """``[B,3,H,W]`` in [0, 1]."""
        return filled(self.generator, batch)

    def generator_pass(self, batch: Batch) -> tuple[torch.Tensor, Terms]:
        """The generator's loss, whose gradients reach nothing else, and its terms."""
        with frozen(self.discriminator):
            terms = self.objective.generator_terms(
                self.discriminator, self.predict(batch), batch.image, batch.mask
            )
            return torch.stack(list(terms.values())).sum(), terms

    def discriminator_pass(self, batch: Batch) -> tuple[torch.Tensor, Terms]:
        """The discriminator's loss, whose gradients reach nothing else, and what to watch."""
        with torch.no_grad():
            predicted = self.predict(batch)
        terms = self.objective.discriminator_terms(self.discriminator, predicted, batch.image, batch.mask)
        return terms["adv"], terms


class Alternation:
    """Steps of two optimizers over accumulated batches.

    Every batch runs both passes, or the generator's alone where nothing is judged by the discriminator;
    their gradients, divided by ``accumulate``, gather until ``accumulate`` batches are done or the epoch
    ends, however many there were. Learning rates follow ``schedule``, a factor of the number of steps done.

    Args:
        step: the networks.
        optimizers: of the generator and of the discriminator.
        schedule: number of steps done -> factor of the optimizers' own learning rates.
        accumulate: batches per step.
        rescale: divide the gradients of a last, short window by its own number of batches; as published, they
            are divided by ``accumulate``.
        backward: called with a loss, in place of ``loss.backward()``, and whether the optimizer steps then.
        inspect: called with 0 or 1, for generator or discriminator, and the terms of that pass, before
            they are learnt from; it may raise.
    """

    def __init__(
        self,
        step: Step,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
        schedule: Callable[[int], float],
        accumulate: int = 1,
        backward: Callable[[torch.Tensor, bool], None] = lambda loss, stepping: loss.backward(),
        inspect: Callable[[int, Terms], None] = lambda which, terms: None,
        rescale: bool = False,
    ) -> None:
        self.step, self.optimizers, self.accumulate = step, optimizers, accumulate
        self.backward, self.inspect, self.rescale = backward, inspect, rescale
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, schedule) for o in optimizers]
        #: How many of the optimizers step.
        self.passes = 2 if step.objective.judged else 1
        self.global_step = 0

    def batch(self, batch: Batch, number: int, last: bool) -> tuple[Terms, Terms]:
        """The passes of batch ``number`` of an epoch, the ``last`` one or not; their terms."""
        stepping = last or (number + 1) % self.accumulate == 0
        terms: list[Terms] = [{}, {}]
        for which, run in enumerate((self.step.generator_pass, self.step.discriminator_pass)[: self.passes]):
            loss, found = run(batch)
            self.inspect(which, found)
            self._learn(which, loss, number, stepping)
            terms[which] = {name: term.detach() for name, term in found.items()}
        if stepping:
            for schedule in self.schedules[: self.passes]:
                schedule.step()
            self.global_step += 1
        return terms[0], terms[1]

    def _learn(self, which: int, loss: torch.Tensor, number: int, stepping: bool) -> None:
        optimizer = self.optimizers[which]
        if number % self.accumulate == 0:
            optimizer.zero_grad()
        self.backward(loss / self.accumulate, stepping)
        if stepping:
            if self.rescale and (gathered := number % self.accumulate + 1) < self.accumulate:
                for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                    if parameter.grad is not None:
                        parameter.grad.mul_(self.accumulate / gathered)
            optimizer.step()


def filled(generator: nn.Module, batch: Batch, **options: Any) -> Any:
    """What a generator makes of a batch: ``[B,3,H,W]`` in [0, 1]; ``options`` are its own."""
    return generator(batch.input, batch.references, flows=batch.flows, flow_errs=batch.errors, **options)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the parameters of ``module`` inside the block."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in eval mode inside the block; then each part in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
