"""Repairing masked regions of a video from the frames that see them."""

from gi_model.propagation.engine import Propagator, inpaint_frame
from gi_model.propagation.learned import LearnedPropagator, load_propagator
from gi_model.propagation.policy import Policy, VisibilityPolicy

__all__ = [
    "LearnedPropagator",
    "Policy",
    "Propagator",
    "VisibilityPolicy",
    "inpaint_frame",
    "load_propagator",
]
