"""IoU of bands along label boundaries: `BoundaryIoU` and `TrimapIoU`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import BoundaryMetric, ratio
from .inputs import part_of_diagonal, spacing_of_voxels, width_in_pixels, width_in_unit
from .windows import ball_max, box_max, near_other_label, steps_within


class _BandIoU(BoundaryMetric):
    """IoU of two sets of labelled pixels, from three counts per class."""

    def __init__(self, num_classes: int, **kwargs: Any):
        super().__init__(num_classes, rows=3, **kwargs)

    @property
    def intersection(self) -> Tensor:
        """int64 [num_classes]: pixels of each class in both bands, so far."""
        return self._counts[0]

    @property
    def predicted(self) -> Tensor:
        """int64 [num_classes]: pixels of each class in the prediction's band, so far."""
        return self._counts[1]

    @property
    def expected(self) -> Tensor:
        """int64 [num_classes]: pixels of each class in the target's band, so far."""
        return self._counts[2]

    def _count_bands(self, pred: Tensor, target: Tensor, in_pred: Tensor, in_target: Tensor) -> Tensor:
        both = self._count(target, in_pred & in_target & (pred == target))
        return torch.stack([both, self._count(pred, in_pred), self._count(target, in_target)])

    def compute(self) -> Tensor:
        """The score, 0-d, or float32 [num_classes] with `average="none"`; NaN where nothing can be scored."""
        union = self.predicted + self.expected - self.intersection
        return self._average(ratio(self.intersection, union))


class BoundaryIoU(_BandIoU):
    """Boundary IoU of Cheng et al. (CVPR 2021, arXiv 2103.16562), for semantic labels.

    Each class's mask keeps only its band, the pixels that an erosion by `width` removes (a square of
    2 * width + 1 pixels, as in the authors' code); the score is the IoU of the bands:

        band_c(m) = {x valid: m(x) = c, and a valid x' with m(x') != c, or the outside of the image, lies
                     within Chebyshev distance `width` of x}
        score_c   = sum_images |band_c(pred) & band_c(target)| / sum_images |band_c(pred) | band_c(target)|

    As in the authors' code the image's frame ends a mask. Void does not (see the module's text): it is in no
    band, and no band runs along it. With `spacing` the distance is Euclidean, in the spacing's unit, between the
    centres of any two voxels of a volume, so no neighbourhood comes in; what lies outside begins one voxel beyond
    the outermost.

    Args:
        num_classes: number of classes C, at least 2; in multilabel mode the number of planes, at least 1.
        width: band width in pixels; by default max(1, round(dilation_ratio * image diagonal)) of each image. With
            `spacing` a length in its unit; by default max(smallest spacing, dilation_ratio * diagonal).
        dilation_ratio: band width as a part of the image diagonal, below 1; None where `width` is given, which
            goes before it.
        spacing: size of a voxel (dz, dy, dx): distances in whole volumes. None: slice by slice, in pixels.
        mode: "multiclass", or "multilabel": each plane is a mask of its own, scored by its ones.
        threshold: what a float prediction of multilabel mode exceeds where it is 1; by default 0, for logits; 0.5 for
            probabilities.
        slice_dim: the dimension of [N,C,D,H,W] along which a volume is cut into images: 2, 3 or 4.
        ignore_index: the label of void pixels in the target; None means -100. If it is in [0, C), that class gets
            no score; in multilabel mode it marks single entries of the planes.
        average: "macro" (mean over the classes that have a band in target or prediction) or "none"
            (float32 [C], NaN for classes without any).
        **kwargs: passed to torchmetrics.Metric.

    `update(preds, target)` takes the shapes that the module's text lists. If nothing can be
    scored, because all is void or no image came, the result is NaN.

    Raises:
        ValueError: an argument, a shape or a label is out of range.
        TypeError: labels are not integers, or logits are not floating point.
        AttributeError: a setting is assigned to; settings other than `average` are fixed.
    """

    width: float | None
    dilation_ratio: float | None

    def __init__(
        self,
        num_classes: int,
        *,
        width: float | None = None,
        dilation_ratio: float = 0.02,
        spacing: Sequence[float] | None = None,
        mode: str = "multiclass",
        threshold: float | None = None,
        slice_dim: int = 2,
        ignore_index: int | None = -100,
        average: str = "macro",
        **kwargs: Any,
    ):
        sizes = spacing_of_voxels(spacing)
        settings: dict[str, Any] = {"width": None, "dilation_ratio": None, "spacing": sizes}
        if width is None:
            settings["dilation_ratio"] = part_of_diagonal("dilation_ratio", dilation_ratio, "width")
        elif sizes is None:
            settings["width"] = width_in_pixels(width, "dilation_ratio")
        else:
            settings["width"] = width_in_unit(width, sizes, "dilation_ratio")
        super().__init__(
            num_classes,
            ignore_index=ignore_index,
            mode=mode,
            threshold=threshold,
            slice_dim=slice_dim,
            average=average,
            settings=settings,
            **kwargs,
        )

    def _count_image(self, pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        space = tuple(target.shape[1:])
        if self.spacing is None:
            pixels = int(self.width or max(1, round((self.dilation_ratio or 0.0) * math.hypot(*space))))
            window, reach = box_max(pixels), [pixels] * len(space)
        else:
            diagonal = math.hypot(*(n * s for n, s in zip(space, self.spacing, strict=True)))
            width = self.width or max(min(self.spacing), (self.dilation_ratio or 0.0) * diagonal)
            window, reach = ball_max(width, self.spacing), [steps_within(width, s) for s in self.spacing]
        near_frame = torch.ones(space, dtype=torch.bool, device=target.device)
        near_frame[tuple(slice(r, max(r, n - r)) for r, n in zip(reach, space, strict=True))] = False
        in_pred = valid & (near_frame | near_other_label(pred, valid, window))
        in_target = valid & (near_frame | near_other_label(target, valid, window))
        return self._count_bands(pred, target, in_pred, in_target)


class TrimapIoU(_BandIoU):
    """Mean IoU over the pixels near a label boundary of the target (Kohli et al., IJCV 82, 2009).

        trimap  = {x valid: a valid x' with target(x') != target(x) lies within Euclidean distance `width`}
        score_c = IoU of {pred = c} and {target = c}, both within the trimap, counts summed over images

    A trimap of width 1 is one pixel on either side of each boundary. The image's frame is no boundary. The
    DeepLab papers draw their trimaps around the void rims of PASCAL VOC instead: `around_void=True` adds the
    valid pixels within `width` of void.

    Args:
        num_classes: number of classes C, at least 2; in multilabel mode the number of planes, at least 1.
        width: half width of the trimap in pixels, at least 1.
        around_void: whether pixels near void belong to the trimap too.
        mode: "multiclass", or "multilabel": each plane is a mask of its own, scored by its ones.
        threshold: what a float prediction of multilabel mode exceeds where it is 1; by default 0, for logits; 0.5 for
            probabilities.
        slice_dim: the dimension of [N,C,D,H,W] along which a volume is cut into images: 2, 3 or 4.
        ignore_index: the label of void pixels in the target; None means -100. If it is in [0, C), that class gets
            no score; in multilabel mode it marks single entries of the planes.
        average: "macro" (mean over the classes that target or prediction hold within the trimap) or "none"
            (float32 [C], NaN for classes without any).
        **kwargs: passed to torchmetrics.Metric.

    `update(preds, target)` takes the shapes that the module's text lists. If nothing can be
    scored, because there is no boundary, all is void or no image came, the result is NaN.

    Raises:
        ValueError: an argument, a shape or a label is out of range.
        TypeError: labels are not integers, or logits are not floating point.
        AttributeError: a setting is assigned to; settings other than `average` are fixed.
    """

    width: int
    around_void: bool

    def __init__(
        self,
        num_classes: int,
        *,
        width: int = 3,
        around_void: bool = False,
        mode: str = "multiclass",
        threshold: float | None = None,
        slice_dim: int = 2,
        ignore_index: int | None = -100,
        average: str = "macro",
        **kwargs: Any,
    ):
        super().__init__(
            num_classes,
            ignore_index=ignore_index,
            mode=mode,
            threshold=threshold,
            slice_dim=slice_dim,
            average=average,
            settings={"width": width_in_pixels(width), "around_void": bool(around_void)},
            **kwargs,
        )

    def _count_image(self, pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        window = ball_max(self.width)
        trimap = valid & near_other_label(target, valid, window)
        if self.around_void:
            trimap |= valid & window((~valid).to(torch.int32), 0).bool()
        return self._count_bands(pred, target, trimap, trimap)
