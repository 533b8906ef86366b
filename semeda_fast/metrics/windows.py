"""What lies near each pixel of a label map: maxima over squares and disks, by shifts of whole images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def near_other_label(labels: Tensor, valid: Tensor, distance: int, window_max: Callable[..., Tensor]) -> Tensor:
    """Bool [N,H,W]: a valid pixel of another label lies within `distance`; meaningful at valid pixels only.

    All classes at once: a window holds another label than its centre exactly if its smallest or its largest
    valid label is not the centre's.
    """
    small = labels.to(torch.int32)
    lowest = torch.iinfo(torch.int32).min
    largest = window_max(small.masked_fill(~valid, lowest), distance, lowest)
    smallest = -window_max((-small).masked_fill(~valid, lowest), distance, lowest)
    return (largest != small) | (smallest != small)


def square_max(x: Tensor, distance: int, empty: int) -> Tensor:
    """Maximum of the pixels of x [N,H,W] within Chebyshev distance; `empty` outside the image."""
    return _line(_line(x, distance, -1, empty, torch.maximum), distance, -2, empty, torch.maximum)


def disk_max(x: Tensor, distance: float, empty: int) -> Tensor:
    """Maximum of the pixels of x [N,H,W] within Euclidean distance; `empty` outside the image."""
    return disk(x, distance, empty, torch.maximum)


def disk(x: Tensor, distance: float, empty: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine the pixels of x [N,H,W] within Euclidean distance: a disk is one horizontal line per row."""
    height = x.shape[-2]
    square = math.floor(distance * distance + 1e-9)  # so that sqrt(13) reaches the pixel (2, 3)
    out = _line(x, math.isqrt(square), -1, empty, combine)
    for dy in range(1, min(math.isqrt(square), height - 1) + 1):
        line = _line(x, math.isqrt(square - dy * dy), -1, empty, combine)
        out[..., dy:, :] = combine(out[..., dy:, :], line[..., : height - dy, :])
        out[..., : height - dy, :] = combine(out[..., : height - dy, :], line[..., dy:, :])
    return out


def _line(x: Tensor, half: int, dim: int, empty: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine (idempotently) the 2 * half + 1 pixels around each along `dim`, in about log2(half) steps."""
    size = x.shape[dim]
    half = min(half, size - 1)  # beyond that the window holds nothing new
    pad = (half, half) if dim == -1 else (0, 0, half, half)
    x = torch.nn.functional.pad(x, pad, value=empty)
    length, reach = 2 * half + 1, 1
    while reach < length:  # x[i] combines the padded pixels i .. i + reach - 1
        step = min(reach, length - reach)
        x = combine(x.narrow(dim, 0, x.shape[dim] - step), x.narrow(dim, step, x.shape[dim] - step))
        reach += step
    return x
