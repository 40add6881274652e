"""Replacements of the published flow network and of what is built around it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from gi_kernels.acceleration.swapping import MEMORY, Replacement
from gi_kernels.ops.complete_flow import complete_flow
from gi_kernels.ops.convex_upsample import convex_upsample
from gi_kernels.ops.correlation_lookup import CorrelationPyramid
from gi_kernels.ops.flow_consistency import flow_consistency
from gi_kernels.ops.flow_warp import flow_warp

#: Channels of hidden state and context, and radius of the lookup, of the large and the small network.
_LARGE, _SMALL = (128, 128, 4), (96, 64, 3)


class FlowNetwork(Replacement):
    """RAFT with lookups and upsampling by kernels; the upsampling mask in the last iteration only."""

    operator = "flow_network"
    replaces = ("RAFT",)

    @classmethod
    def refuse(cls, module: Any) -> str | None:
        for name in ("fnet", "cnet", "update_block", "hidden_dim", "context_dim"):
            if not hasattr(module, name):
                return f"it has no attribute {name}"
        for name in ("encoder", "gru", "flow_head"):
            if not hasattr(module.update_block, name):
                return f"its update block has no attribute {name}"
        sizes = (module.hidden_dim, module.context_dim)
        if sizes not in (_LARGE[:2], _SMALL[:2]):
            return f"it has {sizes[0]} hidden and {sizes[1]} context channels, as no published network has"
        if getattr(getattr(module, "args", None), "alternate_corr", False):
            return "it computes correlations in a way of its own (alternate_corr)"
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

    def both_directions(self, target, sources, iters=20):
        """Flows ``[2,B*T,2,h,w]``: of target ``[B,3,h,w]`` to each of sources ``[B,T,3,h,w]``, and back.

        Each image is encoded once; images in [-1, 1].
        """
        B, T = sources.shape[:2]
        encoded = self._encode(torch.cat([target, sources.flatten(0, 1)]), B * (T + 1))
        pairs = [(e[:B, None].expand(B, T, *e.shape[1:]).flatten(0, 1), e[B:]) for e in encoded]
        first, hidden, context = (torch.cat(pair) for pair in pairs)
        second = torch.cat(pairs[0][::-1])
        return self._iterate(first, second, hidden, context, iters, None, True)[1].unflatten(0, (2, B * T))

    def _mixed(self, tensor):
        enabled = bool(getattr(self.args, "mixed_precision", False)) and tensor.is_cuda
        return torch.autocast("cuda", enabled=enabled)

    def _encode(self, images, count):
        """Features of all images; first hidden state and context of the first ``count``."""
        with self._mixed(images):
            both = self.cnet(images[:count]).split([self.hidden_dim, self.context_dim], dim=1)
            return self.fnet(images).float(), torch.tanh(both[0]), torch.relu(both[1])

    def _iterate(self, features1, features2, hidden, context, iters, flow_init, test_mode):
        radius = (_LARGE if self.hidden_dim == _LARGE[0] else _SMALL)[2]
        pyramid = CorrelationPyramid(features1, features2, levels=4, radius=radius)
        start = _pixels(features1)
        coords = start if flow_init is None else start + flow_init
        flows = []
        for i in range(iters):
            coords = coords.detach()
            wanted = i + 1 == iters or not test_mode
            with self._mixed(features1):
                hidden, mask, delta = self._update(
                    hidden, context, pyramid.lookup(coords), coords - start, wanted
                )
            coords = coords + delta
            if wanted:
                flows.append(_upsample(coords - start, mask))
        return (coords - start, flows[-1]) if test_mode else flows

    def _update(self, hidden, context, correlation, flow, wanted):
        """One iteration; the mask is computed where its result is used."""
        block = self.update_block
        hidden = block.gru(hidden, torch.cat([context, block.encoder(flow, correlation)], dim=1))
        mask = 0.25 * block.mask(hidden) if wanted and hasattr(block, "mask") else None
        return hidden, mask, block.flow_head(hidden)


class FlowWrapper(Replacement):
    """Both directions as one batch, completion and consistency by kernels, on any device."""

    operator = "flow_wrapper"
    replaces = ("RAFT",)

    @classmethod
    def refuse(cls, module: Any) -> str | None:
        for name in ("raft", "resolution", "input_range", "return_err", "return_backward"):
            if not hasattr(module, name):
                return f"it has no attribute {name}"
        return None

    def forward(self, image1, image2, iters=20, flow_init=None, upsample=True, test_mode=True):
        if image1.shape[1] not in (3, 4):
            raise ValueError(f"image1: expected 3 or 4 channels, got {image1.shape[1]}")
        if flow_init is not None or not (self.return_err or self.return_backward):
            return super().forward(image1, image2, iters, flow_init, upsample, test_mode)
        forward, backward = self.estimate(image1, image2[:, None], iters)
        results = [forward]
        if self.return_err:
            results.append(self._error(forward, backward))
        if self.return_backward:
            results.append(backward)
            if self.return_err:
                results.append(self._error(backward, forward))
        return results

    def estimate(self, target, sources, iters=20):
        """Completed flows ``[B*T,2,H,W]`` of target ``[B,C,H,W]`` to sources ``[B,T,C,H,W]``, and back."""
        B, T, C, H, W = sources.shape
        small = self._prepared(target), self._prepared(sources.flatten(0, 1)).unflatten(0, (B, T))
        if isinstance(self.raft, FlowNetwork):
            flow = self.raft.both_directions(*small, iters=iters).flatten(0, 1)
        else:
            repeated, flat = small[0][:, None].expand_as(small[1]).flatten(0, 1), small[1].flatten(0, 1)
            pair = torch.cat([repeated, flat]), torch.cat([flat, repeated])
            flow = self.raft(*pair, iters=iters, test_mode=True, is_normalized=True)[1]
        flow = _resized(flow, (H, W))
        if C == 4:
            mask = target[:, 3:] if self.input_range == "01" else (target[:, 3:] + 1) / 2
            mask = mask[:, None].expand(B, T, 1, H, W).flatten(0, 1)
            flow = complete_flow(flow, torch.cat([mask, mask]))  # the target's mask both ways, as published
        return flow.chunk(2)

    def _prepared(self, image):
        if self.input_range == "01":
            low, high = torch.aminmax(image)
            if not (low >= 0 and high <= 1):
                raise ValueError(f"image: expected values in [0, 1], got [{low:.3g}, {high:.3g}]")
            image = 2 * image - 1
        return F.interpolate(image[:, :3], size=tuple(self.resolution), mode="bilinear", align_corners=True)

    def errors(self, target, sources):
        """Flows and errors ``[B*T,.,H,W]`` of target to sources."""
        forward, backward = self.estimate(target, sources)
        return forward, self._error(forward, backward)

    def _error(self, flow, backward):
        """The published error, its components scaled once more by the ratio of the sizes."""
        H, W = flow.shape[2:]
        h, w = self.resolution
        if H * w == W * h:  # one factor for both components
            return flow_consistency(flow, backward) * (H / h)
        difference = (flow + flow_warp(backward, flow)).abs()
        scale = difference.new_tensor([W / w, H / h])[:, None, None]
        return (difference * scale).mean(dim=1, keepdim=True)


class TrainingModule(Replacement):
    """Estimates all references' flows of a batch at once, and not again for the same images."""

    operator = "flow_loop"
    replaces = ("DefaultInpaintingTrainingModule", "BaseInpaintingTrainingModule")

    @classmethod
    def refuse(cls, module: Any) -> str | None:
        if getattr(module, "flow", None) is None:
            return "it has no flow network"
        return None

    def forward(self, batch):
        if self.flow is not None and "flows" not in batch:
            target = torch.cat([batch["image"], batch["mask"]], dim=1)
            sources = torch.cat([batch["srcs"], batch["srcs_masks"]], dim=2)
            batch["flows"], batch["flow_errs"], batch["aligned_srcs"] = self._flows(target, sources)
        return super().forward(batch)

    @torch.no_grad()
    def _flows(self, target, sources):
        """Flows, errors and warped sources, ``[B,T,...]``; those of the last images are remembered.

        A training step comes twice with the same images, for the generator and the discriminator.
        """
        key = f"{MEMORY}flows"
        images, results = self.__dict__.get(key, (None, None))
        if images is not None and all(
            a.shape == b.shape and a.device == b.device and torch.equal(a, b)
            for a, b in zip(images, (target, sources), strict=True)
        ):
            return results
        B, T = sources.shape[:2]
        flat = sources.flatten(0, 1)
        if isinstance(self.flow, FlowWrapper):
            flow, error = self.flow.errors(target, sources)
        else:
            flow, error = self.flow(target[:, None].expand_as(sources).flatten(0, 1), flat)
        results = tuple(t.unflatten(0, (B, T)) for t in (flow, error, flow_warp(flat, flow)))
        self.__dict__[key] = ((target.clone(), sources.clone()), results)
        return results


FLOW: tuple[type[Replacement], ...] = (FlowNetwork, FlowWrapper, TrainingModule)


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


def _resized(flow: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resized with its vectors."""
    h, w = flow.shape[2:]
    if (h, w) == size:
        return flow
    scale = flow.new_tensor([size[1] / w, size[0] / h])[:, None, None]
    return F.interpolate(flow, size=size, mode="bilinear", align_corners=True) * scale
