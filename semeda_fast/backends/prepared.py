"""The short way of an eager call on the CPU: what shapes and options decide is decided once, and the loss is one node.

A training step calls the loss between two large networks, which leave nothing of it in the caches. Then the general
way (functional.py, ops.py, fused.py: checks, choice of a backend, operators, and a dozen small steps of torch) takes
0.9 ms around the kernels, more than these need for an image of 64x64, and this way about half of that. It serves a
number as the result, by a backend that has `prepare`; everything else, and whoever watches operators, takes the
general way. Both give the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..folding import is_plain
from ..options import LossOptions
from . import registry as backends
from .fused import plain
from .problem import Inputs, Network, Prepared, spec_of

MAX_PREPARED = 64  # calls of one proxy that are remembered: of a size, dtypes and options


_UNKNOWN: Any = object()


class _Calls(dict[Any, Prepared | None]):
    """What was prepared for one proxy, as long as that stays what it was then; pickles of before name this class."""

    def __init__(self) -> None:
        self.proxy: tuple[Any, ...] = ()
        self.tensors: list[Tensor] = []  # whose ids are part of `proxy`


def eager_loss(
    inputs: Inputs, proxy: Network, lambda_ce: float | Tensor, lambda_semeda: float | Tensor, options: LossOptions
) -> Tensor | None:
    """The loss [] as `semeda_loss` has it, or None where the general way is to be taken.

    Args:
        lambda_ce, lambda_semeda: checked by the caller.

    Raises:
        ValueError, TypeError, BackendUnavailableError: as `semeda_loss` does.
    """
    if options.reduction == "none" or options.validate == "always":
        return None
    if not plain(inputs) or torch.autograd.forward_ad._current_level >= 0 or proxy.lost:
        return None
    if isinstance(lambda_ce, Tensor) or isinstance(lambda_semeda, Tensor):
        return None
    for t in inputs:
        if t is not None and not t.is_cpu:  # elsewhere nobody waits for Python, and scalars cannot be read
            return None
    if inputs.logits is None or inputs.target is None:
        return None  # type: ignore[unreachable]  # a mistake, which the general way names
    calls: _Calls | None = proxy.__dict__.get("_calls")
    if calls is None:
        calls = proxy.__dict__["_calls"] = _Calls()
    buffers = proxy._buffers
    tensors: list[Tensor] = [buffers[name] for name in _names(len(proxy.layers))]
    state = (
        [(id(t), t.data_ptr(), t.untyped_storage().nbytes(), t.shape, t.stride(), t.requires_grad) for t in tensors],
        proxy.layers,
        proxy.tap,
        proxy.layer_weights,
        backends.changes(),
    )
    if calls.proxy != state or len(calls) > MAX_PREPARED:
        calls.clear()
        calls.proxy, calls.tensors = state, tensors
    try:
        key = (options, proxy.layer_scales(options.distance), *[t if t is None else _facts(t) for t in inputs])
        call = calls.get(key, _UNKNOWN)
    except TypeError:  # an option that cannot be part of a key: a list, or nonsense
        return None
    if call is _UNKNOWN:
        call = calls[key] = _prepare(inputs, proxy, options)
    if call is None:
        return None
    if torch.is_grad_enabled() and inputs.logits.requires_grad:
        loss: Tensor = _apply(call, lambda_ce, lambda_semeda, *inputs)
        return loss
    return call.forward(inputs, lambda_ce, lambda_semeda, False)[0]


@functools.cache
def _names(layers: int) -> tuple[str, ...]:
    return (*[f"weight{i}" for i in range(layers)], *[f"bias{i}" for i in range(layers)])


def _facts(t: Tensor) -> tuple[Any, ...]:
    """What checks look at, and what says where values lie beside the address."""
    return t.shape, t.stride(), t.dtype, t.requires_grad


def _prepare(inputs: Inputs, proxy: Network, options: LossOptions) -> Prepared | None:
    """What the backend in charge makes of such a call, or None; the checks are those of `semeda_loss`."""
    logits, target, valid, class_weight = inputs
    options.check()
    if not is_plain(logits, target, options):
        return None
    if options.mode == "binary" and target.dim() == 4:
        return None
    spec = spec_of(proxy, options)
    checks.check_tensors(logits, target, valid, class_weight, proxy.weights, spec)
    backend = backends.choose(options.backend, logits, target, proxy.weights, spec)
    if backend.prepare is None:
        return None
    if logits.shape[2:] != target.shape[-2:] and (backend.upsamples is None or not backend.upsamples(logits, target)):
        return None
    parameters = [*proxy.weights, *proxy.biases]
    if not plain(parameters):
        return None
    prepared: Prepared | None = backend.prepare(inputs, parameters, spec)
    return prepared


class _EagerLoss(torch.autograd.Function):
    """One node in the graph, from the logits to the loss."""

    @staticmethod
    def forward(ctx: Any, call: Prepared, lambda_ce: float, lambda_semeda: float, *inputs: Tensor | None) -> Tensor:
        loss, kept, ctx.record = call.forward(Inputs(*inputs), lambda_ce, lambda_semeda, True)  # type: ignore[arg-type]
        ctx.save_for_backward(*inputs, kept)
        ctx.call = call
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        inputs = Inputs(*tensors)
        quick = not torch.is_grad_enabled() and plain((*tensors, kept, d_loss))
        run = ctx.call.backward if quick else ctx.call.watched_backward
        return None, None, None, run(inputs, kept, ctx.record, d_loss), None, None, None


# What `_EagerLoss.apply` calls once it has looked for transforms of torch.func, which `plain` has: 2 us of a call.
_apply = super(torch.autograd.Function, _EagerLoss).apply
