"""The Triton backend: tensors on a GPU become the launches of `kernels/`. Imports where Triton is missing.

With TRITON_INTERPRET=1 set before Triton is imported, the kernels run in Triton's interpreter on the CPU: for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .checks import check_labels
from .config import FusedConfig, config_text, parse_config
from .fused import FusedOps, Outputs, Problem, Saved, why_not_taken
from .kernels.plan import MAX_CLASSES, TILE, Plan, make_plan
from .spec import LossSpec

MIN_CAPABILITY = (8, 0)
INTERPRETER_TILE = (16, 64)  # there each program costs the same whatever its size, some 40 ms


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The launches, or None and the reason."""
    if importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed (torch for CUDA brings it on Linux): pip install triton"
    try:
        return importlib.import_module("semeda_fast.kernels.launch"), ""
    except Exception as error:  # any version of Triton may fail in its own way, and none may break the import of this
        return None, f"the Triton kernels cannot be loaded: {type(error).__name__}: {error}"


def why_unavailable() -> str | None:
    """None where the kernels can run on some device of this machine, else the cause and the remedy."""
    if not (interpreted() or torch.cuda.is_available() or torch.xpu.is_available()):
        return "torch sees no GPU here, and the Triton kernels run on CUDA tensors; use backend='auto' or 'reference'"
    return None if _load()[0] is not None else _load()[1]


def why_unsupported(logits: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> str | None:
    """What these kernels leave to the reference, or None. Reads no data; compiles on the first call for a proxy."""
    reason = why_not_taken("the Triton kernels", MAX_CLASSES, logits, weights, spec)
    if reason is not None:
        return reason
    if not _is_compiled_for(logits.device):
        return None
    reason = _why_not_on(logits.device)
    if reason is None:
        order = torch.channels_last if logits.stride(1) == 1 else torch.contiguous_format
        reason = trial(config_text(weights, spec, False), logits.dtype, order, logits.device)
    return reason


def _is_compiled_for(device: torch.device) -> bool:
    return device.type != "cpu" and not interpreted()


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


@functools.cache
def trial(config: str, dtype: torch.dtype, order: torch.memory_format, device: torch.device) -> str | None:
    """Why the kernels do not run on a device, found out on a tiny image before they are relied on; None where they do.

    Costs nothing beside: kernels are compiled for no particular size, so the first real call finds them compiled.
    """
    settings = parse_config(config)
    channels = 1 if settings.mode == "binary" else settings.channels[0]
    try:
        with _disable_current_modes(), torch.no_grad():  # while a compiler traces, tensors would be fakes
            logits = torch.zeros((1, channels, 8, 8), dtype=dtype, device=device).contiguous(memory_format=order)
            target = torch.zeros((1, 8, 8), dtype=torch.int64, device=device)
            flat = torch.zeros(settings.parameters, device=device)
            problem = Problem(logits, target, None, None, flat, settings)
            outputs = ops.outputs(logits, settings, True)
            _forward(problem, outputs)
            _backward(problem, outputs.codes, outputs.saved_d, outputs.ce, outputs.semeda, torch.empty_like(logits))
    except Exception as error:  # each version of Triton and each driver fails in its own way
        first = next(iter(str(error).strip().splitlines()), "")
        return f"the Triton kernels do not compile or run on {device}: {type(error).__name__}: {first}"
    return None


def _launches() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"semeda_fast's Triton kernels were called without them: {reason}")
    return module


def _plan(problem: Problem) -> Plan:
    n, _, h, w = problem.logits.shape
    tile = INTERPRETER_TILE if interpreted() else TILE
    return make_plan(problem.config, (n, h, w), problem.logits.dtype, problem.target.is_floating_point(), tile)


def _inputs(problem: Problem) -> Any:
    def bytes_of(tensor: Tensor | None) -> Tensor | None:
        return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.bool else tensor

    weight = problem.class_weight
    weight = None if weight is None else weight.detach().to(torch.float32).contiguous()
    target = bytes_of(problem.target)
    return _launches().Inputs(problem.logits.detach(), target, bytes_of(problem.valid), weight, problem.flat)


def _precision() -> str:
    """Of fp32 products: three tf32 products give fp32's accuracy on Nvidia's tensor cores."""
    return "tf32x3" if torch.version.cuda is not None else "ieee"


def saved(logits: Tensor, config: FusedConfig) -> Saved:
    """What is kept for backward."""
    n, _, h, w = logits.shape
    plan = make_plan(config, (n, h, w), logits.dtype, soft=False)
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
    with _on(logits):
        module = _launches()
        module.run_all(module.forward_launches(_plan(problem), _inputs(problem), buffers, _precision()))
        if not config.per_pixel:
            outputs.ce.copy_(terms[0])
            outputs.semeda.copy_(terms[1])
        outputs.ce_weight.copy_(terms[2])
        outputs.per_layer.copy_(terms[3:])
        outputs.valid_count.copy_(counts[0])
    if config.check_labels and not problem.target.is_floating_point():
        _assert_labels(problem, counts[1])


def _assert_labels(problem: Problem, bad: Tensor) -> None:
    """An asynchronous assert; on the CPU, where the interpreter runs, the error of the checks at once."""
    if bad.device.type == "cpu":
        if int(bad):
            config = problem.config
            spec = LossSpec((), (), (), (), (), ignore_index=config.ignore_index, mode=config.mode)
            check_labels(problem.logits, problem.target, problem.valid, spec)
        return
    torch._assert_async(
        bad == 0,
        "semeda_fast: target holds labels that are neither in [0, num_classes) nor ignore_index; "
        "run once with validate='always' to see which",
    )


def _backward(
    problem: Problem, codes: Tensor, saved_d: Tensor, d_ce: Tensor, d_semeda: Tensor, d_logits: Tensor
) -> None:
    if not d_logits.numel():
        return
    with _on(problem.logits):
        module = _launches()
        d_ce, d_semeda = d_ce.contiguous(), d_semeda.contiguous()
        launches = module.backward_launches(
            _plan(problem), _inputs(problem), codes, saved_d, d_ce, d_semeda, d_logits, _precision()
        )
        module.run_all(launches)


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, so that becomes the tensor's."""
    if tensor.device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[Any] = torch.get_device_module(tensor.device).device(tensor.device)
    return context


ops = FusedOps("triton", ("CUDA", "XPU", "CPU") if interpreted() else ("CUDA", "XPU"), saved, _forward, _backward)
run = ops.run
