"""EdgeProxy: the frozen network whose features the loss compares."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backends import features, why_not_fused
from ..plain import whole_number
from .convert import from_sequential
from .record import ProxyLayer, ProxyRecord
from .storage import bundled_record, load_record, save_record


class Float32Buffers(nn.Module):
    """A module whose floating-point buffers follow a move to a device but keep their dtype and their values.

    Attributes:
        lost: whether the values are gone, since they were on the meta device before `to_empty`.
    """

    lost = False
    _made_anew: ClassVar[tuple[str, ...]] = ()  # attributes that calls leave behind, and no copy or pickle holds

    def __getstate__(self) -> dict[str, Any]:
        return self._lasting(super().__getstate__())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(self._lasting(state))  # pickles of before held what is made anew

    def _lasting(self, state: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in state.items() if name not in self._made_anew}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        originals = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, original in originals.items():
            moved = self._buffers[name]
            if moved is None or moved is original:
                continue
            if original.is_meta and not moved.is_meta:
                self.lost = True
            elif moved.dtype != original.dtype:
                # From the original: casting the cast tensor back would keep its rounding.
                self._buffers[name] = original.to(device=moved.device)
            elif not moved.is_meta:
                with torch.no_grad():
                    moved.copy_(original)  # to_empty gave fresh memory, and no checkpoint holds these values
        return self


class EdgeProxy(Float32Buffers):
    """A stack of convolutions with ReLU between, trained to detect semantic edges, then frozen.

    The weights are non-persistent fp32 buffers: no optimizer finds them, no checkpoint stores them,
    `.half()` and `.to(dtype)` leave them alone, `.to(device)` moves them.

    Args:
        num_classes: C, the channels of the probability map that goes in.
        widths: channels of the hidden layers.
        edge_classes: channels of the last layer (2: no edge, edge).
        kernel_size: odd.
        tap: "pre" compares features before the ReLU, "post" after it.
        distance: "l1", "l2" or "smooth_l1", the loss's default with this proxy.
        layer_weights: w_l, one a layer, default all 1.
        seed: of the random initial weights. An untrained proxy is a valid but poor one: train it with
            `train_proxy`, load one with `EdgeProxy.load`, or take `EdgeProxy.bundled(num_classes)`.

    Attributes:
        layers: tuple of ProxyLayer.
        scales: distance -> s_l of each layer, measured by `train_proxy`; empty means 1.
        provenance: how it was made. quality: what it reached, e.g. "edge_f1".

    Raises:
        ValueError: arguments outside the ranges above.
    """

    _made_anew = ("_calls",)  # of backends/prepared.py

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int] = (16, 32),
        *,
        edge_classes: int = 2,
        kernel_size: int = 3,
        tap: str = "pre",
        distance: str = "l1",
        layer_weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        named = [("num_classes", num_classes), *(("a width", w) for w in widths), ("edge_classes", edge_classes)]
        channels = [whole_number(name, value) for name, value in named]
        layers = [ProxyLayer(a, b, kernel_size) for a, b in itertools.pairwise(channels)]
        generator = torch.Generator().manual_seed(seed)
        weights = [_initial_weight(layer, number == 0, generator) for number, layer in enumerate(layers)]
        biases = [torch.zeros(layer.out_channels, dtype=torch.float32) for layer in layers]
        super().__init__()
        self._fill(ProxyRecord(layers, weights, biases, tap, distance, layer_weights, {}, {"trained": False}))

    layers: tuple[ProxyLayer, ...]

    def _fill(self, record: ProxyRecord) -> None:
        self.layers = tuple(record.layers)
        self.tap = record.tap
        self.distance = record.distance
        self.layer_weights: tuple[float, ...] = tuple(record.layer_weights or ())
        self.scales: dict[str, tuple[float, ...]] = {name: tuple(values) for name, values in record.scales.items()}
        self.provenance = dict(record.provenance)
        self.quality = dict(record.quality)
        for number, (weight, bias) in enumerate(zip(record.weights, record.biases, strict=True)):
            self.register_buffer(f"weight{number}", weight, persistent=False)
            self.register_buffer(f"bias{number}", bias, persistent=False)

    @classmethod
    def from_record(cls, record: ProxyRecord) -> EdgeProxy:
        """The network of a record, whose tensors it takes."""
        proxy = cls.__new__(cls)
        nn.Module.__init__(proxy)
        proxy._fill(record)
        return proxy

    def record(self) -> ProxyRecord:
        """This proxy as plain data, with copies of its tensors."""
        return ProxyRecord(
            self.layers,
            self.weights,
            self.biases,
            self.tap,
            self.distance,
            self.layer_weights,
            self.scales,
            self.provenance,
            self.quality,
        )

    @classmethod
    def from_tensors(
        cls,
        layers: Sequence[ProxyLayer],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        *,
        tap: str = "pre",
        distance: str = "l1",
        layer_weights: Sequence[float] | None = None,
        scales: Mapping[str, Sequence[float]] | None = None,
        provenance: Mapping[str, Any] | None = None,
        quality: Mapping[str, Any] | None = None,
    ) -> EdgeProxy:
        """A proxy of these weights ([K_l, K_{l-1}, k, k]) and biases ([K_l]); they are copied as fp32.

        Raises:
            ValueError: shapes that do not fit the layers, or values that are not finite.
        """
        facts = scales or {}, provenance or {}, quality or {}
        return cls.from_record(ProxyRecord(layers, weights, biases, tap, distance, layer_weights, *facts))

    @property
    def num_classes(self) -> int:
        """C, the channels of the map that goes in."""
        return self.layers[0].in_channels

    @property
    def edge_classes(self) -> int:
        """Channels of the last layer."""
        return self.layers[-1].out_channels

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the hidden layers."""
        return tuple(layer.out_channels for layer in self.layers[:-1])

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def receptive_field(self) -> int:
        """Side of the square of input pixels that one value of the last layer sees, in pixels."""
        field, step = 1, 1
        for layer in self.layers:
            window = max(1, abs(layer.pool))
            field += (window - 1) * step
            step *= window
            field += (layer.kernel_size - 1) * layer.dilation * step
            step *= layer.stride
        return field

    @property
    def weights(self) -> list[Tensor]:
        """The convolution weights, [K_l, K_{l-1}, k, k] each, fp32."""
        return [self._buffers[f"weight{i}"] for i in range(len(self.layers))]  # type: ignore[misc]

    @property
    def biases(self) -> list[Tensor]:
        """The biases, [K_l] each, fp32."""
        return [self._buffers[f"bias{i}"] for i in range(len(self.layers))]  # type: ignore[misc]

    def layer_scales(self, distance: str) -> tuple[float, ...]:
        """s_l for this distance; 1 where none was measured."""
        return self.scales.get(distance, (1.0,) * len(self.layers))

    def features(self, probs: Tensor) -> list[Tensor]:
        """phi_l of every layer.

        Args:
            probs: [N,C,H,W] float, a probability map; void pixels are the zero vector.

        Returns:
            one tensor [N,K_l,H,W] a layer (smaller in H and W behind a stride or a pooling).

        Raises:
            ValueError: another rank or number of channels.
        """
        self._check_input(probs)
        return features(probs, self.weights, self.biases, *self._geometry(), self.tap)

    def edge_logits(self, probs: Tensor) -> Tensor:
        """The last layer before any ReLU, [N,edge_classes,H,W]: softmax over dim 1 gives edge probabilities."""
        self._check_input(probs)
        return features(probs, self.weights, self.biases, *self._geometry(), "pre")[-1]

    def forward(self, probs: Tensor) -> Tensor:
        """Same as `edge_logits`."""
        return self.edge_logits(probs)

    def slice_classes(self, num_classes: int) -> EdgeProxy:
        """A proxy for the first `num_classes` classes: the first layer's columns are independent.

        Raises:
            ValueError: num_classes below 1 or above this proxy's.
        """
        return EdgeProxy.from_record(self.record().slice_classes(num_classes))

    def annotated(
        self,
        *,
        scales: Mapping[str, Sequence[float]] | None = None,
        provenance: Mapping[str, Any] | None = None,
        quality: Mapping[str, Any] | None = None,
    ) -> EdgeProxy:
        """A copy with other facts in the place of those given."""
        given = {"scales": scales, "provenance": provenance, "quality": quality}
        facts: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return EdgeProxy.from_record(replace(self.record(), **facts))

    @classmethod
    def from_sequential(cls, network: nn.Sequential, tap: str = "pre", **options: Any) -> EdgeProxy:
        """A proxy of an `nn.Sequential` trained elsewhere; see `proxy.convert.from_sequential`."""
        return cls.from_record(from_sequential(network, tap=tap, **options))

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a safetensors file that holds the weights and everything that defines a result."""
        save_record(self.record(), path, overwrite=overwrite)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> EdgeProxy:
        """Read what `save` wrote. Raises ProxyFileError naming the file, FileNotFoundError."""
        return EdgeProxy.from_record(load_record(path))

    @staticmethod
    def bundled(num_classes: int) -> EdgeProxy:
        """The universal proxy that comes with the package, cut to `num_classes` (1 to 256) classes."""
        return EdgeProxy.from_record(bundled_record(num_classes))

    def why_not_fused(self) -> str | None:
        """Why the fused kernels cannot run this network, or None if they can."""
        return why_not_fused(self.weights, *self._geometry())

    def _geometry(self) -> tuple[list[int], list[int], list[int]]:
        return (
            [layer.stride for layer in self.layers],
            [layer.dilation for layer in self.layers],
            [layer.pool for layer in self.layers],
        )

    def _check_input(self, probs: Tensor) -> None:
        if probs.dim() != 4 or probs.shape[1] != self.num_classes:
            raise ValueError(
                f"this proxy takes probabilities of shape [N,{self.num_classes},H,W], got {list(probs.shape)}"
            )

    def extra_repr(self) -> str:
        chain = " -> ".join(str(c) for c in (self.num_classes, *self.widths, self.edge_classes))
        return f"{chain}, tap={self.tap!r}, distance={self.distance!r}, layer_weights={self.layer_weights}"


def _initial_weight(layer: ProxyLayer, first: bool, generator: torch.Generator) -> Tensor:
    """He initialisation; the first layer sees a one-hot map, where one channel a pixel is on, not all.

    Its kernels sum to zero, so that the inside of every class gives no response from the start: without
    that, a network with hundreds of classes has to learn it for each of them.
    """
    shape = (layer.out_channels, layer.in_channels, layer.kernel_size, layer.kernel_size)
    fan_in = layer.kernel_size**2 * (1 if first else layer.in_channels)
    weight = torch.randn(shape, generator=generator, dtype=torch.float32) * (2.0 / fan_in) ** 0.5
    return weight - weight.mean(dim=(2, 3), keepdim=True) if first and layer.kernel_size > 1 else weight
