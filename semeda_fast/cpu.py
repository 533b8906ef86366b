"""The fused CPU backend: tensors become addresses for `csrc/cpu`; 2 or 3 bits a feature are kept for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .config import FusedConfig
from .fused import FusedOps, Outputs, Problem, Saved, name_bad_labels, why_not_taken
from .native import native_info, native_module
from .params import add_gradients, fill
from .spec import LossSpec

WHOSE = "the fused CPU kernels"
MAX_CLASSES = 1024  # csrc/cpu/api.h
UNIT = 16  # pixels in a word of codes, csrc/cpu/plan.h


def why_unavailable() -> str | None:
    """None where the compiled module is there, else the cause and the remedy."""
    info = native_info()
    return None if info.available else info.reason


def why_unsupported(logits: Tensor, target: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> str | None:
    """What these kernels leave to the reference, or None. Looks at metadata only."""
    return why_not_taken(WHOSE, MAX_CLASSES, logits, weights, spec)


def upsamples(logits: Tensor, target: Tensor) -> bool:
    """Whether the kernels scale such logits up themselves: with less to gain, torch does it before.

    Their scratch for the gradient is of the logits' size.
    """
    (h, w), (height, width) = logits.shape[2:], target.shape[-2:]
    return bool(2 * h <= height and 2 * w <= width)


def code_bytes(channels: Sequence[int], width: int, tap: str, distance: str) -> int:
    """Bytes of codes of one image row; channels are K_1 to K_L."""
    if distance == "l1":
        planes = sum(channels[:-1]) * (3 if tap == "pre" else 2) + 2 * channels[-1]
    else:
        planes = sum(channels[:-1])
    return (width + UNIT - 1) // UNIT * 2 * planes


def saved_floats(channels: Sequence[int], width: int, distance: str) -> int:
    """Floats of one image row that are kept of the differences themselves; l1 needs their signs alone."""
    return 0 if distance == "l1" else (width + UNIT - 1) // UNIT * UNIT * sum(channels)


def _params(problem: Problem) -> tuple[Any, list[Tensor]]:
    """The problem as plain data, and the tensors that must outlive it."""
    module = native_module()
    if module is None:
        raise RuntimeError(f"semeda_fast's CPU kernels were called without them: {native_info().reason}")
    params, keep = fill(module, problem)
    params.threads = torch.get_num_threads()
    return params, keep


def _saved(logits: Tensor, target: Tensor, config: FusedConfig) -> Saved:
    n, h, w = logits.shape[0], *target.shape[-2:]
    channels = config.channels[1:]
    return Saved(
        (n, h, code_bytes(channels, w, config.tap, config.distance)),
        (n, h, saved_floats(channels, w, config.distance)),
        torch.float32,
    )


def _forward(problem: Problem, outputs: Outputs) -> None:
    config = problem.config
    params, keep = _params(problem)
    if outputs.codes.numel():
        params.codes, params.saved_d = outputs.codes.data_ptr(), outputs.saved_d.data_ptr()
    addresses = [tensor.data_ptr() for tensor in outputs[:5]]
    if config.per_pixel:
        params.ce_map, params.semeda_map = addresses[:2]
        addresses[:2] = 0, 0
    bad = native_module().cpu_forward(params, addresses)
    del keep
    if bad and config.check_labels:
        name_bad_labels(problem)


def _backward(
    problem: Problem, codes: Tensor, saved_d: Tensor, d_ce: Tensor, d_semeda: Tensor, d_logits: Tensor
) -> None:
    params, keep = _params(problem)
    module = native_module()
    add_gradients(module, params, d_ce, d_semeda, d_logits)
    params.codes = codes.data_ptr()
    params.saved_d = saved_d.data_ptr() if saved_d.numel() else 0
    module.cpu_backward(params)
    del keep


run = FusedOps("cpu", WHOSE, ("CPU",), _saved, _forward, _backward).run
