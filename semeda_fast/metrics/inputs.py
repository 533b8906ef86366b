"""What the metrics take: each error says what was expected, what came and what to do."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

_INT64 = torch.iinfo(torch.int64)


def class_count(value: Any) -> int:
    """`num_classes` as an int, from a Python or NumPy integer."""
    if not _is_integral(value) or value < 2:
        raise ValueError(
            f"num_classes must be an integer of at least 2, got {value!r}; "
            "for binary masks use num_classes=2 and pass labels, (logits > 0).long()"
        )
    return int(value)


def void_label(value: Any) -> int:
    """`ignore_index` as an int that labels can hold; None means -100, which no label is."""
    if value is None:
        return -100
    if not _is_integral(value):
        raise ValueError(f"ignore_index must be an integer or None (for -100), got {value!r}")
    if not _INT64.min <= value <= _INT64.max:
        raise ValueError(f"ignore_index must fit in 64 bits, as labels do, got {value!r}")
    return int(value)


def width_in_pixels(value: Any, part: str | None = None) -> int:
    """`width` as an int of at least 1; `part` names the option for a part of the diagonal, where there is one."""
    if not _is_integral(value) or value < 1:
        hint = f"; for a part of the image diagonal pass {part}={value}" if part and _is_part(value) else ""
        raise ValueError(f"width must be an integer number of pixels of at least 1, got {value!r}{hint}")
    return int(value)


def tolerance_in_pixels(value: Any) -> float:
    """`tolerance` as a float: 0 or at least 1."""
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"tolerance must be a finite number of pixels of at least 0, got {value!r}")
    if _is_part(value):
        raise ValueError(
            f"tolerance is in pixels, and {value} would reach no neighbour; "
            f"for a part of the image diagonal pass tolerance_ratio={value}, for the exact pixel tolerance=0"
        )
    return float(value)


def part_of_diagonal(name: str, value: Any, pixels: str) -> float:
    """A length as a part of the image diagonal, as a float; `pixels` names the option that takes pixels."""
    if not _is_part(value):
        whole = _is_number(value) and 1 <= value < math.inf
        hint = f"; for pixels pass {pixels}={value}" if whole else ""
        raise ValueError(f"{name} must be positive and below 1, a part of the image diagonal, got {value!r}{hint}")
    return float(value)


def _is_integral(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_part(value: Any) -> bool:
    return _is_number(value) and 0 < value < 1


def choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """One of the names listed."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_tensors(preds: Tensor, target: Tensor, num_classes: int) -> None:
    """Ranks, shapes, dtypes and devices; reads no data."""
    for name, value in (("preds", preds), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if target.dim() != 3:
        hint = "; add the batch dimension with target.unsqueeze(0)" if target.dim() == 2 else ""
        if target.dim() == 4 and target.shape[1] == 1:
            hint = "; drop the channel with target.squeeze(1)"
        raise ValueError(f"target must be labels [N,H,W], got shape {tuple(target.shape)}{hint}")
    if not _is_integer(target):
        raise TypeError(f"target must have an integer dtype, got {target.dtype}")
    if preds.dim() == 4:
        if not preds.is_floating_point():
            hint = ", preds.squeeze(1)" if preds.shape[1] == 1 else ""
            raise TypeError(
                f"preds [N,C,H,W] must be floating-point logits, got {preds.dtype}; pass labels as [N,H,W]{hint}"
            )
        if preds.shape[1] != num_classes:
            binary = "; for one channel of a binary network pass labels, (preds[:, 0] > 0).long()"
            raise ValueError(
                f"preds [N,C,H,W] must have C = num_classes = {num_classes} channels, got shape {tuple(preds.shape)}"
                f"{binary if preds.shape[1] == 1 and num_classes == 2 else ''}"
            )
    elif preds.dim() != 3:
        raise ValueError(f"preds must be labels [N,H,W] or logits [N,C,H,W], got shape {tuple(preds.shape)}")
    elif not _is_integer(preds):
        raise TypeError(
            f"preds [N,H,W] must be labels of an integer dtype, got {preds.dtype}; pass logits as [N,C,H,W]"
        )
    if (preds.shape[0], *preds.shape[-2:]) != tuple(target.shape):
        raise ValueError(
            f"preds and target must agree in N, H and W, got {tuple(preds.shape)} and {tuple(target.shape)}; "
            "resize smaller logits first: "
            "torch.nn.functional.interpolate(logits, target.shape[-2:], mode='bilinear')"
        )
    if preds.device != target.device:
        raise ValueError(f"preds and target must be on one device, got {preds.device} and {target.device}")


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def to_int64(labels: Tensor) -> Tensor:
    """Labels of any integer dtype; those of uint64 beyond int64 become its largest value instead of wrapping."""
    wide = labels.to(torch.int64)
    return wide.where(wide >= 0, _INT64.max) if labels.dtype == torch.uint64 else wide


def bad_labels(name: str, labels: list[Tensor], num_classes: int, ignore_index: int) -> ValueError:
    """The error for the labels (int64) of valid pixels, image by image, of which some are no class."""
    found = sorted({label for image in labels for label in image.unique().tolist()})
    count = sum(int(((image < 0) | (image >= num_classes)).sum()) for image in labels)
    hint = ""
    if found == [0, 255] or (found == [255] and num_classes == 2):
        hint = "; a binary mask of 0 and 255? then pass mask // 255"
    elif found[-1] == 255 and name == "target":
        hint = "; does 255 mark void here? then pass ignore_index=255"
    void = f" or ignore_index={ignore_index}" if name == "target" else ""
    return ValueError(
        f"{name} must hold labels from 0 to {num_classes - 1}{void}; "
        f"found values from {found[0]} to {found[-1]}, {count} of them out of range{hint}"
    )
