"""A batch takes the memory of one image: `update` goes image by image."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from semeda_fast.metrics import BoundaryF, BoundaryIoU, TrimapIoU

METRICS = [BoundaryIoU(70), BoundaryF(70), TrimapIoU(70, around_void=True)]
ALL = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: type(metric).__name__)
SIZE = (48, 64)


class Peak(TorchDispatchMode):
    """Bytes of all storages alive that were made under it, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf.untyped_storage(), known)
        return out

    def add(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        if storage._cdata in known | self.seen:
            return
        size, key = storage.nbytes(), storage._cdata
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.seen.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


def peak(metric: Any, preds: torch.Tensor, target: torch.Tensor) -> int:
    with Peak() as measure:
        metric.update(preds, target)
    return measure.peak


@ALL
@pytest.mark.parametrize("kind", ["labels", "logits"])
def test_memory_does_not_grow_with_the_batch(metric: Any, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 70, (8, *SIZE), generator=generator, dtype=torch.uint8)
    preds = target.flip(0) if kind == "labels" else torch.randn(8, 70, *SIZE, generator=generator)
    one, eight = peak(metric, preds[:1], target[:1]), peak(metric, preds, target)
    pixels = SIZE[0] * SIZE[1]
    assert one > 8 * pixels  # it sees what is allocated
    assert eight < 1.1 * one


SPACE = (24, 36, 40)


@pytest.mark.parametrize("name", ["iou", "f"])
def test_volumes_under_spacing_take_the_memory_of_one(name: str) -> None:
    spacing = (2.0, 1.0, 1.0)
    metric = BoundaryIoU(70, spacing=spacing) if name == "iou" else BoundaryF(70, tolerance=2, spacing=spacing)
    target = torch.randint(0, 70, (8, *SPACE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    one, eight = peak(metric, target.flip(0)[:1], target[:1]), peak(metric, target.flip(0), target)
    assert one > 8 * target[0].numel()
    assert eight < 1.1 * one


@ALL
@pytest.mark.parametrize("slice_dim", [2, 3, 4])
def test_a_volume_takes_the_memory_of_its_slices(metric: Any, slice_dim: int) -> None:
    kind = type(metric)(5, slice_dim=slice_dim)
    target = torch.randint(0, 5, (2, *SPACE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    few = target.narrow(slice_dim - 1, 0, 1)
    one, all_of_them = peak(kind, few.flip(0), few), peak(kind, target.flip(0), target)
    assert one > 8 * few[0].numel()
    assert all_of_them < 1.1 * one


@ALL
def test_planes_take_the_memory_of_one(metric: Any) -> None:
    many, one = (type(metric)(planes, mode="multilabel") for planes in (16, 1))
    target = torch.rand(4, 16, *SIZE, generator=torch.Generator().manual_seed(0)) < 0.5
    one_plane, all_of_them = peak(one, target.flip(0)[:, :1], target[:, :1]), peak(many, target.flip(0), target)
    assert one_plane > 8 * SIZE[0] * SIZE[1]
    assert all_of_them < 1.1 * one_plane
