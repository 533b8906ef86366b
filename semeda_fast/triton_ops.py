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
from .reference import loss_terms
from .spec import LossSpec

MIN_CAPABILITY = (8, 0)
MAX_CLASSES = 256  # kernels/plan.py
TRIAL_SIZE = (20, 100)  # tiles with and without label edges, inside and at the border
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
    if not (interpreted() or _has_gpu()):
        return "torch sees no GPU here, and the Triton kernels run on CUDA tensors; use backend='auto' or 'reference'"
    return None if _load()[0] is not None else _load()[1]


def why_unsupported(logits: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> str | None:
    """What these kernels leave to the reference, or None. Reads no data; compiles on the first call for a proxy."""
    reason = why_not_taken("the Triton kernels", MAX_CLASSES, logits, weights, spec)
    if reason is not None:
        return reason
    if not _is_compiled_for(logits.device):
        return None
    if logits.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # no time for a trial
    reason = _why_not_on(logits.device)
    if reason is None:
        order = torch.channels_last if logits.stride(1) == 1 else torch.contiguous_format
        reason = trial(config_text(weights, spec, False), logits.dtype, order, logits.device)
    return reason


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


@functools.cache
def trial(config: str, dtype: torch.dtype, order: torch.memory_format, device: torch.device) -> str | None:
    """Why the kernels do not run on a device, or not as they should; found out on a tiny image. None where they do.

    Kernels are compiled for no particular size, so the first real call finds them compiled. Waits for the device.
    """
    # A compiler may be tracing (tensors would be fakes), or the caller may be under inference mode or autocast.
    ours = torch.autocast(device.type, enabled=False), torch.inference_mode(False), torch.enable_grad()
    watched = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    try:
        if watched:
            torch.cuda.set_sync_debug_mode(0)  # this one waits, once
        with _disable_current_modes(), ours[0], ours[1], ours[2]:
            found = _disagreement(parse_config(config), dtype, order, device)
    except Exception as error:  # each version of Triton and each driver fails in its own way
        first = next(iter(str(error).strip().splitlines()), "")
        return f"the Triton kernels do not compile or run on {device}: {type(error).__name__}: {first}"
    finally:
        if watched:
            torch.cuda.set_sync_debug_mode(watched)
    return found and f"the Triton kernels compute wrong values on {device}: {found}; please report this"


def _disagreement(
    config: FusedConfig, dtype: torch.dtype, order: torch.memory_format, device: torch.device
) -> str | None:
    """What the kernels and the reference do not agree on by far, for a random proxy."""
    generator = torch.Generator().manual_seed(0)  # not the caller's
    height, width = TRIAL_SIZE
    classes = config.channels[0]
    channels = 1 if config.mode == "binary" else classes
    logits = torch.randn((1, channels, height, width), generator=generator).to(device, dtype)
    logits = logits.contiguous(memory_format=order)
    target = torch.zeros((1, height, width), dtype=torch.int64, device=device)
    target[:, height // 2 :, -width // 8 :] = min(1, classes - 1)  # an edge, and tiles without one
    weights, biases = [], []
    for before, out, size in zip(config.channels, config.channels[1:], config.sizes, strict=False):
        weight = torch.randn((out, before, size, size), generator=generator)
        weights.append((weight / (size * before**0.5)).to(device))
        biases.append(torch.randn(out, generator=generator).to(device))
    flat = torch.cat([tensor.reshape(-1) for tensor in (*weights, *biases)])
    leaf = logits.clone().requires_grad_()
    ones = (1,) * len(config.sizes)
    spec = LossSpec(
        config.layer_weights, config.layer_scales, ones, ones, (0,) * len(ones), config.tap, config.distance,
        config.ignore_index, config.label_smoothing, config.mode, True, config.per_pixel,
    )  # fmt: skip
    expected = loss_terms(leaf, target, None, None, weights, biases, spec)
    (expected.ce.sum() + expected.semeda.sum()).backward()
    assert leaf.grad is not None

    problem = Problem(logits, target, None, None, flat, config)
    outputs = ops.outputs(logits, config, True)
    d_logits = torch.empty_like(logits)
    _forward(problem, outputs)
    one = torch.ones_like(outputs.ce)
    _backward(problem, outputs.codes, outputs.saved_d, one, one, d_logits)
    pairs = {
        "cross-entropy": (outputs.ce, expected.ce.detach(), 1e-2),
        "the SEMEDA term": (outputs.semeda, expected.semeda.detach(), 1e-2),
        "the gradient": (d_logits, leaf.grad, 1e-1),  # L1 flips signs where differences lie within rounding
    }
    for name, (got, wanted, tolerance) in pairs.items():
        error = (got.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30)
        if not error <= tolerance:  # NaN, too
            return f"{name} is off by {float(error):.2g} of its size"
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
