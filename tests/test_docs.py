"""The pages of the site, as they are written: their code runs, and what they say about errors is so."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from readme_blocks import ONE_PROGRAM, PYTHON, parse

from semeda_fast import SemedaLoss, backend_info
from semeda_fast.errors import BackendUnavailableError

DOCS = Path(__file__).resolve().parent.parent / "docs"
# What .ci/run hands to tests/readme_blocks.py; other pages are shown, not run.
RUN = sorted([DOCS / "start.md", DOCS / "results.md", DOCS / "proxies.md", *(DOCS / "guide").rglob("*.md")])


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_blocks_of_a_page_can_be_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in parse(text):
        if block.language in PYTHON:
            ast.parse(block.code, filename=f"{page.name}:{block.line}")
    shown = len(re.findall(r"^```python$", text, re.MULTILINE))
    assert shown < 2 or ONE_PROGRAM in text, "several blocks of Python: make the page one program"


def test_ci_runs_every_page_that_has_code() -> None:
    ci = (DOCS.parent / ".ci" / "run").read_text(encoding="utf-8")
    assert "docs/start.md docs/results.md docs/proxies.md docs/guide/*.md" in ci
    made = (DOCS.parent / "Makefile").read_text(encoding="utf-8")  # `make test-integrations`, which CI calls
    assert "make test-integrations" in ci
    for page in (DOCS / "guide" / "frameworks").glob("*.md"):
        assert f"docs/guide/frameworks/{page.name}" in ci + made
    others = [
        page for page in DOCS.rglob("*.md") if page not in RUN and page.name != "export.md"
    ]  # test_export_page.py
    assert [page.name for page in others if "```python" in page.read_text(encoding="utf-8")] == []


LOGITS = torch.zeros(2, 21, 8, 8, requires_grad=True)
LABELS = torch.zeros(2, 8, 8, dtype=torch.int64)


def _loss(*arguments: object, **options: object) -> object:
    return SemedaLoss(num_classes=21, **options)(*arguments)  # type: ignore[arg-type]


def _with_void() -> torch.Tensor:
    labels = torch.arange(LABELS.numel()).reshape(LABELS.shape) % 5
    return torch.where(labels == 4, 255, labels)


def _second_derivative() -> None:
    fused = backend_info().auto["cpu"]
    if fused == "reference":
        pytest.skip("no fused backend here")
    (first,) = torch.autograd.grad(_loss(LOGITS, LABELS), LOGITS, create_graph=True)  # type: ignore[arg-type]
    torch.autograd.grad(first.sum(), LOGITS)


def _other_device() -> None:
    SemedaLoss(num_classes=21)(LOGITS.to("meta"), LABELS.to("meta"))


def _wrapped(tmp: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp / 'rendezvous'}", rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(SemedaLoss(num_classes=21))
    finally:
        dist.destroy_process_group()


class SemanticSegmenterOutput:
    """What transformers' networks give, by name."""

    logits = LOGITS


def _missing_backend() -> None:
    """Without a GPU; in a process of its own, since this one may have Triton's interpreter."""
    hidden = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "import semeda_fast; semeda_fast.SemedaLoss(num_classes=21, backend='triton')"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env={**hidden, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    raise BackendUnavailableError(result.stderr.splitlines()[-1])


# By the beginning of what the page quotes.
CAUSES: dict[str, Callable[[Path], object]] = {
    "target holds labels outside": lambda _: _loss(LOGITS, _with_void()),
    "logits have 21 classes": lambda _: SemedaLoss(num_classes=19)(LOGITS, LABELS),
    "labels must have the shape ...`; the logits": lambda _: _loss(LOGITS[..., :4, :4], LABELS),
    "a floating-point target": lambda _: _loss(LOGITS, LABELS.float()),
    "logits are on": lambda _: _other_device(),
    "logits must be a tensor": lambda _: _loss(SemanticSegmenterOutput(), LABELS),
    "backend 'triton'": lambda _: _missing_backend(),
    "the fused backend": lambda _: _second_derivative(),
    "DistributedDataParallel": _wrapped,
}
ERRORS = (ValueError, TypeError, RuntimeError, BackendUnavailableError)
TABLE = (DOCS / "guide" / "troubleshooting.md").read_text(encoding="utf-8").partition("| it says |")[2].split("\n\n")[0]
ROWS = [row.strip("| ").split(" | ") for row in TABLE.splitlines() if row.startswith("| `")]


@pytest.mark.parametrize(("says", "remedy"), ROWS, ids=lambda text: text[:30])
def test_an_error_says_what_the_page_quotes(says: str, remedy: str, tmp_path: Path) -> None:
    (cause,) = (cause for begin, cause in CAUSES.items() if says.startswith(f"`{begin}"))
    with pytest.raises(ERRORS) as caught:
        cause(tmp_path)
    message = str(caught.value)
    quoted = re.findall(r"`([^`]+)`", says)[0].replace("cuda:0", "meta")
    assert re.search(".*".join(map(re.escape, quoted.split("..."))), message, re.DOTALL), message
    if code := re.findall(r"`([^`]+)`", remedy):  # where the message has a remedy of its own, it is the page's
        wanted = re.sub(r"[\"']", "", code[0])
        known = re.sub(r"[\"']", "", message)
        assert wanted in known or wanted in ("criterion.to(device)", "backend=reference"), message


def test_every_row_was_tried() -> None:
    assert len(ROWS) == len(CAUSES)
