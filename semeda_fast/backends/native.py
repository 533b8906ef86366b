"""The compiled modules `_C` and `_C_cuda`: loaded on first use, and never a reason for an import to fail."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..installation import PACKAGE, why_missing

# The path of the CUDA module that emulates a GPU on the CPU (tests/cuda_emulated.py), or "".
CUDA_EMULATION = os.environ.get("SEMEDA_FAST_CUDA_EMULATION", "")

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
    torch.uint16: 8,
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
    """The CPU module, or None and the reason."""
    return _import("_C")


@functools.cache
def _load_cuda() -> tuple[ModuleType | None, str]:
    """The CUDA module, or what stands for it in tests, or None and the reason."""
    if not CUDA_EMULATION:
        return _import("_C_cuda")
    try:
        spec = importlib.util.spec_from_file_location("semeda_fast._C_cuda_emulated", CUDA_EMULATION)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, AssertionError) as error:
        return None, f"{CUDA_EMULATION}, named by SEMEDA_FAST_CUDA_EMULATION, cannot be loaded: {error}"
    return module, ""


def _import(part: str) -> tuple[ModuleType | None, str]:
    """A compiled module, or None and the reason."""
    # torch comes first, so that OpenMP resolves to the runtime that torch.set_num_threads controls.
    importlib.import_module("torch")
    reason = why_missing(part)
    if reason is not None:
        return None, reason
    name = f"{PACKAGE}.{part}"
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, (
            f"{name} is installed but cannot be loaded: {error}. Install semeda_fast again "
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


@dataclass(frozen=True)
class CudaInfo:
    """What is known of the compiled CUDA module; asks no driver.

    Attributes:
        available: whether `semeda_fast._C_cuda` is loaded; a GPU may be missing all the same.
        reason: why it is not, and what to do; empty when it is.
        architectures: what it holds code for: 80 is sm_80, -90 is PTX for 9.0 and later.
        emulated: whether the kernels run in an emulation on the CPU, which is for tests.
    """

    available: bool
    reason: str
    architectures: tuple[int, ...] = ()
    emulated: bool = False


def cuda_module() -> Any:
    """`semeda_fast._C_cuda`, or None where it cannot be loaded."""
    return _load_cuda()[0]


@functools.cache
def cuda_info() -> CudaInfo:
    """Whether the compiled CUDA module is there, and what it was built for."""
    module, reason = _load_cuda()
    if module is None:
        return CudaInfo(False, reason, emulated=bool(CUDA_EMULATION))
    return CudaInfo(True, "", tuple(module.architectures()), bool(CUDA_EMULATION))


def dtype_code(dtype: torch.dtype) -> int:
    """The number of a dtype in LossParams; KeyError for one that no kernel reads."""
    return _DTYPES[dtype]


def tensor_view(module: Any, tensor: Tensor, groups: bool = False) -> Any:
    """Place, dtype and strides of [N,C,H,W], [N,H,W] or []: what lacks a dimension repeats along it.

    Args:
        groups: the images lie in groups: the tensor is [A,B,C,H,W] or [A,B,H,W].
    """
    strides = tensor.stride()
    fold, outer = 0, 0
    if groups:
        fold, outer, strides = tensor.shape[1], strides[0], strides[1:]
    if len(strides) != 4:
        strides = (strides[0], 0, *strides[1:]) if strides else (0, 0, 0, 0)
    offset, num_bytes = tensor.storage_offset(), tensor.untyped_storage().nbytes()
    return module.View(tensor.data_ptr(), _DTYPES[tensor.dtype], strides, offset, num_bytes, fold, outer)


def place(tensor: Tensor) -> Any:
    """Where a tensor lies: its address, the elements of its storage in front of it, the storage's bytes in all."""
    return tensor.data_ptr(), tensor.storage_offset(), tensor.untyped_storage().nbytes()


def span(tensor: Tensor) -> Any:
    """Where a contiguous tensor lies: its address, and the bytes of its storage from there on."""
    return tensor.data_ptr(), tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize


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
