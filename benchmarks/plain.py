"""SEMEDA as a user would write it with torch.nn.functional: what runs under bf16 autocast.

The library switches autocast off inside the loss, so its reference cannot play this part. Here the
convolutions run in whatever dtype autocast gives them; softmax, distances' sums and cross-entropy are fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from semeda_fast import EdgeProxy

from .workloads import LAMBDA_CE, LAMBDA_SEMEDA

LossFunction = Callable[[Tensor, Tensor], Tensor]  # (logits [N,C,H,W], target [N,H,W]) -> loss []


def cross_entropy(ignore_index: int, mode: str) -> LossFunction:
    """torch's own cross-entropy, mean over valid pixels; half-precision logits go in as fp32, as under autocast."""

    def multiclass(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), target, ignore_index=ignore_index)

    def binary(logits: Tensor, target: Tensor) -> Tensor:
        valid = (target != ignore_index).float()
        positive = (target == 1).float()
        total = F.binary_cross_entropy_with_logits(logits.float().squeeze(1), positive, valid, reduction="sum")
        return total / valid.sum()

    return binary if mode == "binary" else multiclass


def plain_semeda(proxy: EdgeProxy, ignore_index: int, mode: str) -> LossFunction:
    """Cross-entropy plus SEMEDA ("pre" taps, L1) in a few lines of PyTorch.

    Raises:
        ValueError: a proxy with another tap, distance, stride or pooling, which these lines do not have.
    """
    plain = all((layer.stride, layer.dilation, layer.pool) == (1, 1, 0) for layer in proxy.layers)
    if proxy.tap != "pre" or proxy.distance != "l1" or not plain:
        raise ValueError("plain_semeda has taps before the ReLU, L1 and stride 1 only; give it such a proxy")
    weights, biases, scales = proxy.weights, proxy.biases, proxy.layer_scales("l1")
    layer_weights, num_classes = proxy.layer_weights, proxy.num_classes
    ce = cross_entropy(ignore_index, mode)

    def features(x: Tensor) -> list[Tensor]:
        taps = []
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            x = F.conv2d(torch.relu(x) if number else x, weight, bias, padding=weight.shape[-1] // 2)
            taps.append(x)
        return taps

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        valid = target != ignore_index
        keep = valid.unsqueeze(1)
        z = logits.float()
        if mode == "binary":
            z = torch.cat([torch.zeros_like(z), z], dim=1)
        p = torch.softmax(z, dim=1) * keep
        q = F.one_hot(torch.where(valid, target, 0), num_classes).permute(0, 3, 1, 2).to(p.dtype) * keep
        total = LAMBDA_CE * ce(logits, target)
        for a, b, w, s in zip(features(p), features(q), layer_weights, scales, strict=True):
            distance = ((a - b).abs() * keep).sum(dtype=torch.float32)
            total = total + LAMBDA_SEMEDA * w / (a.shape[1] * s) * distance / valid.sum()
        return total

    return loss


def under_autocast(function: LossFunction, device: str) -> LossFunction:
    """`function` under bf16 autocast, as in a training loop with mixed precision."""

    def wrapped(logits: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return function(logits, target)

    return wrapped
