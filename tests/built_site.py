"""The built site, for tests that look at it: `make docs-look` builds it and sets SEMEDA_FAST_SITE."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """Where the site is; the calling module is skipped where there is none."""
    name = os.environ.get("SEMEDA_FAST_SITE")
    if not name:
        pytest.skip("looks at the built site: make docs-look", allow_module_level=True)
    path = ROOT / name
    if not (path / "index.html").is_file():
        raise FileNotFoundError(f"SEMEDA_FAST_SITE={name}, but {path} holds no index.html; run: make docs")
    return path


def pages(site: Path) -> list[str]:
    """Every page, as its path in the site."""
    return sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if "_static" not in path.parts)
