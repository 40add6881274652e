"""The README's table is what the specs say, and its examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gi_kernels.testing import tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = EXAMPLE.findall(README)
#: Every document whose links must lead somewhere.
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/propagation.md")


def test_operator_table_is_in_sync() -> None:
    fresh = tables.replace(README, tables.BEGIN, tables.END, tables.operator_table())
    assert fresh == README, "run: make readme"


def test_table_is_written_between_the_markers(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(f"before\n{tables.BEGIN}\nstale row\n{tables.END}\nafter\n")
    assert tables.main([str(document)]) == 0
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| `flow_warp` |" in text
    assert "stale row" not in text


def test_missing_marker() -> None:
    with pytest.raises(ValueError, match="expected the markers"):
        tables.replace("nothing here", tables.BEGIN, tables.END, "table")


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(example: str) -> None:
    exec(compile(example, "README.md", "exec"), {"__name__": "example"})


def test_examples_of_the_video_tool() -> None:
    pytest.importorskip("cv2", reason="the [video] extra is not installed")
    for example in EXAMPLE.findall((ROOT / "docs" / "propagation.md").read_text()):
        exec(compile(example, "propagation.md", "exec"), {"__name__": "example"})


def test_relative_links_lead_somewhere() -> None:
    for name in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            if not target.startswith("http"):
                assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / name).read_text(), re.MULTILINE):
            assert target in targets, f"{name}: make {target}"
