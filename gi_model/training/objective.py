"""The published objective of generator and discriminator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gi_model.discriminator import Discriminator
from gi_model.training.losses import Adversarial, feature_matching, weighted_l1
from gi_model.training.perceptual import PerceptualLoss

Terms = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """Factors of the terms that are no objects of their own, as published."""

    l1_known: float = 10
    l1_missing: float = 0
    feature_matching: float = 100
    feature_matching_masked: bool = False


class Objective(nn.Module):
    """What generator and discriminator minimize.

    Generator: weighted L1 + adversarial + feature matching + perceptual. All terms see the prediction as
    it is, not the composite. Where neither the adversarial term nor feature matching has a
    weight, nothing is ``judged``, and the discriminator is not used. Otherwise it is used in the mode it is
    in; in the published training that is training mode in both steps, so that its running statistics are
    updated four times a batch.

    Args:
        adversarial: the adversarial terms.
        perceptual: None leaves that term out.
        weights: factors of the others.
    """

    def __init__(
        self,
        adversarial: Adversarial | None = None,
        perceptual: PerceptualLoss | None = None,
        weights: Weights | None = None,
    ) -> None:
        super().__init__()
        self.adversarial = adversarial or Adversarial()
        self.weights = weights or Weights()
        self.perceptual = perceptual

    @property
    def judged(self) -> bool:
        """Whether any term of the generator depends on the discriminator."""
        return self.adversarial.weight > 0 or self.weights.feature_matching > 0

    def generator_terms(
        self,
        discriminator: Discriminator,
        predicted: torch.Tensor,
        image: torch.Tensor,
        mask: torch.Tensor,
    ) -> Terms:
        """The weighted terms, by name; their sum is the loss.

        Args:
            discriminator: its parameters should not require gradients meanwhile.
            predicted, image: ``[B,3,H,W]`` in [0, 1].
            mask: ``[B,1,H,W]``, 1 where missing.
        """
        weights = self.weights
        terms = {"l1": weighted_l1(predicted, image, mask, weights.l1_known, weights.l1_missing)}
        if self.judged:
            _, real_features = discriminator(image)
            fake_logits, fake_features = discriminator(predicted)
            terms["adv"] = self.adversarial.generator_loss(fake_logits, mask)
        if weights.feature_matching > 0:
            matched = feature_matching(
                fake_features, real_features, mask if weights.feature_matching_masked else None
            )
            terms["fm"] = weights.feature_matching * matched
        if self.perceptual is not None:
            terms["resnet_pl"] = self.perceptual(predicted, image)
        return terms

    def discriminator_terms(
        self,
        discriminator: Discriminator,
        predicted: torch.Tensor,
        image: torch.Tensor,
        mask: torch.Tensor,
    ) -> Terms:
        """``adv`` is the loss; ``real_out``, ``fake_out`` and ``real_gp`` are to be watched."""
        terms = self.adversarial.discriminator_terms(discriminator, image, predicted, mask)
        return {
            "adv": terms.loss,
            "real_out": terms.real,
            "fake_out": terms.fake,
            "real_gp": terms.penalty,
        }
