"""Replacements of the published flow network and of what is built around it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels.acceleration.swapping import MEMORY, Replacement
from gi_kernels.nn import scale_flow
from gi_kernels.ops.complete_flow import complete_flow, reference
from gi_kernels.ops.convex_upsample import convex_upsample
from gi_kernels.ops.correlation_lookup import CorrelationPyramid
from gi_kernels.ops.flow_consistency import flow_consistency
from gi_kernels.ops.flow_warp import flow_warp

_LEVELS = 4
#: Channels of hidden state and context, and radius of the lookup, of the large and the small network.
_LARGE, _SMALL = (128, 128, 4), (96, 64, 3)


class FlowNetwork(Replacement):
    """RAFT with lookups and upsampling by kernels.

    The upsampling mask is computed in the last iteration only, the context's part of the gates once.
    """

    operator = "flow_network"
    replaces = "RAFT"

    @classmethod
    def refuse(cls, module: Any) -> str | None:
        lacking = _lacking(module, "fnet", "cnet", "update_block", "hidden_dim", "context_dim")
        if lacking is None:
            lacking = _lacking(module.update_block, "encoder", "gru", "flow_head", of="its update block")
        if lacking is not None:
            return lacking
        sizes = (module.hidden_dim, module.context_dim)
        if sizes not in (_LARGE[:2], _SMALL[:2]):
            return f"it has {sizes[0]} hidden and {sizes[1]} context channels, as no published network has"
        if getattr(getattr(module, "args", None), "alternate_corr", False):
            return "it computes correlations in a way of its own (alternate_corr)"
        shapes = {n: tuple(p.shape) for n, p in module.update_block.named_parameters()}
        windows = _LEVELS * (2 * _radius(module) + 1) ** 2
        for name, dimension, size in (("encoder.convc1.weight", 1, windows), ("mask.2.weight", 0, 8 * 8 * 9)):
            if shapes.get(name, (size, size))[dimension] != size:
                return (
                    f"parameter update_block.{name} has shape {list(shapes[name])}, expected {size} channels"
                )
        return None

    def forward(
        self,
        image1,
        image2,
        iters=20,
        flow_init=None,
        upsample=True,
        test_mode=True,
        is_normalized=False,
    ):
        if not is_normalized:
            image1, image2 = 2 * (image1 / 255.0) - 1.0, 2 * (image2 / 255.0) - 1.0
        features, hidden, context = self._encode(torch.cat([image1, image2]), len(image1))
        return self._iterate(*features.chunk(2), hidden, context, iters, flow_init, test_mode)

    def estimate(self, target, sources, iters=20, both=True):
        """Flows ``[B*T,2,h,w]`` of target ``[B,3,h,w]`` to sources ``[B,T,3,h,w]``; then, if both, back.

        Each image is encoded once; images in [-1, 1].
        """
        B, T = sources.shape[:2]
        encoded = self._encode(torch.cat([target, sources.flatten(0, 1)]), B * (T + 1) if both else B)
        first = [e[:B, None].expand(B, T, *e.shape[1:]).flatten(0, 1) for e in encoded]
        second = [e[B:] for e in encoded]
        start = [torch.cat(pair) for pair in zip(first, second, strict=True)] if both else first
        end = torch.cat([second[0], first[0]]) if both else second[0]
        return self._iterate(start[0], end, *start[1:], iters, None, True)[1]

    def _mixed(self, tensor):
        mixed = getattr(getattr(self, "args", None), "mixed_precision", False)
        return torch.autocast("cuda", enabled=bool(mixed) and tensor.is_cuda)

    def _encode(self, images, count):
        """Features of all images; first hidden state and context of the first ``count``."""
        with self._mixed(images):
            hidden, context = self.cnet(images[:count]).split([self.hidden_dim, self.context_dim], dim=1)
            return self.fnet(images).float(), torch.tanh(hidden), torch.relu(context)

    def _iterate(self, features1, features2, hidden, context, iters, flow_init, test_mode):
        pyramid = CorrelationPyramid(features1, features2, levels=_LEVELS, radius=_radius(self))
        with self._mixed(features1):
            passes = _gru_passes(self.update_block.gru, hidden, context)
        start = _pixels(features1)
        coords = start if flow_init is None else start + flow_init
        flows = []
        for i in range(iters):
            coords = coords.detach()
            correlation = pyramid.lookup(coords)
            wanted = i + 1 == iters or not test_mode
            with self._mixed(features1):
                motion = self.update_block.encoder(coords - start, correlation)
                for step in passes:
                    hidden = step(hidden, motion)
                delta = self.update_block.flow_head(hidden)
                mask = self._mask(hidden) if wanted else None
            coords = coords + delta
            if wanted:
                flows.append(_upsample(coords - start, mask))
        return (coords - start, flows[-1]) if test_mode else flows

    def _mask(self, hidden):
        return 0.25 * self.update_block.mask(hidden) if hasattr(self.update_block, "mask") else None


class FlowWrapper(Replacement):
    """Both directions as one batch, completion and consistency by kernels, on any device."""

    operator = "flow_wrapper"
    replaces = "RAFT"

    @classmethod
    def refuse(cls, module: Any) -> str | None:
        return _lacking(module, "raft", "resolution", "input_range", "return_err", "return_backward")

    def forward(self, image1, image2, iters=20, flow_init=None, upsample=True, test_mode=True):
        if flow_init is not None or not test_mode or _depends_on_batch(self):
            return super().forward(image1, image2, iters, flow_init, upsample, test_mode)
        if not (self.return_err or self.return_backward):
            return self.estimate(image1, image2[:, None], iters, both=False)[0]
        forward, backward = self.estimate(image1, image2[:, None], iters)
        results = [forward]
        if self.return_err:
            results.append(self._error(forward, backward))
        if self.return_backward:
            results.append(backward)
            if self.return_err:
                results.append(self._error(backward, forward))
        return results

    def errors(self, target, sources):
        """Flows and errors ``[B*T,.,H,W]`` of target to sources."""
        forward, backward = self.estimate(target, sources)
        return forward, self._error(forward, backward)

    def estimate(self, target, sources, iters=20, both=True):
        """Completed flows ``[B*T,2,H,W]`` of target ``[B,C,H,W]`` to sources ``[B,T,C,H,W]``; and back."""
        B, T, _, H, W = sources.shape
        C = target.shape[1]
        if C not in (3, 4):
            raise ValueError(f"image1: expected 3 or 4 channels, got {C}")
        if self.input_range == "01":
            low, high = torch.aminmax(target)
            if not (low >= 0 and high <= 1):
                raise ValueError(f"image1: expected values in [0, 1], got [{low:.3g}, {high:.3g}]")
        small = self._prepared(target), self._prepared(sources.flatten(0, 1)).unflatten(0, (B, T))
        if isinstance(self.raft, FlowNetwork):
            flow = self.raft.estimate(*small, iters, both)
        else:
            first, second = small[0][:, None].expand_as(small[1]).flatten(0, 1), small[1].flatten(0, 1)
            if both:
                first, second = torch.cat([first, second]), torch.cat([second, first])
            flow = self.raft(first, second, iters=iters, test_mode=True, is_normalized=True)[1]
        flow = _resized(flow, (H, W))
        directions = 2 if both else 1
        if C == 4:
            mask = target[:, 3:] if self.input_range == "01" else (target[:, 3:] + 1) / 2
            mask = mask[:, None].expand(B, T, 1, H, W).flatten(0, 1).repeat(directions, 1, 1, 1)
            flow = _completed(flow, mask.to(flow.dtype))  # the target's mask both ways, as published
        return flow.chunk(directions)

    def _prepared(self, image):
        image = image[:, :3]
        image = 2 * image - 1 if self.input_range == "01" else image
        return F.interpolate(image, size=tuple(self.resolution), mode="bilinear", align_corners=True)

    def _error(self, flow, backward):
        """The published error, its components scaled once more by the ratio of the sizes."""
        H, W = flow.shape[2:]
        h, w = self.resolution
        if H * w == W * h and not flow.requires_grad:  # one factor for both components
            return flow_consistency(flow, backward) * (H / h)
        difference = (flow + flow_warp(backward, flow)).abs()
        return scale_flow(difference, W / w, H / h).mean(dim=1, keepdim=True)


class FlowLoop(Replacement):
    """Estimates all references' flows of a batch at once, and not again for the same images."""

    operator = "flow_loop"
    replaces = "DefaultInpaintingTrainingModule"
    passes = 2  # for the generator and for the discriminator

    @classmethod
    def refuse(cls, module: Any) -> str | None:
        return "it has no flow network" if getattr(module, "flow", None) is None else None

    def forward(self, batch):
        if "flows" not in batch and self.flow is not None and not _depends_on_batch(self.flow):
            target = torch.cat([batch["image"], batch["mask"]], dim=1)
            sources = torch.cat([batch["srcs"], batch["srcs_masks"]], dim=2)
            batch["flows"], batch["flow_errs"], batch["aligned_srcs"] = self._remembered(target, sources)
        return super().forward(batch)

    def forget(self):
        self.__dict__.pop(f"{MEMORY}flows", None)

    def _remembered(self, target, sources):
        """``_flows``, of the last images and weights again without estimating them."""
        weights = [(t.data_ptr(), t._version) for t in (*self.flow.parameters(), *self.flow.buffers())]
        last = self.__dict__.get(f"{MEMORY}flows")
        if last and last[0] == weights and _same(last[1], target) and _same(last[2], sources):
            return last[3]
        with torch.inference_mode(False), torch.no_grad():  # what is remembered may serve training
            target, sources = target.clone(), sources.clone()
            results = self._flows(target, sources)
        self.__dict__[f"{MEMORY}flows"] = (weights, target, sources, results)
        return results

    def _flows(self, target, sources):
        """Flows, errors and warped sources, ``[B,T,...]``."""
        B, T = sources.shape[:2]
        flat = sources.flatten(0, 1)
        if isinstance(self.flow, FlowWrapper):
            flow, error = self.flow.errors(target, sources)
        else:
            flow, error = self.flow(target[:, None].expand_as(sources).flatten(0, 1), flat)
        return tuple(t.unflatten(0, (B, T)) for t in (flow, error, flow_warp(flat, flow)))


FLOW: tuple[type[Replacement], ...] = (FlowNetwork, FlowWrapper, FlowLoop)


def _radius(network) -> int:
    return (_LARGE if network.hidden_dim == _LARGE[0] else _SMALL)[2]


def _gru_passes(gru, hidden, context):
    """The passes of an iteration's GRU, functions of hidden state and motion.

    The context is the same in all iterations: its part of the gates is computed once.
    """
    H, inputs = hidden.shape[1], hidden.shape[1] + context.shape[1]
    passes = []
    for suffix in ("1", "2") if hasattr(gru, "convz1") else ("",):
        convs = [getattr(gru, f"conv{gate}{suffix}", None) for gate in "zrq"]
        if not all(type(c) is nn.Conv2d and len(c.weight) == H and c.weight.shape[1] > inputs for c in convs):
            return [lambda h, motion: gru(h, torch.cat([context, motion], dim=1))]
        weight, bias = torch.cat([c.weight for c in convs]), torch.cat([c.bias for c in convs])
        weights = weight.split([H, inputs - H, weight.shape[1] - inputs], dim=1)
        fixed = F.conv2d(context, weights[1], bias, padding=convs[0].padding)
        passes.append(partial(_gru_pass, weights[0], weights[2], fixed, convs[0].padding))
    return passes


def _gru_pass(hidden_weight, motion_weight, fixed, padding, h, motion):
    H = h.shape[1]
    given = F.conv2d(motion, motion_weight, padding=padding) + fixed
    gates = F.conv2d(h, hidden_weight[: 2 * H], padding=padding) + given[:, : 2 * H]
    z, r = gates.sigmoid().chunk(2, dim=1)
    q = (F.conv2d(r * h, hidden_weight[2 * H :], padding=padding) + given[:, 2 * H :]).tanh()
    return (1 - z) * h + z * q


def _depends_on_batch(module: nn.Module) -> bool:
    """Whether an item's result depends on the others in its batch, or on chance."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    return any(m.training for m in module.modules() if isinstance(m, kinds))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _lacking(module: Any, *names: str, of: str = "it") -> str | None:
    """Say which attribute ``module`` lacks; None if it has all."""
    missing = [name for name in names if not hasattr(module, name)]
    return f"{of} has no attribute {missing[0]}" if missing else None


def _pixels(features: torch.Tensor) -> torch.Tensor:
    """Coordinates ``[B,2,H,W]`` of the pixels, x first."""
    B, _, H, W = features.shape
    y, x = torch.meshgrid(
        torch.arange(H, device=features.device), torch.arange(W, device=features.device), indexing="ij"
    )
    return torch.stack([x, y]).float()[None].expand(B, -1, -1, -1)


def _upsample(flow: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        H, W = flow.shape[2:]
        return 8 * F.interpolate(flow, size=(8 * H, 8 * W), mode="bilinear", align_corners=True)
    return convex_upsample(flow, mask.float())


def _completed(flow: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``complete_flow``, by its definition where a gradient may be asked for: its kernel has none."""
    return reference.complete_flow(flow, mask) if flow.requires_grad else complete_flow(flow, mask)


def _resized(flow: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resized with its vectors."""
    h, w = flow.shape[2:]
    if (h, w) == size:
        return flow
    resized = F.interpolate(flow, size=size, mode="bilinear", align_corners=True)
    return scale_flow(resized, size[1] / w, size[0] / h)
