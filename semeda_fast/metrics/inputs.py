"""What the metrics take: each error says what was expected, what came and what to do."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

_INT64 = torch.iinfo(torch.int64)


def class_count(value: Any, mode: str) -> int:
    """`num_classes` as an int, from a Python or NumPy integer."""
    if mode == "multilabel":
        if not _is_integral(value) or value < 1:
            raise ValueError(f"num_classes, the number of planes, must be an integer of at least 1, got {value!r}")
        return int(value)
    if not _is_integral(value) or value < 2:
        raise ValueError(
            f"num_classes must be an integer of at least 2, got {value!r}; "
            "for binary masks use num_classes=2 and pass labels, (logits > 0).long(), or mode='multilabel'"
        )
    return int(value)


def void_label(value: Any, mode: str) -> int:
    """`ignore_index` as an int that labels can hold; None means -100, which no label is."""
    if value is None:
        return -100
    if not _is_integral(value):
        raise ValueError(f"ignore_index must be an integer or None (for -100), got {value!r}")
    if not _INT64.min <= value <= _INT64.max:
        raise ValueError(f"ignore_index must fit in 64 bits, as labels do, got {value!r}")
    if mode == "multilabel" and value in (0, 1):
        raise ValueError(f"ignore_index={value} is what planes of mode='multilabel' hold; mark void by another number")
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


def width_in_unit(value: Any, spacing: tuple[float, ...], part: str) -> float:
    """`width` as a float in the unit of the spacing; `part` names the option for a part of the diagonal."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"width must be a positive finite number in the unit of spacing={spacing}, got {value!r}")
    if value < min(spacing):
        raise ValueError(
            f"width is in the unit of spacing={spacing}, and {value} would reach no neighbour; "
            f"pass at least {min(spacing)}, or a part of the diagonal of each volume as {part}"
        )
    return float(value)


def tolerance_in_unit(value: Any, spacing: tuple[float, ...]) -> float:
    """`tolerance` as a float in the unit of the spacing, which has no default."""
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(
            f"with spacing={spacing} pass tolerance, a finite number of at least 0 in its unit, or tolerance_ratio, "
            f"a part of the diagonal of each volume; got tolerance={value!r}"
        )
    return float(value)


def spacing_of_voxels(value: Any) -> tuple[float, ...] | None:
    """`spacing` as three floats, from any sequence of numbers; None stays."""
    if value is None:
        return None
    try:
        numbers = [number.item() if hasattr(number, "item") else number for number in value]
    except TypeError:
        numbers = []
    if len(numbers) != 3 or not all(_is_number(number) and 0 < number < math.inf for number in numbers):
        raise ValueError(
            f"spacing must be three positive numbers (dz, dy, dx), the size of a voxel, got {value!r}; "
            "images have no spacing: there distances are in pixels"
        )
    return tuple(map(float, numbers))


def slice_dimension(value: Any, spacing: tuple[float, ...] | None) -> int:
    """`slice_dim` as an int in the numbering of [N,C,D,H,W]."""
    if not _is_integral(value) or value not in (2, 3, 4):
        raise ValueError(f"slice_dim must be 2 (depth), 3 (height) or 4 (width) of [N,C,D,H,W], got {value!r}")
    if spacing is not None and value != 2:
        raise ValueError(f"with spacing={spacing} a volume is not cut into slices; leave slice_dim={value} out")
    return int(value)


def threshold_of(value: Any, mode: str) -> float | None:
    """`threshold` as a float, 0 where it is left out; None in multiclass mode, where it means nothing."""
    if mode != "multilabel":
        if value is not None:
            raise ValueError(f"threshold={value!r} belongs to mode='multilabel'; in {mode} mode leave it out")
        return None
    if value is None:
        return 0.0
    if not _is_number(value) or not math.isfinite(value):
        raise ValueError(f"threshold must be a finite number, 0 for logits or 0.5 for probabilities, got {value!r}")
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


def is_integer(x: Tensor) -> bool:
    """Whether labels can have this dtype; bool is none."""
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
    elif found[-1] == 255 and name.startswith("target"):
        hint = "; does 255 mark void here? then pass ignore_index=255"
    void = f" or ignore_index={ignore_index}" if name.startswith("target") else ""
    return ValueError(
        f"{name} must hold labels from 0 to {num_classes - 1}{void}; "
        f"found values from {found[0]} to {found[-1]}, {count} of them out of range{hint}"
    )
