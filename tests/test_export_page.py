"""docs/export.md: its blocks run, one after the other as a reader would run them, and its links lead somewhere."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from readme_blocks import parse, run

PAGE = Path(__file__).resolve().parent.parent / "docs" / "export.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_blocks_run(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("tensorboard")
    blocks = parse(TEXT)
    assert len(blocks) == TEXT.count("```python")
    assert all(later.code.startswith(block.code) for block, later in itertools.pairwise(blocks))
    assert run(blocks[-1], tmp_path, timeout=280) == ""  # which goes on where all before it ended
    made = {path.name for path in tmp_path.iterdir()}
    assert {"step.pt2", "step.onnx", "traced.onnx", "runs"} <= made


def test_links_to_sections() -> None:
    titles = re.findall(r"^## (.*)$", TEXT, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(#([^)]*)\)", TEXT)
    assert links
    assert set(links) <= anchors
