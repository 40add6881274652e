"""A page of pictures: the best and the worst images of an evaluation."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from gi_model.data.validation import ValidationSet
from gi_model.evaluation.filling import Filler
from gi_model.evaluation.images import PER_IMAGE, channels_first
from gi_model.evaluation.report import counted
from gi_model.sheet import HOLE
from gi_model.staging import staged

QUALITY = 90  # of JPEG

STYLE = """body{font:14px sans-serif;margin:2em;max-width:1600px}figure{margin:0 0 1.5em}
div{display:flex;flex-wrap:wrap;gap:4px}p{margin:0;font-size:12px;color:#555}img{display:block;width:192px}"""


def write_cases(
    path: Path,
    title: str,
    sets: Mapping[int, ValidationSet],
    measured: Mapping[int, dict[str, np.ndarray]],
    filler: Filler,
    device: torch.device,
    count: int,
) -> None:
    """Write a page of the ``count`` worst and best images of each data set.

    By LPIPS of the stitched image, or by SSIM without it. Images without mask are left out. The chosen
    ones are filled once more.

    Args:
        sets, measured: samples by number of references, and what was measured of them.
    """
    sections = []
    for n, samples in sets.items():
        numbers = measured[n]
        by, sign = ("lpips", 1) if "stitched/lpips" in numbers else ("ssim", -1)
        order = np.argsort(sign * numbers[f"stitched/{by}"], kind="stable")
        masked = [int(i) for i in order if numbers["area"][i] > 0]
        for what, chosen in (("worst", masked[::-1]), ("best", masked)):
            cases = [_case(samples, i, numbers, filler, device) for i in chosen[:count]]
            sections.append((f"{counted(n, 'reference')}: {what} by {by}, stitched", cases))
    with staged(path) as temporary:
        temporary.write_text(_page(title, sections), encoding="utf-8")


@dataclass
class Case:
    """One image: its name, numbers as text, and titled pictures ``[H,W,3]`` in [0, 1]."""

    name: str
    numbers: str
    pictures: list[tuple[str, np.ndarray]]


def _case(
    samples: ValidationSet, index: int, numbers: dict[str, np.ndarray], filler: Filler, device: torch.device
) -> Case:
    loaded = {name: torch.from_numpy(value)[None] for name, value in samples[index].items()}
    images, masks, srcs, srcs_masks = channels_first(loaded, device)
    predicted = filler(images, masks, srcs, srcs_masks)
    stitched = masks * predicted + (1 - masks) * images

    def picture(tensor: torch.Tensor) -> np.ndarray:
        return tensor.float().movedim(-3, -1).cpu().numpy()

    hidden = picture(srcs_masks[0])[..., 0]
    references = [
        (f"reference {t + 1}", _tinted(frame, hidden[t])) for t, frame in enumerate(picture(srcs[0]))
    ]
    truth = picture(images[0])
    pictures = [("masked", _tinted(truth, picture(masks[0])[..., 0])), *references]
    pictures += [("raw", picture(predicted[0])), ("stitched", picture(stitched[0])), ("truth", truth)]
    shown = [f"{numbers['area'][index]:.0%} masked"]
    for score in PER_IMAGE:
        if f"stitched/{score}" in numbers:
            shown.append(f"{score} {numbers[f'stitched/{score}'][index]:.4f}")
    return Case(samples.targets[index].image.name, ", ".join(shown), pictures)


def _page(title: str, sections: list[tuple[str, list[Case]]]) -> str:
    """One HTML document with all pictures in it."""
    lines = [f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"]
    lines.append(f"<h1>{html.escape(title)}</h1>")
    for heading, cases in sections:
        lines.append(f"<h2>{html.escape(heading)}</h2>")
        for case in cases:
            lines.append(
                f"<figure><figcaption>{html.escape(f'{case.name}: {case.numbers}')}</figcaption><div>"
            )
            lines += [f"<span>{_embedded(p)}<p>{html.escape(t)}</p></span>" for t, p in case.pictures]
            lines.append("</div></figure>")
    return "\n".join(lines) + "\n"


def _tinted(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``[H,W,3]`` in [0, 1] with the masked part, ``[H,W]``, in one colour."""
    return np.where(mask[..., None] > 0.5, np.array(HOLE, np.float32) / 255, image)


def _embedded(picture: np.ndarray) -> str:
    levels = np.rint(255 * picture.clip(0, 1)).astype(np.uint8)
    _, data = cv2.imencode(".jpg", levels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}" alt="">'
