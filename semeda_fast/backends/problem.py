"""One computation as plain data: what travels between the loss, its operators and its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..checks import check_layer_weights
from ..options import LossOptions
from ..spec import LossSpec
from .config import FusedConfig


def images(logits: Tensor) -> int:
    """How many images there are in [N,C,H,W], or in groups, [A,B,C,H,W]."""
    return logits.shape[0] if logits.dim() == 4 else logits.shape[0] * logits.shape[1]


class Problem(NamedTuple):
    """What both directions receive.

    Images that no single stride leads through, such as slices of several volumes, come in groups to a backend that
    `folds`: logits [A,B,C,H,W], target and valid with A and B in the place of N.
    """

    logits: Tensor  # of the target's size, or smaller for a backend that scales them up
    target: Tensor
    valid: Tensor | None
    class_weight: Tensor | None
    flat: Tensor  # the proxy's weights, then its biases, each layer's flattened, fp32
    config: FusedConfig

    def without_groups(self) -> Problem:
        """The same images in one batch; copied where they come in groups."""
        if self.logits.dim() == 4:
            return self
        valid = None if self.valid is None else self.valid.flatten(0, 1)
        return self._replace(logits=self.logits.flatten(0, 1), target=self.target.flatten(0, 1), valid=valid)


class Outputs(NamedTuple):
    """What forward returns; the first five as in LossTerms."""

    ce: Tensor
    semeda: Tensor
    per_layer: Tensor
    ce_weight: Tensor
    valid_count: Tensor
    codes: Tensor  # for backward alone, and empty where no gradient will be asked for
    saved_d: Tensor

    def take(self, terms: Tensor, counts: Tensor) -> None:
        """Copy what kernels wrote, without waiting: terms [3 + L] fp32, counts [2] int64; maps are there already."""
        if not self.ce.dim():
            self.ce.copy_(terms[0])
            self.semeda.copy_(terms[1])
        self.ce_weight.copy_(terms[2])
        self.per_layer.copy_(terms[3:])
        self.valid_count.copy_(counts[0])


class Saved(NamedTuple):
    """Shapes and dtype of what is kept for backward."""

    codes: tuple[Any, ...]  # uint8
    saved_d: tuple[Any, ...]
    dtype: torch.dtype  # of saved_d


class Inputs(NamedTuple):
    """The tensors of a call."""

    logits: Tensor
    target: Tensor
    valid: Tensor | None
    class_weight: Tensor | None


class Prepared(Protocol):
    """What a backend makes of one kind of call: of inputs of these shapes, strides and dtypes, and of one proxy.

    It holds no inputs. The proxy's tensors lie where they lay, but may hold other values in each call.
    """

    def forward(
        self, inputs: Inputs, lambda_ce: float, lambda_semeda: float, save: bool
    ) -> tuple[Tensor, Tensor | None, Any]:
        """The loss [], what is kept for backward where `save` says so, and a record of this call."""

    def backward(self, inputs: Inputs, kept: Tensor, record: Any, d_loss: Tensor) -> Tensor:
        """The gradient of the logits; d_loss: [] of the loss's dtype."""

    def watched_backward(self, inputs: Inputs, kept: Tensor, record: Any, d_loss: Tensor) -> Tensor:
        """The same by an operator, for whoever watches these, or asks for what only they can say."""


class Network(Protocol):
    """What a call reads of a proxy.

    Attributes:
        layers: one record a layer, with stride, dilation and pool.
        weights, biases: [K_l, K_{l-1}, k, k] and [K_l] each.
        layer_weights: w_l.
        lost: whether the values are gone.
    """

    tap: str
    layer_weights: tuple[float, ...]
    lost: bool
    _buffers: Any

    @property
    def layers(self) -> Sequence[Any]: ...

    @property
    def weights(self) -> list[Tensor]: ...

    @property
    def biases(self) -> list[Tensor]: ...

    def layer_scales(self, distance: str) -> tuple[float, ...]:
        """s_l for this distance."""


def spec_of(proxy: Network, options: LossOptions) -> LossSpec:
    """What the options ask for on this proxy.

    Raises:
        ValueError, TypeError: layer_weights that are not one finite number >= 0 a layer.
    """
    layers, given = proxy.layers, options.layer_weights
    return LossSpec(
        **{
            **vars(options),
            "layer_weights": proxy.layer_weights if given is None else check_layer_weights(given, len(layers)),
            "label_smoothing": float(options.label_smoothing),
        },
        layer_scales=proxy.layer_scales(options.distance),
        strides=tuple([layer.stride for layer in layers]),
        dilations=tuple([layer.dilation for layer in layers]),
        pools=tuple([layer.pool for layer in layers]),
        tap=proxy.tap,
    )
