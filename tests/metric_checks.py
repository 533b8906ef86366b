"""What the tests of metrics in collections share: feeding, what each reports alone, copies and casts."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

Batch = tuple[Tensor, Tensor]
Make = Callable[[], dict[str, Metric]]
SETTINGS = ("num_classes", "ignore_index", "mode", "threshold", "slice_dim", "spacing", "contour")
SETTINGS += ("tolerance", "tolerance_ratio", "width", "dilation_ratio", "around_void")


def feed(metrics: Any, batches: list[Batch]) -> None:
    for pred, target in batches:
        metrics.update(pred, target)


def alone(make: Make, batches: list[Batch]) -> dict[str, Tensor]:
    """What each metric reports for itself."""
    key = (make.__qualname__, *(value.numpy().tobytes() for pair in batches for value in pair))
    if key not in _known:
        metrics = make()
        for metric in metrics.values():
            feed(metric, batches)
        _known[key] = {name: metric.compute() for name, metric in metrics.items()}
    return dict(_known[key])


_known: dict[Any, dict[str, Tensor]] = {}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit by bit, NaN equal to NaN."""
    assert actual.keys() == expected.keys()
    wrong = [k for k, v in expected.items() if not torch.equal(actual[k].nan_to_num(-1.0), v.nan_to_num(-1.0))]
    assert not wrong, {k: (actual[k], expected[k]) for k in wrong}


def through_pickle(metrics: MetricCollection) -> MetricCollection:
    return pickle.loads(pickle.dumps(metrics))


def through_a_file(metrics: MetricCollection) -> MetricCollection:
    file = io.BytesIO()
    torch.save(metrics, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CASTS: dict[str, Callable[[Any], Any]] = {
    "to_bfloat16": lambda m: m.to(torch.bfloat16),
    "to_half": lambda m: m.to(torch.float16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "set_dtype": lambda m: m.set_dtype(torch.bfloat16),
    "set_dtype_half": lambda m: m.set_dtype(torch.float16),
    "double": lambda m: m.double(),
    "to_empty": lambda m: m.to_empty(device="cpu"),
}
