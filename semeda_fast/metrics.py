"""Segmentation metrics near label boundaries, with `ignore_index`, as torchmetrics metrics.

`BoundaryIoU`, `BoundaryF` and `TrimapIoU` take labels or logits, keep integer counts per class that are
summed over images and processes, and need nothing but torch operations, so they run on any device.

Void. A pixel whose target equals `ignore_index` is void. It is unknown, not a class, so

* it counts nowhere, and what the network predicts there changes no result;
* the rim of a void region is no boundary: a boundary needs two *valid* pixels of different labels. In
  terms of masks, a class is eroded as if void belonged to it, in the target and in the prediction alike;
* a prediction that agrees with the target on all valid pixels scores 1.

Where void rims separate all classes (PASCAL VOC, rims about 5 pixels wide), distances run across the rim:
bands narrower than the rim are empty, and no contour is left for `BoundaryF`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from semeda_fast.errors import missing_extra

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    if error.name != "torchmetrics":
        raise
    raise missing_extra("semeda_fast.metrics", "torchmetrics", "metrics") from None

__all__ = ["BoundaryF", "BoundaryIoU", "TrimapIoU"]

_BITS = 62  # classes per int64 word in BoundaryF; the sign bit stays clear


class _BoundaryMetric(Metric):
    """What the three metrics share: options, input checks, the average over classes."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, num_classes: int, *, ignore_index: int, average: str, counts: tuple[str, ...], **kwargs: Any):
        super().__init__(**kwargs)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(
                f"num_classes must be an integer of at least 2, got {num_classes!r}; "
                "for binary masks use num_classes=2 and pass labels, (logits > 0).long()"
            )
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise ValueError(f"ignore_index must be an integer, got {ignore_index!r}")
        _check_choice("average", average, ("macro", "none"))
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.average = average
        for name in counts:
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the counts of another instance of the same metric (or its `metric_state`)."""
        super().merge_state(incoming_state)
        self._computed = None  # torchmetrics 1.9 would go on returning the result cached before the merge

    def _labels(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Checked (pred, target, valid): int64, int64 and bool, all [N,H,W]; labels at void pixels are 0."""
        _check_inputs(preds, target, self.num_classes)
        target = target.to(torch.int64)
        valid = target != self.ignore_index
        pred = preds.argmax(dim=1) if preds.dim() == 4 else preds.to(torch.int64)
        target = target.where(valid, torch.zeros_like(target))
        pred = pred.where(valid, torch.zeros_like(pred))
        self._check_range("target", target)
        self._check_range("preds (at valid pixels)", pred)
        return pred, target, valid

    def _check_range(self, name: str, labels: Tensor) -> None:
        if labels.numel() == 0:
            return
        low, high = (int(bound) for bound in labels.aminmax())
        if low >= 0 and high < self.num_classes:
            return
        count = int(((labels < 0) | (labels >= self.num_classes)).sum())
        hint = "; does 255 mark void here? then pass ignore_index=255" if high == 255 else ""
        raise ValueError(
            f"{name} must hold labels from 0 to {self.num_classes - 1}"
            f" or ignore_index={self.ignore_index}; found values from {low} to {high},"
            f" {count} of them out of range{hint}"
        )

    def _count(self, labels: Tensor, where: Tensor) -> Tensor:
        """Pixels of each class among those marked: labels, where [N,H,W] -> int64 [num_classes]."""
        spare = torch.full_like(labels, self.num_classes)
        counts = torch.bincount(labels.where(where, spare).flatten(), minlength=self.num_classes + 1)
        return counts[: self.num_classes].to(self.device)

    def _average(self, scores: Tensor) -> Tensor:
        """Macro mean over the classes that are not NaN, or the [num_classes] scores themselves."""
        if 0 <= self.ignore_index < self.num_classes:
            # Such a class is never in the target, so a score for it would always be 0.
            scores = scores.clone()
            scores[self.ignore_index] = torch.nan
        return scores if self.average == "none" else scores.nanmean()


class _BandIoU(_BoundaryMetric):
    """IoU of two sets of labelled pixels, from three counts per class."""

    intersection: Tensor
    predicted: Tensor
    expected: Tensor

    def __init__(self, num_classes: int, *, ignore_index: int, average: str, **kwargs: Any):
        counts = ("intersection", "predicted", "expected")
        super().__init__(num_classes, ignore_index=ignore_index, average=average, counts=counts, **kwargs)

    def _add(self, pred: Tensor, target: Tensor, in_pred: Tensor, in_target: Tensor) -> None:
        self.intersection += self._count(target, in_pred & in_target & (pred == target))
        self.predicted += self._count(pred, in_pred)
        self.expected += self._count(target, in_target)

    def compute(self) -> Tensor:
        """The score, 0-d, or float32 [num_classes] with `average="none"`; NaN where nothing can be scored."""
        union = self.predicted + self.expected - self.intersection
        return self._average(_ratio(self.intersection, union))


class BoundaryIoU(_BandIoU):
    """Boundary IoU of Cheng et al. (CVPR 2021, arXiv 2103.16562), for semantic labels.

    Each class's mask keeps only its band, the pixels that an erosion by `width` removes (a square of
    2 * width + 1 pixels, as in the authors' code); the score is the IoU of the bands:

        band_c(m) = {x valid: m(x) = c, and a valid x' with m(x') != c, or the outside of the image, lies
                     within Chebyshev distance `width` of x}
        score_c   = sum_images |band_c(pred) & band_c(target)| / sum_images |band_c(pred) | band_c(target)|

    As in the authors' code the image's frame ends a mask. Void does not (see the module's text): it is in no
    band, and no band runs along it.

    Args:
        num_classes: number of classes C, at least 2.
        width: band width in pixels; by default max(1, round(dilation_ratio * image diagonal)) of each image.
        dilation_ratio: band width as a part of the image diagonal; used when `width` is None.
        ignore_index: the label of void pixels in the target. If it is in [0, C), that class gets no score.
        average: "macro" (mean over the classes that have a band in target or prediction) or "none"
            (float32 [C], NaN for classes without any).
        **kwargs: passed to torchmetrics.Metric.

    `update(preds, target)` takes preds as labels [N,H,W] of any integer dtype or logits [N,C,H,W] of any
    floating dtype and memory format, and target as labels [N,H,W] of any integer dtype. If nothing can be
    scored, because all is void or no image came, the result is NaN.

    Raises:
        ValueError: an argument, a shape or a label is out of range.
        TypeError: labels are not integers, or logits are not floating point.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width: int | None = None,
        dilation_ratio: float = 0.02,
        ignore_index: int = -100,
        average: str = "macro",
        **kwargs: Any,
    ):
        super().__init__(num_classes, ignore_index=ignore_index, average=average, **kwargs)
        if width is not None:
            _check_width(width)
        elif not 0 < dilation_ratio < math.inf:
            raise ValueError(f"dilation_ratio must be positive and finite, got {dilation_ratio!r}")
        self.width = width
        self.dilation_ratio = dilation_ratio

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: preds [N,H,W] labels or [N,C,H,W] logits, target [N,H,W] labels."""
        pred, target, valid = self._labels(preds, target)
        if target.numel() == 0:
            return
        height, width = target.shape[-2:]
        distance = self.width or max(1, round(self.dilation_ratio * math.hypot(height, width)))
        near_frame = torch.ones(height, width, dtype=torch.bool, device=target.device)
        near_frame[distance : height - distance, distance : width - distance] = False
        in_pred = valid & (near_frame | _near_other_label(pred, valid, distance, _square_max))
        in_target = valid & (near_frame | _near_other_label(target, valid, distance, _square_max))
        self._add(pred, target, in_pred, in_target)


class TrimapIoU(_BandIoU):
    """Mean IoU over the pixels near a label boundary of the target (Kohli et al., IJCV 82, 2009).

        trimap  = {x valid: a valid x' with target(x') != target(x) lies within Euclidean distance `width`}
        score_c = IoU of {pred = c} and {target = c}, both within the trimap, counts summed over images

    A trimap of width 1 is one pixel on either side of each boundary. The image's frame is no boundary. The
    DeepLab papers draw their trimaps around the void rims of PASCAL VOC instead: `around_void=True` adds the
    valid pixels within `width` of void.

    Args:
        num_classes: number of classes C, at least 2.
        width: half width of the trimap in pixels, at least 1.
        around_void: whether pixels near void belong to the trimap too.
        ignore_index: the label of void pixels in the target. If it is in [0, C), that class gets no score.
        average: "macro" (mean over the classes that target or prediction hold within the trimap) or "none"
            (float32 [C], NaN for classes without any).
        **kwargs: passed to torchmetrics.Metric.

    `update(preds, target)` takes preds as labels [N,H,W] of any integer dtype or logits [N,C,H,W] of any
    floating dtype and memory format, and target as labels [N,H,W] of any integer dtype. If nothing can be
    scored, because there is no boundary, all is void or no image came, the result is NaN.

    Raises:
        ValueError: an argument, a shape or a label is out of range.
        TypeError: labels are not integers, or logits are not floating point.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width: int = 3,
        around_void: bool = False,
        ignore_index: int = -100,
        average: str = "macro",
        **kwargs: Any,
    ):
        super().__init__(num_classes, ignore_index=ignore_index, average=average, **kwargs)
        _check_width(width)
        self.width = width
        self.around_void = around_void

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: preds [N,H,W] labels or [N,C,H,W] logits, target [N,H,W] labels."""
        pred, target, valid = self._labels(preds, target)
        if target.numel() == 0:
            return
        trimap = valid & _near_other_label(target, valid, self.width, _disk_max)
        if self.around_void:
            trimap |= valid & _disk_max((~valid).to(torch.int32), self.width, 0).bool()
        self._add(pred, target, trimap, trimap)


class BoundaryF(_BoundaryMetric):
    """Boundary F score at a tolerance (Csurka et al., BMVC 2013; also the contour score of DAVIS, CVPR 2016).

        contour_c(m) = {x valid: m(x) = c, and one of the 8 neighbours of x is valid and holds another label}
        precision_c  = part of contour_c(pred) within Euclidean distance `tolerance` of contour_c(target)
        recall_c     = part of contour_c(target) within Euclidean distance `tolerance` of contour_c(pred)
        F_c          = 2 precision_c recall_c / (precision_c + recall_c)

    Pixels are counted over all images before dividing, as mean IoU does; the cited papers average scores
    of single images. The image's frame is no contour. A class with a contour in only one of target and
    prediction scores 0.

    Args:
        num_classes: number of classes C, at least 2.
        tolerance: largest distance of a match in pixels; 0 asks for the exact pixel.
        score: what `compute` returns: "f", "precision" or "recall".
        ignore_index: the label of void pixels in the target. If it is in [0, C), that class gets no score.
        average: "macro" (mean over the classes with a contour in target or prediction) or "none"
            (float32 [C], NaN for classes without any).
        **kwargs: passed to torchmetrics.Metric.

    `update(preds, target)` takes preds as labels [N,H,W] of any integer dtype or logits [N,C,H,W] of any
    floating dtype and memory format, and target as labels [N,H,W] of any integer dtype. If nothing can be
    scored, because there is no contour, all is void or no image came, the result is NaN.

    Raises:
        ValueError: an argument, a shape or a label is out of range.
        TypeError: labels are not integers, or logits are not floating point.
    """

    matched_pred: Tensor
    total_pred: Tensor
    matched_target: Tensor
    total_target: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        tolerance: float = 3.0,
        score: str = "f",
        ignore_index: int = -100,
        average: str = "macro",
        **kwargs: Any,
    ):
        counts = ("matched_pred", "total_pred", "matched_target", "total_target")
        super().__init__(num_classes, ignore_index=ignore_index, average=average, counts=counts, **kwargs)
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be a finite number of pixels of at least 0, got {tolerance!r}")
        _check_choice("score", score, ("f", "precision", "recall"))
        self.tolerance = tolerance
        self.score = score

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: preds [N,H,W] labels or [N,C,H,W] logits, target [N,H,W] labels."""
        pred, target, valid = self._labels(preds, target)
        if target.numel() == 0:
            return
        on_pred = valid & _near_other_label(pred, valid, 1, _square_max)
        on_target = valid & _near_other_label(target, valid, 1, _square_max)
        self.total_pred += self._count(pred, on_pred)
        self.total_target += self._count(target, on_target)
        self.matched_pred += self._count(pred, on_pred & self._near_contour(pred, target, on_target))
        self.matched_target += self._count(target, on_target & self._near_contour(target, pred, on_pred))

    def _near_contour(self, labels: Tensor, others: Tensor, contour: Tensor) -> Tensor:
        """Bool [N,H,W]: within the tolerance lies a contour pixel whose `others` equals `labels` here."""
        near = torch.zeros_like(contour)
        for first in range(0, self.num_classes, _BITS):
            # One bit per class: dilating by a disk with "or" serves 62 classes in one pass.
            here = contour & (others >= first) & (others < first + _BITS)
            bit = torch.where(here, others - first, 0)
            words = torch.where(here, torch.ones_like(others) << bit, 0)
            words = _disk(words, self.tolerance, 0, torch.bitwise_or)
            inside = (labels >= first) & (labels < first + _BITS)
            shift = torch.where(inside, labels - first, 0)
            near |= inside & ((words >> shift) & 1).bool()
        return near

    def compute(self) -> Tensor:
        """The score, 0-d, or float32 [num_classes] with `average="none"`; NaN where nothing can be scored."""
        precision = _ratio(self.matched_pred, self.total_pred)
        recall = _ratio(self.matched_target, self.total_target)
        if self.score == "f":
            total = precision + recall
            scores = torch.where(total > 0, 2 * precision * recall / total, torch.zeros_like(total))
        else:
            scores = precision if self.score == "precision" else recall
        absent = (self.total_pred + self.total_target) == 0
        return self._average(scores.nan_to_num(0.0).masked_fill(absent, torch.nan))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole in float32, NaN where whole is 0."""
    return part.to(torch.float32) / whole.to(torch.float32)


def _near_other_label(labels: Tensor, valid: Tensor, distance: int, window_max: Callable[..., Tensor]) -> Tensor:
    """Bool [N,H,W]: a valid pixel of another label lies within `distance`; meaningful at valid pixels only.

    All classes at once: a window holds another label than its centre exactly if its smallest or its largest
    valid label is not the centre's.
    """
    small = labels.to(torch.int32)
    lowest = torch.iinfo(torch.int32).min
    largest = window_max(small.masked_fill(~valid, lowest), distance, lowest)
    smallest = -window_max((-small).masked_fill(~valid, lowest), distance, lowest)
    return (largest != small) | (smallest != small)


def _square_max(x: Tensor, distance: int, empty: int) -> Tensor:
    """Maximum of the pixels of x [N,H,W] within Chebyshev distance; `empty` outside the image."""
    return _line(_line(x, distance, -1, empty, torch.maximum), distance, -2, empty, torch.maximum)


def _disk_max(x: Tensor, distance: float, empty: int) -> Tensor:
    """Maximum of the pixels of x [N,H,W] within Euclidean distance; `empty` outside the image."""
    return _disk(x, distance, empty, torch.maximum)


def _disk(x: Tensor, distance: float, empty: int, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
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


def _check_inputs(preds: Tensor, target: Tensor, num_classes: int) -> None:
    for name, value in (("preds", preds), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if target.dim() != 3:
        hint = "; add the batch dimension with target.unsqueeze(0)" if target.dim() == 2 else ""
        raise ValueError(f"target must be labels [N,H,W], got shape {tuple(target.shape)}{hint}")
    if not _is_integer(target):
        raise TypeError(f"target must have an integer dtype, got {target.dtype}")
    if preds.dim() == 4:
        if not preds.is_floating_point():
            raise TypeError(f"preds [N,C,H,W] must be floating-point logits, got {preds.dtype}; pass labels as [N,H,W]")
        if preds.shape[1] != num_classes:
            raise ValueError(
                f"preds [N,C,H,W] must have C = num_classes = {num_classes} channels, got shape {tuple(preds.shape)}"
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


def _check_width(width: int) -> None:
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"width must be an integer number of pixels of at least 1, got {width!r}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
