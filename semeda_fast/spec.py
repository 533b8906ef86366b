"""The description of one loss computation that every backend receives beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from torch import Tensor

from .options import LossOptions

TAPS = ("pre", "post")


@dataclass(unsafe_hash=True)
class LossSpec(LossOptions):
    """What is computed, without the tensors: the options, and what the proxy adds to them.

    Attributes:
        layer_weights: w_l, one a layer.
        layer_scales: s_l, one a layer, by which its distance is divided.
        strides, dilations: of each layer's convolution.
        pools: the pooling in front of each layer's convolution: 0 none, k > 1 max-pooling with window
            and stride k, k < -1 average-pooling with window and stride -k.
        tap: features before ("pre") or after ("post") the ReLU are compared.
        weight_rows: of class weights: image i of the batch has row i % weight_rows.
        distance: the one chosen.
        upsample: where given, logits may be smaller than the target and are scaled up, as `reference.upsampled` says.
    """

    layer_weights: tuple[float, ...] = field()
    layer_scales: tuple[float, ...] = field()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pools: tuple[int, ...] = ()
    tap: str = "pre"
    weight_rows: int = 1
    distance: str = field(default="l1", kw_only=True)

    def arguments(self) -> tuple[Any, ...]:
        """The values of ARGUMENTS, as the operator takes them."""
        return tuple([getattr(self, name) for name in ARGUMENTS])


ARGUMENTS = tuple(each.name for each in fields(LossSpec))
_SCHEMA = {
    "tuple[float, ...]": "float[]",
    "tuple[int, ...]": "int[]",
    "str": "str",
    "str | None": "str?",
    "int": "int",
    "float": "float",
    "bool": "bool",
}


def schema() -> str:
    """ARGUMENTS as an operator's schema names them."""
    return ", ".join(f"{_SCHEMA[str(each.type)]} {each.name}" for each in fields(LossSpec))


class LossTerms(NamedTuple):
    """What every backend returns; fp32, or fp64 for fp64 logits. Nothing is divided by a count yet."""

    ce: Tensor  # [] or [N,H,W]: cross-entropy summed over valid pixels, or its map (0 at void pixels)
    semeda: Tensor  # [] or [N,H,W]: sum_l w_l / (K_l s_l) * rho, summed over valid pixels, or its map
    per_layer: Tensor  # [L]: 1 / (K_l s_l) * rho summed over valid pixels, without w_l; carries no gradient
    ce_weight: Tensor  # []: what CE's mean is divided by: the sum of weight[y] over valid pixels
    valid_count: Tensor  # [] int64: V, the number of valid pixels
