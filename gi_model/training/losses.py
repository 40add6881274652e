"""The terms of the published objective, on images in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels import checks
from gi_model.discriminator import Discriminator


def weighted_l1(
    predicted: torch.Tensor, image: torch.Tensor, mask: torch.Tensor, known: float = 10, missing: float = 0
) -> torch.Tensor:
    """``mean(w * |predicted - image|)``; w is ``known`` where ``mask [B,1,H,W]`` is 0, ``missing`` where 1.

    The mean runs over all numbers of ``[B,3,H,W]``: the size of the masks has an influence.
    """
    weight = mask * missing + (1 - mask) * known
    return (weight * (predicted - image).abs()).mean()


def feature_matching(
    predicted: Sequence[torch.Tensor], real: Sequence[torch.Tensor], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over layers of the mean squared difference of their features.

    Args:
        predicted, real: of a :class:`~gi_model.discriminator.Discriminator`, ``[B,C_i,h_i,w_i]``.
        mask: ``[B,1,H,W]``; differences count by one minus it, resized to the layer.
    """
    terms = []
    for ours, theirs in zip(predicted, real, strict=True):
        difference = (ours - theirs) ** 2
        if mask is not None:
            difference = difference * (1 - _resized(mask, ours, "bilinear"))
        terms.append(difference.mean())
    return torch.stack(terms).mean()


@dataclass(frozen=True)
class DiscriminatorTerms:
    """What a step of the discriminator minimizes, and what to watch.

    Attributes:
        loss: scalar, to be differentiated.
        real, fake: mean logits of the real and of the predicted images.
        penalty: the penalty's share of the loss.
    """

    loss: torch.Tensor
    real: torch.Tensor
    fake: torch.Tensor
    penalty: torch.Tensor


@dataclass(frozen=True)
class Adversarial:
    """Non-saturating adversarial loss with a penalty on the gradient at real images (R1).

    With logits D, softplus s and the mask m at the size of the logits::

        generator:      weight * mean(s(-D(fake)))
        discriminator:  mean(s(-D(real)) + penalty * ||dD/dreal||^2 + F)
        F = m s(D(fake)) + (1 - m) s(-D(fake))    with mask_as_target: known parts count as real
        F = s(D(fake))                            without

    The penalty is computed in every step and has no factor 1/2. ``weight`` is that of the generator only.

    Args:
        weight, penalty: factors; published ``weight`` and ``gp_coef``.
        mask_as_target: published ``mask_as_fake_target``.
        masked_generator, masked_discriminator: count only logits inside the mask; the mean still runs
            over all. Published ``use_unmasked_for_gen`` and ``use_unmasked_for_discr``, negated.
        extra: the generator's logits count ``1 + extra * m``, with ``mask_as_target``; published
            ``extra_mask_weight_for_gen``.
        scaling: ``nearest``, ``bilinear`` or ``maxpool``: how the mask is brought to the size of the logits.

    Raises:
        ValueError: combinations without a meaning.

    Source: Mescheder et al., "Which training methods for GANs do actually converge?", 2018.
    """

    weight: float = 10
    penalty: float = 0.001
    mask_as_target: bool = True
    masked_generator: bool = False
    masked_discriminator: bool = False
    extra: float = 0
    scaling: str = "nearest"

    def __post_init__(self) -> None:
        checks.one_of("scaling", self.scaling, ("nearest", "bilinear", "maxpool"))
        if self.masked_generator and not self.masked_discriminator:
            raise ValueError("masked_generator: expected masked_discriminator too")
        if self.masked_discriminator and self.mask_as_target:
            raise ValueError("masked_discriminator: expected mask_as_target=False")

    def generator_loss(self, fake_logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What the generator minimizes, of logits ``[B,1,h,w]`` and the target's mask ``[B,1,H,W]``."""
        terms = F.softplus(-fake_logits)
        if self.masked_generator:
            terms = terms * self._at(mask, fake_logits)
        elif self.mask_as_target and self.extra > 0:
            terms = terms * (1 + self.extra * self._at(mask, fake_logits))
        return self.weight * terms.mean()

    def discriminator_terms(
        self, discriminator: Discriminator, real: torch.Tensor, fake: torch.Tensor, mask: torch.Tensor
    ) -> DiscriminatorTerms:
        """Run the discriminator on real and predicted images ``[B,3,H,W]``, which get no gradients.

        The penalty is zero where gradients are disabled. It is differentiated through: batch norms in
        training mode let the images of a batch have an influence on each other, and it counts.
        """
        real = real.detach().requires_grad_(torch.is_grad_enabled())
        real_logits, _ = discriminator(real)
        fake_logits, _ = discriminator(fake.detach())
        penalty = self.penalty * self._penalty(real_logits, real)
        terms = F.softplus(fake_logits)
        if self.masked_discriminator or self.mask_as_target:
            inside = self._at(mask, fake_logits)
            terms = inside * terms
            if self.mask_as_target:
                terms = terms + (1 - inside) * F.softplus(-fake_logits)
        loss = (F.softplus(-real_logits) + penalty + terms).mean()
        return DiscriminatorTerms(
            loss, real_logits.detach().mean(), fake_logits.detach().mean(), penalty.detach()
        )

    def _penalty(self, logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Mean over the batch of the squared norm of the gradient of all logits by an image."""
        if not logits.requires_grad:
            return logits.new_zeros(())
        (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        return gradient.flatten(1).square().sum(dim=1).mean()

    def _at(self, mask: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return _resized(mask, logits, self.scaling)


def _resized(mask: torch.Tensor, like: torch.Tensor, scaling: str) -> torch.Tensor:
    """``mask [B,1,H,W]`` at the size of ``like [B,C,h,w]``."""
    size = like.shape[2:]
    if mask.shape[2:] == size:
        return mask
    if scaling == "maxpool":
        return nn.functional.adaptive_max_pool2d(mask, list(size))
    if scaling == "bilinear":
        return F.interpolate(mask, size, mode="bilinear", align_corners=False)
    return F.interpolate(mask, size, mode=scaling)
