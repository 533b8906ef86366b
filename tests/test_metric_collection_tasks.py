"""In a MetricCollection metrics of volumes and planes report what they report alone, whatever the first batch was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from metric_checks import CASTS, SETTINGS, Batch, Make, alone, feed, same, through_a_file, through_pickle
from torchmetrics import Metric, MetricCollection

from semeda_fast.metrics import BoundaryF, BoundaryIoU, TrimapIoU


def volume_zoo() -> dict[str, Metric]:
    """Metrics of volumes that differ in one setting each."""
    c, v = 3, 255
    near, far = (1.0, 1.0, 1.0), (2.0, 0.8, 0.8)
    return {
        **{f"f_dim{dim}": BoundaryF(c, tolerance=1, slice_dim=dim, ignore_index=v) for dim in (2, 3, 4)},
        **{f"iou_dim{dim}": BoundaryIoU(c, width=1, slice_dim=dim, ignore_index=v) for dim in (2, 3, 4)},
        **{f"trimap_dim{dim}": TrimapIoU(c, width=1, slice_dim=dim, ignore_index=v) for dim in (2, 3, 4)},
        "f_near": BoundaryF(c, tolerance=1, spacing=near, ignore_index=v),
        "f_far": BoundaryF(c, tolerance=1, spacing=far, ignore_index=v),
        "f_turned": BoundaryF(c, tolerance=1, spacing=far[::-1], ignore_index=v),
        "f_erosion": BoundaryF(c, tolerance=1, spacing=near, contour="erosion", ignore_index=v),
        "f_part": BoundaryF(c, tolerance_ratio=0.1, spacing=far, ignore_index=v),
        "iou_near": BoundaryIoU(c, width=1, spacing=near, ignore_index=v),
        "iou_far": BoundaryIoU(c, width=1, spacing=far, ignore_index=v),
        "iou_turned": BoundaryIoU(c, width=1, spacing=far[::-1], ignore_index=v),
        "iou_part": BoundaryIoU(c, dilation_ratio=0.1, spacing=far, ignore_index=v),
    }


def plane_zoo() -> dict[str, Metric]:
    """Metrics of planes that differ in one setting each; multiclass ones of as many classes take the same tensors."""
    options: dict[str, Any] = {"mode": "multilabel", "ignore_index": 255}
    kinds: dict[str, Any] = {
        "f": lambda **kw: BoundaryF(3, tolerance=1, **kw),
        "iou": lambda **kw: BoundaryIoU(3, width=1, **kw),
        "trimap": lambda **kw: TrimapIoU(3, width=1, **kw),
    }
    variants = {"plain": {}, "above": {"threshold": 0.5}, "void7": {"ignore_index": 7}}
    return {f"{k}_{v}": make(**{**options, **more}) for k, make in kinds.items() for v, more in variants.items()}


def volume_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.nn.functional.avg_pool3d(torch.randn(2, 3, 8, 17, 19, generator=generator), 3, 1)
    other = torch.nn.functional.avg_pool3d(torch.randn(2, 3, 8, 17, 19, generator=generator), 3, 1)
    return noise + 0.5 * other, noise.argmax(1)


def plane_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    noise = 9 * torch.nn.functional.avg_pool2d(torch.randn(2, 3, 30, 34, generator=generator), 5, 1)
    other = 9 * torch.nn.functional.avg_pool2d(torch.randn(2, 3, 30, 34, generator=generator), 5, 1)
    return noise + 0.5 * other, (noise > 0).long()


def dull(pair: Batch, value: int) -> Batch:
    """One class alone, or void alone, where every setting counts the same."""
    return torch.where(torch.arange(3).view(1, 3, *[1] * (pair[0].dim() - 2)) == 1, 1.0, -1.0).expand_as(
        pair[0]
    ), torch.full_like(pair[1], value)


KINDS: dict[str, tuple[Make, Callable[[int], Batch]]] = {
    "volumes": (volume_zoo, volume_batch),
    "planes": (plane_zoo, plane_batch),
}
each_kind = pytest.mark.parametrize(("make", "make_batch"), KINDS.values(), ids=KINDS.keys())


@each_kind
@pytest.mark.parametrize("value", [0, 1, None], ids=["zeros", "ones", "ordinary"])
def test_a_collection_of_volumes_or_planes(make: Make, make_batch: Callable[[int], Batch], value: int | None) -> None:
    first = make_batch(1) if value is None else dull(make_batch(1), value)
    batches = [first, make_batch(2), make_batch(3)]
    metrics = MetricCollection(make())
    feed(metrics, batches)
    same(metrics.compute(), alone(make, batches))
    metrics.reset()
    feed(metrics, batches[1:])
    same(metrics.compute(), alone(make, batches[1:]))
    assert len(metrics.compute_groups) == len(metrics)


@each_kind
def test_the_volumes_and_planes_tell_the_settings_apart(make: Make, make_batch: Callable[[int], Batch]) -> None:
    pred, target = make_batch(2)
    scores = {name: float(score) for name, score in alone(make, [(pred, target)]).items() if "void7" not in name}
    assert len({round(score, 5) for score in scores.values()}) == len(scores), scores
    assert all(0 < score < 1 for score in scores.values())


@each_kind
def test_volumes_and_planes_survive_copies_and_casts(make: Make, make_batch: Callable[[int], Batch]) -> None:
    batches = [make_batch(seed) for seed in (4, 5)]
    metrics = MetricCollection(make())
    feed(metrics, batches[:1])
    for way in (through_pickle, through_a_file, copy.deepcopy, *CASTS.values()):
        copied = way(copy.deepcopy(metrics))
        feed(copied, batches[1:])
        same(copied.compute(), alone(make, batches))


def test_settings_of_volumes_and_planes_are_fixed_and_not_merged() -> None:
    for make, make_batch in KINDS.values():
        metrics = make()
        for metric in metrics.values():
            metric.update(*make_batch(2))
            for setting in SETTINGS:
                if hasattr(metric, setting):
                    with pytest.raises(AttributeError, match=rf"{setting} .*fixed"):
                        setattr(metric, setting, 2)
        alike: dict[type, list[Metric]] = {}
        for metric in metrics.values():
            alike.setdefault(type(metric), []).append(metric)
        for group in alike.values():
            for other in group[1:]:
                with pytest.raises(ValueError, match="only counts of equal settings"):
                    group[0].merge_state(other)
