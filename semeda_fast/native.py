"""The compiled module `semeda_fast._C`: loaded on first use, and never a reason for an import to fail."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_DTYPES = {  # DType in csrc/params.h
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.uint8: 3,
    torch.bool: 3,
    torch.int8: 4,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
}


@dataclass(frozen=True)
class NativeInfo:
    """What is known of the compiled module.

    Attributes:
        available: whether `semeda_fast._C` is loaded.
        reason: why it is not, and what to do; empty when it is.
        build: compiler, cxx_standard (e.g. 201703), openmp, openmp_version (the _OPENMP date),
            openmp_threads, and instruction_sets, the names of those that kernels were built for.
            Empty when not available.
        cpu: vector extensions of this machine, such as {"avx2": True, "neon": False}. Empty when
            not available.
    """

    available: bool
    reason: str
    build: dict[str, Any] = field(default_factory=dict)
    cpu: dict[str, bool] = field(default_factory=dict)


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The module, or None and the reason."""
    # torch comes first, so that OpenMP resolves to the runtime that torch.set_num_threads controls.
    importlib.import_module("torch")
    if importlib.util.find_spec("semeda_fast._C") is None:
        return None, (
            "semeda_fast._C is not installed: semeda_fast was installed with SEMEDA_FAST_BUILD=none or "
            "without a working C++ compiler. Install from source with SEMEDA_FAST_BUILD=cpu to build it, "
            "or to see why it does not build"
        )
    try:
        return importlib.import_module("semeda_fast._C"), ""
    except ImportError as error:
        return None, (
            f"semeda_fast._C is installed but cannot be loaded: {error}. Install semeda_fast again "
            "with this Python, so that the two match"
        )


def native_module() -> Any:
    """`semeda_fast._C`, or None where it cannot be loaded."""
    return _load()[0]


@functools.cache
def native_info() -> NativeInfo:
    """Whether the compiled module is there, how it was built, and what this processor offers."""
    module, reason = _load()
    if module is None:
        return NativeInfo(available=False, reason=reason)
    return NativeInfo(available=True, reason="", build=module.build_info(), cpu=module.cpu_features())


def tensor_view(module: Any, tensor: Tensor) -> Any:
    """Address, dtype and strides of [N,C,H,W], [N,H,W] or []: what lacks a dimension repeats along it."""
    strides = tensor.stride()
    if len(strides) == 3:
        strides = (strides[0], 0, *strides[1:])
    return module.View(tensor.data_ptr(), _DTYPES[tensor.dtype], list(strides or (0, 0, 0, 0)))


def has_bad_label(target: Tensor, valid: Tensor | None, num_classes: int, ignore_index: int) -> bool | None:
    """Whether a valid pixel of target [N,H,W] (integers, on the CPU) holds no class; None where it cannot be told."""
    module = native_module()
    if module is None or target.device.type != "cpu":
        return None
    params = module.LossParams()
    params.n, params.h, params.w = target.shape
    params.classes = num_classes
    params.ignore_index = ignore_index
    params.target = tensor_view(module, target)
    if valid is not None:
        params.valid = tensor_view(module, valid)
    return bool(module.has_bad_label(params))
