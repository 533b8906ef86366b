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

import torch
from torch import Tensor

from .checks import check_labels
from .config import FusedConfig
from .fused import FusedOps, Outputs, Problem, Saved
from .spec import LossSpec

MAX_CLASSES = 256  # kernels/plan.py, which cannot be imported without Triton
MIN_CAPABILITY = (8, 0)
INTERPRETER_TILE = (16, 64)  # there each program costs the same whatever its size, some 40 ms


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The launches, or None and the reason."""
    if importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed; install it with: pip install triton (PyTorch for CUDA on Linux brings it)"
    try:
        return importlib.import_module("semeda_fast.kernels.launch"), ""
    except Exception as error:  # any version of Triton may fail in its own way, and none may break the import of this
        return None, f"the Triton kernels cannot be loaded: {type(error).__name__}: {error}"


def why_unavailable() -> str | None:
    """None where the kernels can run on some device of this machine, else the cause and the remedy."""
    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no GPU here; the Triton kernels run on CUDA tensors"
    return None if _load()[0] is not None else _load()[1]


def why_unsupported(logits: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> str | None:
    """What these kernels leave to the reference, or None. Looks at metadata only."""
    if logits.dtype == torch.float64:
        return "the Triton kernels compute in float32 at most, and the logits are float64"
    if not spec.from_logits:
        return "the Triton kernels take logits, not probabilities (from_logits=False)"
    if weights[0].shape[1] > MAX_CLASSES:
        return f"the Triton kernels take up to {MAX_CLASSES} classes, the proxy has {weights[0].shape[1]}"
    for number, weight in enumerate(weights):
        rows, columns = weight.shape[2:]
        if rows != columns or rows % 2 == 0:
            return f"the proxy's layer {number} has a kernel of {rows}x{columns}; the fused kernels take odd squares"
    if logits.device.type == "cuda" and not interpreted():
        return _why_not_on(logits.device.index)
    return None


@functools.cache
def _why_not_on(index: int | None) -> str | None:
    """Whether a GPU is too old."""
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < MIN_CAPABILITY:
        have, need = ".".join(map(str, capability)), ".".join(map(str, MIN_CAPABILITY))
        return f"the Triton kernels need a GPU of compute capability {need}, this one has {have}"
    return None


def _launches() -> ModuleType:
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"semeda_fast's Triton kernels were called without them: {reason}")
    return module


def _plan(problem: Problem):  # type: ignore[no-untyped-def]  # of a module that needs Triton
    n, _, h, w = problem.logits.shape
    module = importlib.import_module("semeda_fast.kernels.plan")
    tile = INTERPRETER_TILE if interpreted() else module.TILE
    return module.make_plan(problem.config, (n, h, w), problem.logits.dtype, problem.target.is_floating_point(), tile)


def _inputs(problem: Problem):  # type: ignore[no-untyped-def]
    def bytes_of(tensor: Tensor | None) -> Tensor | None:
        return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.bool else tensor

    weight = problem.class_weight
    weight = None if weight is None else weight.detach().to(torch.float32).contiguous()
    target = bytes_of(problem.target)
    return _launches().Inputs(problem.logits.detach(), target, bytes_of(problem.valid), weight, problem.flat)


def _precision() -> str:
    """Of fp32 products: three tf32 products give fp32's accuracy on tensor cores; AMD's have none."""
    return "ieee" if torch.version.hip is not None else "tf32x3"


def saved(logits: Tensor, config: FusedConfig) -> Saved:
    """What is kept for backward; see kernels/plan.py."""
    n, _, h, w = logits.shape
    pixels = n * h * w
    codes, kept = 0, 0
    l1, post = config.distance == "l1", config.tap == "post"
    last = len(config.sizes) - 1
    for number, k in enumerate(config.channels[1:]):
        planes = (2 if post or number == last else 3) if l1 else int(number != last)
        word = 1 if k <= 8 else 2 if k <= 16 else 4 * ((k + 31) // 32)
        codes += (planes * word * pixels + 15) // 16 * 16
        kept += 0 if l1 else (k * pixels + 15) // 16 * 16
    half = logits.dtype != torch.float32 and not config.per_pixel
    return Saved((codes,), (kept,), torch.float16 if half else torch.float32)


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


def _on(tensor: Tensor) -> torch.cuda.device:
    """Triton launches on the current device: it becomes the tensor's; for others than CUDA, nothing happens."""
    return torch.cuda.device(tensor.device if tensor.device.type == "cuda" else -1)


run = FusedOps("triton", ("CUDA", "XPU", "CPU") if interpreted() else ("CUDA", "XPU"), saved, _forward, _backward).run
