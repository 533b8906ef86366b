"""The frozen description of one loss computation that every backend receives beside its tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

DISTANCES = ("l1", "l2", "smooth_l1")
TAPS = ("pre", "post")
MODES = ("multiclass", "binary")
REDUCTIONS = ("mean", "sum", "none")
EMPTY = ("zero", "nan")
UPSAMPLE = ("bilinear",)
VALIDATE = ("auto", "always", "never")


class LossSpec(NamedTuple):  # made in each call, and a frozen dataclass of twelve fields takes 4 us
    """What is computed, without the tensors. Strings are members of the tuples above.

    Attributes:
        layer_weights: w_l, one a layer.
        layer_scales: s_l, one a layer, by which its distance is divided.
        strides, dilations: of each layer's convolution.
        pools: the pooling in front of each layer's convolution: 0 none, k > 1 max-pooling with window
            and stride k, k < -1 average-pooling with window and stride -k.
        per_pixel: True asks for the terms as [N,H,W] maps, False for their sums over all pixels.
        upsample: the logits may be smaller than the target and are then scaled up, as `reference.upsampled` says.
    """

    layer_weights: tuple[float, ...]
    layer_scales: tuple[float, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pools: tuple[int, ...]
    tap: str = "pre"
    distance: str = "l1"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    mode: str = "multiclass"
    from_logits: bool = True
    per_pixel: bool = False
    upsample: bool = False


class LossTerms(NamedTuple):
    """What every backend returns; fp32, or fp64 for fp64 logits. Nothing is divided by a count yet."""

    ce: Tensor  # [] or [N,H,W]: cross-entropy summed over valid pixels, or its map (0 at void pixels)
    semeda: Tensor  # [] or [N,H,W]: sum_l w_l / (K_l s_l) * rho, summed over valid pixels, or its map
    per_layer: Tensor  # [L]: 1 / (K_l s_l) * rho summed over valid pixels, without w_l; carries no gradient
    ce_weight: Tensor  # []: what CE's mean is divided by: the sum of weight[y] over valid pixels
    valid_count: Tensor  # [] int64: V, the number of valid pixels
