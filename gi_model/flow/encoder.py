"""RAFT's image encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from gi_kernels.ops.fused_convolution import Activation
from gi_model.flow.layers import Convolution, convolution

Norm = Literal["instance", "batch", "none"]
Step = Callable[[torch.Tensor], torch.Tensor]
#: Beginnings of own state-dict keys -> those of the published keys of the same tensor.
Prefixes = dict[str, tuple[str, ...]]


class Encoder(nn.Module):
    """Images ``[N,3,H,W]`` -> features ``[N,outputs,H/8,W/8]``; H and W are multiples of 8.

    A 7x7 convolution of stride 2, then six residual blocks, of which the third and the fifth halve the
    size again, then a 1x1 convolution. Batch norms always use their running statistics and are folded
    into the convolutions before them; instance norms have no parameters.

    Args:
        widths: channels of the first convolution and of the three pairs of blocks.
        outputs: channels of the result.
        norm: what follows each convolution but the last.
        bottleneck: blocks of 1x1, 3x3, 1x1 convolutions at a quarter of the width instead of two 3x3.

    Source: Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", 2020.
    """

    def __init__(
        self, widths: tuple[int, int, int, int], outputs: int, norm: Norm, bottleneck: bool = False
    ) -> None:
        super().__init__()
        self.norm = norm
        self.stem = convolution(3, widths[0], 7, stride=2)
        self.stem_norm = _norm(norm, widths[0])
        self.blocks = nn.ModuleList()
        for pair in range(3):
            stride = 1 if pair == 0 else 2
            self.blocks.append(_Block(widths[pair], widths[pair + 1], stride, norm, bottleneck))
            self.blocks.append(_Block(widths[pair + 1], widths[pair + 1], 1, norm, bottleneck))
        self.head = convolution(widths[3], outputs, 1)

    def ready(self, dtype: torch.dtype) -> Step:
        """The encoder with its weights in ``dtype``, for any number of images."""
        stem = _step(self.stem, self.stem_norm, self.norm, dtype, "relu")
        blocks = [block.ready(dtype) for block in self.blocks]
        head = Convolution.of(self.head, dtype)

        def encode(x: torch.Tensor) -> torch.Tensor:
            x = stem(x)
            for block in blocks:
                x = block(x)
            return head(x)

        return encode

    def published_names(self) -> dict[str, tuple[str, ...]]:
        """Own state-dict keys -> the published keys of the same tensor."""
        prefixes: Prefixes = {"stem.": ("conv1.",), "stem_norm.": ("norm1.",), "head.": ("conv2.",)}
        for i, block in enumerate(self.blocks):
            for own, published in block.published_prefixes().items():
                prefixes[f"blocks.{i}.{own}"] = tuple(f"layer{i // 2 + 1}.{i % 2}.{p}" for p in published)
        return rename(self, prefixes)


class _Block(nn.Module):
    """``ReLU(shortcut(x) + y)``, ``y`` the last of the ``ReLU(norm(conv(.)))`` in a row."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, bottleneck: bool) -> None:
        super().__init__()
        self.norm = norm
        if bottleneck:
            narrow = outputs // 4
            plan = [(inputs, narrow, 1, 1), (narrow, narrow, 3, stride), (narrow, outputs, 1, 1)]
        else:
            plan = [(inputs, outputs, 3, stride), (outputs, outputs, 3, 1)]
        self.convs = nn.ModuleList(convolution(*sizes) for sizes in plan)
        self.norms = nn.ModuleList(_norm(norm, sizes[1]) for sizes in plan)
        self.shortcut = convolution(inputs, outputs, 1, stride) if stride > 1 else None
        self.shortcut_norm = _norm(norm, outputs) if stride > 1 else None

    def ready(self, dtype: torch.dtype) -> Step:
        """The block with its weights in ``dtype``."""
        steps = [_step(c, n, self.norm, dtype, "relu") for c, n in zip(self.convs, self.norms, strict=True)]
        shortcut = None
        if self.shortcut is not None:
            shortcut = _step(self.shortcut, self.shortcut_norm, self.norm, dtype, "none")

        def block(x: torch.Tensor) -> torch.Tensor:
            y = x
            for step in steps:
                y = step(y)
            return (y + (x if shortcut is None else shortcut(x))).relu_()

        return block

    def published_prefixes(self) -> Prefixes:
        """Beginnings of own keys -> those of the published keys."""
        count = len(self.convs)
        prefixes: Prefixes = {f"convs.{i}.": (f"conv{i + 1}.",) for i in range(count)}
        prefixes |= {f"norms.{i}.": (f"norm{i + 1}.",) for i in range(count)}
        if self.shortcut is not None:
            # The published block registers the shortcut's norm twice.
            prefixes |= {"shortcut.": ("downsample.0.",)}
            prefixes |= {"shortcut_norm.": ("downsample.1.", f"norm{count + 1}.")}
        return prefixes


def rename(module: nn.Module, prefixes: Prefixes) -> dict[str, tuple[str, ...]]:
    """Every key of ``module`` with its prefix replaced by each of the prefix's counterparts."""
    names = {}
    for key in module.state_dict():
        prefix = next(p for p in prefixes if key.startswith(p))
        names[key] = tuple(other + key.removeprefix(prefix) for other in prefixes[prefix])
    return names


def _norm(norm: Norm, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def _step(
    layer: nn.Conv2d, norm_layer: nn.Module, norm: Norm, dtype: torch.dtype, activation: Activation
) -> Step:
    """Convolution, norm and activation."""
    apply = Convolution.of(layer, dtype, norm_layer)
    if norm != "instance":
        return lambda x: apply(x, activation=activation)

    def step(x: torch.Tensor) -> torch.Tensor:
        # One group per channel is an instance norm, and several times faster on channels-last memory.
        # Not the one of torch.nn.functional, which refuses single pixels.
        x = torch.group_norm(apply(x), layer.out_channels)
        return x.relu_() if activation == "relu" else x

    return step
