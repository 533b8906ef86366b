"""The backend "cuda": tensors on a GPU become addresses for `csrc/cuda`, one kernel a direction for the whole network.

With SEMEDA_FAST_CUDA_EMULATION=path set before the import, the module at that path, which emulates a GPU, runs the same
kernel bodies on the CPU: for tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec import LossSpec
from .config import FusedConfig, config_text, parse_config
from .fused import FusedOps, assert_labels, on_device, why_not_taken
from .native import CUDA_EMULATION, cuda_info, cuda_module, span
from .params import add_gradients, describe, fill
from .problem import Outputs, Problem, Saved, images
from .trial import first_use

WHOSE = "the CUDA kernels"
MAX_CLASSES = 256  # csrc/cuda/api.h
_INSTEAD = "use backend='auto' or 'reference'"


def emulated() -> bool:
    """Whether the kernels run on the CPU, in an emulation of a GPU."""
    return bool(CUDA_EMULATION)


def why_unavailable() -> str | None:
    """None where the kernels can run on some GPU of this machine, else the cause and the remedy."""
    if not emulated():
        built = torch.version.cuda is not None
        if not (built and _has_gpu()):
            cause = "torch sees no GPU here" if built else f"this torch ({torch.__version__}) is built without CUDA"
            return f"{cause}, and {WHOSE} ({_built()}) run on CUDA tensors; {_INSTEAD}"
    info = cuda_info()
    if not info.available:
        return info.reason
    reason = _drivers_refusal()
    return f"{reason}; {_INSTEAD}" if reason else None


def _built() -> str:
    info = cuda_info()
    return f"built for {architecture_names(info.architectures)}" if info.available else "not built here"


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


@functools.cache
def _drivers_refusal() -> str:
    return str(cuda_module().why_unavailable())


def why_unsupported(logits: Tensor, target: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> str | None:
    """What these kernels leave to other backends, or None. Looks at metadata only."""
    reason = why_not_taken(WHOSE, MAX_CLASSES, logits, weights, spec)
    if reason is not None:
        return reason
    if target.is_floating_point():
        return f"{WHOSE} take labels, and the target is a distribution ({target.dtype})"
    if spec.per_pixel:
        return f"{WHOSE} sum over pixels, and reduction='none' asks for a map"
    if spec.weight_rows != 1:
        return f"{WHOSE} take one class weight a class, and planes of mode='multilabel' have their own"
    if spec.distance != "l1":
        return f"{WHOSE} compute the distance 'l1', not {spec.distance!r}"
    return _why_not_on(config_text(weights, spec, False), logits.dtype, logits.device)


def why_failing(logits: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> str | None:
    """What a first use on a tiny image found, or None. Reads no data of the caller's."""
    return first_use(ops, logits, weights, spec) if _is_on_trial(logits.device) else None


def _is_on_trial(device: torch.device) -> bool:
    return device.type != "cpu"


@functools.lru_cache(maxsize=256)
def _why_not_on(config: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Whether a device is of no architecture built for, or the module knows no kernel for such a loss there."""
    module = _module()
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if not runs_on(cuda_info().architectures, capability):
            return (
                f"{WHOSE} were built for {architecture_names(cuda_info().architectures)}, and {device} has compute "
                f"capability {capability[0]}.{capability[1]}"
            )
    reason = module.why_unsupported(describe(module, parse_config(config), dtype), _index(device))
    return str(reason) or None


def runs_on(architectures: Sequence[int], capability: tuple[int, int]) -> bool:
    """Whether code for one of the architectures (as in CudaInfo) runs on a GPU of that compute capability.

    Binary code runs on its own major version from its own minor version on, PTX on its version and all later ones
    (CUDA Programming Guide, binary and PTX compatibility).
    """
    for number in architectures:
        built = divmod(abs(number), 10)
        if capability >= built and (number < 0 or capability[0] == built[0]):
            return True
    return False


def architecture_names(architectures: Sequence[int]) -> str:
    """For messages: "sm_80, sm_90, PTX 9.0"."""
    names = [f"sm_{number}" if number > 0 else f"PTX {-number // 10}.{-number % 10}" for number in architectures]
    return ", ".join(names) or "no GPU"


def code_bytes_per_pixel(channels: Sequence[int]) -> int:
    """Bytes of codes that a pixel needs for backward; channels are K_1 to K_L.

    A hidden layer has three bits a channel (t(p) > 0, d > 0, d < 0), each kind in bytes of its own, the last layer two.
    """
    return sum(3 * ((out + 7) // 8) for out in channels[:-1]) + (2 * channels[-1] + 7) // 8


def saved(logits: Tensor, target: Tensor, config: FusedConfig) -> Saved:
    """What is kept for backward."""
    n, h, w = images(logits), *target.shape[-2:]
    return Saved((n * h * w * code_bytes_per_pixel(config.channels[1:]),), (0,), torch.float32)


def _module() -> Any:
    module = cuda_module()
    if module is None:
        raise RuntimeError(f"semeda_fast's CUDA kernels were called without them: {cuda_info().reason}")
    return module


def _index(device: torch.device) -> int:
    """The number of a CUDA device; the emulation has one."""
    return device.index or 0


def _queue(run: Callable[[Any, tuple[int, int], int, int], None], params: Any, logits: Tensor) -> None:
    """Call a function of the module on the current stream of the logits' device, with the memory that it needs."""
    device, index = logits.device, _index(logits.device)
    with on_device(logits):
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        # The allocator gives this memory away again only to what is queued behind on the same stream.
        workspace = torch.empty(_module().workspace_bytes(params, index), dtype=torch.uint8, device=device)
        run(params, span(workspace), index, stream)


def _forward(problem: Problem, outputs: Outputs) -> None:
    logits = problem.logits
    terms = logits.new_empty(3 + len(problem.config.sizes), dtype=torch.float32)
    counts = logits.new_empty(2, dtype=torch.int64)
    if logits.numel():
        module = _module()
        params, keep = fill(module, problem)
        params.terms, params.counts = span(terms), span(counts)
        if outputs.codes.numel():
            need = module.code_bytes(params)
            if need != outputs.codes.numel():
                raise RuntimeError(
                    f"the CUDA module writes {need} bytes of codes where cuda.py has {outputs.codes.numel()}: they "
                    "are of different versions; install semeda_fast again"
                )
            params.codes = span(outputs.codes)
        _queue(module.cuda_forward, params, logits)
        del keep
    else:
        terms.zero_()
        counts.zero_()
    with on_device(logits):
        outputs.take(terms, counts)
    if problem.config.check_labels:
        assert_labels(problem, counts[1])


def _backward(
    problem: Problem, codes: Tensor, saved_d: Tensor, d_ce: Tensor, d_semeda: Tensor, d_logits: Tensor
) -> None:
    if not d_logits.numel():
        return
    module = _module()
    params, keep = fill(module, problem)
    add_gradients(module, params, d_ce, d_semeda, d_logits)
    if codes.data_ptr() % 2:  # vmap keeps those of several calls in one tensor, and kernels read words
        codes = codes.clone()
    params.codes = span(codes)
    _queue(module.cuda_backward, params, problem.logits)
    del keep


ops = FusedOps("cuda", WHOSE, ("CUDA", "CPU") if emulated() else ("CUDA",), saved, _forward, _backward)
run = ops.run
