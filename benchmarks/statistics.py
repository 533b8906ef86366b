"""Means over seeds, with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, two-sided 95 %, by degrees of freedom (1 to 9).
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Interval:
    """A mean, half the width of its 95 % interval (NaN for one value), and how many values it is of."""

    mean: float
    half: float
    count: int

    def text(self, *, signed: bool = False) -> str:
        """'0.512 ± 0.013', or '+0.021 ± 0.009'; without the interval for one value."""
        mean = f"{self.mean:+.4f}" if signed else f"{self.mean:.4f}"
        return mean if math.isnan(self.half) else f"{mean} ± {self.half:.4f}"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return abs(self.mean) > self.half


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean with Student's 95 % interval, for values that scatter normally.

    Raises:
        ValueError: no values, or more than ten.
    """
    if not 1 <= len(values) <= len(_T95) + 1:
        raise ValueError(f"expected 1 to {len(_T95) + 1} values, got {len(values)}")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, math.nan, 1)
    return Interval(mean, _T95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values)), len(values))
