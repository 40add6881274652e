"""Tensors out of checkpoint files, without running anything a file says.

A ``.ckpt`` or ``.pth`` file holds a pickle: a program that may import and call whatever is installed.
``pickles`` reads that program itself. It imports nothing and calls nothing: what the program would
build is kept as inert ``descriptions``, and a tensor is made from its description only when it is
returned (``loading``) and has been checked against the bytes that the file really has (``archives``,
``legacy``, ``safetensors``). What is held in memory besides the tensors is bounded in each part.

``runs`` reads what a training run needs to go on, in the same way.

Published names of tensors, and loading them into modules: ``gi_model.published``.
"""

from gi_model.checkpoints.loading import load_checkpoint
from gi_model.checkpoints.runs import load_run
from gi_model.errors import CheckpointError

__all__ = ["CheckpointError", "load_checkpoint", "load_run"]
