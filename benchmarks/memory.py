"""Memory of one forward and backward: the peak, what stays in between, and what autograd saves.

Peak: Linux keeps the largest resident set of a process, VmHWM, and sets it back to the present one when 5 is
written to /proc/self/clear_refs. So it counts everything: torch's tensors, oneDNN's scratch and a backend's own.
The kernel's counters are exact to about a megabyte, so small workloads show nothing. On CUDA torch's
allocator is asked. Elsewhere the peak is not available, and reports say so.
"""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .contenders import Contender
from .plain import LossFunction
from .workloads import Inputs, make_inputs

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """Bytes, or None with the reason where the system does not tell.

    Attributes:
        above_inputs: peak of forward + backward above the memory held before it (logits, labels, proxy).
        gradient: size of d_logits, which is part of that peak.
        between: held between forward and backward, above the same base.
    """

    above_inputs: int | None
    gradient: int
    between: int | None
    reason: str = ""


def measure_peak(contender: Contender, inputs: Inputs, compiler: str) -> Peak:
    """The peak of this process; call it in a fresh one.

    Code, threads and libraries are loaded by a warm-up that is not counted: on a 32x32 map, so that scratch
    which a backend keeps for its next call counts at its full size; for compiled contenders, which are
    compiled for one size, at the full size.
    """
    leaf = inputs.leaf(contender.layout)
    if leaf.device.type == "cuda":
        return _cuda_peak(contender, inputs, compiler, leaf)
    gradient = leaf.numel() * leaf.element_size()
    reason = why_no_peak()
    if reason:
        return Peak(None, gradient, None, reason)
    function = contender.make(inputs, compiler)
    if contender.compiled:
        _step(function, leaf, inputs.target)
    else:
        small = make_inputs(inputs.workload.replace(batch=1, height=32, width=32))
        _step(contender.make(small, compiler), small.leaf(contender.layout), small.target)
    trim()
    base = _status_bytes("VmRSS")
    peak = peak_of(lambda: function(leaf, inputs.target).backward(), "cpu")
    leaf.grad = None
    trim()
    loss = function(leaf, inputs.target)
    trim()
    between = _status_bytes("VmRSS") - base
    del loss
    return Peak(peak, gradient, max(0, between))


def peak_of(step: Callable[[], None], device: str) -> int:
    """Bytes that a call needs above what is held before it, at its peak."""
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - base)
    trim()
    base = _status_bytes("VmRSS")
    _CLEAR_REFS.write_text("5")
    step()
    return max(0, _status_bytes("VmHWM") - base)


def why_no_peak() -> str:
    """Why the peak of a CPU process cannot be measured here; "" where it can."""
    if platform.system() != "Linux":
        return f"the peak is read from /proc, which {platform.system()} does not have"
    try:
        _CLEAR_REFS.write_text("5")
    except OSError as error:
        return f"{_CLEAR_REFS} cannot be written: {error}"
    return ""


def trim() -> None:
    """Collect garbage and give freed heap pages back to the system, where the C library can."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def saved_bytes(function: LossFunction, leaf: Tensor, inputs: Inputs) -> int:
    """Bytes that autograd keeps for the backward pass, without logits, labels and the proxy's weights.

    Operators registered through torch.library save through the same hooks. Each storage counts once and as
    a whole. Memory that a backend would keep outside autograd is not seen here, but in `Peak.between`.
    """
    kept: dict[int, Tensor] = {}  # holding them keeps an address from being used twice

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = function(leaf, inputs.target)
    del loss
    given = (leaf, inputs.target, *inputs.proxy.weights, *inputs.proxy.biases)
    ours = {tensor.untyped_storage().data_ptr() for tensor in given}
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in ours)


def _step(function: LossFunction, leaf: Tensor, target: Tensor) -> None:
    function(leaf, target).backward()
    leaf.grad = None


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no line {field}")


def _cuda_peak(contender: Contender, inputs: Inputs, compiler: str, leaf: Tensor) -> Peak:
    function = contender.make(inputs, compiler)
    for _ in range(2):  # compiles, and lets cuDNN choose
        _step(function, leaf, inputs.target)
    gc.collect()
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = function(leaf, inputs.target)
    between = torch.cuda.memory_allocated() - base
    loss.backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - base
    leaf.grad = None
    return Peak(peak, leaf.numel() * leaf.element_size(), between)
