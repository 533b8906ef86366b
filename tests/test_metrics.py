"""The boundary metrics against slow forms, hand-made cases and their error paths."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from semeda_fast.metrics import BoundaryF, BoundaryIoU, TrimapIoU

VOID = -100
METRICS = (BoundaryIoU, BoundaryF, TrimapIoU)
ALL = pytest.mark.parametrize("metric", METRICS, ids=lambda cls: cls.__name__)


# ----------------------------------------------------------------------------- slow forms


def slow_boundary_iou(preds: np.ndarray, targets: np.ndarray, classes: int, width: int | None, ratio: float) -> Any:
    """As in the authors' code: mask minus its iterated 3x3 erosion, the frame being background."""
    inter, union = np.zeros(classes), np.zeros(classes)
    for pred, target in zip(preds, targets, strict=True):
        void = target == VOID
        d = width or max(1, round(ratio * math.hypot(*target.shape)))
        for c in range(classes):
            bands = []
            for labels in (pred, target):
                mask = (labels == c) & ~void
                eroded = ndimage.binary_erosion(mask | void, np.ones((3, 3)), iterations=d, border_value=0)
                bands.append(mask & ~eroded)
            inter[c] += (bands[0] & bands[1]).sum()
            union[c] += (bands[0] | bands[1]).sum()
    with np.errstate(invalid="ignore"):
        return inter / union


def slow_trimap_iou(preds: np.ndarray, targets: np.ndarray, classes: int, width: int, around_void: bool) -> Any:
    """Pixel by pixel."""
    inter, union = np.zeros(classes), np.zeros(classes)
    for pred, target in zip(preds, targets, strict=True):
        height, breadth = target.shape
        yy, xx = np.mgrid[:height, :breadth]
        for y in range(height):
            for x in range(breadth):
                if target[y, x] == VOID:
                    continue
                disk = target[(yy - y) ** 2 + (xx - x) ** 2 <= width**2]
                other = (disk != VOID) & (disk != target[y, x])
                if other.any() or (around_void and (disk == VOID).any()):
                    a, b = pred[y, x], target[y, x]
                    inter[a] += a == b
                    for c in {int(a), int(b)}:
                        union[c] += 1
    with np.errstate(invalid="ignore"):
        return inter / union


def slow_contour(labels: np.ndarray, void: np.ndarray, c: int) -> np.ndarray:
    """Pixel by pixel, over the 8 neighbours."""
    height, width = labels.shape
    out = np.zeros((height, width), bool)
    for y in range(height):
        for x in range(width):
            if void[y, x] or labels[y, x] != c:
                continue
            for v in range(max(0, y - 1), min(height, y + 2)):
                for u in range(max(0, x - 1), min(width, x + 2)):
                    out[y, x] |= not void[v, u] and labels[v, u] != c
    return out


def slow_boundary_f(preds: np.ndarray, targets: np.ndarray, classes: int, tolerance: float) -> dict[str, Any]:
    """Euclidean distance transforms per class."""
    counts = np.zeros((4, classes))
    for pred, target in zip(preds, targets, strict=True):
        void = target == VOID
        for c in range(classes):
            a, b = slow_contour(pred, void, c), slow_contour(target, void, c)
            far = np.full(a.shape, np.inf)
            to_a = ndimage.distance_transform_edt(~a) if a.any() else far
            to_b = ndimage.distance_transform_edt(~b) if b.any() else far
            slack = 1e-6
            counts[:, c] += [
                (a & (to_b <= tolerance + slack)).sum(),
                a.sum(),
                (b & (to_a <= tolerance + slack)).sum(),
                b.sum(),
            ]
    scores: dict[str, list[float]] = {"f": [], "precision": [], "recall": []}
    for hit_a, all_a, hit_b, all_b in counts.T:
        p, r = hit_a / all_a if all_a else 0.0, hit_b / all_b if all_b else 0.0
        absent = all_a + all_b == 0
        scores["precision"].append(math.nan if absent else p)
        scores["recall"].append(math.nan if absent else r)
        scores["f"].append(math.nan if absent else (2 * p * r / (p + r) if p + r else 0.0))
    return {name: np.array(values) for name, values in scores.items()}


def random_maps(seed: int, classes: int, size: tuple[int, int], n: int = 2, void: bool = True) -> tuple[Any, Any]:
    """Blobs of `classes` labels with blobs of void, and a prediction that differs in places."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((n, classes, *size)), (0, 0, 1.5, 1.5))
    target = noise.argmax(1)
    pred = (noise + 0.6 * ndimage.gaussian_filter(rng.standard_normal(noise.shape), (0, 0, 1, 1))).argmax(1)
    if void:
        hidden = ndimage.gaussian_filter(rng.standard_normal((n, *size)), (0, 1, 1)) > 0.25
        target = np.where(hidden, VOID, target)
    return pred, target


def score(metric: Any, pred: Any, target: Any) -> np.ndarray:
    metric.update(torch.as_tensor(np.asarray(pred)), torch.as_tensor(np.asarray(target)))
    return np.asarray(metric.compute())


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=0)  # NaN equals NaN


CASES = [(0, 2, (17, 23), False), (1, 4, (23, 17), True), (2, 7, (16, 31), True), (3, 3, (5, 3), True)]


@pytest.mark.parametrize(("seed", "classes", "size", "void"), CASES)
@pytest.mark.parametrize(("width", "ratio"), [(None, 0.02), (None, 0.1), (1, 0.02), (2, 0.02), (40, 0.02)])
def test_boundary_iou_equals_slow_form(
    seed: int, classes: int, size: tuple[int, int], void: bool, width: int | None, ratio: float
) -> None:
    pred, target = random_maps(seed, classes, size, void=void)
    metric = BoundaryIoU(classes, width=width, dilation_ratio=ratio, average="none")
    close(score(metric, pred, target), slow_boundary_iou(pred, target, classes, width, ratio))


@pytest.mark.parametrize(("seed", "classes", "size", "void"), CASES)
@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("around_void", [False, True])
def test_trimap_iou_equals_slow_form(
    seed: int, classes: int, size: tuple[int, int], void: bool, width: int, around_void: bool
) -> None:
    pred, target = random_maps(seed, classes, size, void=void)
    metric = TrimapIoU(classes, width=width, around_void=around_void, average="none")
    close(score(metric, pred, target), slow_trimap_iou(pred, target, classes, width, around_void))


@pytest.mark.parametrize(("seed", "classes", "size", "void"), CASES)
@pytest.mark.parametrize("tolerance", [0, 1, math.sqrt(2), math.sqrt(5), 3, math.sqrt(13), 60])
def test_boundary_f_equals_slow_form(
    seed: int, classes: int, size: tuple[int, int], void: bool, tolerance: float
) -> None:
    pred, target = random_maps(seed, classes, size, void=void)
    expected = slow_boundary_f(pred, target, classes, tolerance)
    for name in ("f", "precision", "recall"):
        close(
            score(BoundaryF(classes, tolerance=tolerance, score=name, average="none"), pred, target),
            expected[name],
        )


def test_boundary_f_with_more_classes_than_bits_in_a_word() -> None:
    pred, target = random_maps(5, 150, (24, 24))
    assert (target > 124).any()
    expected = slow_boundary_f(pred, target, 150, 2)["f"]
    assert np.nanmin(expected) < np.nanmax(expected)
    close(score(BoundaryF(150, tolerance=2, average="none"), pred, target), expected)


# ----------------------------------------------------------------------------- known answers


def halves(shift: int = 0, size: int = 20) -> np.ndarray:
    """[1,size,size]: label 0 left of the middle plus `shift`, label 1 right of it."""
    labels = np.zeros((1, size, size), np.int64)
    labels[..., size // 2 + shift :] = 1
    return labels


def test_known_trimap() -> None:
    # One column of 20 is wrong; the trimap of width 2 holds two columns a side.
    out = score(TrimapIoU(2, width=2, average="none"), halves(1), halves())
    close(out, np.array([2 / 3, 1 / 2]))
    assert score(TrimapIoU(2, width=2), halves(1), halves()) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_known_boundary_f() -> None:
    # Contours are one column a side, the prediction's moved by three columns.
    assert score(BoundaryF(2, tolerance=3), halves(3), halves()) == 1
    assert score(BoundaryF(2, tolerance=2.9), halves(3), halves()) == 0
    # An extra object, a single pixel far away: precision falls, recall stays.
    pred = halves()
    pred[0, 10, 2] = 1  # contour of class 1: 20 -> 21 pixels; of class 0: 20 -> 28
    close(
        score(BoundaryF(2, tolerance=1, score="precision", average="none"), pred, halves()),
        [20 / 28, 20 / 21],
    )
    close(score(BoundaryF(2, tolerance=1, score="recall", average="none"), pred, halves()), [1, 1])
    close(score(BoundaryF(2, tolerance=1, average="none"), pred, halves()), [40 / 48, 40 / 41])


def test_known_boundary_iou() -> None:
    # The band of width 1 of a half of 20x10 pixels is its outline, 56 pixels, the image's frame included.
    out = score(BoundaryIoU(2, width=1, average="none"), halves(1), halves())
    # Class 0: outlines of 20x10 and 20x11 share the left column and the two rows of 10; union 56 + 58 - 38.
    close(out, np.array([38 / 76, (20 + 2 * 8) / (56 + 54 - 36)]))


def test_default_width_follows_the_diagonal() -> None:
    pred, target = random_maps(7, 3, (60, 80), n=1)  # diagonal 100, so 2 pixels
    close(score(BoundaryIoU(3), pred, target), score(BoundaryIoU(3, width=2), pred, target))
    assert score(BoundaryIoU(3), pred, target) != score(BoundaryIoU(3, width=1), pred, target)


def test_boundary_scores_see_what_iou_forgives() -> None:
    ragged = halves()
    ragged[0, ::2, 10] = 0
    assert score(BoundaryIoU(2, width=1), ragged, halves()) < 0.9
    assert score(TrimapIoU(2, width=1), ragged, halves()) < 0.8


# ----------------------------------------------------------------------------- void


@ALL
def test_predictions_under_void_change_nothing(metric: Any) -> None:
    pred, target = random_maps(11, 5, (24, 24))
    rng = np.random.default_rng(0)
    junk = np.where(target == VOID, rng.integers(-1000, 1000, target.shape), pred)
    close(score(metric(5, average="none"), junk, target), score(metric(5, average="none"), pred, target))


@ALL
def test_agreement_on_valid_pixels_scores_one(metric: Any) -> None:
    pred, target = random_maps(12, 4, (24, 24))
    pred = np.where(target == VOID, pred, target)
    assert score(metric(4), pred, target) == 1


def test_rim_of_void_is_no_boundary() -> None:
    target = np.zeros((1, 30, 30), np.int64)
    target[0, 10:20, 10:20] = VOID
    pred = np.zeros_like(target)
    assert np.isnan(score(TrimapIoU(2, width=3), pred, target))
    assert np.isnan(score(BoundaryF(2), pred, target))
    band = BoundaryIoU(2, width=2)
    assert score(band, pred, target) == 1
    assert band.expected.tolist() == [30 * 30 - 26 * 26, 0]  # the frame alone, nothing around the void
    around = TrimapIoU(2, width=1, around_void=True)
    assert score(around, pred, target) == 1
    assert around.expected.tolist() == [40, 0]


def test_distances_run_across_a_void_rim() -> None:
    target = halves()
    target[..., 9:11] = VOID  # valid labels now lie three columns apart
    assert np.isnan(score(TrimapIoU(2, width=2), halves(), target))
    reach = TrimapIoU(2, width=3)
    assert score(reach, halves(), target) == 1
    assert reach.expected.tolist() == [20, 20]


@ALL
def test_everything_void_gives_nan(metric: Any) -> None:
    target = np.full((2, 9, 9), VOID)
    assert np.isnan(score(metric(3), np.zeros_like(target), target))
    assert np.isnan(score(metric(3, average="none"), np.zeros_like(target), target)).all()


@ALL
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_images_give_nan(metric: Any) -> None:
    assert np.isnan(np.asarray(metric(3).compute()))
    assert np.isnan(score(metric(3), np.zeros((0, 4, 4), int), np.zeros((0, 4, 4), int)))
    assert np.isnan(score(metric(3), np.zeros((2, 0, 4), int), np.zeros((2, 0, 4), int)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 1), (2, 1, 7), (2, 7, 1)])
def test_tiny_images(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(3)
    pred, target = rng.integers(0, 3, shape), rng.integers(0, 3, shape)
    target.flat[0] = VOID if target.size > 3 else 1
    close(score(BoundaryIoU(3, average="none"), pred, target), slow_boundary_iou(pred, target, 3, None, 0.02))
    close(score(TrimapIoU(3, width=2, average="none"), pred, target), slow_trimap_iou(pred, target, 3, 2, False))
    close(score(BoundaryF(3, average="none"), pred, target), slow_boundary_f(pred, target, 3, 3)["f"])


@ALL
def test_ignored_class_inside_the_range_has_no_score(metric: Any) -> None:
    pred, target = random_maps(13, 3, (20, 20))
    moved = np.where(target == VOID, 0, target + 1)  # labels 1..3, void 0
    out = score(metric(4, ignore_index=0, average="none"), pred + 1, moved)
    assert np.isnan(out[0])
    close(out[1:], score(metric(3, average="none"), pred, target))
    # Predicting the ignored class at valid pixels is an error of the other classes, not a score of its own.
    blank = metric(4, ignore_index=0, average="none")
    wrong = score(blank, np.zeros_like(moved), moved)
    assert np.isnan(wrong[0])
    assert (wrong[1:] == 0).all()


# ----------------------------------------------------------------------------- inputs and states


@ALL
def test_logits_of_any_layout_and_dtype_equal_labels(metric: Any) -> None:
    pred, target = random_maps(21, 6, (20, 26))
    logits = torch.nn.functional.one_hot(torch.as_tensor(pred), 6).permute(0, 3, 1, 2) * 4.0 - 2.0
    expected = score(metric(6, average="none"), pred, target)
    labels = torch.as_tensor(target)
    for form in (
        logits.contiguous(),
        logits.contiguous(memory_format=torch.channels_last),
        logits.to(torch.bfloat16),
        logits.half(),
        logits.double().flip(-1).contiguous().flip(-1),
    ):
        before = form.clone()
        measure = metric(6, average="none")
        measure.update(form, labels)
        close(np.asarray(measure.compute()), expected)
        assert torch.equal(form, before)


@ALL
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16])
def test_integer_dtypes(metric: Any, dtype: torch.dtype) -> None:
    pred, target = random_maps(22, 6, (20, 26))
    void = 100 if dtype == torch.int8 else 255
    expected = score(metric(6, average="none"), pred, target)
    labels = torch.as_tensor(np.where(target == VOID, void, target)).to(dtype)
    measure = metric(6, ignore_index=void, average="none")
    measure.update(torch.as_tensor(pred).to(dtype), labels)
    close(np.asarray(measure.compute()), expected)
    assert int(labels.to(torch.int64).max()) == void  # inputs are not written


@ALL
def test_batches_and_merging_equal_one_call(metric: Any) -> None:
    pred, target = random_maps(23, 4, (22, 18), n=6)
    whole = score(metric(4, average="none"), pred, target)
    first, second = metric(4, average="none"), metric(4, average="none")
    score(first, pred[:1], target[:1])
    score(first, pred[1:3], target[1:3])
    score(second, pred[3:], target[3:])
    first.merge_state(second)
    close(np.asarray(first.compute()), whole)
    assert (whole > 0).all()
    assert (whole < 1).all()
    first.reset()
    close(score(first, pred, target), whole)


@ALL
def test_sync_sums_counts_over_processes(metric: Any) -> None:
    """Two processes, played by one: the gather hands back this process's counts and the other's."""
    pred, target = random_maps(24, 4, (22, 18), n=4)
    other = metric(4)
    score(other, pred[2:], target[2:])
    theirs = iter([getattr(other, name) for name in other._reductions])

    def gather(mine: torch.Tensor, group: Any) -> list[torch.Tensor]:
        return [mine, next(theirs)]

    local = metric(4, dist_sync_fn=gather, distributed_available_fn=lambda: True)
    close(score(local, pred[:2], target[:2]), score(metric(4), pred, target))


@ALL
def test_forward_gives_the_batch_and_keeps_the_sum(metric: Any) -> None:
    pred, target = random_maps(25, 4, (22, 18), n=4)
    measure = metric(4)
    pred_t, target_t = torch.as_tensor(pred), torch.as_tensor(target)
    measure(pred_t[:2], target_t[:2])
    close(np.asarray(measure(pred_t[2:], target_t[2:])), score(metric(4), pred[2:], target[2:]))
    close(np.asarray(measure.compute()), score(metric(4), pred, target))
    assert measure.higher_is_better
    assert measure.full_state_update is False


@ALL
def test_absent_classes_are_left_out_of_the_mean(metric: Any) -> None:
    pred, target = random_maps(26, 3, (20, 20))
    wide = score(metric(9, average="none"), pred, target)
    assert np.isnan(wide[3:]).all()
    close(score(metric(9), pred, target), score(metric(3), pred, target))
    close(score(metric(9), pred, target), np.float32(np.nanmean(wide)))


# ----------------------------------------------------------------------------- errors

LABELS = torch.zeros(2, 4, 5, dtype=torch.int64)


@ALL
@pytest.mark.parametrize(
    ("preds", "target", "kind", "words"),
    [
        (LABELS, LABELS[0], ValueError, r"target must be labels \[N,H,W\].*\(4, 5\).*unsqueeze"),
        (LABELS[0], LABELS, ValueError, r"preds must be labels \[N,H,W\] or logits"),
        (LABELS, LABELS.float(), TypeError, "integer dtype, got torch.float32"),
        (LABELS, LABELS.bool(), TypeError, "integer dtype, got torch.bool"),
        (LABELS.float(), LABELS, TypeError, r"pass logits as \[N,C,H,W\]"),
        (
            torch.zeros(2, 3, 4, 5, dtype=torch.int64),
            LABELS,
            TypeError,
            "floating-point logits, got torch.int64",
        ),
        (torch.zeros(2, 4, 4, 5), LABELS, ValueError, r"num_classes = 3 channels.*\(2, 4, 4, 5\)"),
        (torch.zeros(2, 3, 2, 5), LABELS, ValueError, r"agree in N, H and W.*interpolate"),
        (LABELS[:1], LABELS, ValueError, r"agree in N, H and W"),
        (LABELS + 3, LABELS, ValueError, r"preds .*0 to 2.*from 3 to 3, 40 of them"),
        (LABELS, LABELS - 1, ValueError, r"target .*ignore_index=-100.*from -1 to -1, 40 of them"),
        (LABELS, LABELS + 255, ValueError, r"does 255 mark void.*ignore_index=255"),
        (LABELS.numpy(), LABELS, TypeError, "preds must be a torch.Tensor, got ndarray"),
        (LABELS, LABELS.to("meta"), ValueError, "on one device, got cpu and meta"),
    ],
)
def test_bad_input_is_named(metric: Any, preds: Any, target: Any, kind: type[Exception], words: str) -> None:
    measure = metric(3)
    with pytest.raises(kind, match=words):
        measure.update(preds, target)


@ALL
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": 1}, "num_classes=2"),
        ({"num_classes": 2.0}, "must be an integer"),
        ({"num_classes": 3, "average": "micro"}, "'macro', 'none'"),
        ({"num_classes": 3, "ignore_index": 1.0}, "ignore_index must be an integer"),
    ],
)
def test_bad_common_options_are_named(metric: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        metric(**options)


@pytest.mark.parametrize(
    ("metric", "options", "words"),
    [
        (BoundaryIoU, {"width": 0}, "width must be"),
        (BoundaryIoU, {"width": 1.5}, "width must be"),
        (BoundaryIoU, {"dilation_ratio": 0.0}, "dilation_ratio must be positive"),
        (BoundaryIoU, {"dilation_ratio": math.nan}, "dilation_ratio must be positive"),
        (TrimapIoU, {"width": -1}, "width must be"),
        (BoundaryF, {"tolerance": -0.5}, "tolerance must be"),
        (BoundaryF, {"tolerance": math.inf}, "tolerance must be"),
        (BoundaryF, {"score": "F1"}, "'f', 'precision', 'recall'"),
    ],
)
def test_bad_own_options_are_named(metric: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        metric(3, **options)


def test_without_torchmetrics_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torchmetrics'] = None\n"
        "try:\n    import semeda_fast.metrics\n"
        "except ImportError as e:\n    print(type(e).__name__, e)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.startswith("MissingExtraError")
    assert "pip install 'semeda-fast[metrics]'" in done.stdout
