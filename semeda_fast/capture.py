"""Who looks on: whether a call becomes part of a graph, which runs, and may be trained, when the call is long over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_PROXY = torch._C._TorchDispatchModeKey.PROXY  # of make_fx, and so of torch.export and torch.compile
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
T = TypeVar("T")
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def watched() -> bool:
    """Whether somebody sees the operators of this thread: a mode, a transform of torch.func, a tracer, a compiler."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
        or torch.compiler.is_compiling()
    )


def recorded() -> bool:
    """Whether operators are written into a graph of which nobody knows yet whether it will be trained.

    torch.compile knows: it compiles anew where a gradient is asked for after all.
    """
    if torch._C._is_tracing() or torch.compiler.is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() and torch._C._get_dispatch_mode(_PROXY) is not None:
        return True
    before = torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)
    return before and torch._ops._get_dispatch_mode_pre_dispatch(_PROXY) is not None


def asks_gradient(tensor: Tensor) -> bool:
    """Whether a gradient of this tensor may be asked for, at any level of torch.func."""
    if not torch.is_grad_enabled():
        return False
    while not tensor.requires_grad:
        if not _is_wrapped(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def writes_onnx() -> bool:
    """Whether torch.onnx.export is at work, to whose format no operator but torch's own can be translated."""
    return recorded() and torch.onnx.is_in_onnx_export()


def untraced(function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments), which looks at metadata, unseen by torch.jit.trace.

    For that each size is a tensor, and whatever asks for its value gives a warning.
    """
    if not torch.jit.is_tracing():
        return function(*arguments)
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return function(*arguments)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def size_of(tensor: Tensor, dim: int) -> int:
    """A size as a number, for torch.jit.trace, too."""
    return untraced(tensor.size, dim)  # type: ignore[return-value]  # of the overloads mypy takes the first


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """All sizes as numbers; what is made of them, torch.jit.trace takes for constants."""
    return untraced(_shape, tensor)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
