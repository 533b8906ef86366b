"""Boundary metrics of label channels, overlapping planes and volumes: each equals what images and slow forms give."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from semeda_fast.metrics import BoundaryF, BoundaryIoU, TrimapIoU

VOID = -100
METRICS: dict[str, tuple[Any, dict[str, Any]]] = {
    "iou": (BoundaryIoU, {"width": 1}),
    "iou_ratio": (BoundaryIoU, {"dilation_ratio": 0.1}),
    "f": (BoundaryF, {"tolerance": 1}),
    "f_ratio": (BoundaryF, {"tolerance_ratio": 0.1}),
    "f_erosion": (BoundaryF, {"tolerance": 1, "contour": "erosion"}),
    "f_seam": (BoundaryF, {"tolerance": 1, "contour": "seam"}),
    "dice": (BoundaryF, {"tolerance": 1, "score": "dice"}),
    "trimap": (TrimapIoU, {"width": 2, "around_void": True}),
}
ALL = pytest.mark.parametrize(("metric", "options"), METRICS.values(), ids=METRICS.keys())
SPACED = ("iou", "iou_ratio", "f", "f_ratio", "f_erosion", "dice")


def blobs(seed: int, classes: int, *shape: int) -> Tensor:
    """Logits [N, classes, *space] whose largest makes blobs."""
    rng = np.random.default_rng(seed)
    sigma = (0, 0, *[1.2] * (len(shape) - 1))
    return torch.as_tensor(ndimage.gaussian_filter(rng.standard_normal((shape[0], classes, *shape[1:])), sigma))


def label_pair(seed: int, classes: int, *shape: int, void: bool = True) -> tuple[Tensor, Tensor]:
    """(logits [N,C,*space], target [N,*space]); void in blobs."""
    base = blobs(seed, classes, *shape)
    target = base.argmax(1)
    if void:
        target = target.masked_fill(blobs(seed + 100, 1, *shape)[:, 0] > 0.2, VOID)
    return base + 0.7 * blobs(seed + 200, classes, *shape), target


def plane_pair(seed: int, planes: int, *shape: int, void: bool = True) -> tuple[Tensor, Tensor]:
    """(logits [N,C,*space], target [N,C,*space] of 0 and 1); void differs from plane to plane."""
    base = blobs(seed, planes, *shape)
    target = (base > 0).long()
    if void:
        target = target.masked_fill(blobs(seed + 100, planes, *shape) > 0.2, VOID)
    return base + 0.7 * blobs(seed + 200, planes, *shape), target


def result(metric: Any, preds: Tensor, target: Tensor) -> np.ndarray:
    before = preds.clone(), target.clone()
    metric.update(preds, target)
    assert torch.equal(preds, before[0])
    assert torch.equal(target, before[1])
    return np.asarray(metric.compute())


def equal(actual: np.ndarray, expected: np.ndarray) -> None:
    """NaN equals NaN; something was scored, and not all of it is 0 or 1."""
    np.testing.assert_array_equal(actual, expected)
    assert ((expected > 0) & (expected < 1)).any()


# ----------------------------------------------------------------------------- a label channel


@ALL
def test_a_label_channel_is_dropped(metric: Any, options: dict[str, Any]) -> None:
    logits, target = label_pair(1, 3, 2, 15, 17)
    expected = result(metric(3, **options), logits, target)
    equal(result(metric(3, **options), logits, target[:, None]), expected)
    equal(result(metric(3, **options), logits.argmax(1), target[:, None]), expected)
    # As labels on both sides they are volumes of one slice, which is the image.
    equal(result(metric(3, **options), logits.argmax(1)[:, None], target[:, None]), expected)


@ALL
def test_a_label_channel_of_volumes_is_dropped(metric: Any, options: dict[str, Any]) -> None:
    logits, target = label_pair(2, 3, 2, 5, 9, 8)
    expected = result(metric(3, **options), logits, target)
    equal(result(metric(3, **options), logits, target[:, None]), expected)
    equal(result(metric(3, **options), logits.argmax(1), target[:, None]), expected)
    equal(result(metric(3, **options), logits.argmax(1), target), expected)


# ----------------------------------------------------------------------------- planes


@ALL
@pytest.mark.parametrize("shape", [(2, 15, 17), (2, 4, 9, 8)], ids=["images", "volumes"])
def test_each_plane_is_a_binary_map(metric: Any, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    logits, target = plane_pair(3, 4, *shape)
    target[:, 2] = 0
    logits[:, 2] = -1.0  # a plane with nothing in it
    many = metric(4, mode="multilabel", average="none", **options)
    scores = result(many, logits, target)
    single = [
        result(metric(2, average="none", **options), (logits[:, c] > 0).long(), target[:, c])[1] for c in range(4)
    ]
    equal(scores, np.array(single))
    assert np.isnan(scores[2])
    mean = result(metric(4, mode="multilabel", **options), logits, target)
    assert mean == pytest.approx(np.nanmean(scores), rel=1e-6)
    one = metric(1, mode="multilabel", **options)
    assert result(one, logits[:, :1], target[:, :1]) == scores[0]


@ALL
def test_what_planes_may_be(metric: Any, options: dict[str, Any]) -> None:
    logits, target = plane_pair(4, 3, 2, 12, 14, void=False)
    expected = result(metric(3, mode="multilabel", **options), logits, target)
    masks = logits > 0
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.uint16, torch.float32):
        equal(result(metric(3, mode="multilabel", **options), masks.to(dtype), target), expected)
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.uint64):
        equal(result(metric(3, mode="multilabel", **options), logits, target.to(dtype)), expected)
    half = metric(3, mode="multilabel", threshold=0.5, **options)
    equal(result(half, logits.sigmoid(), target), expected)
    other = metric(3, mode="multilabel", threshold=0.1, **options)
    assert result(other, logits, target) != expected


@ALL
def test_void_entries_of_one_plane_are_void_there_alone(metric: Any, options: dict[str, Any]) -> None:
    logits, target = plane_pair(5, 3, 2, 14, 16)
    make = lambda: metric(3, mode="multilabel", average="none", **options)  # noqa: E731
    expected = result(make(), logits, target)
    noise = torch.where(target == VOID, 1e6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)), 0)
    equal(result(make(), logits + noise, target), expected)
    more = target.clone()
    more[:, 1, 4:9] = VOID
    changed = result(make(), logits, more)
    assert changed[1] != expected[1]
    np.testing.assert_array_equal(changed[[0, 2]], expected[[0, 2]])
    shifted = target.masked_fill(target == VOID, 255)
    equal(result(metric(3, mode="multilabel", ignore_index=255, average="none", **options), logits, shifted), expected)
    # 2 is a plane's number here as well, and no plane loses its score to it.
    shifted = target.masked_fill(target == VOID, 2)
    equal(result(metric(3, mode="multilabel", ignore_index=2, average="none", **options), logits, shifted), expected)


def test_probabilities_above_zero_are_warned_of() -> None:
    logits, target = plane_pair(6, 2, 2, 12, 14)
    with pytest.warns(UserWarning, match=r"look like probabilities.*threshold=0.5"):
        BoundaryF(2, mode="multilabel").update(logits.sigmoid(), target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BoundaryF(2, mode="multilabel", threshold=0.5).update(logits.sigmoid(), target)
        BoundaryF(2, mode="multilabel").update(logits, target)
        BoundaryF(2, mode="multilabel").update((logits > 0).float(), target)
        BoundaryF(2, mode="multilabel").update(logits > 0, target)


# ----------------------------------------------------------------------------- volumes, slice by slice


@ALL
@pytest.mark.parametrize("slice_dim", [2, 3, 4])
def test_volumes_are_their_slices(metric: Any, options: dict[str, Any], slice_dim: int) -> None:
    logits, target = label_pair(7, 3, 2, 5, 9, 8)
    images = logits.movedim(slice_dim, 1).flatten(0, 1), target.movedim(slice_dim - 1, 1).flatten(0, 1)
    expected = result(metric(3, average="none", **options), *images)
    make = lambda: metric(3, slice_dim=slice_dim, average="none", **options)  # noqa: E731
    equal(result(make(), logits, target), expected)
    equal(result(make(), logits.argmax(1), target), expected)
    equal(result(make(), logits.contiguous(memory_format=torch.channels_last_3d), target), expected)
    planes, masks = plane_pair(8, 3, 2, 5, 9, 8)
    many = metric(3, slice_dim=slice_dim, mode="multilabel", average="none", **options)
    folded = [x.movedim(slice_dim, 1).flatten(0, 1) for x in (planes, masks)]
    equal(result(many, planes, masks), result(metric(3, mode="multilabel", average="none", **options), *folded))


def test_the_depth_is_the_default() -> None:
    logits, target = label_pair(9, 3, 2, 5, 9, 8)
    scores = [result(BoundaryF(3, tolerance=1, slice_dim=dim), logits, target) for dim in (2, 3, 4)]
    assert result(BoundaryF(3, tolerance=1), logits, target) == scores[0]
    assert len(set(map(float, scores))) == 3


# ----------------------------------------------------------------------------- volumes, true distances

SPACINGS = [(1.0, 1.0, 1.0), (3.0, 0.7, 0.7), (0.5, 2.0, 1.25)]


def distance_to(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Of each voxel's centre to the nearest of the mask."""
    return ndimage.distance_transform_edt(~mask, sampling=spacing) if mask.any() else np.full(mask.shape, np.inf)


def slow_band(mask: np.ndarray, void: np.ndarray, width: float, spacing: tuple[float, ...]) -> np.ndarray:
    """The mask's voxels within `width` of what is neither mask nor void; all outside of the volume is that."""
    other = np.pad(~(mask | void), 1, constant_values=True)
    return mask & (distance_to(other, spacing)[1:-1, 1:-1, 1:-1] <= width + 1e-6)


def slow_contour(mask: np.ndarray, void: np.ndarray, contour: str) -> np.ndarray:
    window = ndimage.generate_binary_structure(3, 1 if contour == "erosion" else 3)
    return mask & ~ndimage.binary_erosion(mask | void, window, border_value=contour == "rim")


def volumes(logits: Tensor, target: Tensor, classes: int) -> list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Of each class, (pred, target, void) of each volume."""
    labels, truth = logits.argmax(1).numpy(), target.numpy()
    pairs = list(zip(labels, truth, strict=True))
    return [[((p == c) & (t != VOID), t == c, t == VOID) for p, t in pairs] for c in range(classes)]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("width", [None, 0.02, 0.15, 2.0, 3.5, 4.2, 1000.0])
def test_bands_with_spacing(spacing: tuple[float, ...], width: float | None) -> None:
    """Ties too: 4.2 is six voxels of 0.7, whose square rounds."""
    logits, target = label_pair(10, 3, 2, 7, 12, 11)
    ratio = width if width is not None and width < 1 else None
    options = {"dilation_ratio": ratio} if ratio else {"width": width} if width else {}
    diagonal = math.hypot(*(n * s for n, s in zip((7, 12, 11), spacing, strict=True)))
    reach = width if width is not None and ratio is None else max(min(spacing), (ratio or 0.02) * diagonal)
    expected = []
    for pieces in volumes(logits, target, 3):
        bands = [[slow_band(mask, void, reach, spacing) for mask in (p, t)] for p, t, void in pieces]
        expected.append(sum((a & b).sum() for a, b in bands) / sum((a | b).sum() for a, b in bands))
    actual = result(BoundaryIoU(3, spacing=spacing, average="none", **options), logits, target)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("contour", ["rim", "erosion"])
@pytest.mark.parametrize("tolerance", [0.0, 0.4, 1.4, 2.0, 3.0, "0.1", 1e300])
def test_contours_with_spacing(spacing: tuple[float, ...], contour: str, tolerance: Any) -> None:
    logits, target = label_pair(11, 3, 2, 7, 12, 11)
    diagonal = math.hypot(*(n * s for n, s in zip((7, 12, 11), spacing, strict=True)))
    reach = 0.1 * diagonal if tolerance == "0.1" else tolerance
    options = {"tolerance_ratio": 0.1} if tolerance == "0.1" else {"tolerance": tolerance}
    scores: dict[str, list[float]] = {"f": [], "precision": [], "recall": [], "dice": []}
    for pieces in volumes(logits, target, 3):
        counts = np.zeros(4)
        for p, t, void in pieces:
            a, b = slow_contour(p, void, contour), slow_contour(t, void, contour)
            near_a, near_b = (distance_to(x, spacing) <= reach + 1e-6 for x in (a, b))
            counts += [(a & near_b).sum(), a.sum(), (b & near_a).sum(), b.sum()]
        precision, recall = counts[0] / counts[1], counts[2] / counts[3]
        scores["precision"].append(precision)
        scores["recall"].append(recall)
        scores["f"].append(2 * precision * recall / (precision + recall))
        scores["dice"].append((counts[0] + counts[2]) / (counts[1] + counts[3]))
    for score, expected in scores.items():
        metric = BoundaryF(3, spacing=spacing, contour=contour, score=score, average="none", **options)
        np.testing.assert_allclose(result(metric, logits, target), expected, rtol=1e-6)


@pytest.mark.parametrize("name", SPACED)
def test_planes_with_spacing(name: str) -> None:
    metric, options = METRICS[name]
    options = {**options, "spacing": (1.0, 0.7, 0.9), "average": "none"}
    logits, target = plane_pair(12, 3, 2, 6, 9, 8)
    scores = result(metric(3, mode="multilabel", **options), logits, target)
    single = [result(metric(2, **options), (logits[:, c] > 0).long(), target[:, c])[1] for c in range(3)]
    equal(scores, np.array(single))


@pytest.mark.parametrize("name", SPACED)
def test_spacing_has_a_unit(name: str) -> None:
    """Millimetres or micrometres: the same score, where lengths are given in the same unit."""
    metric, options = METRICS[name]
    logits, target = label_pair(13, 3, 1, 6, 9, 8)
    scaled = {k: 1000.0 * v if k in ("tolerance", "width") else v for k, v in options.items()}
    one = result(metric(3, spacing=(1.0, 0.5, 0.7), **options), logits, target)
    assert result(metric(3, spacing=(1000.0, 500.0, 700.0), **scaled), logits, target) == one
    assert result(metric(3, spacing=np.array([1.0, 0.5, 0.7]), **options), logits, target) == one
    assert (
        result(metric(3, spacing=torch.tensor([1.0, 0.5, 0.7], dtype=torch.float64), **options), logits, target) == one
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6, 7])
def test_a_distance_that_rounds_reaches_what_it_says(steps: int) -> None:
    """Three voxels of 0.1 are 0.30000000000000004 in floating point, and 0.3 / 0.1 is below 3."""
    logits, target = label_pair(18, 3, 1, 9, 16, 15)
    tenth, length = (0.1, 0.1, 0.1), steps / 10
    one = (1.0, 1.0, 1.0)
    equal(
        result(BoundaryIoU(3, width=length, spacing=tenth), logits, target),
        result(BoundaryIoU(3, width=steps, spacing=one), logits, target),
    )
    logits, target = far_apart()
    actual = result(BoundaryF(3, tolerance=length, spacing=tenth, average="none"), logits, target)
    np.testing.assert_array_equal(
        actual, result(BoundaryF(3, tolerance=steps, spacing=one, average="none"), logits, target)
    )
    # One voxel of class 1, and that of the target `steps` away along one axis of three, or 3 and 4 across for 5.
    assert actual[1] == (1.0 if steps >= 5 else 0.0)
    assert actual[2] == (1.0 if steps >= 3 else 0.0)


def far_apart() -> tuple[Tensor, Tensor]:
    """Single voxels: of class 1 apart by (3, 4) in a plane, of class 2 by 3 along the last axis."""
    pred, target = torch.zeros(2, 1, 9, 16, 15, dtype=torch.int64)
    pred[0, 4, 2, 2], target[0, 4, 5, 6] = 1, 1
    pred[0, 4, 12, 5], target[0, 4, 12, 8] = 2, 2
    return pred, target


# ----------------------------------------------------------------------------- errors

IMAGES = torch.zeros(2, 4, 5, dtype=torch.int64)
VOLUMES = torch.zeros(2, 6, 4, 5, dtype=torch.int64)
LOGITS3D = torch.zeros(2, 3, 6, 4, 5)
EACH = pytest.mark.parametrize("metric", [BoundaryIoU, BoundaryF, TrimapIoU], ids=lambda cls: cls.__name__)


@EACH
@pytest.mark.parametrize(
    ("preds", "target", "kind", "words"),
    [
        (torch.zeros(2, 3, 4, 5), VOLUMES, ValueError, r"\[N,H,W\] or \[N,1,H,W\], got shape \(2, 6, 4, 5\); volumes"),
        (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5).long(), ValueError, r"target.argmax\(1\).*mode='multilabel'"),
        (IMAGES, torch.zeros(2, 3, 4, 5).long(), ValueError, r"\[N,H,W\].*got shape \(2, 3, 4, 5\)"),
        (LOGITS3D, IMAGES, ValueError, r"target must be labels \[N,D,H,W\] or \[N,1,D,H,W\], got shape \(2, 4, 5\)"),
        (LOGITS3D, VOLUMES[:, None].float(), TypeError, "integer dtype, got torch.float32"),
        (LOGITS3D[:, :2], VOLUMES, ValueError, r"preds \[N,C,D,H,W\] must have C = num_classes = 3.*\(2, 2, 6, 4, 5\)"),
        (LOGITS3D[:, :, :3], VOLUMES, ValueError, r"N, D, H and W.*target.shape\[-3:\], mode='trilinear'"),
        (VOLUMES[:, :3], VOLUMES, ValueError, r"agree in N, D, H and W"),
        (
            VOLUMES[:, None],
            VOLUMES,
            TypeError,
            r"floating-point logits.*pass labels as \[N,D,H,W\], preds.squeeze\(1\)",
        ),
        (VOLUMES.float(), VOLUMES, ValueError, r"target must be labels \[N,H,W\]"),
        (LOGITS3D, VOLUMES[:, None, None], ValueError, r"target must be labels \[N,D,H,W\] or \[N,1,D,H,W\]"),
        (LOGITS3D, VOLUMES + 255, ValueError, r"does 255 mark void.*ignore_index=255"),
        (LOGITS3D, VOLUMES + 7, ValueError, r"from 7 to 7, 240 of them"),
    ],
)
def test_shapes_that_mean_nothing(metric: Any, preds: Any, target: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        metric(3).update(preds, target)


@EACH
def test_one_hot_maps_are_no_volumes(metric: Any) -> None:
    """[N,C,H,W] of C classes has the shape of C slices, and would give a score of nothing."""
    logits, target = label_pair(14, 3, 2, 12, 14, void=False)
    one_hot = lambda labels: torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)  # noqa: E731
    with pytest.raises(ValueError, match=r"one-hot; pass labels, preds.argmax\(1\) and target.argmax\(1\)"):
        metric(3).update(one_hot(logits.argmax(1)), one_hot(target))
    deep, labels = label_pair(15, 3, 2, 3, 12, 14, void=False)  # a volume that is three slices deep
    metric(3).update(deep.argmax(1), labels)


@EACH
@pytest.mark.parametrize(
    ("preds", "target", "kind", "words"),
    [
        (
            IMAGES,
            torch.zeros(2, 3, 4, 5).long(),
            ValueError,
            r"preds must be planes .* C = num_classes = 3.*multiclass",
        ),
        (
            torch.zeros(2, 3, 4, 5),
            IMAGES,
            ValueError,
            r"target must be planes.*got shape \(2, 4, 5\); labels of one map",
        ),
        (
            torch.zeros(2, 3, 4, 5),
            IMAGES[:, None],
            ValueError,
            r"target must be planes.*\(2, 1, 4, 5\); labels of one map",
        ),
        (torch.zeros(2, 2, 4, 5), torch.zeros(2, 3, 4, 5).long(), ValueError, r"preds must be planes.*\(2, 2, 4, 5\)$"),
        (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5), TypeError, r"target.long\(\).*target > 0.5"),
        (torch.zeros(2, 3, 2, 5), torch.zeros(2, 3, 4, 5).long(), ValueError, r"one shape.*mode='bilinear'"),
        (LOGITS3D[..., :2], torch.zeros(2, 3, 6, 4, 5).long(), ValueError, r"one shape.*mode='trilinear'"),
        (
            torch.zeros(2, 3, 4, 5),
            torch.zeros(2, 3, 4, 5).bool().to("meta"),
            ValueError,
            "on one device, got cpu and meta",
        ),
        (
            torch.zeros(2, 3, 4, 5),
            torch.tensor([0, 2, 0])[None, :, None, None].expand(2, 3, 4, 5),
            ValueError,
            r"target\[:, 1\] must hold labels from 0 to 1 or ignore_index=-100; .*from 2 to 2, 40",
        ),
        (
            torch.tensor([0, 0, 255])[None, :, None, None].expand(2, 3, 4, 5),
            torch.zeros(2, 3, 4, 5).bool(),
            ValueError,
            r"preds\[:, 2\] .*0 and 255\? then pass mask // 255",
        ),
        (torch.zeros(2, 3, 4, 5), None, TypeError, "target must be a torch.Tensor, got NoneType"),
    ],
)
def test_planes_that_mean_nothing(metric: Any, preds: Any, target: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        metric(3, mode="multilabel").update(preds, target)


@EACH
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "binary"}, r"mode='multilabel', num_classes=1"),
        ({"mode": "multi"}, "mode must be one of 'multiclass', 'multilabel', got 'multi'"),
        ({"mode": "multilabel", "num_classes": 0}, "number of planes, must be an integer of at least 1, got 0"),
        ({"mode": "multilabel", "ignore_index": 1}, "ignore_index=1 is what planes"),
        ({"mode": "multilabel", "threshold": "0.5"}, "threshold must be a finite number"),
        ({"mode": "multilabel", "threshold": math.nan}, "threshold must be a finite number"),
        ({"threshold": 0.5}, "threshold=0.5 belongs to mode='multilabel'"),
        ({"slice_dim": 1}, r"slice_dim must be 2 \(depth\), 3 \(height\) or 4 \(width\).*got 1"),
        ({"slice_dim": 2.0}, "slice_dim must be 2"),
    ],
)
def test_bad_options_of_tasks(metric: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        metric(**{"num_classes": 3, **options})


@pytest.mark.parametrize(
    ("metric", "options", "words"),
    [
        (
            BoundaryF,
            {"tolerance": 1, "spacing": (1, 1)},
            r"three positive numbers \(dz, dy, dx\).*images have no spacing",
        ),
        (BoundaryF, {"tolerance": 1, "spacing": 2.0}, "three positive numbers .*got 2.0"),
        (BoundaryIoU, {"spacing": (1, 0, 1)}, "three positive numbers"),
        (BoundaryIoU, {"spacing": (1, math.inf, 1)}, "three positive numbers"),
        (BoundaryF, {"spacing": (1, 1, 1)}, r"spacing=\(1.0, 1.0, 1.0\) pass tolerance, .*or tolerance_ratio"),
        (BoundaryF, {"spacing": (1, 1, 1), "tolerance": -1}, "at least 0 .* got tolerance=-1"),
        (
            BoundaryF,
            {"spacing": (1, 1, 1), "tolerance": 1, "slice_dim": 3},
            "not cut into slices; leave slice_dim=3 out",
        ),
        (BoundaryF, {"spacing": (1, 1, 1), "tolerance": 1, "contour": "seam"}, "contour='seam' is of images"),
        (BoundaryF, {"contour": "edge"}, "contour must be one of 'rim', 'erosion', 'seam', got 'edge'"),
        (
            BoundaryIoU,
            {"spacing": (2, 1, 1), "width": 0.5},
            r"0.5 would reach no neighbour; pass at least 1.0, .*dilation_r",
        ),
        (BoundaryIoU, {"spacing": (2, 1, 1), "width": math.nan}, "width must be a positive finite number"),
    ],
)
def test_bad_spacings(metric: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        metric(3, **options)


@pytest.mark.parametrize("mode", ["multiclass", "multilabel"])
def test_spacing_of_images(mode: str) -> None:
    logits, target = label_pair(16, 3, 2, 9, 8) if mode == "multiclass" else plane_pair(16, 3, 2, 9, 8)
    for metric in (
        BoundaryIoU(3, spacing=(1, 1, 1), mode=mode),
        BoundaryF(3, tolerance=1, spacing=(1, 1, 1), mode=mode),
    ):
        with pytest.raises(ValueError, match=r"measures volumes, and target is images.*leave spacing out"):
            metric.update(logits, target)


@EACH
@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 6), (2, 3, 0, 5, 6), (2, 3, 4, 0, 6)])
def test_empty_volumes(metric: Any, shape: tuple[int, ...]) -> None:
    """Nothing to score is NaN, as for images."""
    measure = metric(3, mode="multilabel")
    measure.update(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool))
    assert measure.compute().isnan()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 7), (2, 3, 1, 1), (1, 2, 2, 2)])
def test_tiny_volumes(shape: tuple[int, ...]) -> None:
    logits, target = label_pair(17, 2, *shape, void=False)
    for spacing in SPACINGS:
        pieces = volumes(logits, target, 2)
        width = 2.0
        bands = [[[slow_band(m, v, width, spacing) for m in (p, t)] for p, t, v in each] for each in pieces]
        with np.errstate(invalid="ignore"):
            expected = [
                np.float64(sum((a & b).sum() for a, b in each)) / sum((a | b).sum() for a, b in each) for each in bands
            ]
        actual = result(BoundaryIoU(2, width=width, spacing=spacing, average="none"), logits, target)
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        BoundaryF(2, tolerance=1, spacing=spacing, contour="erosion").update(logits, target)
