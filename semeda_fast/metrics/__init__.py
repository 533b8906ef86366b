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
