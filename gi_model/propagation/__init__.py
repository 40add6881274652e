"""Repairing masked regions of a video from the frames that see them."""

from gi_model.propagation.engine import Propagator, inpaint_frame

__all__ = ["Propagator", "inpaint_frame"]
