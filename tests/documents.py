"""What tests of the commands in documents share."""

from __future__ import annotations

import re
from pathlib import Path

import torch

DOCUMENTS = Path(__file__).parents[1] / "docs"


def text_and_lines(name: str) -> tuple[str, list[str]]:
    """A document, and the lines of its shell blocks; a line that goes on behind a backslash is one."""
    text = (DOCUMENTS / name).read_text()
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    return text, blocks.replace("\\\n", " ").splitlines()


class SmallInception(torch.nn.Module):
    """In place of Inception, whose weights and time a test need not spend."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
