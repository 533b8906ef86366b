"""Numbers and class weights as users have them: of Python or NumPy, in lists or arrays."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_LABEL = -100  # torch's ignore_index where none is given


def whole_number(name: str, value: Any) -> int:
    """A Python or NumPy integer as an int.

    Raises:
        TypeError: anything else, True and False among it.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return int(value)


def void_label(value: Any) -> int:
    """`ignore_index` as an int; None means -100, which is no label.

    Raises:
        TypeError: no integer. ValueError: it does not fit in 64 bits.
    """
    if value is None:
        return NO_LABEL
    number = whole_number("ignore_index", value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits, as labels do, got {number}")
    return number


def class_weights(value: Any, device: torch.device | None = None, name: str = "weight") -> Tensor | None:
    """Class weights as a tensor: a list, a tuple or a NumPy array of numbers becomes one of fp32 on `device`.

    Raises:
        TypeError: anything else that is neither a tensor nor None.
    """
    if value is None or isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.asarray("")
    if isinstance(value, (str, bytes)) or array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold one number a class, as a tensor, a list or a NumPy array, got {value!r}")
    return torch.tensor(array.astype(np.float32), device=device)
