"""Keyframe propagation on the kernels of ``gi_kernels``."""

from gi_model.checkpoints import load_checkpoint
from gi_model.configs import build_generator
from gi_model.published import export_published, load_published

__all__ = ["build_generator", "export_published", "load_checkpoint", "load_published"]
