"""`BoundaryF` beside the contour score F of DAVIS (Perazzi et al., CVPR 2016): the same tolerance, other contours."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from semeda_fast.metrics import BoundaryF

SIZE = (120, 160)  # diagonal 200: 0.008 of it is 1.6 pixels, so 2


def davis_contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower right neighbour: one pixel wide, on either side."""
    out = np.zeros(mask.shape, bool)
    out[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    out[:-1] |= mask[:-1] != mask[1:]
    out[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return out


def davis_f(pred: np.ndarray, target: np.ndarray, part: float = 0.008) -> float:
    """F of one object in one image: the part of each contour within a disk around the other."""
    reach = math.ceil(part * math.hypot(*target.shape))
    contours = davis_contour(pred), davis_contour(target)
    totals = [int(contour.sum()) for contour in contours]
    if totals == [0, 0]:
        return 1.0
    if 0 in totals:
        return 0.0  # precision and recall are 0 and 1, or 1 and 0
    far = [ndimage.distance_transform_edt(~contour) for contour in contours]
    precision = (contours[0] & (far[1] <= reach)).sum() / totals[0]
    recall = (contours[1] & (far[0] <= reach)).sum() / totals[1]
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def ours(pred: np.ndarray, target: np.ndarray, **tolerance: float) -> float:
    """F of class 1, the object, as `BoundaryF` has it."""
    metric = BoundaryF(2, average="none", **tolerance)
    metric.update(torch.as_tensor(pred.astype(np.int64))[None], torch.as_tensor(target.astype(np.int64))[None])
    return float(metric.compute()[1])


def objects(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A blobby object and a prediction of it that strays by a few pixels."""
    rng = np.random.default_rng(seed)
    height = ndimage.gaussian_filter(rng.standard_normal(SIZE), 8)
    stray = ndimage.gaussian_filter(rng.standard_normal(SIZE), 4)
    return height + 0.25 * stray > 0.02, height > 0.02


@pytest.mark.parametrize("seed", range(12))
def test_the_ratio_is_the_tolerance_of_davis(seed: int) -> None:
    """0.008 of the diagonal, rounded up; for objects larger than that the scores lie within 0.02."""
    pred, target = objects(seed)
    score = ours(pred, target, tolerance_ratio=0.008)
    assert score == ours(pred, target, tolerance=2)
    assert score != ours(pred, target, tolerance=1)
    assert davis_f(pred, target) == pytest.approx(score, abs=0.02)


def test_the_ratio_follows_each_image() -> None:
    pred, target = objects(3)
    halves = pred[:60, :80], target[:60, :80]  # diagonal 100: one pixel at 0.01, where the whole has two
    assert ours(*halves, tolerance_ratio=0.01) == ours(*halves, tolerance=1)
    assert ours(pred, target, tolerance_ratio=0.01) == ours(pred, target, tolerance=2)
    assert ours(pred, target, tolerance_ratio=0.0055) == ours(pred, target, tolerance=2)  # 1.1 pixels, rounded up


def test_how_the_scores_differ() -> None:
    """What the docstring of `BoundaryF` says of DAVIS."""
    differences = [davis_f(*pair) - ours(*pair, tolerance_ratio=0.008) for pair in map(objects, range(12))]
    assert min(differences) < -0.004
    assert max(differences) > 0.004
    nothing = np.zeros(SIZE, bool)
    for mask in (nothing, ~nothing):
        assert davis_f(mask, mask) == 1
        assert math.isnan(ours(mask, mask, tolerance_ratio=0.008))
    one, pixel = objects(0)[1], nothing.copy()
    assert davis_f(one, nothing) == ours(one, nothing, tolerance_ratio=0.008) == 0
    pixel[50, 50] = True
    moved = np.roll(pixel, (2, 2), (0, 1))
    assert davis_f(pixel, moved) == 0.25  # one of the four pixels of its seam is near
    assert ours(pixel, moved, tolerance_ratio=0.008) == 0
