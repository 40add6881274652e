"""The two-stream generator, and what it shares with the transformer baseline: crossing from references.

Source: Esser, Michael, Sengupta, "Towards Unified Keyframe Propagation Models", 2022.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gi_kernels import checks, native
from gi_kernels.nn import DeformableAggregation, KeysValues, check_heads, check_inputs
from gi_model.graphs import Graphs
from gi_model.pixels import Guess, PixelPropagation
from gi_model.published import Names, renamed
from gi_model.references import Crossing, References
from gi_model.streams import (
    Attention,
    Decoder,
    FourierBlock,
    PositionCode,
    ResidualConv,
    TwoStreamBlock,
    encoder,
    flag,
    fold,
    initialise,
    widths,
)

State = tuple[torch.Tensor, ...]


class Generator(nn.Module):
    """What all generators share: their call, the checks of it, and the copy for inference.

    ``generator(input, srcs, flows=flows, flow_errs=errs)`` -> image ``[B,3,H,W]`` in (0, 1), with

    - ``input [B,4,H,W]``: target frames in [0, 1] times (1 - mask), then the mask, 1 to be filled;
    - ``srcs [B,T,4,H,W]``: the same of T reference frames with masks of their own;
    - ``flows [B,T,2,h,w]``: flow in pixels of its own grid, x first, from a target to each reference;
    - ``flow_errs [B,T,1,h,w]``: its forward-backward error.

    A generator that propagates pixels adds a correction to its guess, inside the mask only; in training mode
    its image may leave [0, 1] there.

    Height and width must be multiples of ``2^downsamplings``, at least twice that.
    """

    encoder: nn.Module
    decoder: Decoder

    def __init__(self, in_channels: int, width: int, downsamplings: int, max_width: int) -> None:
        super().__init__()
        self.channels, self.downsamplings = in_channels, downsamplings
        self.widths = widths(width, downsamplings, max_width)  # of feature maps, from fine to coarse
        self.optimised = False  # by for_inference
        self.channels_last: bool | None = None  # None: on CPUs
        self.graphs = Graphs()

    @property
    def needs_flow(self) -> bool:
        """Whether it has to be called with ``flows``."""
        return False

    def _finish(self, out_channels: int, bounded: bool = True) -> None:
        """Add the decoder to all else, and draw weights for training."""
        self.decoder = Decoder(self.widths, out_channels, bounded)
        initialise(self)

    def for_inference(self, dtype: torch.dtype | None = None, channels_last: bool = True) -> Generator:
        """A copy that computes the same with less work, and cannot be trained.

        Batch norms are folded into convolutions, convolutions of one input are merged, position codes
        are kept for the last few sizes. On the CPU the 3x3 convolutions of Fourier blocks keep their
        weights transformed, in float32 with four times as many numbers. On a GPU, where autograd is off,
        its work is launched as one CUDA graph per size, see :class:`~gi_model.graphs.Graphs`.

        Args:
            dtype: of weights and activations; inputs are cast to it, the result is of the inputs' dtype.
            channels_last: compute in that layout, twice as fast on CPUs.
        """
        optimised = copy.deepcopy(self).eval()
        fold(optimised)
        optimised.requires_grad_(False)
        if dtype is not None:
            optimised.to(dtype)
        if channels_last:
            optimised.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimised.channels_last = channels_last
        optimised.optimised = True
        return optimised

    def _launch(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``, of a copy for inference through CUDA graphs."""
        if not self.optimised:
            return function(*arguments)
        return self.graphs.run(function, *arguments, weights=lambda: [*self.parameters(), *self.buffers()])

    def train(self, mode: bool = True) -> Generator:
        """As of any module, but a copy for inference has no training mode."""
        if mode and self.optimised:
            raise ValueError("mode: expected False for a copy made by for_inference(), got True")
        return super().train(mode)

    def _check_names(self) -> None:
        """Raise if the weights are no longer those that were published."""
        if self.optimised:
            raise ValueError("module: a copy made by for_inference() has no published names, convert before")

    def _weight(self) -> torch.Tensor:
        """Some weight: all have its dtype and device."""
        return self.decoder.out.weight

    def _frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames ``[N,4,H,W]`` as the encoder wants them."""
        # Convolutions of PyTorch on CPUs are up to twice as fast with the channels last, but its batch norm
        # then sums up in a way that loses digits when training; that of the kernels does not.
        precise = not self.training or native.PROBLEM is None
        last = frames.is_cpu and precise if self.channels_last is None else self.channels_last
        dtype = self._weight().dtype if self.optimised else frames.dtype
        return frames.to(dtype=dtype, memory_format=torch.channels_last if last else torch.preserve_format)

    def _check_frames(self, *named: tuple[str, torch.Tensor, str]) -> None:
        """Raise unless frames fit each other, the weights, and the encoder's strides."""
        if self.optimised:  # casts
            checks.shapes(*named)
        else:
            check_inputs(self._weight(), *named)
        step = 2**self.downsamplings
        for name, frames, _ in named:
            checks.nonempty(name, frames, 0)
            H, W = frames.shape[-2:]
            if H % step or W % step or min(H, W) < 2 * step:
                raise ValueError(
                    f"{name}: expected height and width to be multiples of {step}, at least {2 * step}, "
                    f"got {H} x {W}"
                )


class CrossingGenerator(Generator):
    """A generator whose first blocks look at the references' states in the same block.

    Subclasses make ``blocks`` and ``aggregations`` (one per crossed block, or none), then call
    ``_finish``. A block maps a state, whose first tensor is the features, and the references' keys
    and values to the new state, its own keys and values, and its :class:`Attention` if it has any.
    """

    blocks: nn.ModuleList
    aggregations: nn.ModuleList
    #: Guesses targets for the encoder to see and the decoder to correct; None, as published, for no guess.
    pixels: PixelPropagation | None

    def __init__(
        self,
        in_channels: int,
        width: int,
        downsamplings: int,
        max_width: int,
        blocks: int,
        crossed: int,
        attends: bool,
        pixels: int = 0,
    ) -> None:
        super().__init__(in_channels, width, downsamplings, max_width)
        checks.positive("blocks", blocks)
        checks.positive("crossed", crossed)
        self.crossed = min(crossed, blocks)
        self.attends = flag("attends", attends)
        if pixels and in_channels != 4:
            raise ValueError(f"in_channels: expected 4 to propagate pixels, got {in_channels}")
        self.pixels = PixelPropagation(pixels, downsamplings) if pixels else None
        self.encoder = encoder(2 * in_channels if pixels else in_channels, self.widths)
        self.code = PositionCode(self.widths[-1])

    @property
    def needs_flow(self) -> bool:
        """Whether it has to be called with ``flows``."""
        return self.pixels is not None or len(self.aggregations) > 0

    def _finish(self, out_channels: int, bounded: bool = True) -> None:
        super()._finish(out_channels, bounded and self.pixels is None)
        if self.pixels is not None:  # begin with the guess
            if out_channels != 3:
                raise ValueError(f"out_channels: expected 3 to propagate pixels, got {out_channels}")
            self.pixels.initialise()
            nn.init.zeros_(self.decoder.out.weight)

    def forward(
        self,
        input: torch.Tensor,
        srcs: torch.Tensor | None = None,
        flows: torch.Tensor | None = None,
        flow_errs: torch.Tensor | None = None,
        *,
        references: References | None = None,
        return_attention: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, list[Attention]]:
        """Fill the target frames.

        Args:
            input, srcs, flows, flow_errs: see :class:`Generator`; flow is needed where the generator
                aggregates features or propagates pixels, its error for the former.
            references: of ``encode_references(srcs)``, instead of ``srcs``; in eval mode the result is
                the same to the bit.
            return_attention: also return a list with the :class:`Attention` of each block.

        Raises:
            TypeError, ValueError: an argument of the wrong type, rank, size, dtype or device, or missing.
        """
        self._check(input, srcs, flows, flow_errs, references)
        if self.training:
            assert srcs is not None
            guess = self._guess(input, srcs, flows)
            state, sources = self._encode_together(_joined(input, guess), self._complete(srcs))
            seen = self._cross(sources, *srcs.shape[:2])
            return self._fill(input, guess, state, seen, flows, flow_errs, return_attention)
        if references is None:
            assert srcs is not None
            references = self.encode_references(srcs)
        return self._launch(self._infer, input, references, flows, flow_errs, return_attention)

    def _infer(
        self,
        input: torch.Tensor,
        references: References,
        flows: torch.Tensor | None,
        flow_errs: torch.Tensor | None,
        return_attention: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, list[Attention]]:
        """:meth:`forward` in eval mode, of checked arguments."""
        guess = self._guess(input, references.frames, flows)
        state = self._encode(self._frames(_joined(input, guess)))
        seen = [(c.attention, c.aggregation) for c in references.crossings]
        return self._fill(input, guess, state, seen, flows, flow_errs, return_attention)

    def _guess(
        self, input: torch.Tensor, srcs: torch.Tensor | None, flows: torch.Tensor | None
    ) -> Guess | None:
        """What references show of the targets, if the generator propagates pixels."""
        if self.pixels is None:
            return None
        assert srcs is not None and flows is not None  # checked
        return self.pixels(input, srcs, flows, self._frames)  # type: ignore[no-any-return]

    def _complete(self, srcs: torch.Tensor) -> torch.Tensor:
        """References as the encoder sees them: of theirs nothing is guessed."""
        return srcs if self.pixels is None else torch.cat([srcs, srcs], dim=2)

    def _fill(
        self,
        input: torch.Tensor,
        guess: Guess | None,
        state: State,
        seen: Sequence[tuple[KeysValues | None, torch.Tensor | KeysValues | None]],
        flows: torch.Tensor | None,
        flow_errs: torch.Tensor | None,
        return_attention: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, list[Attention]]:
        """Images from the targets' state and what each crossed block sees of the references."""
        attentions = []
        for i, block in enumerate(self.blocks):
            attention, aggregation = seen[i] if i < self.crossed else (None, None)
            state, _, looked = block(state, _segments(attention), return_attention)
            attentions.append(looked)
            if i < len(self.aggregations):
                assert flows is not None and flow_errs is not None  # checked
                layer = self._aggregation(i)
                if isinstance(aggregation, tuple):
                    features = layer.aggregate(state[0], *aggregation, flows, flow_errs)
                else:  # projects on the way, in a fraction of the memory
                    features = layer(state[0], aggregation, flows, flow_errs)
                state = (features, *state[1:])
        out = self.decoder(state[0])
        if guess is not None:
            out = guess.colours + input[:, 3:] * out
            out = out if self.training else out.clamp(0, 1)
        out = out.to(input.dtype)
        return (out, [a for a in attentions if a is not None]) if return_attention else out

    def encode_references(self, srcs: torch.Tensor) -> References:
        """What the generator needs of reference frames ``[B,T,4,H,W]``, to serve many targets.

        On the CPU each of the T is encoded by itself: what is kept of it is the same, to the bit,
        whatever it is encoded with. On a GPU all are one batch, and the last digits depend on it.

        Raises:
            ValueError: in training mode, where batch norm wants targets and references together; or
                frames of the wrong size or device.
            TypeError: frames of the wrong type or dtype.
        """
        if self.training:
            raise ValueError("srcs: expected eval mode to encode references; when training, call with srcs")
        self._check_srcs(srcs)
        at_once = 1 if srcs.is_cpu else srcs.shape[1]  # a larger batch is hardly faster there
        parts = [self._launch(self._encode_batch, some) for some in srcs.split(at_once, dim=1)]
        return References.join(parts)

    def _encode_batch(self, srcs: torch.Tensor) -> References:
        """:meth:`encode_references` in one batch."""
        B, T, _, H, W = srcs.shape
        state = self._encode(self._frames(self._complete(srcs).flatten(0, 1)))
        crossings = []
        for i, (attention, features) in enumerate(self._cross(state, B, T)):
            aggregation = self._aggregation(i).project(features) if self.aggregations else None
            crossings.append(Crossing(attention, aggregation))
        return References(B, T, (H, W), tuple(crossings), None if self.pixels is None else srcs)

    def _aggregation(self, i: int) -> DeformableAggregation:
        layer = self.aggregations[i]
        assert isinstance(layer, DeformableAggregation)
        return layer

    def _encode(self, frames: torch.Tensor) -> State:
        """Frames ``[N,4,H,W]`` -> state."""
        return (self.code(self.encoder(frames)),)

    def _encode_together(self, input: torch.Tensor, srcs: torch.Tensor) -> tuple[State, State]:
        """States of targets and of references, in one batch: batch norm sees all frames."""
        frames = torch.cat([input, srcs.flatten(0, 1)])  # in this order both parts are views, of any layout
        parts = [s.split([len(input), len(s) - len(input)]) for s in self._encode(self._frames(frames))]
        return tuple(targets for targets, _ in parts), tuple(sources for _, sources in parts)

    def _cross(self, state: State, B: int, T: int) -> list[tuple[KeysValues | None, torch.Tensor]]:
        """References, state of ``[B·T,...]``, through the crossed blocks among themselves.

        Per block: keys and values ``[B,T,heads,N,d]``, and features ``[B,T,C,h,w]`` after it.
        """
        seen = []
        for block in self.blocks[: self.crossed]:
            state, (keys, values), _ = block(state)
            attention = (keys.unflatten(0, (B, T)), values.unflatten(0, (B, T))) if self.attends else None
            seen.append((attention, state[0].unflatten(0, (B, T))))
        return seen

    def _check(
        self,
        input: torch.Tensor,
        srcs: torch.Tensor | None,
        flows: torch.Tensor | None,
        flow_errs: torch.Tensor | None,
        references: References | None,
    ) -> None:
        named = [("input", input, f"B {self.channels} H W")]
        self._check_frames(*named)
        if (srcs is None) == (references is None):
            given = "neither" if srcs is None else "both"
            raise ValueError(f"srcs, references: expected one of the two, got {given}")
        if srcs is not None:
            self._check_srcs(srcs)
            named.append(("srcs", srcs, f"B T {self.channels} H W"))
        self._check_frames(*named)
        count = srcs.shape[1] if srcs is not None else self._check_references(input, references)
        needed = [("flows", flows, 2)] if self.needs_flow else []
        needed += [("flow_errs", flow_errs, 1)] if len(self.aggregations) else []
        for name, tensor, channels in needed:
            pattern = f"{input.shape[0]} {count} {channels} h w"
            if tensor is None:
                raise ValueError(f"{name}: expected a tensor [{pattern.replace(' ', ', ')}], got None")
            checks.shapes((name, tensor, pattern))
            checks.nonempty(name, tensor, 3, 4)
            if tensor.device != input.device:
                raise ValueError(
                    f"{name}: expected a tensor on {input.device} like input, got {tensor.device}"
                )

    def _check_srcs(self, srcs: torch.Tensor) -> None:
        self._check_frames(("srcs", srcs, f"B T {self.channels} H W"))
        checks.nonempty("srcs", srcs, 1)

    def _check_references(self, input: torch.Tensor, references: object) -> int:
        """Raise unless ``references`` fit; return their number."""
        if not isinstance(references, References):
            raise TypeError(f"references: expected References, got {type(references).__name__}")
        if self.training:
            raise ValueError("references: expected srcs when training: batch norm wants all frames together")
        B, _, H, W = input.shape
        if (references.batch, references.size) != (B, (H, W)):
            raise ValueError(
                f"references: expected those of {B} x T frames of {H} x {W} like input, "
                f"got {references.batch} x {len(references)} of {references.size[0]} x {references.size[1]}"
            )
        kinds = [(c.attention is not None, c.aggregation is not None) for c in references.crossings]
        alike = kinds == [(self.attends, len(self.aggregations) > 0)] * self.crossed
        if not alike or (references.frames is None) != (self.pixels is None):
            raise ValueError("references: expected those of this generator, got those of one built otherwise")
        weight = self._weight()
        device = weight.device.type
        mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        for tensor in (t for c in references.crossings for t in c.tensors()):
            if tensor.device != weight.device or (tensor.dtype != weight.dtype and not mixed):
                raise ValueError(
                    f"references: expected {weight.dtype} on {weight.device} like the weights, "
                    f"got {tensor.dtype} on {tensor.device}"
                )
        return len(references)


class TwoStreamGenerator(CrossingGenerator):
    """Local features, aggregated along flow, and global latents that attend to each other.

    Args:
        in_channels, out_channels: of frames, the mask included, and of the result.
        width: channels after the first convolution; they double with each of ``downsamplings`` up to
            ``max_width``.
        blocks: two-stream blocks; the first ``crossed`` of them see the references.
        refine: ``"fourier"`` or ``"conv"``, the convolutions of a block.
        global_ratio: share of the channels that are global in Fourier convolutions.
        groups: of the convolutions otherwise.
        grid: the latents are ``grid * grid`` windows of a feature map.
        heads: of the attention between latents.
        window_heads: of reading from and writing to features.
        attends: whether latents attend to the references' latents.
        aggregates: whether features of the references are aggregated along flow.
        pixels: channels of the network that propagates pixels before features, see
            :class:`~gi_model.pixels.PixelPropagation`; 0, as published, for none.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        out_channels: int = 3,
        width: int = 64,
        downsamplings: int = 3,
        max_width: int = 1024,
        blocks: int = 4,
        crossed: int = 2,
        refine: str = "fourier",
        global_ratio: float = 0.75,
        groups: int = 4,
        grid: int = 16,
        heads: int = 8,
        window_heads: int = 8,
        attends: bool = True,
        aggregates: bool = True,
        pixels: int = 0,
    ) -> None:
        super().__init__(in_channels, width, downsamplings, max_width, blocks, crossed, attends, pixels)
        C = self.widths[-1]
        checks.positive("grid", grid)
        check_heads(C, heads)
        check_heads(C, window_heads)

        def refinement() -> nn.Module:
            return FourierBlock(C, global_ratio) if refine == "fourier" else ResidualConv(C, groups)

        if refine not in ("fourier", "conv"):
            raise ValueError(f"refine: expected 'fourier' or 'conv', got {refine!r}")
        self.latents = nn.Parameter(torch.empty(grid**2, C))
        self.blocks = nn.ModuleList(
            TwoStreamBlock(C, heads, window_heads, grid**2, (refinement(), refinement()))
            for _ in range(blocks)
        )
        self.aggregations = nn.ModuleList(
            DeformableAggregation(C) for _ in range(self.crossed if flag("aggregates", aggregates) else 0)
        )
        self._finish(out_channels)
        nn.init.normal_(self.latents, std=0.02)

    def _encode(self, frames: torch.Tensor) -> State:
        (features,) = super()._encode(frames)
        return features, self.latents.expand(features.shape[0], -1, -1)

    def published_names(self) -> Names:
        """Published names: those of one long sequence, of which layers without weights count too."""
        self._check_names()
        start = self.downsamplings + 2  # the reflection pad is 0
        parts = {f"encoder.{i}": f"model.{i + 1}" for i in range(self.downsamplings + 1)}
        parts |= {"code.project": f"model.{start}.project", "latents": f"model.{start}.latents"}
        parts |= {f"blocks.{i}": f"model.{start + 1 + i}" for i in range(len(self.blocks))}
        parts |= self.decoder.published_parts(start + len(self.blocks) + 2)
        parts |= {f"aggregations.{i}": f"deformable_writes.{i}" for i in range(len(self.aggregations))}
        parts |= {} if self.pixels is None else {"pixels": "pixels"}  # was never published
        return renamed(self, parts)


def _joined(input: torch.Tensor, guess: Guess | None) -> torch.Tensor:
    """Targets as the encoder sees them."""
    return input if guess is None else torch.cat([input, *(part.to(input.dtype) for part in guess)], dim=1)


def _segments(attention: KeysValues | None) -> Sequence[KeysValues] | None:
    """Keys and values ``[B,T,heads,N,d]`` as T pairs, which are attended to where they are."""
    return None if attention is None else list(zip(*(t.unbind(1) for t in attention), strict=True))
