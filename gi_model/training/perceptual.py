"""The perceptual loss: distances in the features of a network that was trained to segment scenes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from gi_model.errors import InputError
from gi_model.published import Names, identical

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB in [0, 1]
COUNTER = "num_batches_tracked"


class SceneEncoder(nn.Module):
    """ResNet-50 with dilations instead of its last two strides: ``[B,3,H,W]`` -> four maps.

    256 channels at 1/4, and 512, 1024 and 2048 channels at 1/8 of the size. Parameters are named as in
    the encoder files of MIT's scene parsing networks (ADE20K, ``resnet50dilated``).

    Source: Zhou et al., "Semantic Understanding of Scenes through the ADE20K Dataset", 2019.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(128)
        self.layer1 = _layer(128, 64, blocks=3)
        self.layer2 = _layer(256, 128, blocks=4, stride=2)
        self.layer3 = _layer(512, 256, blocks=6, dilation=2)
        self.layer4 = _layer(1024, 512, blocks=3, dilation=4)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = images
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features

    def published_names(self) -> Names:
        """Those of the encoder files."""
        return identical(self)


class PerceptualLoss(nn.Module):
    """``weight * sum_k mean((f_k(predicted) - f_k(image))^2)`` over the four maps of a scene encoder.

    The encoder has no gradients of its own. Its batch norms follow the module's mode, as they did in
    the published training: in training mode they use the statistics of the batch and go on updating
    their running ones, twice per call. That changes value and gradient a lot; ``frozen`` keeps them in
    eval mode instead.

    Args:
        weight: factor.
        frozen: batch norms always use their stored statistics.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, weight: float = 30, frozen: bool = False) -> None:
        super().__init__()
        self.weight, self.frozen = weight, frozen
        self.encoder = SceneEncoder().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.train()

    def train(self, mode: bool = True) -> PerceptualLoss:
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, predicted: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """The loss of images ``[B,3,H,W]`` in [0, 1]; only ``predicted`` gets a gradient."""
        ours = self.encoder((predicted - self.mean) / self.std)
        theirs = self.encoder((image.detach() - self.mean) / self.std)
        terms = [F.mse_loss(a, b) for a, b in zip(ours, theirs, strict=True)]
        return self.weight * torch.stack(terms).sum()

    def load_encoder(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the weights of an encoder file; what else is in it is passed over.

        Raises:
            InputError: a weight is missing or of another shape; nothing has been changed then.
        """
        own = self.encoder.state_dict()
        missing = [key for key in own if key not in state and not key.endswith(COUNTER)]
        shapes = [key for key in own if key in state and state[key].shape != own[key].shape]
        if missing or shapes:
            wrong = [f"{key} is missing" for key in missing]
            wrong += [
                f"{key} has shape {list(state[key].shape)}, expected {list(own[key].shape)}" for key in shapes
            ]
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise InputError(f"perceptual encoder: {'; '.join(wrong[:5])}{more}")
        self.encoder.load_state_dict({key: state.get(key, value) for key, value in own.items()})


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with batch norms, added to the input."""

    def __init__(self, channels: int, width: int, stride: int, dilation: int, downsample: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module | None = None
        if downsample:
            projection = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x)))


def _layer(channels: int, width: int, blocks: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Blocks of one width; where they are dilated, the first is half as much."""
    first = _Bottleneck(channels, width, stride, max(1, dilation // 2), downsample=True)
    others = (_Bottleneck(4 * width, width, 1, dilation, downsample=False) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)
