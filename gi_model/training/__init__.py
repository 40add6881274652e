"""Training of the two-stream generator by the published recipe."""

from gi_model.training.losses import Adversarial, feature_matching, weighted_l1
from gi_model.training.objective import Objective, Weights
from gi_model.training.perceptual import PerceptualLoss, SceneEncoder
from gi_model.training.schedule import WarmUpCosine
from gi_model.training.step import Alternation, Batch, Step

__all__ = [
    "Adversarial",
    "Alternation",
    "Batch",
    "Objective",
    "PerceptualLoss",
    "SceneEncoder",
    "Step",
    "WarmUpCosine",
    "Weights",
    "feature_matching",
    "weighted_l1",
]
