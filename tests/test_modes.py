"""The table of modes and backends in the documentation says what runs."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from semeda_fast import EdgeProxy, SemedaLoss
from semeda_fast.backends import registry as backends
from semeda_fast.backends.native import cuda_module

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("modes", ROOT / "docs" / "modes.py")
assert spec is not None
assert spec.loader is not None
modes: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(modes)


def test_the_page_has_the_table_of_today() -> None:
    if cuda_module() is None:
        pytest.skip("neither the CUDA kernels nor their emulation are here, which the table asks")
    assert modes.table() in modes.PAGE.read_text(encoding="utf-8"), "run docs/modes.py as its docstring says"


@pytest.mark.parametrize("row", modes.MODES, ids=[row[0] for row in modes.MODES])
def test_what_runs_on_the_cpu_is_what_the_table_says(row: Any) -> None:
    if "cpu" not in backends.available_names("cpu"):
        pytest.skip("the CPU kernels are not built here")
    name, options, shape, labels, more = row
    said = modes.answers(*row)["cpu"]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, dtype=more.get("logits", torch.float32))
    soft = more.get("target") is not None
    target = torch.full(labels, 1 / shape[1]) if soft else torch.randint(2, labels, generator=generator)
    if not options.get("from_logits", True):
        logits = logits.softmax(dim=1)
    proxy = EdgeProxy(2 if options.get("mode", "multiclass") != "multiclass" else shape[1])
    more_options = {"weight": torch.ones(shape[1])} if more.get("rows") else {}
    criterion = SemedaLoss(proxy, **options, **more_options)
    arguments: dict[str, Any] = {}
    if name == "`counts`":
        arguments["counts"] = criterion.counts(target)
    leaf = logits.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once in a process a loss that is left to the reference warns
        loss = criterion(leaf, target, **arguments)
        assert isinstance(loss, torch.Tensor)
        loss.sum().backward()
        with torch.profiler.profile() as profile, torch.no_grad():
            criterion(leaf.detach(), target, **arguments)
    ran = {event.key for event in profile.key_averages()}
    assert ("semeda_fast::cpu_forward" in ran) == (said != "reference")
    if said != "reference":
        assert ("aten::upsample_bilinear2d" in ran) == (said == "scaled by torch before")
