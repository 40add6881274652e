"""LPIPS: how different two images look, by the features of a network trained on photographs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from gi_kernels import checks
from gi_kernels.nn import check_inputs
from gi_model.checkpoints import load_checkpoint
from gi_model.errors import InputError
from gi_model.evaluation import lpips_weights
from gi_model.published import Names, load_published

# Of ImageNet as the metric's authors normalise it, for pixels in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
TINY = 1e-10  # what is added to the length of a feature vector before it is divided by it

#: Backbones: (channels out, kernel, stride, padding) of convolutions, each followed by a ReLU; None pools.
NETWORKS: dict[str, tuple[tuple[int, int, int, int] | None, ...]] = {
    "vgg16": tuple(
        (width, 3, 1, 1) if width else None
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
    ),
    "alexnet": (
        (64, 11, 4, 2),
        None,
        (192, 5, 1, 2),
        None,
        (384, 3, 1, 1),
        (256, 3, 1, 1),
        (256, 3, 1, 1),
    ),
}
#: Torchvision's numbers of the ReLUs after which features are taken.
TAPS = {"vgg16": (3, 8, 15, 22, 29), "alexnet": (1, 4, 7, 9, 11)}
POOLS = {"vgg16": 2, "alexnet": 3}  # window; the stride is 2
SMALLEST = {"vgg16": 16, "alexnet": 31}  # pixels of a side, for one feature in the last map


def lpips(
    network: str = "vgg16",
    weights: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
) -> LPIPS:
    """LPIPS with trained weights, in eval mode, without gradients of its weights.

    Args:
        network: ``vgg16``, as in the published evaluation, or ``alexnet``.
        weights: one or more files that hold backbone and heads together, or ``None`` for those that
            ``gi-model fetch-lpips`` has put into the cache. Layouts: torchvision's state dict of the
            whole network or of its ``features``; heads as the package lpips 0.1 ships them
            (``lin0.model.1.weight``, ...); the state dict of that package's whole module; what
            ``fetch-lpips`` writes. Any format that ``load_checkpoint`` reads.

    Raises:
        InputError: no weights in the cache, files that cannot be read or do not fit.
        ValueError: unknown network.
    """
    metric = LPIPS(network)
    if weights is None:
        weights = lpips_weights.cached(network)
    files = [weights] if isinstance(weights, str | os.PathLike) else list(weights)
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state |= published_layout(load_checkpoint(file))
    try:
        load_published(metric, state)
    except InputError as error:
        names = ", ".join(os.fspath(file) for file in files)
        raise InputError(f"weights: {names} for LPIPS with {network}: {error}") from error
    return metric


class LPIPS(nn.Module):
    """Learned perceptual distance of images, version 0.1 with linear heads; fresh weights.

    ``d = sum_k mean_hw sum_c w_kc (a_kchw - b_kchw)^2`` where ``a_k`` and ``b_k`` are the two images'
    features after the k-th tapped ReLU, divided by their length over the channels. Differentiable in
    both images.

    Args:
        network: ``vgg16`` or ``alexnet``.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, network: str = "vgg16") -> None:
        super().__init__()
        checks.one_of("network", network, tuple(NETWORKS))
        self.network = network
        self.features = _backbone(network)
        tapped = [self.features.get_submodule(str(tap - 1)) for tap in TAPS[network]]
        widths = [layer.out_channels for layer in tapped if isinstance(layer, nn.Conv2d)]
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor, others: torch.Tensor, *, spatial: bool = False) -> torch.Tensor:
        """Distance per image, or per pixel.

        Args:
            images, others: ``[B,3,H,W]`` in [0, 1], of the dtype and on the device of the weights; sides
                of at least 16 (vgg16) or 31 (alexnet) pixels.
            spatial: a map instead: every layer's distances scaled up bilinearly to the images' size.

        Returns:
            ``[B]``, or ``[B,1,H,W]`` if ``spatial``. Zero for equal images; published heads are not
            negative.

        Raises:
            TypeError, ValueError: images of the wrong type, rank, size, dtype or device.
        """
        self._check(("images", images, "B 3 H W"), ("others", others, "B 3 H W"))
        terms = self.terms(self.describe(images), self.describe(others))
        if spatial:
            size = images.shape[2:]
            return sum_of([F.interpolate(t, size=size, mode="bilinear", align_corners=False) for t in terms])
        return sum_of([t.mean(dim=(1, 2, 3)) for t in terms])

    def describe(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Unit features ``[B,C_k,h_k,w_k]`` of ``images`` after each tap, to be compared with others'."""
        self._check(("images", images, "B 3 H W"))
        x = (2 * images - 1 - self.shift.to(images.dtype)) / self.scale.to(images.dtype)
        taps, described = TAPS[self.network], []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in taps:
                described.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + TINY))
        return described

    def terms(self, features: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Distance maps ``[B,1,h_k,w_k]`` of every tap, from what ``describe`` returned."""
        pairs = zip(self.heads, features, others, strict=True)
        return [head((one - other).square()) for head, one, other in pairs]

    def published_names(self) -> Names:
        """Torchvision's names for the backbone, those of lpips 0.1 for the heads."""
        names: Names = {key: (key,) for key in self.state_dict() if key.startswith("features.")}
        return names | {f"heads.{k}.weight": (f"lin{k}.model.1.weight",) for k in range(len(self.heads))}

    def _check(self, *named: tuple[str, torch.Tensor, str]) -> None:
        check_inputs(self.heads[0].get_parameter("weight"), *named)
        name, images, _ = named[0]
        smallest = SMALLEST[self.network]
        if min(images.shape[2:]) < smallest:
            raise ValueError(
                f"{name}: expected sides of at least {smallest} pixels for {self.network}, "
                f"got {images.shape[2]}x{images.shape[3]}"
            )


def published_layout(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` under ``LPIPS.published_names``, without what LPIPS does not use.

    Known are the layouts that ``lpips`` lists. Names of no layout are kept, so that loading reports them.
    """
    made = {}
    for name, tensor in state.items():
        if name.startswith(("classifier.", "scaling_layer.")):
            continue
        name = re.sub(r"^(\d+)\.(weight|bias)$", r"features.\1.\2", name)
        name = re.sub(r"^net\.slice\d+\.(\d+)\.(weight|bias)$", r"features.\1.\2", name)
        name = re.sub(r"^lins\.(\d+)\.model\.1\.weight$", r"lin\1.model.1.weight", name)
        made[name] = tensor
    return made


def sum_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of tensors of one shape, from the first to the last."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _backbone(network: str) -> nn.Sequential:
    """The convolutions of torchvision's network, with its numbering, up to the last tap."""
    layers: list[nn.Module] = []
    channels = 3
    for layer in NETWORKS[network]:
        if layer is None:
            layers.append(nn.MaxPool2d(POOLS[network], 2))
        else:
            out, kernel, stride, padding = layer
            layers += [nn.Conv2d(channels, out, kernel, stride, padding), nn.ReLU()]
            channels = out
    return nn.Sequential(*layers)
