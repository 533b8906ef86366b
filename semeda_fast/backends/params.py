"""A problem as the plain data that every native module reads: `LossParams` of csrc/params.h."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..options import DISTANCES
from ..spec import TAPS
from .config import FusedConfig
from .native import dtype_code, span, tensor_view
from .problem import Problem, images


def describe(module: Any, config: FusedConfig, dtype: torch.dtype) -> Any:
    """LossParams of a native module for one pixel of logits of that dtype, without any address."""
    params = module.LossParams(_settings(module, config))
    params.n = params.h = params.w = 1
    params.logits = module.View(0, dtype_code(dtype), [0, 0, 0, 0], 0, 0)
    params.target = module.View(0, dtype_code(torch.int64), [0, 0, 0, 0], 0, 0)
    return params


def fill(module: Any, problem: Problem) -> tuple[Any, list[Tensor]]:
    """LossParams of a native module for tensors as they lie, and the tensors that must outlive it.

    Nothing is copied but class weights that are not fp32 and contiguous, and fp64 targets.
    """
    logits, target, valid, class_weight, flat, config = problem
    keep: list[Tensor] = [flat]

    def float32(tensor: Tensor) -> Tensor:
        keep.append(tensor.detach().to(torch.float32).contiguous())
        return keep[-1]

    params = module.LossParams(_settings(module, config))
    params.set_proxy(span(flat))
    groups = logits.dim() == 5
    params.n = images(logits)
    h, w = logits.shape[-2:]
    params.h, params.w = target.shape[-2:]
    if (h, w) != (params.h, params.w):
        params.logits_h, params.logits_w = h, w
    params.logits = tensor_view(module, logits, groups)
    params.soft = target.is_floating_point()
    if params.soft:
        params.soft_channels = target.shape[-3]
        target = float32(target) if target.dtype == torch.float64 else target
    params.target = tensor_view(module, target, groups)
    if valid is not None:
        params.valid = tensor_view(module, valid, groups)
    if class_weight is not None:
        params.class_weight = span(float32(class_weight))
    return params, keep


def add_gradients(module: Any, params: Any, d_ce: Tensor, d_semeda: Tensor, d_logits: Tensor) -> None:
    """What backward reads and writes beside the problem: d_ce and d_semeda fp32, [] or [N,H,W]."""
    params.d_ce, params.d_semeda = tensor_view(module, d_ce), tensor_view(module, d_semeda)
    params.d_semeda_is_map = d_semeda.dim() > 0
    params.d_logits = tensor_view(module, d_logits, d_logits.dim() == 5)


@functools.lru_cache(maxsize=256)
def _settings(module: Any, config: FusedConfig) -> Any:
    """The configuration, without any address; to be copied."""
    params = module.LossParams()
    params.classes = config.channels[0]
    params.binary = config.mode == "binary"
    params.ignore_index = config.ignore_index
    params.label_smoothing = config.label_smoothing
    params.weight_rows = config.weight_rows
    params.soft_tolerance = config.tolerance
    params.tap = TAPS.index(config.tap)
    params.distance = DISTANCES.index(config.distance)
    shapes = zip(config.channels, config.channels[1:], config.sizes, strict=False)
    for (before, out, size), w, s in zip(shapes, config.layer_weights, config.layer_scales, strict=True):
        inverse = 1 / (out * s)
        params.add_layer(out, before, size, inverse, w * inverse)
    return params
