"""Segmentation metrics near label boundaries, with `ignore_index`, as torchmetrics metrics.

`BoundaryIoU`, `BoundaryF` and `TrimapIoU` keep integer counts per class that are summed over images and
processes, and need nothing but torch operations, so they run on any device.

Shapes of `update(preds, target)`. Labels are of any integer dtype, logits of any floating dtype and memory format,
and the target of labels may carry one channel, [N,1,H,W] or [N,1,D,H,W]:

=============================  ==============================  =====================
mode                           preds                           target
=============================  ==============================  =====================
"multiclass", images           [N,H,W] labels, or [N,C,H,W]    [N,H,W]
                               logits
"multiclass", volumes          [N,D,H,W] labels, or            [N,D,H,W]
                               [N,C,D,H,W] logits
"multilabel", images           [N,C,H,W]                       [N,C,H,W]
"multilabel", volumes          [N,C,D,H,W]                     [N,C,D,H,W]
=============================  ==============================  =====================

Planes. In multilabel mode each of the C planes is a mask of 0 and 1 (bool, or any integer dtype) that gets the score of
its ones; planes may overlap. Predictions may be floats too, which are 1 above `threshold`. Void is void entry by entry.
With one plane and `average="none"` torchmetrics returns the score as a 0-d tensor.

Volumes are cut into slices along `slice_dim`, and each slice is an image. With `spacing=(dz, dy, dx)` `BoundaryIoU` and
`BoundaryF` measure in the whole volume instead: Euclidean distances between centres of voxels, in the spacing's unit.

Void. A pixel whose target equals `ignore_index` is void. It is unknown, not a class, so

* it counts nowhere, and what the network predicts there changes no result;
* the rim of a void region is no boundary: a boundary needs two *valid* pixels of different labels. In
  terms of masks, a class is eroded as if void belonged to it, in the target and in the prediction alike;
* a prediction that agrees with the target on all valid pixels scores 1.

Where void rims separate all classes (PASCAL VOC, rims about 5 pixels wide), distances run across the rim:
bands narrower than the rim are empty, and no contour is left for `BoundaryF`.

Collections. In a `torchmetrics.MetricCollection` each metric reports what it reports alone. Those of one class
and equal settings share their counts, whatever `score` and `average` make of them; others never do.
"""

from __future__ import annotations

from semeda_fast.errors import missing_extra

try:
    import torchmetrics  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torchmetrics":
        raise
    raise missing_extra("semeda_fast.metrics", "torchmetrics", "metrics") from None

from .bands import BoundaryIoU, TrimapIoU
from .contours import BoundaryF

__all__ = ["BoundaryF", "BoundaryIoU", "TrimapIoU"]
