"""Keyframe propagation on the kernels of ``gi_kernels``."""
