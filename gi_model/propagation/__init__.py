"""Repairing masked regions of a video from the frames that see them, and carrying edits through it."""

from gi_model.propagation.edits import EditError, EditPropagator
from gi_model.propagation.engine import Propagator
from gi_model.propagation.learned import LearnedPropagator, load_propagator
from gi_model.propagation.policy import Policy, VisibilityPolicy

__all__ = [
    "EditError",
    "EditPropagator",
    "LearnedPropagator",
    "Policy",
    "Propagator",
    "VisibilityPolicy",
    "load_propagator",
]
