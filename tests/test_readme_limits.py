"""The README is short: words, lines, where the first picture and the first Python stand."""

from __future__ import annotations

import re
from pathlib import Path

TEXT = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
LINES = TEXT.splitlines()


def first(pattern: str) -> int:
    return next(number for number, line in enumerate(LINES, 1) if re.match(pattern, line))


def test_it_is_short() -> None:
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    words = " ".join(line for line in prose.splitlines() if not line.startswith("|")).split()
    assert len(words) <= 700
    assert [line for line in LINES if len(line) > 110] == []


def test_what_matters_comes_first() -> None:
    assert first(r"!\[") <= 8
    assert first(r"## Install") < first(r"```diff") <= 40
    assert first(r"```python") <= 60


def test_pictures_and_pages_are_there() -> None:
    root = Path(__file__).resolve().parent.parent
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", TEXT)
    assert [link for link in links if not (root / link).exists()] == []
