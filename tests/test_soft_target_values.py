"""The values of float targets are looked at by default, by each backend where it reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Case
from helpers import NUM_CLASSES, make_inputs, make_proxy, value_and_grad
from torch import Tensor

from semeda_fast import SemedaLoss, semeda_loss
from semeda_fast.backends import fused, values
from semeda_fast.backends import operator as ops
from semeda_fast.backends.config import parse_config
from semeda_fast.backends.problem import Problem
from semeda_fast.spec import LossSpec

H, W = 7, 21  # a part of a unit of 16 columns, and of a tile


@pytest.fixture(autouse=True)
def _no_asserts_on_a_device(request: pytest.FixtureRequest) -> None:
    case = request.node.callspec.params.get("case") if hasattr(request.node, "callspec") else None
    if case is not None and case.device != "cpu":
        pytest.skip("a device-side assert would end the use of the device in this process")


def soft(n: int = 2, c: int = NUM_CLASSES, seed: int = 3) -> Tensor:
    return torch.randn(n, c, H, W, generator=torch.Generator().manual_seed(seed)).softmax(1)


def loss_of(case: Case, classes: int = NUM_CLASSES, **options: Any) -> SemedaLoss:
    return SemedaLoss(make_proxy(classes), backend=case.backend, **options)


def put(value: float) -> Callable[[Tensor], object]:
    """One share is `value`, the sum stays 1."""

    def change(pixel: Tensor) -> None:
        pixel.fill_(0.0)
        pixel[0], pixel[1] = value, 1 - value

    return change


def fill(*values: float) -> Callable[[Tensor], object]:
    return lambda pixel: pixel.copy_(torch.tensor([*values, *[0.0] * (NUM_CLASSES - len(values))]))


# What is done to one pixel [C], and what the error says of it.
WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "below 0": (put(-0.02), "-0.02 to 1.02, with the sum 1"),
    "above 1": (put(1.02), "-0.02 to 1.02, with the sum 1"),
    "two classes": (fill(1.0, 0.0, 1.0), "0 to 1, with the sum 2"),
    "no class": (fill(), "0 to 0, with the sum 0"),
    "a sum of 1.06": (fill(0.5, 0.56), "0 to 0.56, with the sum 1.06"),
    "a sum of 0.94": (fill(0.5, 0.44), "0 to 0.5, with the sum 0.94"),
    "a grey level": (fill(0.0, 255.0), "0 to 255, with the sum 255"),
    "NaN": (fill(0.0, float("nan"), 1.0), "nan"),
    "infinity": (fill(float("inf")), "0 to inf, with the sum inf"),
    "both infinities": (fill(float("inf"), float("-inf")), "-inf to inf, with the sum nan"),
}
PLACES = {"first": (0, 0, 0), "last": (1, H - 1, W - 1), "inside": (1, 3, 16)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", WRONG)
def test_one_pixel_that_holds_no_distribution(case: Case, name: str, place: str) -> None:
    change, found = WRONG[name]
    logits, _ = make_inputs(h=H, w=W, void=0.0)
    target = soft()
    n, y, x = PLACES[place]
    assert torch.isfinite(loss_of(case)(logits, target))
    change(target[n, :, y, x])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\] and sum to 1") as caught:
        loss_of(case)(logits, target)
    assert f"1 of {2 * H * W} do not, the first at [n={n}, y={y}, x={x}]: " in str(caught.value)
    assert found in str(caught.value)


ROUNDED = {
    "below 0": put(-0.008),
    "above 1": put(1.008),
    "a sum of 1.04": fill(0.5, 0.54),
    "a sum of 0.96": fill(0.5, 0.46),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_what_rounding_may_do_passes(case: Case, name: str) -> None:
    logits, _ = make_inputs(h=H, w=W, void=0.0)
    target = soft()
    ROUNDED[name](target[1, :, 3, 16])
    assert torch.isfinite(loss_of(case)(logits, target))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [False, True])
def test_half_precision_targets_of_150_classes_pass(case: Case, dtype: torch.dtype, cast: bool) -> None:
    """A teacher's softmax, label smoothing and mixup, all computed in half precision; then cast, as wrappers do."""
    classes = 150
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (2, H, W), generator=generator)
    one_hot = torch.nn.functional.one_hot(labels, classes).movedim(3, 1).to(dtype)
    smoothed = one_hot * 0.9 + 0.1 / classes
    teacher = (3 * torch.randn(one_hot.shape, generator=generator)).to(dtype).softmax(1)
    mixed = smoothed * 0.7 + smoothed.flip(0) * 0.3
    logits = torch.randn(2, classes, H, W, generator=generator)
    criterion = loss_of(case, classes)
    for target in (smoothed, teacher, mixed, 0.37 * mixed + 0.63 * teacher):
        assert target.dtype == dtype
        assert torch.isfinite(criterion(logits, target.float() if cast else target))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_every_dtype_is_looked_at(case: Case, dtype: torch.dtype) -> None:
    logits, labels = make_inputs(h=H, w=W, void=0.0)
    one_hot = torch.nn.functional.one_hot(labels, NUM_CLASSES).movedim(3, 1).float()
    criterion = loss_of(case)
    assert torch.isfinite(criterion(logits, one_hot.to(dtype)))
    one_hot[1, :, 3, 16] = 1
    with pytest.raises(ValueError, match=r"the first at \[n=1, y=3, x=16\]: 1 to 1, with the sum 5"):
        criterion(logits, one_hot.to(dtype))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_layout_is_looked_at(case: Case, layout: torch.memory_format) -> None:
    logits, _ = make_inputs(n=2, c=21, h=H, w=W, void=0.0)
    target = soft(c=21).contiguous(memory_format=layout)
    criterion = loss_of(case, 21)
    assert torch.isfinite(criterion(logits, target))
    target[0, 20, 0, 17] += 1
    with pytest.raises(ValueError, match=r"\[n=0, y=0, x=17\]"):
        criterion(logits, target)


def test_void_pixels_are_not_looked_at(case: Case) -> None:
    """Whatever lies under them, bit for bit."""
    logits, _ = make_inputs(h=H, w=W, void=0.0)
    target, valid = soft(), torch.rand(2, H, W) > 0.3
    clean = value_and_grad(loss_of(case), logits, target, valid_mask=valid)
    for rubbish in (0.0, 255.0, -1.0, float("nan"), float("inf")):
        dirty = torch.where(valid.unsqueeze(1), target, rubbish)
        found = value_and_grad(loss_of(case), logits, dirty, valid_mask=valid)
        assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))
    with pytest.raises(ValueError, match="must lie in"):
        loss_of(case)(logits, dirty)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_never_looks_at_nothing(case: Case, reduction: str) -> None:
    """And gives what the formula gives, for values that are no distribution."""
    logits, _ = make_inputs(h=H, w=W, void=0.0)
    target = 3 * soft()
    target[1, :, 3, 16] = -1
    unchecked = loss_of(case, validate="never", reduction=reduction)
    found, gradient = value_and_grad(unchecked, logits, target)
    reference = SemedaLoss(make_proxy(), validate="never", reduction=reduction, backend="reference")
    expected, expected_gradient = value_and_grad(reference, logits, target)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(gradient).all()
    assert (gradient - expected_gradient).norm() < 1e-2 * expected_gradient.norm()
    with pytest.raises(ValueError, match="must lie in"):
        loss_of(case, reduction=reduction)(logits, target)


@pytest.mark.parametrize("channels", [1, 2])
def test_binary_targets(case: Case, channels: int) -> None:
    logits, _ = make_inputs(c=1, num_labels=2, h=H, w=W, void=0.0)
    criterion = loss_of(case, 2, mode="binary")
    target = soft(c=2)[:, :channels].contiguous()
    assert torch.isfinite(criterion(logits, target))
    for value in (255.0, -0.02, 1.02, float("nan"), float("inf"), float("-inf")):
        wrong = target.clone()
        wrong[1, 0, 6, 20] = value
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\].*1 of 294 do not, the first at \[n=1, y=6, x=20\]"):
            criterion(logits, wrong)


def test_grey_levels_do_not_train(case: Case) -> None:
    """0.0 and 255.0 in binary mode went to a loss of -10989."""
    logits, labels = make_inputs(c=1, num_labels=2, h=H, w=W, void=0.0)
    target = 255.0 * labels.unsqueeze(1)
    criterion = loss_of(case, 2, mode="binary")
    torch.testing.assert_close(criterion(logits, target // 255), criterion(logits, labels), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\].*pass target // 255"):
        criterion(logits, target)


def test_every_way_into_the_loss_looks(case: Case) -> None:
    """The short eager way again and again, the general way, the function, no gradient, torch.compile."""
    logits, _ = make_inputs(h=H, w=W, void=0.0)
    good, bad = soft(), 2 * soft()
    criterion = loss_of(case)
    compiled = torch.compile(criterion, fullgraph=True)
    ways: list[Callable[[Tensor], Any]] = [
        lambda y: criterion(logits, y),
        lambda y: criterion(logits.detach(), y),
        lambda y: criterion(logits, y, return_components=True).loss,
        lambda y: semeda_loss(logits, y, criterion.proxy, backend=case.backend),
        lambda y: compiled(logits, y),
    ]
    for way in ways:
        for _ in range(2):
            assert torch.isfinite(way(good))
            with pytest.raises(ValueError, match="must lie in"):
                way(bad)


def test_probabilities_in_the_place_of_logits() -> None:
    logits, target = make_inputs(h=H, w=W, void=0.1)
    criterion = SemedaLoss(make_proxy(), ignore_index=255, from_logits=False, backend="reference")
    probabilities = logits.detach().softmax(1)
    assert torch.isfinite(criterion(probabilities, target))
    with pytest.raises(ValueError, match=r"probabilities must lie in .*pass from_logits=True"):
        criterion(logits, target)
    probabilities[(target == 255).unsqueeze(1).expand_as(logits)] = torch.nan
    assert torch.isfinite(criterion(probabilities, target))
    binary = SemedaLoss(mode="binary", from_logits=False, backend="reference")
    with pytest.raises(ValueError, match=r"probabilities must lie in .*pass from_logits=True"):
        binary(3 * torch.ones(1, 1, 4, 4), torch.ones(1, 4, 4).long())


def test_on_a_gpu_an_asynchronous_assert_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which stands for one that nobody waits for."""
    said: list[tuple[Tensor, str]] = []
    monkeypatch.setattr(torch, "_assert_async", lambda condition, text: said.append((condition, text)))
    logits, target = (torch.zeros(1, NUM_CLASSES, 4, 4, device="meta") for _ in range(2))
    config = parse_config('{"channels": [5, 2], "sizes": [3], "layer_weights": [1], "layer_scales": [1], "tap": "pre", '
                          '"distance": "l1", "ignore_index": -100, "label_smoothing": 0, "mode": "multiclass", '
                          '"reduction": "mean", "check_labels": true, "tolerance": 0.05}')  # fmt: skip
    bad = torch.zeros((), dtype=torch.int64, device="meta")
    fused.assert_labels(Problem(logits, target, None, None, logits, config), bad)
    fused.assert_labels(Problem(logits, target[:, 0].long(), None, None, logits, config), bad)
    ops.look_at_values(logits, target, None, LossSpec((), ()), False)
    ops.look_at_values(logits, target, None, LossSpec((), (), from_logits=False), False)
    texts = [text for _, text in said]
    assert [("no distribution" in text, "labels" in text) for text in texts] == [
        (True, False), (False, True), (True, False), (True, False), (True, False),
    ]  # fmt: skip
    assert "target with" in texts[0]
    assert "probabilities with" in texts[4]
    assert all(text == values.assertion(target) for text in texts[:1])
    assert all("validate='always'" in text for text in texts)
    assert all(condition.device.type == "meta" for condition, _ in said)
