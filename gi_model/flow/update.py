"""RAFT's recurrent update: what one iteration does to the hidden state and the flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from gi_model.flow.encoder import Prefixes, rename
from gi_model.flow.layers import Convolution, convolution

#: (hidden [B,D,h,w], gates [B,G,h,w], correlation [B,K,h,w], flow [B,2,h,w]) -> hidden, step of the flow.
Iteration = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]


class Update(nn.Module):
    r"""Motion encoder, gated recurrent passes, and heads for the flow's step and the upsampling mask.

    Per pass, with ``h`` the hidden state and ``x = [context, motion]``:

    .. math:: z, r = \sigma(W_{z,r} [h, x] + b_{z,r}), \quad q = \tanh(W_q [r h, x] + b_q), \quad
        h \leftarrow (1 - z) h + z q

    The context is the same in every iteration, and so is its share of the three sums: ``context_share``
    computes it once, ``ready`` leaves it out of the convolutions.

    Args:
        correlation: channels of a correlation lookup.
        small: of the small network, which has one 3x3 pass instead of 1x5 and 5x1, and no mask.

    Source: Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", 2020.
    """

    def __init__(self, correlation: int, small: bool) -> None:
        super().__init__()
        self.hidden, self.context = (96, 64) if small else (128, 128)
        self.motion = _MotionEncoder(correlation, small)
        sizes = self.hidden, self.context, self.motion.outputs
        kernels = [(3, 3)] if small else [(1, 5), (5, 1)]
        self.passes = nn.ModuleList(_GatedPass(*sizes, kernel) for kernel in kernels)
        width = 128 if small else 256
        self.flow_head = _Head(self.hidden, width, 2, 3)
        self.mask_head = None if small else _Head(self.hidden, width, 9 * 64, 1)

    @property
    def gates(self) -> int:
        """Channels of ``context_share``: three gates of each pass."""
        return 3 * self.hidden * len(self.passes)

    def context_share(self, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        """Context [B,C,h,w] -> its share, and the biases', of all gates' sums ``[B,gates,h,w]``."""
        shares = [each.context_share(dtype) for each in self.passes]
        return lambda context: torch.cat([share(context) for share in shares], dim=1)

    def ready(self, dtype: torch.dtype) -> Iteration:
        """One iteration with weights in ``dtype``."""
        encode_motion = self.motion.ready(dtype)
        passes = [each.ready(dtype) for each in self.passes]
        head = self.flow_head.ready(dtype)

        def iterate(
            hidden: torch.Tensor, gates: torch.Tensor, correlation: torch.Tensor, flow: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            # Channels-last like all else: a mixture would be worked on in another layout.
            motion = encode_motion(correlation, flow.to(dtype, memory_format=torch.channels_last))
            for run, share in zip(passes, gates.chunk(len(passes), dim=1), strict=True):
                hidden = run(hidden, motion, share)
            return hidden, head(hidden).to(flow.dtype)

        return iterate

    def mask(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[B,576,h,w]`` of the convex upsampling, of the large network only."""
        assert self.mask_head is not None
        return 0.25 * self.mask_head.ready(hidden.dtype)(hidden)

    def published_names(self) -> dict[str, tuple[str, ...]]:
        """Own state-dict keys -> the published keys of the same tensor."""
        prefixes: Prefixes = {
            f"motion.{own}.": (f"encoder.{name}.",) for own, name in _MotionEncoder.PUBLISHED.items()
        }
        for i in range(len(self.passes)):
            suffix = "" if len(self.passes) == 1 else str(i + 1)
            prefixes |= {
                f"passes.{i}.{gate}.": (f"gru.conv{letter}{suffix}.",)
                for gate, letter in {"update": "z", "reset": "r", "candidate": "q"}.items()
            }
        prefixes |= {"flow_head.inner.": ("flow_head.conv1.",), "flow_head.outer.": ("flow_head.conv2.",)}
        prefixes |= {"mask_head.inner.": ("mask.0.",), "mask_head.outer.": ("mask.2.",)}
        return rename(self, prefixes)


class _MotionEncoder(nn.Module):
    """Correlation and flow -> what the recurrent passes see of them; the flow itself last."""

    PUBLISHED = {  # noqa: RUF012
        "correlation1": "convc1",
        "correlation2": "convc2",
        "flow1": "convf1",
        "flow2": "convf2",
        "merge": "conv",
    }

    def __init__(self, correlation: int, small: bool) -> None:
        super().__init__()
        if small:
            wide, seen, flow, self.outputs = 96, 96, 64, 82
        else:
            wide, seen, flow, self.outputs = 256, 192, 128, 128
        self.correlation1 = convolution(correlation, wide, 1)
        self.correlation2 = None if small else convolution(wide, seen, 3)
        self.flow1 = convolution(2, flow, 7)
        self.flow2 = convolution(flow, flow // 2, 3)
        self.merge = convolution(seen + flow // 2, self.outputs - 2, 3)

    def ready(self, dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]:
        """The motion's channels, as maps that are side by side."""
        correlation1, flow1, flow2, merge = (
            Convolution.of(layer, dtype) for layer in (self.correlation1, self.flow1, self.flow2, self.merge)
        )
        correlation2 = None if self.correlation2 is None else Convolution.of(self.correlation2, dtype)

        def encode(correlation: torch.Tensor, flow: torch.Tensor) -> tuple[torch.Tensor, ...]:
            seen = correlation1(correlation, activation="relu")
            if correlation2 is not None:
                seen = correlation2(seen, activation="relu")
            moved = flow2(flow1(flow, activation="relu"), activation="relu")
            return merge(seen, moved, activation="relu"), flow

        return encode


class _GatedPass(nn.Module):
    """One pass of the gated recurrent unit; see :class:`Update`."""

    def __init__(self, hidden: int, context: int, motion: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        inputs = hidden + context + motion
        self.update, self.reset, self.candidate = (convolution(inputs, hidden, kernel) for _ in range(3))
        self.hidden = hidden
        self.shares = {
            "hidden": slice(0, hidden),
            "context": slice(hidden, hidden + context),
            "motion": slice(hidden + context, inputs),
        }

    def context_share(self, dtype: torch.dtype) -> Convolution:
        layers = (self.update, self.reset, self.candidate)
        return Convolution.of_channels(layers, [self.shares["context"]], dtype, bias=True)

    def ready(
        self, dtype: torch.dtype
    ) -> Callable[[torch.Tensor, Sequence[torch.Tensor], torch.Tensor], torch.Tensor]:
        varying = [self.shares["hidden"], self.shares["motion"]]
        gates = Convolution.of_channels((self.update, self.reset), varying, dtype, bias=False)
        candidate = Convolution.of_channels((self.candidate,), varying, dtype, bias=False)

        def run(hidden: torch.Tensor, motion: Sequence[torch.Tensor], share: torch.Tensor) -> torch.Tensor:
            of_gates, of_candidate = share.split([2 * self.hidden, self.hidden], dim=1)
            both = gates(hidden, *motion, addend=of_gates, activation="sigmoid")
            update, reset = both.chunk(2, dim=1)
            new = candidate(reset * hidden, *motion, addend=of_candidate, activation="tanh")
            return torch.lerp(hidden, new, update)

        return run


class _Head(nn.Module):
    """A 3x3 convolution, ReLU and another convolution."""

    def __init__(self, inputs: int, width: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.inner = convolution(inputs, width, 3)
        self.outer = convolution(width, outputs, kernel)

    def ready(self, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        inner, outer = Convolution.of(self.inner, dtype), Convolution.of(self.outer, dtype)
        return lambda x: outer(inner(x, activation="relu"))
