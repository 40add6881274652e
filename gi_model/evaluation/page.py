"""A page of pictures: the best and the worst images of an evaluation."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from gi_model.evaluation.report import replacing

HOLE = (255, 60, 160)  # RGB
QUALITY = 90  # of JPEG

STYLE = """body{font:14px sans-serif;margin:2em;max-width:1600px}figure{margin:0 0 1.5em}
div{display:flex;flex-wrap:wrap;gap:4px}p{margin:0;font-size:12px;color:#555}img{display:block;width:192px}"""


@dataclass
class Case:
    """One image: its name, numbers as text, and titled pictures ``[H,W,3]`` in [0, 1]."""

    name: str
    numbers: str
    pictures: list[tuple[str, np.ndarray]]


def write_page(path: Path, title: str, sections: list[tuple[str, list[Case]]]) -> None:
    """Write one HTML file with all pictures in it."""
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
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def tinted(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``[H,W,3]`` in [0, 1] with the masked part, ``[H,W]``, in one colour."""
    return np.where(mask[..., None] > 0.5, np.array(HOLE, np.float32) / 255, image)


def _embedded(picture: np.ndarray) -> str:
    levels = np.rint(255 * picture.clip(0, 1)).astype(np.uint8)
    _, data = cv2.imencode(".jpg", levels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}" alt="">'
