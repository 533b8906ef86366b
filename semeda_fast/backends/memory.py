"""What kernels are handed: that tensors fit together, lie in memory, and are in backward what they were in forward.

Autograd counts in-place changes and raises by itself. It sees neither `tensor.data = other`, nor a storage that was
resized, nor what `saved_tensors_hooks` give back; a kernel that reads by address would then read anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .problem import Problem, Saved, images

INPUTS = ("logits", "target", "valid_mask", "weight")
_PLAIN = (Tensor, torch.nn.Parameter)  # others need not have a storage
REMEDY = (
    "Keep it as it is until backward has run, or hand the loss a copy (clone()) of what will change; a pair of "
    "saved_tensors_hooks must give back what it was given"
)

Facts = list[tuple[torch.Size, torch.dtype, torch.device] | None]  # of each tensor


def facts_of(tensors: Sequence[Tensor | None]) -> Facts:
    """What backward compares with."""
    return [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]


def check_unchanged(names: Sequence[str], before: Facts, tensors: Sequence[Tensor | None]) -> None:
    """Raise where a saved tensor is not what it was: another shape, dtype or device, or too little memory for it.

    Values are not looked at: `tensor.data = other` of the same shape and dtype is not seen.

    Raises:
        RuntimeError: naming the tensor, what it was and what it is.
    """
    for name, fact, tensor in zip(names, before, tensors, strict=True):
        if tensor is None or fact is None:
            continue
        if (tensor.shape, tensor.dtype, tensor.device) != fact:
            was, now = _described(*fact), _described(tensor.shape, tensor.dtype, tensor.device)
            raise RuntimeError(f"{name} changed between forward and backward: it was {was}, and is {now}. {REMEDY}")
        if type(tensor) in _PLAIN and tensor.untyped_storage().nbytes() < _end_of(tensor):
            raise RuntimeError(f"{name} changed between forward and backward: {_shortage(tensor)}. {REMEDY}")


def check_memory(names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Raise where a tensor's storage has been freed, or shrunk to less than the tensor.

    Raises:
        ValueError: naming the tensor and the bytes.
    """
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and tensor.untyped_storage().nbytes() < _end_of(tensor):
            raise ValueError(f"{name} has lost its memory: {_shortage(tensor)}")


def check_consistent(problem: Problem) -> None:
    """Shapes and dtypes of one problem against each other, as the operators' callers may mix them.

    Raises:
        ValueError: naming the tensor, what was expected and what came.
    """
    logits, target, valid, class_weight, flat, config = problem
    groups = logits.shape[:2] if logits.dim() == 5 else logits.shape[:1]
    channels = 1 if config.mode == "binary" else config.channels[0]
    if logits.dim() not in (4, 5) or logits.shape[-3] != channels:
        raise ValueError(f"logits must have the shape [N,{channels},H,W], got {list(logits.shape)}")
    pixels = (*groups, *target.shape[-2:])
    if not target.is_floating_point():
        _expect("target", target, pixels)
    elif not (channels == 1 and target.dim() == logits.dim() and target.shape[-3] == 2):  # both of binary mode
        _expect("target", target, (*groups, channels, *pixels[-2:]))
    if valid is not None:
        _expect("valid_mask", valid, pixels)
    if class_weight is not None:
        rows = () if config.weight_rows == 1 and class_weight.dim() == 1 else (config.weight_rows,)
        _expect("weight", class_weight, (*rows, config.channels[0]))
    _expect("the proxy's parameters", flat, (config.parameters,))
    if flat.dtype != torch.float32:
        raise ValueError(f"the proxy's parameters must be float32, got {flat.dtype}")
    for name, tensor in zip(INPUTS[1:], (target, valid, class_weight), strict=True):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"logits are on {logits.device} but {name} is on {tensor.device}")


def check_kept(expected: Saved, codes: Tensor, saved_d: Tensor) -> None:
    """What backward gets against what forward keeps of such a problem.

    Raises:
        RuntimeError: forward kept nothing, or something else has come.
    """
    for name, tensor, shape, dtype in (
        ("codes", codes, expected.codes, torch.uint8),
        ("saved_d", saved_d, expected.saved_d, expected.dtype),
    ):
        if tuple(tensor.shape) == tuple(shape) and tensor.dtype == dtype:
            continue
        if not tensor.numel():
            raise RuntimeError(
                "backward was handed nothing that forward had saved, since no gradient was wanted where that ran "
                "or was traced: run or trace it with gradients enabled and with logits that require one"
            )
        came = _described(tensor.shape, tensor.dtype, tensor.device)
        raise RuntimeError(f"{name}, which forward kept, must be {list(shape)} {dtype}, and is {came}. {REMEDY}")


def check_upstream(problem: Problem, d_ce: Tensor, d_semeda: Tensor) -> None:
    """The gradients of the terms, which are numbers, or maps where the terms are.

    Raises:
        ValueError: naming the tensor, what was expected and what came.
    """
    shape = (images(problem.logits), *problem.target.shape[-2:]) if problem.config.per_pixel else ()
    _expect("the gradient of ce", d_ce, shape)
    _expect("the gradient of semeda", d_semeda, shape)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}, got {list(tensor.shape)}")


def _end_of(tensor: Tensor) -> int:
    """Bytes of the storage up to the tensor's last element."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + last + 1) * tensor.itemsize


def _shortage(tensor: Tensor) -> str:
    return (
        f"its storage has {tensor.untyped_storage().nbytes()} bytes now, and {list(tensor.shape)} {tensor.dtype} "
        f"takes {_end_of(tensor)}"
    )


def _described(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"{list(shape)} {dtype} on {device}"
