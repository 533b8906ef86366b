"""Writes the table of docs/how/shapes.md: what each backend computes itself, and what it leaves to the reference.

    SEMEDA_FAST_CUDA_EMULATION=$(python tests/cuda_emulated.py) python docs/modes.py

Each backend is asked on tensors without memory. The CUDA kernels, or their emulation, have to be there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semeda_fast import EdgeProxy
from semeda_fast.backends import registry, spec_of
from semeda_fast.folding import Call, folded
from semeda_fast.options import options_of

PAGE = Path(__file__).with_name("how") / "shapes.md"
BEGIN, END = "<!-- modes: begin -->", "<!-- modes: end -->"
BACKENDS = ("cpu", "triton", "cuda")
LABELS, FLOATS = torch.int64, torch.float32
# Name, options, logits' shape, target's shape, and what else there is.
MODES: list[tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ("several classes", {}, (2, 21, 8, 8), (2, 8, 8), {}),
    ("150 classes", {}, (2, 150, 8, 8), (2, 8, 8), {}),
    ("300 classes", {}, (2, 300, 8, 8), (2, 8, 8), {}),
    ("binary", {"mode": "binary"}, (2, 1, 8, 8), (2, 8, 8), {}),
    ("overlapping classes", {"mode": "multilabel"}, (2, 4, 8, 8), (2, 4, 8, 8), {}),
    ("overlapping classes, `weight`, `pos_weight`", {"mode": "multilabel"}, (2, 4, 8, 8), (2, 4, 8, 8), {"rows": True}),
    ("volumes", {}, (2, 5, 4, 8, 8), (2, 4, 8, 8), {}),
    ("soft targets", {}, (2, 5, 8, 8), (2, 5, 8, 8), {"target": FLOATS}),
    ('small logits, `upsample="bilinear"`', {"upsample": "bilinear"}, (2, 5, 4, 4), (2, 16, 16), {}),
    ('`distance="l2"`, `"smooth_l1"`', {"distance": "l2"}, (2, 5, 8, 8), (2, 8, 8), {}),
    ('`reduction="none"`, `pixel_weight`', {"reduction": "none"}, (2, 5, 8, 8), (2, 8, 8), {}),
    ("`counts`", {}, (2, 5, 8, 8), (2, 8, 8), {}),
    ("probabilities, `from_logits=False`", {"from_logits": False}, (2, 5, 8, 8), (2, 8, 8), {}),
    ("float64", {}, (2, 5, 8, 8), (2, 8, 8), {"logits": torch.float64}),
]


def answers(name: str, options: dict[str, Any], shape: Any, labels: Any, more: dict[str, Any]) -> dict[str, str]:
    """By backend: "itself", "scaled by torch before", or "reference"."""
    logits = torch.empty(shape, dtype=more.get("logits", FLOATS), device="meta")
    target = torch.empty(labels, dtype=more.get("target", LABELS), device="meta")
    given = options_of(options, "l1", "modes")
    weight = torch.ones(shape[1], device="meta") if more.get("rows") else None
    classes = 2 if given.mode != "multiclass" else shape[1]
    proxy = EdgeProxy(classes)
    call, given, _ = folded(Call(logits, target, None, weight, None, None), given)
    spec = spec_of(proxy, given)
    if call.weight is not None:
        spec.weight_rows = call.weight.shape[0]
    z, y = (x[:, 0] if call.logits.dim() == 5 else x for x in (call.logits, call.target))
    return {backend: _answer(backend, z, y, proxy, spec) for backend in BACKENDS}


def _answer(name: str, logits: Tensor, target: Tensor, proxy: EdgeProxy, spec: Any) -> str:
    backend = registry.get(name)
    if backend.why_unsupported(logits, target, proxy.weights, spec) is not None:
        return "reference"
    if spec.upsample and (backend.upsamples is None or not backend.upsamples(logits, target)):
        return "scaled by torch before"
    return "itself"


def table() -> str:
    """In Markdown."""
    lines = [f"| | {' | '.join(f'`{name}`' for name in BACKENDS)} |", "|---" * (1 + len(BACKENDS)) + "|"]
    for row in MODES:
        found = answers(*row)
        lines.append(f"| {row[0]} | {' | '.join(found[name] for name in BACKENDS)} |")
    return "\n".join(lines)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
