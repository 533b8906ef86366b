"""F score of label contours: `BoundaryF`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import BoundaryMetric, ratio
from .inputs import choice, part_of_diagonal, tolerance_in_pixels
from .windows import disk, near_other_label, square_max

_BITS = 62  # classes per int64 word; the sign bit stays clear


class BoundaryF(BoundaryMetric):
    """Boundary F score at a tolerance (Csurka et al., BMVC 2013).

        contour_c(m) = {x valid: m(x) = c, and one of the 8 neighbours of x is valid and holds another label}
        precision_c  = part of contour_c(pred) within Euclidean distance `tolerance` of contour_c(target)
        recall_c     = part of contour_c(target) within Euclidean distance `tolerance` of contour_c(pred)
        F_c          = 2 precision_c recall_c / (precision_c + recall_c)

    Pixels are counted over all images before dividing, as mean IoU does; the cited paper averages scores
    of single images. The image's frame is no contour. A class with a contour in only one of target and
    prediction scores 0.

    Not the contour score F of DAVIS (Perazzi et al., CVPR 2016), though `tolerance_ratio=0.008` is its
    tolerance. There a contour is the seam between an object and the rest: pixels that differ from their right,
    lower or lower right neighbour, on either side; here it is the object's own rim. An object scores 1 where
    neither map has a contour; here NaN. Scores of single objects and images are averaged; and there is no void.
    For one object in one image F differs by up to about 0.02 where objects are larger than the tolerance, by
    more for objects of a few pixels.

    Args:
        num_classes: number of classes C, at least 2.
        tolerance: largest distance of a match in pixels, by default 3; 0 asks for the exact pixel, otherwise
            at least 1.
        tolerance_ratio: the tolerance as a part of each image's diagonal instead, above 0 and below 1, rounded
            up to whole pixels.
        score: what `compute` returns: "f", "precision" or "recall".
        ignore_index: the label of void pixels in the target; None means -100. If it is in [0, C), that class gets
            no score.
        average: "macro" (mean over the classes with a contour in target or prediction) or "none"
            (float32 [C], NaN for classes without any).
        **kwargs: passed to torchmetrics.Metric.

    `update(preds, target)` takes preds as labels [N,H,W] of any integer dtype or logits [N,C,H,W] of any
    floating dtype and memory format, and target as labels [N,H,W] of any integer dtype. If nothing can be
    scored, because there is no contour, all is void or no image came, the result is NaN.

    Raises:
        ValueError: an argument, a shape or a label is out of range.
        TypeError: labels are not integers, or logits are not floating point.
        AttributeError: a setting is assigned to; settings other than `score` and `average` are fixed.
    """

    tolerance: float | None
    tolerance_ratio: float | None

    def __init__(
        self,
        num_classes: int,
        *,
        tolerance: float | None = None,
        tolerance_ratio: float | None = None,
        score: str = "f",
        ignore_index: int | None = -100,
        average: str = "macro",
        **kwargs: Any,
    ):
        settings: dict[str, Any] = {"tolerance": None, "tolerance_ratio": None}
        if tolerance_ratio is None:
            settings["tolerance"] = tolerance_in_pixels(3.0 if tolerance is None else tolerance)
        elif tolerance is None:
            settings["tolerance_ratio"] = part_of_diagonal("tolerance_ratio", tolerance_ratio, "tolerance")
        else:
            raise ValueError(f"pass tolerance={tolerance!r} or tolerance_ratio={tolerance_ratio!r}, not both")
        super().__init__(num_classes, ignore_index=ignore_index, average=average, rows=4, settings=settings, **kwargs)
        self.score = choice("score", score, ("f", "precision", "recall"))

    @property
    def matched_pred(self) -> Tensor:
        """int64 [num_classes]: pixels of the prediction's contour near the target's, so far."""
        return self._counts[0]

    @property
    def total_pred(self) -> Tensor:
        """int64 [num_classes]: pixels of the prediction's contour, so far."""
        return self._counts[1]

    @property
    def matched_target(self) -> Tensor:
        """int64 [num_classes]: pixels of the target's contour near the prediction's, so far."""
        return self._counts[2]

    @property
    def total_target(self) -> Tensor:
        """int64 [num_classes]: pixels of the target's contour, so far."""
        return self._counts[3]

    def _count_image(self, pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        on_pred = valid & near_other_label(pred, valid, 1, square_max)
        on_target = valid & near_other_label(target, valid, 1, square_max)
        return torch.stack(
            [
                self._count(pred, on_pred & self._near_contour(pred, target, on_target)),
                self._count(pred, on_pred),
                self._count(target, on_target & self._near_contour(target, pred, on_pred)),
                self._count(target, on_target),
            ]
        )

    def _near_contour(self, labels: Tensor, others: Tensor, contour: Tensor) -> Tensor:
        """Bool [N,H,W]: within the tolerance lies a contour pixel whose `others` equals `labels` here."""
        diagonal = math.hypot(*labels.shape[-2:])
        distance = diagonal if self.tolerance is None else min(self.tolerance, diagonal)  # nothing is farther
        if self.tolerance_ratio is not None:
            distance = math.ceil(self.tolerance_ratio * diagonal)
        near = torch.zeros_like(contour)
        for first in range(0, self.num_classes, _BITS):
            # One bit per class: dilating by a disk with "or" serves 62 classes in one pass.
            here = contour & (others >= first) & (others < first + _BITS)
            bit = torch.where(here, others - first, 0)
            words = torch.where(here, torch.ones_like(others) << bit, 0)
            words = disk(words, distance, 0, torch.bitwise_or)
            inside = (labels >= first) & (labels < first + _BITS)
            shift = torch.where(inside, labels - first, 0)
            near |= inside & ((words >> shift) & 1).bool()
        return near

    def compute(self) -> Tensor:
        """The score, 0-d, or float32 [num_classes] with `average="none"`; NaN where nothing can be scored."""
        precision = ratio(self.matched_pred, self.total_pred)
        recall = ratio(self.matched_target, self.total_target)
        if self.score == "f":
            total = precision + recall
            scores = torch.where(total > 0, 2 * precision * recall / total, torch.zeros_like(total))
        else:
            scores = precision if self.score == "precision" else recall
        absent = (self.total_pred + self.total_target) == 0
        return self._average(scores.nan_to_num(0.0).masked_fill(absent, torch.nan))
