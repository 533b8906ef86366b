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

from .checks import check_labels
from .config import FusedConfig, config_text, parse_config
from .native import native_info, native_module, tensor_view
from .spec import DISTANCES, TAPS, LossSpec, LossTerms

MAX_CLASSES = 1024  # csrc/cpu/params.h
UNIT = 16  # pixels in a word of codes, csrc/cpu/plan.h


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
    check_labels: bool,
) -> LossTerms:
    """The terms of `reference.loss_terms`, for arguments that passed its checks and `why_unsupported`."""
    save = torch.is_grad_enabled() and logits.requires_grad
    # One flat tensor: an operator with a list of tensors costs half a millisecond more a call.
    flat = torch.cat([tensor.reshape(-1).to(torch.float32) for tensor in (*weights, *biases)])
    config = config_text(weights, spec, check_labels)
    ce, semeda, per_layer, ce_weight, valid_count, _, _ = torch.ops.semeda_fast.cpu_forward(
        logits, target, valid, class_weight, flat, config, save
    )
    return LossTerms(ce, semeda, per_layer, ce_weight, valid_count)


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


def _params(
    logits: Tensor, target: Tensor, valid: Tensor | None, class_weight: Tensor | None, flat: Tensor, config: FusedConfig
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
    params.classes = config.channels[0]
    params.binary = config.mode == "binary"
    params.logits = tensor_view(module, logits)
    params.soft = target.is_floating_point()
    if params.soft:
        params.soft_channels = target.shape[1]
        target = float32(target) if target.dtype == torch.float64 else target
    params.target = tensor_view(module, target)
    if valid is not None:
        params.valid = tensor_view(module, valid)
    if class_weight is not None:
        params.class_weight = float32(class_weight).data_ptr()
    params.ignore_index = config.ignore_index
    params.label_smoothing = config.label_smoothing
    params.tap = TAPS.index(config.tap)
    params.distance = DISTANCES.index(config.distance)
    weight = flat.data_ptr()
    bias = weight + 4 * (config.parameters - sum(config.channels[1:]))
    shapes = zip(config.channels, config.channels[1:], config.sizes, strict=False)
    for (before, out, size), w, s in zip(shapes, config.layer_weights, config.layer_scales, strict=True):
        inverse = 1 / (out * s)
        params.add_layer(weight, bias, out, before, size, inverse, w * inverse)
        weight += 4 * out * before * size * size
        bias += 4 * out
    params.threads = torch.get_num_threads()
    return params, keep


# Defined by hand: what torch.library.custom_op wraps around a function costs 0.1 ms a call.
_library = torch.library.Library("semeda_fast", "FRAGMENT")
_library.define(
    "cpu_forward(Tensor logits, Tensor target, Tensor? valid, Tensor? class_weight, Tensor flat, str config, "
    "bool save) -> (Tensor ce, Tensor semeda, Tensor per_layer, Tensor ce_weight, Tensor valid_count, Tensor codes, "
    "Tensor saved_d)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "cpu_backward(Tensor d_ce, Tensor d_semeda, Tensor logits, Tensor target, Tensor? valid, Tensor? class_weight, "
    "Tensor flat, Tensor codes, Tensor saved_d, str config) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    class_weight: Tensor | None,
    flat: Tensor,
    config: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ce, semeda, per_layer, ce_weight, valid_count as in LossTerms; codes and saved_d, empty unless `save`."""
    settings = parse_config(config)
    params, keep = _params(logits, target, valid, class_weight, flat, settings)
    ce, semeda, codes, saved_d = _outputs(logits, settings, save)
    terms = torch.empty(3 + len(settings.sizes), dtype=torch.float32)
    counts = torch.empty(2, dtype=torch.int64)
    params.terms, params.counts = terms.data_ptr(), counts.data_ptr()
    if save:
        params.codes, params.saved_d = codes.data_ptr(), saved_d.data_ptr()
    if settings.per_pixel:
        params.ce_map, params.semeda_map = ce.data_ptr(), semeda.data_ptr()
    native_module().cpu_forward(params)
    del keep
    if settings.check_labels and int(counts[1]):
        spec = LossSpec((), (), (), (), (), ignore_index=settings.ignore_index, mode=settings.mode)
        check_labels(logits, target, valid, spec)  # raises
    if not settings.per_pixel:
        ce, semeda = terms[0].clone(), terms[1].clone()
    return ce, semeda, terms[3:].clone(), terms[2].clone(), counts[0].clone(), codes, saved_d


def _outputs(logits: Tensor, config: FusedConfig, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fresh memory for ce, semeda, codes and saved_d."""
    n, _, h, w = logits.shape
    shape = (n, h, w) if config.per_pixel else ()
    coded = (n, h, code_bytes(config.channels[1:], w, config.tap, config.distance)) if save else (0,)
    saved = (n, h, saved_floats(config.channels[1:], w, config.distance)) if save else (0,)
    return (
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty(coded, dtype=torch.uint8),
        logits.new_empty(saved, dtype=torch.float32),
    )


def _fake_forward(
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    class_weight: Tensor | None,
    flat: Tensor,
    config: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    settings = parse_config(config)
    ce, semeda, codes, saved_d = _outputs(logits, settings, save)
    per_layer = logits.new_empty((len(settings.sizes),), dtype=torch.float32)
    ce_weight = logits.new_empty((), dtype=torch.float32)
    count = logits.new_empty((), dtype=torch.int64)
    return ce, semeda, per_layer, ce_weight, count, codes, saved_d


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
    config: str,
) -> Tensor:
    """The gradient of the logits, in their dtype and, where they are dense, their strides."""
    params, keep = _params(logits, target, valid, class_weight, flat, parse_config(config))
    d_logits = torch.empty_like(logits)
    module = native_module()
    d_ce, d_semeda = d_ce.to(torch.float32), d_semeda.to(torch.float32)
    params.d_ce, params.d_semeda = tensor_view(module, d_ce), tensor_view(module, d_semeda)
    params.d_semeda_is_map = d_semeda.dim() > 0
    params.d_logits = tensor_view(module, d_logits)
    params.codes = codes.data_ptr()
    params.saved_d = saved_d.data_ptr() if saved_d.numel() else 0
    module.cpu_backward(params)
    del keep
    return d_logits


def _fake_backward(d_ce: Tensor, d_semeda: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, valid, class_weight, flat, config, _ = inputs
    ctx.save_for_backward(logits, target, valid, class_weight, flat, output[5], output[6])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # or each backward would fill zeros of the size of `codes`
    ctx.config = config


def _differentiate(ctx: Any, d_ce: Tensor | None, d_semeda: Tensor | None, *_: None) -> tuple[Any, ...]:
    logits, target, valid, class_weight, flat, codes, saved_d = ctx.saved_tensors
    zero = logits.new_zeros((), dtype=torch.float32) if d_ce is None or d_semeda is None else None
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
        ctx.config,
    )
    return d_logits, None, None, None, None, None, None


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "the fused CPU backend has no second derivative; use SemedaLoss(backend='reference'), which has all of them"
    )


_library.impl("cpu_forward", _forward, "CPU")
_library.impl("cpu_backward", _backward, "CPU")
torch.library.register_fake("semeda_fast::cpu_forward", _fake_forward, lib=_library)
torch.library.register_fake("semeda_fast::cpu_backward", _fake_backward, lib=_library)
torch.library.register_autograd("semeda_fast::cpu_forward", _differentiate, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("semeda_fast::cpu_backward", _no_second_derivative, lib=_library)
