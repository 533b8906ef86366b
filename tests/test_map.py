"""docs/map.md leads to files that are there, and to names that they hold."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENTRY = re.compile(r"`([\w./]+/[\w.]+)(?::(\w+))?`")


def entries() -> list[tuple[str, str]]:
    return ENTRY.findall((ROOT / "docs" / "map.md").read_text())


def test_the_map_leads_somewhere() -> None:
    lost = [
        f"{path}:{name}"
        for path, name in entries()
        if not (ROOT / path).is_file() or not re.search(rf"\b{name}\b", (ROOT / path).read_text())
    ]
    assert lost == []


def test_the_map_names_every_backend_of_each_op() -> None:
    text = " ".join(path for path, _ in entries())
    for part in ("reference.py", "csrc/cpu/", "kernels/", "csrc/cuda/", "tests/", "benchmarks/"):
        assert text.count(part) >= 5, part
