"""Every page of the site in Chromium, wide and narrow, light and dark: nothing fails, and nothing scrolls sideways.

Screenshots are left in build/screenshots, for eyes.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import built_site
import pytest

SITE = built_site.folder()
api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install '.[docs]'")
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
if CHROMIUM is None:
    pytest.skip("no Chromium here: apt-get install chromium, or CHROMIUM=its path", allow_module_level=True)

SCREENSHOTS = built_site.ROOT / "build" / "screenshots"
FLAGS = [
    f"--{flag}"
    for flag in (
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    )
]
WIDTHS = {1280: 900, 400: 800}
TALLEST = 4000  # pixels of a screenshot
# What holds a page's text must not scroll sideways; only a table, a formula or code may, each in a box of its own.
SIDEWAYS = """() => ['html', '.bd-main', '.bd-content', '.bd-article-container', '.bd-article'].filter(name => {
    const box = document.querySelector(name)
    return box && box.scrollWidth > box.clientWidth + 1
})"""
STICK_OUT = """() => [...document.querySelectorAll('.bd-article *')].filter(element => {
    if (element.getBoundingClientRect().right <= innerWidth) return false
    for (let box = element.parentElement; !box.matches('.bd-article'); box = box.parentElement)
        if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(box).overflowX)) return false
    return true
}).slice(0, 3).map(element => element.outerHTML.slice(0, 120))"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[api.Browser]:
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, chromium_sandbox=False)
        yield found
        found.close()


@pytest.fixture
def view(browser: api.Browser) -> Iterator[api.Page]:
    """A page in a profile of its own, whose complaints are in `problems`."""
    context = browser.new_context(service_workers="block")
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.problems = []
    page.on("console", lambda m: m.type in ("error", "warning") and page.problems.append(f"{m.type}: {m.text}"))
    page.on("pageerror", lambda error: page.problems.append(f"error: {error}"))
    page.on("requestfailed", lambda request: page.problems.append(f"failed: {request.url}"))
    page.on("response", lambda r: r.status >= 400 and page.problems.append(f"{r.status}: {r.url}"))
    page.on("request", lambda r: not is_local(r.url) and page.problems.append(f"another host: {r.url}"))
    yield page
    context.close()


def is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob") or parts.hostname == "127.0.0.1"


@pytest.mark.parametrize("name", built_site.pages(SITE))
def test_a_page(name: str, view: api.Page, address: str) -> None:
    view.goto(f"{address}/{name}", wait_until="load")
    view.wait_for_function(
        "document.querySelectorAll('.math').length == document.querySelectorAll('.math mjx-container').length"
    )
    for width, screen in WIDTHS.items():
        view.set_viewport_size({"width": width, "height": screen})
        for scheme in ("light", "dark"):
            view.emulate_media(color_scheme=scheme)
            view.wait_for_function(f"document.documentElement.dataset.theme == '{scheme}'")
            assert view.evaluate(SIDEWAYS) == [], f"at {width} px these scroll sideways; {view.evaluate(STICK_OUT)}"
            picture = SCREENSHOTS / f"{width}-{scheme}" / Path(name).with_suffix(".png")
            picture.parent.mkdir(parents=True, exist_ok=True)
            height = min(TALLEST, view.evaluate("document.documentElement.scrollHeight"))
            clip = {"x": 0, "y": 0, "width": width, "height": height}
            view.screenshot(path=picture, full_page=True, clip=clip, animations="disabled")
    broken = view.evaluate("[...document.images].filter(image => !image.naturalWidth).map(image => image.src)")
    assert broken == []
    assert view.problems == []


def test_the_search_finds_a_name_and_asks_nobody_else(view: api.Page, address: str) -> None:
    view.goto(f"{address}/search.html?q=lambda_semeda", wait_until="load")
    view.wait_for_selector("#search-results li a")
    assert view.problems == []
