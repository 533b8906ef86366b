"""F score of label contours: `BoundaryF`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import BoundaryMetric, ratio
from .inputs import (
    choice,
    part_of_diagonal,
    spacing_of_voxels,
    tolerance_in_pixels,
    tolerance_in_unit,
)
from .windows import ball, ball_max, box_max, near_other_label

_BITS = 62  # classes per int64 word; the sign bit stays clear


class BoundaryF(BoundaryMetric):
    """Boundary F score at a tolerance (Csurka et al., BMVC 2013), and its kin.

        precision_c  = part of contour_c(pred) within Euclidean distance `tolerance` of contour_c(target)
        recall_c     = part of contour_c(target) within Euclidean distance `tolerance` of contour_c(pred)
        F_c          = 2 precision_c recall_c / (precision_c + recall_c)
        dice_c       = part of both contours' pixels together within `tolerance` of the other contour

    What a contour is, `contour` says:

        "rim"      {x valid: m(x) = c, and one of the 8 neighbours of x (26 with `spacing`) is valid and holds another
                   label}. The image's frame is no contour.
        "erosion"  the same with the 4 (6) neighbours that share a side, and x at the image's frame too: what an erosion
                   by a cross removes. `score="dice"` is then the surface Dice, or NSD, of MONAI without subvoxels.
        "seam"     {x valid: of x and its right, lower or lower right neighbour, also valid, one is of c, one is not},
                   so pixels on either side of a border. With `tolerance_ratio=0.008` this is the contour score F of
                   DAVIS (Perazzi et al., CVPR 2016). Images and slices alone, no `spacing`.

    Pixels are counted over all images before dividing, as mean IoU does; the papers, MONAI and DAVIS average scores of
    single images (or objects). A class with a contour in only one of target and prediction scores 0, and NaN where
    neither has one; DAVIS gives 1 there.

    Args:
        num_classes: number of classes C, at least 2; in multilabel mode the number of planes, at least 1.
        tolerance: largest distance of a match in pixels, by default 3; 0 asks for the exact pixel, otherwise
            at least 1. With `spacing` a length in its unit, at least 0, without a default.
        tolerance_ratio: the tolerance as a part of each image's diagonal instead, above 0 and below 1, rounded
            up to whole pixels; with `spacing` not rounded.
        contour: "rim", "erosion" or "seam", see above.
        score: what `compute` returns: "f", "precision", "recall" or "dice".
        spacing: size of a voxel (dz, dy, dx): distances in whole volumes. None: slice by slice, in pixels.
        mode: "multiclass", or "multilabel": each plane is a mask of its own, scored by its ones.
        threshold: what a float prediction of multilabel mode exceeds where it is 1; by default 0, for logits; 0.5 for
            probabilities.
        slice_dim: the dimension of [N,C,D,H,W] along which a volume is cut into images: 2, 3 or 4.
        ignore_index: the label of void pixels in the target; None means -100. If it is in [0, C), that class gets
            no score; in multilabel mode it marks single entries of the planes.
        average: "macro" (mean over the classes with a contour in target or prediction) or "none"
            (float32 [C], NaN for classes without any).
        **kwargs: passed to torchmetrics.Metric.

    `update(preds, target)` takes the shapes that the module's text lists. If nothing can be
    scored, because there is no contour, all is void or no image came, the result is NaN.

    Raises:
        ValueError: an argument, a shape or a label is out of range.
        TypeError: labels are not integers, or logits are not floating point.
        AttributeError: a setting is assigned to; settings other than `score` and `average` are fixed.
    """

    tolerance: float | None
    tolerance_ratio: float | None
    contour: str

    def __init__(
        self,
        num_classes: int,
        *,
        tolerance: float | None = None,
        tolerance_ratio: float | None = None,
        contour: str = "rim",
        score: str = "f",
        spacing: Sequence[float] | None = None,
        mode: str = "multiclass",
        threshold: float | None = None,
        slice_dim: int = 2,
        ignore_index: int | None = -100,
        average: str = "macro",
        **kwargs: Any,
    ):
        sizes = spacing_of_voxels(spacing)
        settings: dict[str, Any] = {
            "contour": choice("contour", contour, ("rim", "erosion", "seam")),
            "spacing": sizes,
            "tolerance": None,
            "tolerance_ratio": None,
        }
        if tolerance_ratio is not None and tolerance is not None:
            raise ValueError(f"pass tolerance={tolerance!r} or tolerance_ratio={tolerance_ratio!r}, not both")
        if tolerance_ratio is not None:
            settings["tolerance_ratio"] = part_of_diagonal("tolerance_ratio", tolerance_ratio, "tolerance")
        elif sizes is None:
            settings["tolerance"] = tolerance_in_pixels(3.0 if tolerance is None else tolerance)
        else:
            settings["tolerance"] = tolerance_in_unit(tolerance, sizes)
        if contour == "seam" and sizes is not None:
            raise ValueError(f"contour='seam' is of images; with spacing={sizes} pass contour='rim' or 'erosion'")
        super().__init__(
            num_classes,
            ignore_index=ignore_index,
            mode=mode,
            threshold=threshold,
            slice_dim=slice_dim,
            average=average,
            rows=4,
            settings=settings,
            **kwargs,
        )
        self.score = choice("score", score, ("f", "precision", "recall", "dice"))

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
        if self.contour == "seam":
            return self._count_seams(pred, target, valid)
        on_pred, on_target = self._contour(pred, valid), self._contour(target, valid)
        return torch.stack(
            [
                self._count(pred, on_pred & self._near_contour(pred, target, on_target)),
                self._count(pred, on_pred),
                self._count(target, on_target & self._near_contour(target, pred, on_pred)),
                self._count(target, on_target),
            ]
        )

    def _contour(self, labels: Tensor, valid: Tensor) -> Tensor:
        """Bool [1, *space]: pixels on the contour of their own class."""
        if self.contour == "rim":
            return valid & near_other_label(labels, valid, box_max(1))
        frame = torch.ones_like(valid)
        inside = [slice(None)] + [slice(1, max(1, n - 1)) for n in valid.shape[1:]]
        frame[tuple(inside)] = False
        return valid & (frame | near_other_label(labels, valid, ball_max(1)))

    def _near_contour(self, labels: Tensor, others: Tensor, contour: Tensor) -> Tensor:
        """Bool [1, *space]: within the tolerance lies a contour pixel whose `others` equals `labels` here."""
        near = torch.zeros_like(contour)
        for first in range(0, self._labels, _BITS):
            words = self._widened(_words(others, contour, first))
            near |= (words & _words(labels, torch.ones_like(contour), first)).bool()
        return near

    def _count_seams(self, pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """A seam's pixel is of two classes or more, so contours are words of classes here."""
        groups = []
        for first in range(0, self._labels, _BITS):
            classes = min(_BITS, self._labels - first)
            a, b = _seams(pred, valid, first), _seams(target, valid, first)
            rows = (a & self._widened(b), a, b & self._widened(a), b)
            groups.append(torch.stack([_count_bits(words, classes) for words in rows]))
        return torch.cat(groups, dim=1)

    def _widened(self, words: Tensor) -> Tensor:
        """Words of classes [1, *space], each with those within the tolerance: one pass serves 62 classes."""
        spacing = self.spacing or (1.0,) * (words.dim() - 1)
        diagonal = math.hypot(*(n * s for n, s in zip(words.shape[1:], spacing, strict=True)))
        if self.tolerance_ratio is None:
            distance = min(self.tolerance or 0.0, diagonal)  # nothing is farther
        else:
            distance = self.tolerance_ratio * diagonal
            distance = math.ceil(distance) if self.spacing is None else distance
        return ball(words, distance, spacing, torch.bitwise_or)

    def compute(self) -> Tensor:
        """The score, 0-d, or float32 [num_classes] with `average="none"`; NaN where nothing can be scored."""
        precision = ratio(self.matched_pred, self.total_pred)
        recall = ratio(self.matched_target, self.total_target)
        if self.score == "dice":
            scores = ratio(self.matched_pred + self.matched_target, self.total_pred + self.total_target)
        elif self.score == "f":
            total = precision + recall
            scores = torch.where(total > 0, 2 * precision * recall / total, torch.zeros_like(total))
        else:
            scores = precision if self.score == "precision" else recall
        absent = (self.total_pred + self.total_target) == 0
        return self._average(scores.nan_to_num(0.0).masked_fill(absent, torch.nan))


def _words(labels: Tensor, where: Tensor, first: int) -> Tensor:
    """int64: the bit of each label of the group that begins with class `first`, 0 outside of it and of `where`."""
    inside = where & (labels >= first) & (labels < first + _BITS)
    return torch.where(inside, torch.ones_like(labels) << torch.where(inside, labels - first, 0), 0)


def _seams(labels: Tensor, valid: Tensor, first: int) -> Tensor:
    """int64 [1,H,W]: the classes of the group on whose seam each pixel lies."""
    words, bits = torch.zeros_like(labels), _words(labels, valid, first)
    height, width = labels.shape[-2:]
    for dy, dx in ((0, 1), (1, 0), (1, 1)):
        here = (slice(None), slice(height - dy), slice(width - dx))
        there = (slice(None), slice(dy, None), slice(dx, None))
        differ = valid[here] & valid[there] & (labels[here] != labels[there])
        words[here] |= torch.where(differ, bits[here] | bits[there], 0)
    return words


def _count_bits(words: Tensor, classes: int) -> Tensor:
    """int64 [classes]: the words that hold each bit."""
    return torch.stack([((words >> c) & 1).sum() for c in range(classes)])
