"""What training shows of a batch: frames, flows and attention, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import cv2
import numpy as np
import torch

from gi_kernels import flow_warp
from gi_model.flow.colours import flow_colours
from gi_model.sheet import HOLE, tabulate
from gi_model.streams import Attention
from gi_model.training.step import Batch

WIDTH = 128  # pixels; smaller pictures are enlarged to at least this

Column = tuple[str, np.ndarray]  # title, pictures [B,H,W,3] uint8


@dataclass(frozen=True)
class Sample:
    """A batch and what the generator made of it.

    Attributes:
        batch: frames, masks and, if there are any, flows.
        predicted: ``[B,3,H,W]`` in [0, 1].
        attention: of each block that has any, softmax maps of its read and sigmoid maps of its write.
    """

    batch: Batch
    predicted: torch.Tensor
    attention: Sequence[Attention] = ()


@torch.no_grad()
def sheets(sample: Sample, count: int = 4) -> dict[str, np.ndarray]:
    """Pictures of the first ``count`` images of a batch, a row for each.

    - ``frames``: masked target and references, prediction, composite, truth;
    - ``flows``, if the batch has any: for each reference its flow (hue: direction, saturation: length), the
      masked reference aligned to the target by it, and its error from black to yellow; then what colours
      mean: the flow from the middle of a disk to each of its points, up to the length in the title;
    - ``attention``, if the generator has any: for each block where it reads and writes, mean over heads,
      from black (0) to yellow (the largest of the picture).

    Returns:
        ``[H,W,3]`` uint8 by name. Small pictures are enlarged.
    """
    batch = _first(sample.batch, count)
    made = {"frames": _frames(batch, sample.predicted[:count])}
    if batch.flows is not None:
        made["flows"] = _flows(batch, batch.flows)
    if sample.attention:
        made["attention"] = _attention(sample.attention, count)
    return {name: _sheet(columns) for name, columns in made.items()}


def _frames(batch: Batch, predicted: torch.Tensor) -> list[Column]:
    columns = [("masked", _tinted(batch.image, batch.mask))]
    for t in range(batch.srcs.shape[1]):
        columns.append((f"reference {t + 1}", _tinted(batch.srcs[:, t], batch.srcs_masks[:, t])))
    composite = batch.composite(predicted)
    shown = {"prediction": predicted, "composite": composite, "truth": batch.image}
    return columns + [(title, _levels(_last(images))) for title, images in shown.items()]


def _flows(batch: Batch, flows: torch.Tensor) -> list[Column]:
    moved = _last(flows)
    lengths = np.linalg.norm(moved, axis=-1)
    longest = float(np.quantile(lengths[np.isfinite(lengths)], 0.99)) if np.isfinite(lengths).any() else 0.0
    longest = max(longest, 1.0)
    columns = []
    for t in range(flows.shape[1]):
        mask, flow = batch.srcs_masks[:, t].float(), flows[:, t].float()
        seen = flow_warp(torch.cat([batch.srcs[:, t].float() * (1 - mask), 1 - mask], dim=1), flow)
        columns.append((f"flow {t + 1}", flow_colours(moved[:, t], longest)))
        columns.append((f"aligned {t + 1}", _tinted(seen[:, :3], 1 - seen[:, 3:])))
        if batch.errors is not None:
            columns.append((f"error {t + 1}", _heat(_last(batch.errors[:, t])[..., 0])))
    return [*columns, (f"to {longest:.3g} px", _wheel(columns[0][1].shape))]


def _attention(attention: Sequence[Attention], count: int) -> list[Column]:
    columns = []
    for i, maps in enumerate(attention):
        for name, values in (("read", maps.read), ("write", maps.write)):
            columns.append((f"{name} {i + 1}", _heat(values[:count].float().mean(dim=1).cpu().numpy())))
    return columns


def _sheet(columns: Sequence[Column]) -> np.ndarray:
    """Columns of pictures of any sizes, brought to that of the largest."""
    height, width = (max(pictures.shape[axis] for _, pictures in columns) for axis in (1, 2))
    enlarged = max(1, -(-WIDTH // width))
    size = (enlarged * width, enlarged * height)
    rows = [
        [cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST) for picture in row]
        for row in zip(*(pictures for _, pictures in columns), strict=True)
    ]
    return tabulate([title for title, _ in columns], rows)


def _first(batch: Batch, count: int) -> Batch:
    parts = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: part[:count] for name, part in parts.items() if part is not None})


def _tinted(images: torch.Tensor, masks: torch.Tensor) -> np.ndarray:
    """Images with what is hidden in one colour."""
    return np.where(_last(masks) > 0.5, np.array(HOLE, np.uint8), _levels(_last(images)))


def _heat(values: np.ndarray) -> np.ndarray:
    """``[B,H,W]`` of values from 0 to the largest of each picture as colours ``[B,H,W,3]``."""
    finite = np.nan_to_num(values, posinf=0, neginf=0)
    scaled = finite / np.maximum(finite.max(axis=(1, 2), keepdims=True), 1e-12)
    levels = np.rint(255 * scaled.clip(0, 1)).astype(np.uint8)
    return np.stack([cv2.applyColorMap(picture, cv2.COLORMAP_INFERNO)[..., ::-1] for picture in levels])


def _wheel(shape: Sequence[int]) -> np.ndarray:
    """What colours of flows mean, as pictures ``[B,H,W,3]``."""
    B, H, W = shape[:3]
    rows, columns = np.mgrid[:H, :W].astype(np.float32)
    radius = (min(H, W) - 1) / 2
    from_middle = np.stack([columns - (W - 1) / 2, rows - (H - 1) / 2], axis=-1) / radius
    colours = flow_colours(from_middle, 1)
    colours[np.linalg.norm(from_middle, axis=-1) > 1] = 255
    return np.broadcast_to(colours, (B, *colours.shape))


def _last(images: torch.Tensor) -> np.ndarray:
    """Channels last, float32."""
    return images.detach().float().movedim(-3, -1).cpu().numpy()


def _levels(images: np.ndarray) -> np.ndarray:
    """[0, 1] -> 0 to 255."""
    return np.rint(255 * np.nan_to_num(images).clip(0, 1)).astype(np.uint8)
