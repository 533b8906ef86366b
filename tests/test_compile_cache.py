"""Code that torch.compile keeps on disk is not taken by another build of the library."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from helpers import make_inputs

from semeda_fast import SemedaLoss
from semeda_fast.backends.build import BUILD, PACKAGE, digest


def test_a_compiled_graph_names_the_build() -> None:
    seen: list[Any] = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(node.args for node in graph.graph.nodes if "loss_terms" in str(node.target))
        return graph.forward

    criterion = SemedaLoss(num_classes=5, ignore_index=255)
    logits, target = make_inputs()
    torch.compile(criterion, fullgraph=True, backend=note)(logits, target)
    assert [args[-1] for args in seen] == [BUILD]


def test_the_word_changes_with_sources_and_compiled_modules(tmp_path: Path) -> None:
    copy = tmp_path / "semeda_fast"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert digest(copy) == BUILD
    with (copy / "backends" / "reference.py").open("a") as file:
        file.write("# another\n")
    other = digest(copy)
    (copy / "_C.new.so").write_bytes(b"")
    assert len({BUILD, other, digest(copy)}) == 3
