"""Which setting is which published measure: Boundary IoU, the contour score of DAVIS, the surface Dice of MONAI.

Each measure is written from its definition with SciPy; where its package is installed, the package is asked, too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from semeda_fast.metrics import BoundaryF, BoundaryIoU

Masks = np.ndarray  # bool [objects, *space]
IMAGE, VOLUME = (61, 83), (9, 26, 23)
SEEDS = pytest.mark.parametrize("seed", range(6))


def masks(seed: int, *space: int, objects: int = 3, sigma: float = 2.0) -> tuple[Masks, Masks]:
    """(pred, target) of overlapping objects: blobs that touch the frame, or at even seeds scattered pixels."""
    rng = np.random.default_rng(seed)
    if seed % 2 == 0:
        noise, other, coin = rng.random((3, objects, *space))
        target = noise < 0.004
        return (target & (coin < 0.5)) | (other < 0.004), target
    blur = (0.0, *[sigma] * len(space))
    base = ndimage.gaussian_filter(rng.standard_normal((objects, *space)), blur)
    stray = ndimage.gaussian_filter(rng.standard_normal((objects, *space)), blur)
    return base + 0.6 * stray > 0.4 * base.std(), base > 0.4 * base.std()


def ours(metric: Any, pred: Masks, target: Masks, **options: Any) -> np.ndarray:
    """The score of each object."""
    measure = metric(len(pred), mode="multilabel", average="none", **options)
    measure.update(torch.as_tensor(pred)[None], torch.as_tensor(target)[None])
    return np.atleast_1d(np.asarray(measure.compute(), dtype=np.float64))  # torchmetrics makes one score 0-d


def agree(actual: np.ndarray, expected: Sequence[float]) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
    assert len({round(float(score), 4) for score in actual}) > 1  # not all 0 or 1


# ----------------------------------------------------------------------------- Boundary IoU, Cheng et al., CVPR 2021


def band(mask: np.ndarray, part: float) -> np.ndarray:
    """Pixels of a mask that lie within `part` of the diagonal from its outside, in steps to the 8 neighbours."""
    width = max(1, round(part * math.hypot(*mask.shape)))
    steps = ndimage.distance_transform_cdt(np.pad(mask, 1), metric="chessboard")[1:-1, 1:-1]
    return mask & (steps <= width)


def band_by_opencv(mask: np.ndarray, part: float) -> np.ndarray:
    """The same by the library that the authors use: what a repeated erosion takes away."""
    cv2 = pytest.importorskip("cv2")
    width = max(1, round(part * math.hypot(*mask.shape)))
    padded = np.pad(mask.astype(np.uint8), 1)
    return mask & (cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1] == 0)


@SEEDS
@pytest.mark.parametrize("part", [0.02, 0.005, 0.025])  # of 103 pixels: 2, 1 and, rounded up, 3
@pytest.mark.parametrize("form", [band, band_by_opencv])
def test_boundary_iou(seed: int, part: float, form: Any) -> None:
    pred, target = masks(seed, *IMAGE)
    expected = []
    for p, t in zip(pred, target, strict=True):
        a, b = form(p, part), form(t, part)
        expected.append((a & b).sum() / (a | b).sum())
    agree(ours(BoundaryIoU, pred, target, dilation_ratio=part), expected)


# ----------------------------------------------------------------------------- F of DAVIS, Perazzi et al., CVPR 2016


def seam(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower right neighbour: one pixel wide, on either side."""
    out = np.zeros(mask.shape, bool)
    out[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    out[:-1] |= mask[:-1] != mask[1:]
    out[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return out


def davis_f(pred: np.ndarray, target: np.ndarray, part: float = 0.008) -> float:
    """F of one object in one image: the part of each contour within a disk around the other."""
    reach = math.ceil(part * math.hypot(*target.shape))
    contours = seam(pred), seam(target)
    totals = [int(contour.sum()) for contour in contours]
    if totals == [0, 0]:
        return 1.0
    if 0 in totals:
        return 0.0  # precision and recall are 0 and 1, or 1 and 0
    far = [ndimage.distance_transform_edt(~contour) for contour in contours]
    precision = (contours[0] & (far[1] <= reach)).sum() / totals[0]
    recall = (contours[1] & (far[0] <= reach)).sum() / totals[1]
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


DAVIS = {"contour": "seam", "tolerance_ratio": 0.008}


@SEEDS
@pytest.mark.parametrize("space", [IMAGE, (120, 160), (40, 30)])
def test_contour_score_of_davis(seed: int, space: tuple[int, int]) -> None:
    pred, target = masks(seed, *space)
    agree(ours(BoundaryF, pred, target, **DAVIS), [davis_f(*pair) for pair in zip(pred, target, strict=True)])


def test_where_davis_differs() -> None:
    """What the guide says: an object without a contour on either side, and the mean over images."""
    nothing, one = np.zeros((1, 20, 30), bool), np.zeros((1, 20, 30), bool)
    one[0, 5:15, 5:15] = True
    for same in (nothing, ~nothing):
        assert davis_f(same[0], same[0]) == 1
        assert np.isnan(ours(BoundaryF, same, same, **DAVIS)).all()
    assert davis_f(one[0], nothing[0]) == ours(BoundaryF, one, nothing, **DAVIS)[0] == 0
    assert davis_f(nothing[0], one[0]) == ours(BoundaryF, nothing, one, **DAVIS)[0] == 0


def test_the_ratio_follows_each_image() -> None:
    """Rounded up to whole pixels, as DAVIS does."""
    pred, target = masks(3, 120, 160)  # diagonal 200
    halves = pred[:, :60, :80], target[:, :60, :80]  # diagonal 100: one pixel at 0.01, where the whole has two
    for pair, ratio, tolerance in (
        (halves, 0.01, 1),
        ((pred, target), 0.01, 2),
        ((pred, target), 0.0055, 2),  # 1.1 pixels
        ((pred, target), 0.008, 2),
    ):
        expected = ours(BoundaryF, *pair, tolerance=tolerance)
        assert (ours(BoundaryF, *pair, tolerance_ratio=ratio) == expected).all()
        assert (ours(BoundaryF, *pair, tolerance=tolerance + 1) != expected).all()


@pytest.mark.parametrize("seed", [1, 3, 5])
def test_the_rim_is_another_contour(seed: int) -> None:
    """What the guide says: for objects larger than the tolerance the default is near DAVIS's score, not equal."""
    pred, target = masks(seed, 120, 160, sigma=6.0)
    rim, seams = (ours(BoundaryF, pred, target, tolerance_ratio=0.008, contour=name) for name in ("rim", "seam"))
    assert (rim != seams).all()
    assert np.abs(rim - seams).max() < 0.03


@SEEDS
def test_seams_of_labels_are_seams_of_their_masks(seed: int) -> None:
    """As classes of one map, more of them than a word has bits, among them pixels on the seams of many."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 70, (11, 13)).repeat(3, 0).repeat(3, 1)
    pred = np.where(rng.random(target.shape) < 0.9, target, rng.integers(0, 70, target.shape))
    measure = BoundaryF(70, average="none", **DAVIS)
    measure.update(torch.as_tensor(pred)[None], torch.as_tensor(target)[None])
    expected = [davis_f(pred == c, target == c) if ((pred == c) | (target == c)).any() else math.nan for c in range(70)]
    agree(np.asarray(measure.compute(), dtype=np.float64), expected)


def test_seams_end_at_void() -> None:
    target = torch.zeros(1, 9, 12, dtype=torch.int64)
    target[:, :, 6:] = 1
    clear = BoundaryF(2, **DAVIS)
    clear.update(target, target)
    assert clear.total_target.tolist() == [9, 9]
    target[:, 4] = -100
    measure = BoundaryF(2, **DAVIS)
    measure.update(target.clamp(min=0), target)
    # Row 4 is void, and row 3 has no lower neighbour that is valid: column 5 of the eight valid rows.
    assert measure.total_target.tolist() == [8, 8]
    assert measure.compute() == 1


# ----------------------------------------------------------------------------- surface Dice of MONAI (Seidlitz et al.)

MONAI = {"contour": "erosion", "score": "dice"}
SPACINGS = [(1.0, 1.0, 1.0), (2.5, 0.8, 0.8), (0.9, 1.7, 1.1)]


def surface_dice(pred: np.ndarray, target: np.ndarray, tolerance: float, spacing: tuple[float, ...]) -> float:
    """Part of the surfaces' voxels, of both, that lie within the tolerance of the other surface."""
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (pred, target)]
    total = sum(surface.sum() for surface in surfaces)
    if total == 0:
        return math.nan
    if not all(surface.any() for surface in surfaces):
        return 0.0
    far = [ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces]
    hits = (surfaces[0] & (far[1] <= tolerance + 1e-6)).sum() + (surfaces[1] & (far[0] <= tolerance + 1e-6)).sum()
    return hits / total


def surface_dice_of_monai(pred: Masks, target: Masks, tolerance: float, spacing: tuple[float, ...]) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports, and of objects that are not there
        metrics = pytest.importorskip("monai.metrics")
        out = metrics.compute_surface_dice(
            torch.as_tensor(pred)[None],
            torch.as_tensor(target)[None],
            class_thresholds=[tolerance] * len(pred),
            include_background=True,
            spacing=spacing,
        )
    return out[0].double().numpy()


@SEEDS
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0, 3.1])
def test_surface_dice_of_volumes(seed: int, spacing: tuple[float, ...], tolerance: float) -> None:
    pred, target = masks(seed, *VOLUME, sigma=1.5)
    actual = ours_of_volume(pred, target, tolerance, spacing)
    agree(actual, [surface_dice(p, t, tolerance, spacing) for p, t in zip(pred, target, strict=True)])


@SEEDS
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.0, 3.1])
def test_surface_dice_of_volumes_as_monai_has_it(seed: int, spacing: tuple[float, ...], tolerance: float) -> None:
    pred, target = masks(seed, *VOLUME, sigma=1.5)
    actual = ours_of_volume(pred, target, tolerance, spacing)
    agree(actual, surface_dice_of_monai(pred, target, tolerance, spacing))


def ours_of_volume(pred: Masks, target: Masks, tolerance: float, spacing: tuple[float, ...]) -> np.ndarray:
    return ours(BoundaryF, pred, target, tolerance=tolerance, spacing=spacing, **MONAI)


@SEEDS
@pytest.mark.parametrize("tolerance", [0, 1, 2.5])
def test_surface_dice_of_images(seed: int, tolerance: float) -> None:
    pred, target = masks(seed, *IMAGE)
    actual = ours(BoundaryF, pred, target, tolerance=tolerance, **MONAI)
    agree(actual, [surface_dice(p, t, tolerance, (1.0, 1.0)) for p, t in zip(pred, target, strict=True)])
    agree(actual, surface_dice_of_monai(pred, target, tolerance, (1.0, 1.0)))


def test_surface_dice_of_what_is_not_there() -> None:
    nothing, one = np.zeros((1, *VOLUME), bool), np.zeros((1, *VOLUME), bool)
    one[0, 2:7, 5:15, 5:15] = True
    for pred, target in ((nothing, one), (one, nothing), (nothing, nothing), (one, one), (~nothing, ~nothing)):
        actual = ours_of_volume(pred, target, 1.0, SPACINGS[1])
        expected = surface_dice(pred[0], target[0], 1.0, SPACINGS[1])
        np.testing.assert_equal(actual, [expected])
