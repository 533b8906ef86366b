"""What a trained proxy is worth: its edge F1 on masks, and the scale of each layer's distance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..backends import distance_maps, not_ignored
from ..options import DISTANCES
from ..spec import LossSpec
from .edges import edge_labels
from .network import EdgeProxy

CORRUPTION = 0.25
_SCALE_MASKS = 32  # enough for two digits, and seconds for masks of a megapixel


@torch.no_grad()
def edge_quality(
    proxy: EdgeProxy, masks: Tensor | Dataset[Any], *, radius: int = 1, ignore_index: int = -100
) -> dict[str, float | int]:
    """Precision, recall and F1 of the edge class over all valid pixels of `masks` ([M,H,W], or a Dataset).

    The proxy sees what the loss shows it of ground truth: the clean one-hot map, zero at void pixels.
    A pixel is predicted as edge where the last of the edge classes has the largest logit.
    """
    hits = wrong = missed = pixels = 0
    for labels in _each(masks):
        valid = not_ignored(labels, ignore_index)
        truth = edge_labels(labels, radius=radius, ignore_index=ignore_index)
        with torch.autocast(labels.device.type, enabled=False):
            logits = proxy.edge_logits(one_hot(labels, valid, proxy.num_classes))
        found = (logits.argmax(dim=1) == proxy.edge_classes - 1) & valid
        hits += int((found & truth).sum())
        wrong += int((found & ~truth).sum())
        missed += int((truth & ~found).sum())
        pixels += int(valid.sum())
    return {
        "edge_f1": 2 * hits / max(1, 2 * hits + wrong + missed),
        "edge_precision": hits / max(1, hits + wrong),
        "edge_recall": hits / max(1, hits + missed),
        "edge_share": (hits + missed) / max(1, pixels),
        "masks": len(masks),  # type: ignore[arg-type]
        "pixels": pixels,
    }


@torch.no_grad()
def measure_scales(
    proxy: EdgeProxy, masks: Tensor | Dataset[Any], *, ignore_index: int = -100
) -> dict[str, tuple[float, ...]]:
    """s_l of every layer and distance: the mean distance between ground truth and a standard corruption of it.

    In the corruption, a quarter of each pixel's probability goes to the label that the mask, rotated by 180
    degrees, holds there (to its own where that one is void). Divided by s_l, a layer's distance is 1 there,
    so a lambda means the same for every proxy.
    """
    count = min(len(masks), _SCALE_MASKS)  # type: ignore[arg-type]
    sums = {distance: torch.zeros(proxy.num_layers, dtype=torch.float64) for distance in DISTANCES}
    pixels = 0
    for number, labels in enumerate(_each(masks)):
        if number == count:
            break
        valid = not_ignored(labels, ignore_index)
        q = one_hot(labels, valid, proxy.num_classes)
        p = corrupted(labels, valid, q)
        pixels += int(valid.sum())
        for distance in DISTANCES:
            with torch.autocast(labels.device.type, enabled=False):
                maps = distance_maps(p, q, valid, proxy.weights, proxy.biases, _plain_spec(proxy, distance))
            sums[distance] += torch.stack([m.double().sum() for m in maps])
    # A distance of 0 (masks of one class) measures nothing; 1 leaves the layer as it is.
    return {
        distance: tuple(float(s) / pixels if s > 0 else 1.0 for s in total.tolist()) for distance, total in sums.items()
    }


def corrupted(labels: Tensor, valid: Tensor, q: Tensor) -> Tensor:
    """The standard corruption of the one-hot map q [N,C,H,W] of labels [N,H,W]."""
    other, other_valid = labels.flip(1, 2), valid.flip(1, 2)
    other = torch.where(other_valid, other, labels)
    return (1 - CORRUPTION) * q + CORRUPTION * one_hot(other, valid, q.shape[1])


def one_hot(labels: Tensor, valid: Tensor, num_classes: int) -> Tensor:
    """The one-hot map of labels [N,H,W] as fp32 [N,C,H,W], zero where not valid."""
    n, h, w = labels.shape
    result = torch.zeros((n, num_classes, h, w), dtype=torch.float32, device=labels.device)
    index = torch.where(valid, labels.long(), 0).unsqueeze(1)
    return result.scatter_(1, index, valid.unsqueeze(1).to(result.dtype))


def _each(masks: Tensor | Dataset[Any]) -> Iterator[Tensor]:
    """One mask after the other, as [1,H,W]: they may differ in size."""
    for index in range(len(masks)):  # type: ignore[arg-type]
        yield torch.as_tensor(masks[index]).unsqueeze(0)


def _plain_spec(proxy: EdgeProxy, distance: str) -> LossSpec:
    return LossSpec(
        layer_weights=(1.0,) * proxy.num_layers,
        layer_scales=(1.0,) * proxy.num_layers,
        strides=tuple(layer.stride for layer in proxy.layers),
        dilations=tuple(layer.dilation for layer in proxy.layers),
        pools=tuple(layer.pool for layer in proxy.layers),
        tap=proxy.tap,
        distance=distance,
    )
