"""The site: `make docs` builds it into build/docs, without a network.

Pages are Markdown (MyST). Signatures and what they mean come from the code, by autodoc.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.fileutil import copy_asset

import semeda_fast

project = "semeda_fast"
author = "The semeda_fast authors"
copyright = author
version = release = semeda_fast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
]
root_doc = "index"
exclude_patterns = ["_static"]
nitpicky = True
# What belongs to other projects has no target here: their inventories would have to be downloaded.
UNNAMED = r"Accelerator|ArrayLike|Dataset|Metric|NDArray|ProcessGroup|Tensor|Trainer|int64|semeda_fast\.proxy\.record.*"
FOREIGN = "accelerate collections matplotlib nn np numpy os pathlib torch torchmetrics typing"
nitpick_ignore_regex = [("py:.*", rf"({FOREIGN.replace(' ', '|')})\..*|{UNNAMED}")]

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist", "attrs_block", "attrs_inline"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 60
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]
default_role = "literal"  # docstrings mark code with single backticks

html_theme = "pydata_sphinx_theme"
html_title = "semeda_fast"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_use_index = False
html_domain_indices = False
html_show_sphinx = False
html_sidebars: dict[str, list[str]] = {
    page: [] for page in ("index", "start", "guarantees", "changelog", "contributing")
}
html_context = {"default_mode": "auto"}  # said outright: left out, the theme complains in the console
html_theme_options = {
    "header_links_before_dropdown": 8,
    "navbar_end": ["theme-switcher"],
    "show_prev_next": True,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "use_edit_page_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "footer_start": ["copyright"],
    "footer_end": [],
}

# One file that holds its fonts as paths; pages with mathematics load it from here.
MATHJAX = "tex-svg.js"
mathjax_path = f"mathjax/{MATHJAX}"
mathjax3_config = {"svg": {"fontCache": "global"}, "options": {"enableMenu": False}}

DOCS = Path(__file__).resolve().parent
SHOWN = {
    DOCS.parent / file: page
    for file, page in {
        "CHANGELOG.md": "changelog",
        "CONTRIBUTING.md": "contributing",
        "benchmarks/README.md": "measured",
        "csrc/cuda/README.md": "how/cuda",
        "kernels/README.md": "how/mathematics",
    }.items()
}
_SECTION = re.compile(r"(Args|Attributes|Example|Raises|Returns|Shape|Yields|Note):$")


def mark_literal_blocks(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings indent formulas by four, as Markdown does; reStructuredText wants a `::` in front."""
    marked: list[str] = []
    base, inside = 0, False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent == 0:
            base = 4 if _SECTION.match(line) else 0
        if not line.strip() or inside:
            inside = inside and (not line.strip() or indent >= base + 4)
        elif indent >= base + 4 and marked and not marked[-1].strip():
            marked += [" " * base + "::", ""]
            inside = True
        marked.append(line)
    lines[:] = marked


def redirect(text: str, folder: Path) -> str:
    """Links of a text in `folder` that lead to a file of the repository which the site shows lead to its page."""

    def page(link: re.Match[str]) -> str:
        path, anchor = link[1], link[2] or ""
        if path.startswith("/") or not (folder / path).is_file():
            return link[0]
        target = (folder / path).resolve()
        if target in SHOWN:
            return f"](/{SHOWN[target]}.md{anchor})"
        inside = target.is_relative_to(DOCS) and not folder.is_relative_to(DOCS)
        return f"](/{target.relative_to(DOCS).as_posix()}{anchor})" if inside else link[0]

    return re.sub(r"\]\(([^()\s:#]+)(#[^()\s]*)?\)", page, text)


def redirect_page(app: Sphinx, name: str, source: list[str]) -> None:
    source[0] = redirect(source[0], Path(app.env.doc2path(name)).parent)


def redirect_included(app: Sphinx, path: Path, page: str, source: list[str]) -> None:
    source[0] = redirect(source[0], (DOCS / path).resolve().parent)


class CommandHelp(SphinxDirective):
    """`command-help`: what `semeda-fast ARGUMENTS --help` prints."""

    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        command = [sys.executable, "-m", "semeda_fast.cli", *(self.arguments[0].split() if self.arguments else [])]
        environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
        text = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, env=environment).stdout
        return [nodes.literal_block(text, text.strip(), language="text")]


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """MathJax comes in a package whose name no import statement can say."""
    if error is None and app.builder.format == "html":
        found = importlib.util.find_spec("sphinx-mathjax-offline")
        assert found is not None
        assert found.submodule_search_locations is not None
        source = Path(found.submodule_search_locations[0], "static", "mathjax", MATHJAX)
        copy_asset(source, Path(app.outdir, "_static", "mathjax"))


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", mark_literal_blocks, priority=400)  # before napoleon's
    app.connect("build-finished", copy_mathjax)
    app.connect("source-read", redirect_page)
    app.connect("include-read", redirect_included)
    app.add_directive("command-help", CommandHelp)
