"""The Triton backend: tensors on a GPU become the launches of `kernels/`. Imports where Triton is missing.

With TRITON_INTERPRET=1 set before Triton is imported, the kernels run in Triton's interpreter on the CPU: for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..installation import why_missing
from ..spec import LossSpec
from .config import FusedConfig
from .fused import FusedOps, assert_labels, on_device, why_not_taken
from .memory import INPUTS, check_memory
from .problem import Outputs, Problem, Saved, images
from .trial import first_use

WHOSE = "the Triton kernels"
MIN_CAPABILITY = (8, 0)
MAX_CLASSES = 256  # kernels/plan.py
INTERPRETER_TILE = (16, 64)  # there each program costs the same whatever its size, some 40 ms


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The launches, or None and the reason."""
    if importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed (torch for CUDA brings it on Linux): pip install triton"
    if reason := why_missing("kernels"):
        return None, reason
    try:
        return importlib.import_module("semeda_fast.kernels.launch"), ""
    except Exception as error:  # any version of Triton may fail in its own way, and none may break the import of this
        return None, f"the Triton kernels cannot be loaded: {type(error).__name__}: {error}"


def why_unavailable() -> str | None:
    """None where the kernels can run on some device of this machine, else the cause and the remedy."""
    if not (interpreted() or _has_gpu()):
        return "torch sees no GPU here, and the Triton kernels run on CUDA tensors; use backend='auto' or 'reference'"
    return None if _load()[0] is not None else _load()[1]


def why_unsupported(logits: Tensor, target: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> str | None:
    """What these kernels leave to the reference, or None. Looks at metadata only."""
    reason = why_not_taken(WHOSE, MAX_CLASSES, logits, weights, spec)
    return reason or (_why_not_on(logits.device) if _is_compiled_for(logits.device) else None)


def why_failing(logits: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> str | None:
    """What a first use on a tiny image found, or None. Reads no data; compiles on the first call for a proxy."""
    return first_use(ops, logits, weights, spec) if _is_compiled_for(logits.device) else None


def _is_compiled_for(device: torch.device) -> bool:
    return device.type != "cpu" and not interpreted()


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available() or torch.xpu.is_available()


@functools.cache
def _why_not_on(device: torch.device) -> str | None:
    """Whether a GPU is too old."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        have, need = ".".join(map(str, capability)), ".".join(map(str, MIN_CAPABILITY))
        return f"the Triton kernels need a GPU of compute capability {need}, this one has {have}"
    return None


def _launches() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"semeda_fast's Triton kernels were called without them: {reason}")
    return module


def _plan(problem: Problem) -> Any:
    n, _, h, w = problem.logits.shape
    plan = _plan_module()
    tile = INTERPRETER_TILE if interpreted() else plan.TILE
    return plan.make_plan(problem.config, (n, h, w), problem.logits.dtype, problem.target.is_floating_point(), tile)


def _plan_module() -> ModuleType:
    """Needs no Triton, but is found in an installed package only: a bare checkout has kernels/ beside semeda_fast/."""
    return importlib.import_module("semeda_fast.kernels.plan")


def _inputs(problem: Problem) -> Any:
    check_memory((*INPUTS, "the proxy's parameters"), problem[:5])

    def bytes_of(tensor: Tensor | None) -> Tensor | None:
        return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.bool else tensor

    weight = problem.class_weight
    weight = None if weight is None else weight.detach().to(torch.float32).contiguous()
    target = bytes_of(problem.target)
    return _launches().Inputs(problem.logits.detach(), target, bytes_of(problem.valid), weight, problem.flat)


def _precision() -> str:
    """Of fp32 products: three tf32 products give fp32's accuracy on Nvidia's tensor cores."""
    return "tf32x3" if torch.version.cuda is not None else "ieee"


def saved(logits: Tensor, target: Tensor, config: FusedConfig) -> Saved:
    """What is kept for backward."""
    n, h, w = images(logits), *target.shape[-2:]
    plan = _plan_module().make_plan(config, (n, h, w), logits.dtype, soft=False)
    return Saved((plan.code_offsets[-1],), (plan.saved_offsets[-1],), plan.dtype)


def _forward(problem: Problem, outputs: Outputs) -> None:
    config = problem.config
    logits = problem.logits
    terms = logits.new_empty(3 + len(config.sizes), dtype=torch.float32)
    counts = logits.new_empty(2, dtype=torch.int64)
    save = outputs.codes.numel() > 0
    buffers = {
        "terms": terms,
        "counts": counts,
        "codes": outputs.codes if save else None,
        "saved": outputs.saved_d if save else None,
        "ce_map": outputs.ce if config.per_pixel else None,
        "semeda_map": outputs.semeda if config.per_pixel else None,
    }
    with on_device(logits):
        module = _launches()
        module.run_all(module.forward_launches(_plan(problem), _inputs(problem), buffers, _precision()))
        outputs.take(terms, counts)
    if config.check_labels:
        assert_labels(problem, counts[1])


def _backward(
    problem: Problem, codes: Tensor, saved_d: Tensor, d_ce: Tensor, d_semeda: Tensor, d_logits: Tensor
) -> None:
    if not d_logits.numel():
        return
    check_memory(("codes", "saved_d", "d_ce", "d_semeda"), (codes, saved_d, d_ce, d_semeda))
    with on_device(problem.logits):
        module = _launches()
        d_ce, d_semeda = d_ce.contiguous(), d_semeda.contiguous()
        launches = module.backward_launches(
            _plan(problem), _inputs(problem), codes, saved_d, d_ce, d_semeda, d_logits, _precision()
        )
        module.run_all(launches)


_KEYS = ("CUDA", "XPU", "CPU") if interpreted() else ("CUDA", "XPU")
ops = FusedOps("triton", WHOSE, _KEYS, saved, _forward, _backward)
run = ops.run
