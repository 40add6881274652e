"""Feature networks with the weights that users bring."""

from __future__ import annotations

import os
from typing import TypeVar

from torch import nn

from gi_model.checkpoints import load_checkpoint
from gi_model.errors import InputError
from gi_model.published import load_published

Network = TypeVar("Network", bound=nn.Module)


def with_weights(network: Network, weights: str | os.PathLike[str], unused: str) -> Network:
    """``network`` with the weights of a file, in any format that ``load_checkpoint`` reads.

    Args:
        unused: what the names of the file's last layer begin with, which the network does not have.

    Raises:
        InputError: the file cannot be read or does not fit.
    """
    state = {name: t for name, t in load_checkpoint(weights).items() if not name.startswith(unused)}
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):  # older files have no counters; they change nothing
            state.setdefault(name, tensor)
    try:
        load_published(network, state)
    except InputError as error:
        raise InputError(f"weights: {os.fspath(weights)}: {error}") from error
    return network
