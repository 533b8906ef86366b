"""The fused CPU backend: tensors become addresses for `csrc/cpu`, behind two registered operators.

`cpu_forward` gives the terms and, where a gradient will be wanted, the codes that `cpu_backward` turns into it:
2 or 3 bits a feature instead of activations. Both are opaque to the compiler, so one compiled graph holds them
as they are, for any shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .native import native_info, native_module
from .spec import DISTANCES, TAPS, LossSpec, LossTerms

MAX_CLASSES = 1024  # csrc/cpu/params.h
UNIT = 16  # pixels in a word of codes, csrc/cpu/plan.h
_DTYPES = {
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


def why_unavailable() -> str | None:
    """None where the compiled module is there, else the cause and the remedy."""
    info = native_info()
    return None if info.available else info.reason


def why_unsupported(logits: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> str | None:
    """What these kernels leave to the reference, or None. Looks at metadata only."""
    if logits.dtype == torch.float64:
        return "the fused CPU kernels compute in float32, and the logits are float64"
    if not spec.from_logits:
        return "the fused CPU kernels take logits, not probabilities (from_logits=False)"
    if weights[0].shape[1] > MAX_CLASSES:
        return f"the fused CPU kernels take up to {MAX_CLASSES} classes, the proxy has {weights[0].shape[1]}"
    for number, weight in enumerate(weights):
        rows, columns = weight.shape[2:]
        if rows != columns or rows % 2 == 0:
            return f"the proxy's layer {number} has a kernel of {rows}x{columns}; the fused kernels take odd squares"
    return None


def run(
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    class_weight: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    spec: LossSpec,
) -> LossTerms:
    """The terms of `reference.loss_terms`, for arguments that passed its checks and `why_unsupported`."""
    save = torch.is_grad_enabled() and logits.requires_grad
    # One flat tensor: an operator with a list of tensors costs half a millisecond more a call.
    flat = torch.cat([tensor.reshape(-1).to(torch.float32) for tensor in (*weights, *biases)])
    channels = [weights[0].shape[1], *(weight.shape[0] for weight in weights)]
    ce, semeda, per_layer, ce_weight, valid_count, _, _ = torch.ops.semeda_fast.cpu_forward(
        logits,
        target,
        valid,
        class_weight,
        flat,
        channels,
        [weight.shape[2] for weight in weights],
        list(spec.layer_weights),
        list(spec.layer_scales),
        spec.tap,
        spec.distance,
        spec.ignore_index,
        spec.label_smoothing,
        spec.mode,
        spec.per_pixel,
        save,
    )
    return LossTerms(ce, semeda, per_layer.detach(), ce_weight.detach(), valid_count)


def code_bytes(channels: Sequence[int], width: int, tap: str, distance: str) -> int:
    """Bytes of codes of one image row; channels are K_1 to K_L."""
    if distance == "l1":
        planes = sum(channels[:-1]) * (3 if tap == "pre" else 2) + 2 * channels[-1]
    else:
        planes = sum(channels[:-1])
    return (width + UNIT - 1) // UNIT * 2 * planes


def saved_floats(channels: Sequence[int], width: int, distance: str) -> int:
    """Floats of one image row that are kept of the differences themselves; l1 needs their signs alone."""
    return 0 if distance == "l1" else (width + UNIT - 1) // UNIT * UNIT * sum(channels)


def has_bad_label(target: Tensor, valid: Tensor | None, num_classes: int, ignore_index: int) -> bool | None:
    """Whether a valid pixel of target [N,H,W] (integers, on the CPU) holds no class; None where it cannot be told."""
    module = native_module()
    if module is None or target.device.type != "cpu":
        return None
    params = module.LossParams()
    params.n, params.h, params.w = target.shape
    params.classes = num_classes
    params.ignore_index = ignore_index
    params.target = _view(module, target)
    if valid is not None:
        params.valid = _view(module, valid)
    return bool(module.has_bad_label(params))


def _view(module: Any, tensor: Tensor) -> Any:
    """Of [N,C,H,W], [N,H,W] or []: what lacks a dimension repeats along it."""
    strides = {4: lambda s: s, 3: lambda s: (s[0], 0, s[1], s[2]), 0: lambda s: (0, 0, 0, 0)}[tensor.dim()](
        tensor.stride()
    )
    return module.View(tensor.data_ptr(), _DTYPES[tensor.dtype], list(strides))


def _params(
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    class_weight: Tensor | None,
    flat: Tensor,
    channels: Sequence[int],
    sizes: Sequence[int],
    layer_weights: Sequence[float],
    layer_scales: Sequence[float],
    tap: str,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
    mode: str,
) -> tuple[Any, list[Tensor]]:
    """The problem as plain data, and the tensors that must outlive it."""
    module = native_module()
    if module is None:
        raise RuntimeError(f"semeda_fast's CPU kernels were called without them: {native_info().reason}")
    keep: list[Tensor] = []

    def float32(tensor: Tensor) -> Tensor:
        keep.append(tensor.detach().to(torch.float32).contiguous())
        return keep[-1]

    params = module.LossParams()
    params.n, _, params.h, params.w = logits.shape
    params.classes = channels[0]
    params.binary = mode == "binary"
    params.logits = _view(module, logits)
    params.soft = target.is_floating_point()
    if params.soft:
        params.soft_channels = target.shape[1]
        target = float32(target) if target.dtype == torch.float64 else target
    params.target = _view(module, target)
    if valid is not None:
        params.valid = _view(module, valid)
    if class_weight is not None:
        params.class_weight = float32(class_weight).data_ptr()
    params.ignore_index = ignore_index
    params.label_smoothing = label_smoothing
    params.tap = TAPS.index(tap)
    params.distance = DISTANCES.index(distance)
    weight = flat.data_ptr()
    bias = weight + 4 * sum(a * b * k * k for a, b, k in zip(channels, channels[1:], sizes, strict=False))
    for before, out, size, w, s in zip(channels, channels[1:], sizes, layer_weights, layer_scales, strict=False):
        inverse = 1 / (out * s)
        params.add_layer(weight, bias, out, before, size, inverse, w * inverse)
        weight += 4 * out * before * size * size
        bias += 4 * out
    params.threads = torch.get_num_threads()
    return params, keep


@torch.library.custom_op("semeda_fast::cpu_forward", mutates_args=(), device_types="cpu")
def _forward(
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    class_weight: Tensor | None,
    flat: Tensor,
    channels: list[int],
    sizes: list[int],
    layer_weights: list[float],
    layer_scales: list[float],
    tap: str,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
    mode: str,
    per_pixel: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ce, semeda, per_layer, ce_weight, valid_count as in LossTerms; codes and saved_d, empty unless `save`."""
    params, keep = _params(
        logits, target, valid, class_weight, flat, channels, sizes, layer_weights, layer_scales,
        tap, distance, ignore_index, label_smoothing, mode,
    )  # fmt: skip
    ce, semeda, codes, saved_d = _outputs(logits, channels[1:], tap, distance, per_pixel, save)
    terms = torch.empty(3 + len(sizes), dtype=torch.float32)
    counts = torch.empty(2, dtype=torch.int64)
    params.terms, params.counts = terms.data_ptr(), counts.data_ptr()
    if save:
        params.codes, params.saved_d = codes.data_ptr(), saved_d.data_ptr()
    if per_pixel:
        params.ce_map, params.semeda_map = ce.data_ptr(), semeda.data_ptr()
    native_module().cpu_forward(params)
    del keep
    if not per_pixel:
        ce, semeda = terms[0].clone(), terms[1].clone()
    return ce, semeda, terms[3:].clone(), terms[2].clone(), counts[0].clone(), codes, saved_d


def _outputs(
    logits: Tensor, channels: Sequence[int], tap: str, distance: str, per_pixel: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fresh memory for ce, semeda, codes and saved_d."""
    n, _, h, w = logits.shape
    shape = (n, h, w) if per_pixel else ()
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty((n, h, code_bytes(channels, w, tap, distance)) if save else (0,), dtype=torch.uint8),
        logits.new_empty((n, h, saved_floats(channels, w, distance)) if save else (0,), dtype=torch.float32),
    )


@_forward.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    class_weight: Tensor | None,
    flat: Tensor,
    channels: list[int],
    sizes: list[int],
    layer_weights: list[float],
    layer_scales: list[float],
    tap: str,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
    mode: str,
    per_pixel: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    ce, semeda, codes, saved_d = _outputs(logits, channels[1:], tap, distance, per_pixel, save)
    per_layer = logits.new_empty((len(sizes),), dtype=torch.float32)
    ce_weight = logits.new_empty((), dtype=torch.float32)
    count = logits.new_empty((), dtype=torch.int64)
    return ce, semeda, per_layer, ce_weight, count, codes, saved_d


@torch.library.custom_op("semeda_fast::cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    d_ce: Tensor,
    d_semeda: Tensor,
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    class_weight: Tensor | None,
    flat: Tensor,
    codes: Tensor,
    saved_d: Tensor,
    channels: list[int],
    sizes: list[int],
    layer_weights: list[float],
    layer_scales: list[float],
    tap: str,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
    mode: str,
) -> Tensor:
    """The gradient of the logits, in their dtype and, where they are dense, their strides."""
    params, keep = _params(
        logits, target, valid, class_weight, flat, channels, sizes, layer_weights, layer_scales,
        tap, distance, ignore_index, label_smoothing, mode,
    )  # fmt: skip
    d_logits = torch.empty_like(logits)
    module = native_module()
    d_ce, d_semeda = d_ce.to(torch.float32), d_semeda.to(torch.float32)
    params.d_ce, params.d_semeda = _view(module, d_ce), _view(module, d_semeda)
    params.d_semeda_is_map = d_semeda.dim() > 0
    params.d_logits = _view(module, d_logits)
    params.codes = codes.data_ptr()
    params.saved_d = saved_d.data_ptr() if saved_d.numel() else 0
    module.cpu_backward(params)
    del keep
    return d_logits


@_backward.register_fake
def _(
    d_ce: Tensor,
    d_semeda: Tensor,
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    class_weight: Tensor | None,
    flat: Tensor,
    codes: Tensor,
    saved_d: Tensor,
    channels: list[int],
    sizes: list[int],
    layer_weights: list[float],
    layer_scales: list[float],
    tap: str,
    distance: str,
    ignore_index: int,
    label_smoothing: float,
    mode: str,
) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, valid, class_weight, flat, *configuration, _, _ = inputs
    ctx.save_for_backward(logits, target, valid, class_weight, flat, output[5], output[6])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # or each backward would fill zeros of the size of `codes`
    ctx.configuration = configuration


def _differentiate(ctx: Any, d_ce: Tensor | None, d_semeda: Tensor | None, *_: None) -> tuple[Any, ...]:
    logits, target, valid, class_weight, flat, codes, saved_d = ctx.saved_tensors
    zero = logits.new_zeros((), dtype=torch.float32)
    d_logits = torch.ops.semeda_fast.cpu_backward(
        zero if d_ce is None else d_ce,
        zero if d_semeda is None else d_semeda,
        logits,
        target,
        valid,
        class_weight,
        flat,
        codes,
        saved_d,
        *ctx.configuration,
    )
    return (d_logits, *[None] * (len(ctx.configuration) + 6))


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "the fused CPU backend has no second derivative; use SemedaLoss(backend='reference'), which has all of them"
    )


torch.library.register_autograd("semeda_fast::cpu_forward", _differentiate, setup_context=_setup_context)
torch.library.register_autograd("semeda_fast::cpu_backward", _no_second_derivative)
