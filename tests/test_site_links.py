"""The built site holds together: links and anchors lead somewhere, assets are there, no other host is asked."""

from __future__ import annotations

import importlib
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import built_site
import pytest

SITE = built_site.folder()
LOADS = {
    ("script", "src"),
    ("img", "src"),
    ("img", "srcset"),
    ("source", "srcset"),
    ("link", "href"),
    ("iframe", "src"),
}


class Page(HTMLParser):
    """What a page links to, what it loads, and the anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id":
                self.anchors.add(value)
            elif (tag, name) in LOADS:
                self.loads.append(value)
            elif (tag, name) == ("a", "href"):
                self.links.append(value)


@cache
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def problem(source: Path, link: str) -> str:
    """Why a link of a page leads nowhere; empty where it leads somewhere, or out of the site."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return ""
    target = (source.parent / unquote(parts.path)).resolve() if parts.path else source
    if not target.is_file():
        return f"{link}: there is no {target}"
    if parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in page(target).anchors:
        return f"{link}: {target.name} has no such anchor"
    return ""


def test_every_link_and_every_asset_leads_somewhere() -> None:
    problems = []
    for name in built_site.pages(SITE):
        source = SITE / name
        found = page(source)
        problems += [f"{name}: {text}" for link in found.links + found.loads if (text := problem(source, link))]
    assert not problems, "\n".join(problems)


def test_nothing_is_loaded_from_another_host() -> None:
    for name in built_site.pages(SITE):
        foreign = [link for link in page(SITE / name).loads if urlsplit(link).netloc]
        assert not foreign, f"{name} loads {foreign}"
    for style in SITE.rglob("*.css"):
        text = style.read_text(encoding="utf-8", errors="replace")
        assert not re.search(r"(url\(\s*[\"']?|@import\s+[\"'])(https?:)?//", text), style


def test_a_page_with_formulas_brings_mathjax() -> None:
    text = (SITE / "how" / "mathematics.html").read_text(encoding="utf-8")
    assert "tex-svg.js" in text
    assert r"\tag{12}" in text
    assert (SITE / "_static" / "mathjax" / "tex-svg.js").stat().st_size > 1_000_000


@pytest.mark.parametrize(
    "module", ["semeda_fast", "semeda_fast.proxy", "semeda_fast.metrics", "semeda_fast.schedule", "semeda_fast.errors"]
)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    """One heading a name, with the text of its docstring: what `__all__` gains, the reference gains."""
    pytest.importorskip("torchmetrics", reason="semeda_fast.metrics needs it")
    found = importlib.import_module(module)
    names = [name for name in found.__all__ if name != "__version__"]
    anchors = set().union(
        *(page(SITE / name).anchors for name in built_site.pages(SITE) if name.startswith("reference/"))
    )
    assert [name for name in names if not anchors & {f"{module}.{name}", f"semeda_fast.{name}"}] == []
