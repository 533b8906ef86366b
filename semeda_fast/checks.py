"""Argument checks: each error says what was expected, what came and what to do.

`check_tensors` looks at tensors' metadata, and waits for no device; options.py has the checks of the options, and
backends/values.py those of what tensors hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import shapes
from .capture import untraced
from .options import LossOptions
from .spec import LossSpec

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.bool)


def check_lambda(name: str, value: float | Tensor) -> None:
    """A term's weight is a finite number >= 0, or a tensor of one element (whose value is not read)."""
    if isinstance(value, Tensor):
        if untraced(value.numel) != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name} as a tensor must hold one floating-point number, got shape {list(value.shape)}, {value.dtype}"
            )
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor of one element, got {type(value).__name__}")
    elif not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def check_layer_weights(layer_weights: Sequence[float] | None, num_layers: int) -> tuple[float, ...]:
    """The layer weights as floats, all 1 by default; ValueError if they are not one finite number >= 0 a layer."""
    if layer_weights is None:
        return (1.0,) * num_layers
    if isinstance(layer_weights, (int, float, str)):
        raise TypeError(f"layer_weights must hold one number a layer, {num_layers} in all, got {layer_weights!r}")
    values = tuple(float(w) for w in layer_weights)
    if len(values) != num_layers:
        raise ValueError(
            f"layer_weights must hold one number a layer: the proxy has {num_layers} layers, got {len(values)}"
        )
    if not all(0 <= w < float("inf") for w in values):
        raise ValueError(f"layer_weights must be finite and not negative, got {values}")
    return values


def check_class_weight(weight: Tensor | None, num_classes: int) -> None:
    """CE's class weights are one floating-point number a class."""
    if weight is None:
        return
    if not weight.is_floating_point():
        raise TypeError(
            f"weight must be a floating-point tensor of shape [{num_classes}], got {weight.dtype}; pass weight.float()"
        )
    if tuple(weight.shape) != (num_classes,):
        raise ValueError(f"weight must hold one number a class, shape [{num_classes}], got shape {list(weight.shape)}")


def check_more(
    weight: Tensor | None,
    pos_weight: Tensor | None,
    pixel_weight: Tensor | None,
    counts: object,
    num_classes: int,
    options: LossOptions,
) -> None:
    """ValueError or TypeError for what a call has beside logits, target and valid_mask; reads no data."""
    if options.mode != "multilabel":
        check_class_weight(weight, num_classes)
    if pos_weight is not None:
        check_pos_weight(pos_weight, options.mode)
    if pixel_weight is not None:
        if not isinstance(pixel_weight, Tensor) or not pixel_weight.is_floating_point():
            came = pixel_weight.dtype if isinstance(pixel_weight, Tensor) else type(pixel_weight).__name__
            raise TypeError(f"pixel_weight must be a floating-point tensor, one number a pixel, got {came}")
        if pixel_weight.requires_grad:
            raise ValueError("pixel_weight requires a gradient, but only the logits receive one; pass .detach()")
    if counts is None:
        return
    if not (hasattr(counts, "ce_weight") and hasattr(counts, "valid")):
        raise TypeError(f"counts must be what criterion.counts(target) gives, got {type(counts).__name__}")
    if options.reduction != "mean":
        raise ValueError(f"counts divide a mean, and reduction={options.reduction!r} is none; leave counts out")


def check_pos_weight(pos_weight: Tensor, mode: str) -> None:
    """The weight of the foreground is one number, or with mode="multilabel" one a class."""
    if mode == "multiclass":
        raise ValueError("pos_weight is for mode='binary' and mode='multilabel'; with mode='multiclass' use weight")
    if not pos_weight.is_floating_point():
        raise TypeError(f"pos_weight must be a floating-point tensor, got {pos_weight.dtype}; pass pos_weight.float()")
    if mode == "binary" and pos_weight.numel() != 1:
        raise ValueError(f"with mode='binary' pos_weight holds one number, got shape {list(pos_weight.shape)}")


def check_classes(num_classes: int, mode: str, from_binary: str) -> None:
    """ValueError for a proxy whose number of classes means nothing in a mode.

    Args:
        from_binary: what to write for one channel.
    """
    if mode == "multiclass" and num_classes == 1:
        raise ValueError(
            "mode='multiclass' needs at least 2 classes, got 1: a softmax over one channel is 1 everywhere and has a "
            f"gradient of 0; for one channel with a sigmoid use {from_binary}, with labels 0 and 1"
        )


def check_are_tensors(logits: object, target: object, valid_mask: object) -> None:
    """TypeError for what networks and data loaders give beside tensors, naming the tensor in it."""
    for name, value in (("logits", logits), ("target", target), ("valid_mask", valid_mask)):
        if isinstance(value, Tensor) or (name == "valid_mask" and value is None):
            continue
        remedy = "pass a torch.Tensor"
        if type(value).__module__ == "numpy":
            remedy = f"pass torch.from_numpy({name})"
        elif type(value).__module__.startswith("PIL."):
            remedy = f"pass torch.from_numpy(np.array({name}))"
        elif isinstance(getattr(value, "logits", None), Tensor):
            remedy = "pass its .logits"
        elif isinstance(value, dict) and (keys := [key for key, item in value.items() if isinstance(item, Tensor)]):
            remedy = f"pass its [{'out' if 'out' in keys else keys[0]!r}]".replace("[out]", "['out']")
        elif isinstance(value, (tuple, list)):
            remedy = f"pass one of its {len(value)} elements"
        elif isinstance(value, torch.fx.Proxy):
            remedy = (
                "torch.fx.symbolic_trace cannot look inside the loss: trace it with torch.export or make_fx, or with a "
                "torch.fx.Tracer whose is_leaf_module(module, name) is true where isinstance(module, SemedaLoss)"
            )
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; {remedy}")


def check_tensors(
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    class_weight: Tensor | None,
    weights: Sequence[Tensor],
    spec: LossSpec,
) -> None:
    """Ranks, shapes, dtypes, devices and requires_grad; reads no data, so it costs no synchronisation."""
    _check_logits(logits, target, weights[0].shape[1], spec)
    _check_target(logits, target, spec)
    n, h, w = logits.shape[0], *target.shape[-2:]
    if valid is not None:
        if valid.dtype != torch.bool:
            raise TypeError(
                f"valid_mask must be a bool tensor (True: the pixel counts), got {valid.dtype}; pass valid_mask.bool()"
            )
        if tuple(valid.shape) != (n, h, w):
            remedy = "; pass valid_mask.squeeze(1)" if tuple(valid.shape) == (n, 1, h, w) else ""
            raise ValueError(
                f"valid_mask must have the shape [{n},{h},{w}] of the pixels, got {list(valid.shape)}{remedy}"
            )
    if spec.weight_rows == 1:
        check_class_weight(class_weight, weights[0].shape[1])
    others = {"target": target, "valid_mask": valid, "weight": class_weight, "the proxy": weights[0]}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != logits.device:
            remedy = f"pass {name}.to(logits.device)"
            if name in ("the proxy", "weight"):
                remedy = "call criterion.to(logits.device)"
            raise ValueError(f"logits are on {logits.device} but {name} is on {tensor.device}; {remedy}")
    for name, tensor in (("target", target), ("weight", class_weight)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, but only the logits receive one; pass {name}.detach()")
    if any(weight.requires_grad for weight in weights):
        raise ValueError(
            "the proxy's weights require a gradient, but the proxy is frozen: only the logits receive one; "
            "train a proxy with train_proxy, before it enters the loss"
        )


def _check_logits(logits: Tensor, target: Tensor, num_classes: int, spec: LossSpec) -> None:
    name = "logits" if spec.from_logits else "probabilities"
    if logits.dtype not in LOGITS_DTYPES:
        remedy = ""
        if logits.is_floating_point():
            remedy = "; pass logits.float()"
        elif not logits.is_complex():
            remedy = "; pass the network's output itself, of which an argmax has no gradient"
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}{remedy}")
    if logits.dim() != 4:
        remedy = shapes.logits_rank(logits, target, spec)
        raise ValueError(f"{name} must have the shape [N,C,H,W], got {list(logits.shape)}; {remedy}")
    if logits.shape[2] == 0 or logits.shape[3] == 0:
        raise ValueError(f"{name} must have H and W of at least 1, got shape {list(logits.shape)}")
    check_classes(num_classes, spec.mode, "mode='binary' and EdgeProxy.bundled(2)")
    channels = logits.shape[1]
    if spec.mode == "binary":
        if num_classes != 2:
            raise ValueError(
                f"mode='binary' needs a proxy with 2 classes, got one with {num_classes}; take EdgeProxy.bundled(2)"
            )
        if channels != 1:
            remedy = shapes.logits_channels(logits, num_classes, spec)
            raise ValueError(f"mode='binary' expects one channel, [N,1,H,W], got {list(logits.shape)}; {remedy}")
    elif channels != num_classes:
        remedy = shapes.logits_channels(logits, num_classes, spec)
        raise ValueError(
            f"{name} have {channels} classes (shape {list(logits.shape)}) but the proxy has {num_classes}; {remedy}"
        )


def _check_target(logits: Tensor, target: Tensor, spec: LossSpec) -> None:
    n, c, h, w = logits.shape
    if spec.upsample and target.dim() >= 3:
        h, w = target.shape[-2:]
        if h == 0 or w == 0:
            raise ValueError(f"target must have H and W of at least 1, got shape {list(target.shape)}")
    if target.is_floating_point():
        binary = spec.mode == "binary"
        fits = tuple(target.shape) == (n, c, h, w) or (binary and tuple(target.shape) == (n, 2, h, w))
        if not fits:
            expected = f"[{n},1,{h},{w}] or [{n},2,{h},{w}]" if binary else f"[{n},{c},{h},{w}]"
            raise ValueError(
                f"a floating-point target is a distribution of shape {expected}, got {list(target.shape)}, "
                f"{target.dtype}; {shapes.distribution_shape(target, logits, spec)}"
            )
        return
    if target.dtype not in LABEL_DTYPES:
        remedy = "; pass target.to(torch.int64)" if target.dtype in (torch.uint32, torch.uint64) else ""
        raise TypeError(
            "target must hold integer labels (uint8, int8, int16, uint16, int32, int64, bool) or a float distribution, "
            f"got {target.dtype}{remedy}"
        )
    if tuple(target.shape) != (n, h, w):
        remedy = shapes.label_shape(target, logits, spec)
        raise ValueError(
            f"labels must have the shape [{n},{h},{w}] for logits of shape {list(logits.shape)}, "
            f"got {list(target.shape)}" + (f"; {remedy}" if remedy else "")
        )
