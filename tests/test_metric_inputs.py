"""What users hand to the metrics: label dtypes, NumPy numbers, masks of 0 and 255; each error's advice works."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from semeda_fast.metrics import BoundaryF, BoundaryIoU, TrimapIoU

METRICS = (BoundaryIoU, BoundaryF, TrimapIoU)
ALL = pytest.mark.parametrize("metric", METRICS, ids=lambda cls: cls.__name__)


def maps(classes: int = 3, void: int | None = None) -> tuple[Tensor, Tensor]:
    """Blobs of labels, and a prediction that differs in places."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.nn.functional.avg_pool2d(torch.randn(2, classes, 24, 28, generator=generator), 5, 1)
    target = noise.argmax(1)
    pred = (noise + 0.1 * torch.randn(noise.shape, generator=generator)).argmax(1)
    if void is not None:
        target[:, 3:9, 5:12] = void
    return pred, target


def result(metric: Any, pred: Tensor, target: Tensor) -> float:
    metric.update(pred, target)
    value = float(metric.compute())
    assert 0 < value < 1
    return value


# ----------------------------------------------------------------------------- dtypes


@ALL
@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
@pytest.mark.parametrize("void", [255, 60_000])
def test_unsigned_labels(metric: Any, dtype: torch.dtype, void: int) -> None:
    pred, target = maps(void=void)
    expected = result(metric(3, ignore_index=void), pred, target)
    assert result(metric(3, ignore_index=void), pred.to(dtype), target.to(dtype)) == expected
    logits = torch.nn.functional.one_hot(pred, 3).permute(0, 3, 1, 2).float()
    assert result(metric(3, ignore_index=void), logits, target.to(dtype)) == expected
    with pytest.raises(ValueError, match=rf"target must hold labels from 0 to 2.*to {void}, 84 of them"):
        metric(3).update(pred, target.to(dtype))


@ALL
def test_labels_beyond_int64_are_no_void_label(metric: Any) -> None:
    """2**64 - 100 would wrap to -100, the default void label."""
    pred, target = maps()
    target = target.to(torch.uint64)
    target[0, 0, 0] = torch.tensor(2**64 - 100, dtype=torch.uint64)
    with pytest.raises(ValueError, match=r"target must hold labels from 0 to 2.*1 of them out of range"):
        metric(3).update(pred, target)
    with pytest.raises(ValueError, match=r"preds .* must hold labels from 0 to 2.*1 of them out of range"):
        metric(3).update(target, pred)


@ALL
def test_counts_of_tensor_subclasses_are_plain(metric: Any) -> None:
    """MONAI's MetaTensor would stay in the states, and in what is stored of them."""

    class Tagged(Tensor):
        pass

    pred, target = maps()
    measure = metric(3)
    assert result(measure, pred.as_subclass(Tagged), target.as_subclass(Tagged)) == result(metric(3), pred, target)
    assert {type(state) for state in measure.metric_state.values()} == {type(measure.compute())} == {Tensor}


# ----------------------------------------------------------------------------- options


@ALL
@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int16])
def test_numpy_integers(metric: Any, kind: Any) -> None:
    pred, target = maps(void=100)
    measure = metric(kind(3), ignore_index=kind(100))
    assert type(measure.num_classes) is type(measure.ignore_index) is int
    assert result(measure, pred, target) == result(metric(3, ignore_index=100), pred, target)


def test_numpy_numbers_of_the_own_options() -> None:
    pred, target = maps()
    for options in ({"width": np.int64(2)}, {"dilation_ratio": np.float32(0.125)}):
        plain = {name: value.item() for name, value in options.items()}
        assert result(BoundaryIoU(3, **options), pred, target) == result(BoundaryIoU(3, **plain), pred, target)
    for options in (
        {"tolerance": np.int32(2)},
        {"tolerance": np.float32(1.5)},
        {"tolerance_ratio": np.float32(0.03125)},
    ):
        plain = {name: value.item() for name, value in options.items()}
        assert result(BoundaryF(3, **options), pred, target) == result(BoundaryF(3, **plain), pred, target)
    assert result(TrimapIoU(3, width=np.int8(2)), pred, target) == result(TrimapIoU(3, width=2), pred, target)


@ALL
def test_no_ignore_index_means_minus_100(metric: Any) -> None:
    pred, target = maps(void=-100)
    measure = metric(3, ignore_index=None)
    assert measure.ignore_index == -100
    assert result(measure, pred, target) == result(metric(3), pred, target)


@ALL
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_classes": True}, "num_classes must be an integer of at least 2, got True"),
        ({"num_classes": np.True_}, "num_classes must be an integer of at least 2"),
        ({"num_classes": np.float64(3)}, "num_classes must be an integer of at least 2"),
        ({"num_classes": "3"}, "num_classes must be an integer of at least 2, got '3'"),
        ({"num_classes": None}, "num_classes must be an integer of at least 2, got None"),
        ({"num_classes": 3, "ignore_index": True}, r"ignore_index must be an integer or None \(for -100\), got True"),
        ({"num_classes": 3, "ignore_index": np.False_}, "ignore_index must be an integer or None"),
        ({"num_classes": 3, "ignore_index": 255.0}, "ignore_index must be an integer or None .* got 255.0"),
        ({"num_classes": 3, "ignore_index": 2**64 - 1}, "ignore_index must fit in 64 bits"),
    ],
)
def test_bad_common_options(metric: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        metric(**options)


@pytest.mark.parametrize(
    ("metric", "options", "words"),
    [
        (BoundaryF, {"tolerance": True}, "tolerance must be a finite number of pixels"),
        (BoundaryF, {"tolerance": "3"}, "tolerance must be a finite number of pixels"),
        (BoundaryF, {"tolerance": math.nan}, "tolerance must be a finite number of pixels"),
        (BoundaryF, {"tolerance_ratio": 0}, "tolerance_ratio must be positive and below 1"),
        (BoundaryF, {"tolerance_ratio": -0.1}, "tolerance_ratio must be positive and below 1"),
        (BoundaryF, {"tolerance_ratio": math.nan}, "tolerance_ratio must be positive and below 1"),
        (BoundaryF, {"tolerance_ratio": math.inf}, "tolerance_ratio must be positive and below 1.*got inf$"),
        (BoundaryF, {"tolerance_ratio": True}, "tolerance_ratio must be positive and below 1.*got True$"),
        (BoundaryF, {"tolerance": 3, "tolerance_ratio": 0.1}, "pass tolerance=3 or tolerance_ratio=0.1, not both"),
        (BoundaryIoU, {"width": True}, "width must be an integer number of pixels of at least 1, got True$"),
        (BoundaryIoU, {"dilation_ratio": True}, "dilation_ratio must be positive and below 1"),
        (BoundaryIoU, {"dilation_ratio": None}, "dilation_ratio must be positive and below 1"),
        (TrimapIoU, {"width": 0.5}, "width must be an integer number of pixels of at least 1, got 0.5$"),
    ],
)
def test_bad_own_options(metric: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        metric(3, **options)


# ----------------------------------------------------------------------------- advice, followed


def test_a_tolerance_below_one_pixel() -> None:
    """The 0.008 of DAVIS is a part of the diagonal; as pixels it asked for exact pixels without a word."""
    pred, target = maps()
    for value in (0.008, 0.5, 0.999, np.float32(0.008)):
        with pytest.raises(ValueError, match=r"no neighbour.*pass tolerance_ratio=[0-9.]+, .*tolerance=0$") as error:
            BoundaryF(3, tolerance=value)
        assert f"tolerance_ratio={value}," in str(error.value)
    followed = result(BoundaryF(3, tolerance_ratio=0.008), pred, target)
    assert followed == result(BoundaryF(3, tolerance=1), pred, target)  # rounded up
    assert followed > result(BoundaryF(3, tolerance=0), pred, target)


def test_a_ratio_in_pixels_and_pixels_as_a_ratio() -> None:
    pred, target = maps()
    for metric, ratio, pixels in (
        (BoundaryF, "tolerance_ratio", "tolerance"),
        (BoundaryIoU, "dilation_ratio", "width"),
    ):
        with pytest.raises(ValueError, match=rf"{ratio} must be positive and below 1.*for pixels pass {pixels}=2$"):
            metric(3, **{ratio: 2})
        result(metric(3, **{pixels: 2}), pred, target)
    with pytest.raises(ValueError, match=r"width must be .*got 0.05; .*pass dilation_ratio=0.05$"):
        BoundaryIoU(3, width=0.05)
    result(BoundaryIoU(3, dilation_ratio=0.05), pred, target)


def test_a_tolerance_beyond_the_image_reaches_all_of_it() -> None:
    pred, target = maps()
    for tolerance in (40, 1e300):
        metric = BoundaryF(3, tolerance=tolerance)
        metric.update(pred, target)
        assert metric.compute() == 1


@ALL
def test_masks_of_0_and_255(metric: Any) -> None:
    """255 as void would leave no foreground to score."""
    pred, target = maps(2)
    expected = result(metric(2), pred, target)
    for scale in (target * 255, (target * 255).to(torch.uint8)):
        with pytest.raises(ValueError, match=r"binary mask of 0 and 255\? then pass mask // 255$"):
            metric(2).update(pred, scale)
        assert result(metric(2), pred, scale // 255) == expected
    with pytest.raises(ValueError, match=r"preds .*pass mask // 255$"):
        metric(2).update(pred * 255, target)
    with pytest.raises(ValueError, match=r"pass mask // 255$"):
        metric(2).update(torch.ones_like(pred), torch.full_like(target, 255))


@ALL
def test_255_as_void(metric: Any) -> None:
    pred, target = maps(void=255)
    with pytest.raises(ValueError, match=r"does 255 mark void here\? then pass ignore_index=255$"):
        metric(3).update(pred, target)
    result(metric(3, ignore_index=255), pred, target)
    bad = pred.clone()
    bad[0, 0, 0] = 255  # void is what the target says; in a prediction ignore_index changes nothing
    with pytest.raises(ValueError, match=r"found values from 0 to 255, 1 of them out of range$"):
        metric(3).update(bad, pred)


@ALL
def test_shapes_of_others(metric: Any) -> None:
    """A label channel as MONAI has it, and the one channel of a binary network."""
    pred, target = maps(2)
    expected = result(metric(2), pred, target)
    assert result(metric(2), pred, target[:, None]) == expected
    with pytest.raises(TypeError, match=r"pass labels as \[N,H,W\], preds.squeeze\(1\)$"):
        metric(2).update(pred[:, None], target)
    assert result(metric(2), pred[:, None].squeeze(1), target[:, None].squeeze(1)) == expected
    logits = pred[:, None].float() - 0.5
    with pytest.raises(ValueError, match=r"pass labels, \(preds\[:, 0\] > 0\).long\(\)$"):
        metric(2).update(logits, target)
    assert result(metric(2), (logits[:, 0] > 0).long(), target) == expected


@ALL
def test_a_bad_image_late_in_a_batch_changes_no_count(metric: Any) -> None:
    pred, target = maps()
    measure = metric(3)
    expected = result(measure, pred, target)
    bad = target.clone()
    bad[1, 2, 3] = 7
    for pair in ((pred, bad), (bad, target)):
        with pytest.raises(ValueError, match="from 0 to 7, 1 of them"):
            measure.update(*pair)
    assert float(measure.compute()) == expected
