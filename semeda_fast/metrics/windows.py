"""What lies near each pixel of a label map: maxima over boxes and balls, by shifts of whole images or volumes.

"Pixel" is a voxel in volumes. Every x is [N, *space] with one, two or three dimensions of space.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_SLACK = 1 + 1e-9  # so that sqrt(13) reaches the pixel (2, 3), and 1.4 two pixels of 0.7


def near_other_label(labels: Tensor, valid: Tensor, window_max: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Bool [N, *space]: a valid pixel of another label lies in the window; meaningful at valid pixels only.

    All classes at once: a window holds another label than its centre exactly if its smallest or its largest
    valid label is not the centre's. `window_max(x, empty)` gives each window's maximum, where `empty` is below
    all of x.
    """
    small = labels.to(torch.int32)
    lowest = torch.iinfo(torch.int32).min
    largest = window_max(small.masked_fill(~valid, lowest), lowest)
    smallest = -window_max((-small).masked_fill(~valid, lowest), lowest)
    return (largest != small) | (smallest != small)


def box_max(distance: int) -> Callable[[Tensor, int], Tensor]:
    """The maximum of the pixels within Chebyshev distance (a square, or a cube); `empty` outside the image."""

    def window_max(x: Tensor, empty: int) -> Tensor:
        for dim in range(1 - x.dim(), 0):
            x = _line(x, distance, dim, empty, torch.maximum)
        return x

    return window_max


def ball_max(distance: float, spacing: Sequence[float] | None = None) -> Callable[[Tensor, int], Tensor]:
    """The maximum of the pixels within Euclidean distance, in the unit of `spacing`; the image alone is looked at."""
    return lambda x, empty: ball(x, distance, spacing, torch.maximum)


def steps_within(distance: float, spacing: float) -> int:
    """Pixels that lie within a distance along one axis."""
    return math.floor(distance * _SLACK / spacing)


def ball(x: Tensor, distance: float, spacing: Sequence[float] | None, combine: Callable[..., Tensor]) -> Tensor:
    """Combine (idempotently) the pixels of x [N, *space] within Euclidean distance; spacing per axis, or ones.

    A ball is a bundle of lines along the last axis. They are taken from the shortest to the longest, so one line
    that grows serves all, and beside x and the result nothing is kept. Which pixels a ball holds is found in
    Python's float64, so every device agrees.
    """
    space = x.shape[1:]
    *cross, along = spacing or [1.0] * len(space)
    reach = [min(steps_within(distance, s), n - 1) for s, n in zip(cross, space, strict=False)]
    bundle: dict[int, list[tuple[int, ...]]] = {}
    for offset in itertools.product(*(range(-r, r + 1) for r in reach)):
        rest = distance * distance * _SLACK - sum((k * s) ** 2 for k, s in zip(offset, cross, strict=True))
        if rest >= 0:
            half = min(steps_within(math.sqrt(rest), along), space[-1] - 1)
            bundle.setdefault(half, []).append(offset)
    out, line = x.clone(), x.clone()
    for half in range(max(bundle, default=-1) + 1):
        if half > 0:
            _merge(line, x, (0,) * len(cross) + (half,), combine)
            _merge(line, x, (0,) * len(cross) + (-half,), combine)
        for offset in bundle.get(half, ()):
            _merge(out, line, (*offset, 0), combine)
    return out


def _merge(out: Tensor, x: Tensor, offset: Sequence[int], combine: Callable[..., Tensor]) -> None:
    """out[p] = combine(out[p], x[p + offset]) where both lie in the image."""
    here: list[Any] = [slice(None)]
    there: list[Any] = [slice(None)]
    for k, n in zip(offset, x.shape[1:], strict=True):
        here.append(slice(max(0, -k), n - max(0, k)))
        there.append(slice(max(0, k), n - max(0, -k)))
    target = out[tuple(here)]
    combine(target, x[tuple(there)], out=target)


def _line(x: Tensor, half: int, dim: int, empty: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine (idempotently) the 2 * half + 1 pixels around each along `dim`, in about log2(half) steps."""
    size = x.shape[dim]
    half = min(half, size - 1)  # beyond that the window holds nothing new
    x = torch.nn.functional.pad(x, (0, 0) * (-dim - 1) + (half, half), value=empty)
    length, reach = 2 * half + 1, 1
    while reach < length:  # x[i] combines the padded pixels i .. i + reach - 1
        step = min(reach, length - reach)
        x = combine(x.narrow(dim, 0, x.shape[dim] - step), x.narrow(dim, step, x.shape[dim] - step))
        reach += step
    return x
