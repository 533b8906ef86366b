"""A proxy as plain data: what its file holds, what conversion gives, and what EdgeProxy is built of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..checks import check_layer_weights
from ..options import DISTANCES
from ..plain import whole_number
from ..spec import TAPS


@dataclass(frozen=True)
class ProxyLayer:
    """One convolution, with what stands in front of it. Followed by a ReLU (the last layer's only as a tap).

    Attributes:
        in_channels, out_channels: K_{l-1} and K_l.
        kernel_size: odd; the padding is dilation * (kernel_size // 2) zeros on every side ("same").
        stride, dilation: of the convolution.
        pool: in front of the convolution: 0 none, k > 1 max-pooling with window and stride k, k < -1
            average-pooling with window and stride -k.
    """

    in_channels: int
    out_channels: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    pool: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, whole_number(name, value))
        if self.in_channels < 1 or self.out_channels < 1:
            raise ValueError(f"a layer needs at least 1 channel, got {self.in_channels} -> {self.out_channels}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {self.kernel_size}")
        if self.stride < 1 or self.dilation < 1:
            raise ValueError(f"stride and dilation must be at least 1, got {self.stride} and {self.dilation}")
        if self.pool in (1, -1):
            raise ValueError(f"pool must be 0 (none), above 1 (max) or below -1 (average), got {self.pool}")


@dataclass(frozen=True)
class ProxyRecord:
    """Everything that defines a proxy; checked and, the tensors, copied as fp32 on creation.

    Attributes:
        layers: one ProxyLayer a convolution.
        weights: [K_l, K_{l-1}, k, k] each. biases: [K_l] each.
        tap: "pre" compares features before the ReLU, "post" after it.
        distance: "l1", "l2" or "smooth_l1".
        layer_weights: w_l, one a layer; None: all 1.
        scales: distance -> s_l of each layer.
        provenance: how it was made. quality: what it reached.

    Raises:
        ValueError: shapes that do not fit the layers, or values that are not finite.
    """

    layers: Sequence[ProxyLayer]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    tap: str = "pre"
    distance: str = "l1"
    layer_weights: Sequence[float] | None = None
    scales: Mapping[str, Sequence[float]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = tuple(self.layers)
        _check_choice("tap", self.tap, TAPS)
        _check_choice("distance", self.distance, DISTANCES)
        if not layers:
            raise ValueError("a proxy needs at least one layer")
        for number, layer in enumerate(layers[1:], start=1):
            if layer.in_channels != layers[number - 1].out_channels:
                raise ValueError(
                    f"layer {number} takes {layer.in_channels} channels, but layer {number - 1} gives "
                    f"{layers[number - 1].out_channels}"
                )
        weights, biases = [], []
        for number, (layer, weight, bias) in enumerate(zip(layers, self.weights, self.biases, strict=True)):
            shape = (layer.out_channels, layer.in_channels, layer.kernel_size, layer.kernel_size)
            if tuple(weight.shape) != shape or tuple(bias.shape) != shape[:1]:
                raise ValueError(
                    f"layer {number}: expected a weight of shape {shape} and a bias of {shape[:1]}, "
                    f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
                )
            weights.append(_frozen(number, weight))
            biases.append(_frozen(number, bias))
        checked = {
            "layers": layers,
            "weights": tuple(weights),
            "biases": tuple(biases),
            "layer_weights": check_layer_weights(self.layer_weights, len(layers)),
            "scales": {name: _positive(name, values, len(layers)) for name, values in self.scales.items()},
            "provenance": _plain(dict(self.provenance)),
            "quality": _plain(dict(self.quality)),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def slice_classes(self, num_classes: int) -> ProxyRecord:
        """The record of a proxy for the first `num_classes` classes: the first layer's columns are independent.

        Raises:
            ValueError: num_classes below 1 or above this proxy's.
        """
        num_classes, have = whole_number("num_classes", num_classes), self.layers[0].in_channels
        if not 1 <= num_classes <= have:
            raise ValueError(f"this proxy has {have} classes; cannot cut it to {num_classes}")
        return replace(
            self,
            layers=(replace(self.layers[0], in_channels=num_classes), *self.layers[1:]),
            weights=(self.weights[0][:, :num_classes], *self.weights[1:]),
            provenance={**self.provenance, "sliced_from_classes": have},
        )


def _frozen(number: int, value: Tensor) -> Tensor:
    value = value.detach().to(torch.float32).contiguous().clone()
    if not (value.is_meta or isinstance(value, FakeTensor)) and not torch.isfinite(value).all():
        raise ValueError(f"layer {number} holds weights that are not finite (as float32)")
    return value


def _plain(value: Any) -> Any:
    """Facts without classes of torch's or NumPy's, such as that of torch's version: a pickle would name them."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [_plain(item) for item in value]
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value


def _positive(name: str, values: Sequence[float], num_layers: int) -> tuple[float, ...]:
    scales = tuple(float(s) for s in values)
    if name not in DISTANCES or len(scales) != num_layers or not all(0 < s < float("inf") for s in scales):
        raise ValueError(f"scales must map a distance to {num_layers} positive numbers, got {name!r}: {scales}")
    return scales


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
