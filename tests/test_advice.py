"""What an error about labels advises works: the code in its text is run, and gives the labels that were meant.

Each row is a wrong call, the advice that its message holds, and what that advice makes of the labels.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import Case
from helpers import make_proxy
from torch import Tensor

from semeda_fast import SemedaLoss, advice


class Row(NamedTuple):
    """A target whose pixels hold `labels` in turn, and one way to mend it.

    Attributes:
        classes: of the loss; 1 is binary mode.
        code: an expression in the message that gives the right target; "" leaves it as it is.
        options: of the right loss; the message names each as name=value.
        right: the labels that the right target holds, in turn.
        ignore_index: of the wrong call.
    """

    labels: list[int]
    classes: int
    code: str = ""
    options: dict[str, Any] = {}  # noqa: RUF012  # never written to
    right: list[int] = []  # noqa: RUF012
    ignore_index: int = -100
    dtype: torch.dtype = torch.int64


U8, I16, I32 = torch.uint8, torch.int16, torch.int32
FIVE = [0, 1, 2, 3, 4]
GREYS = "torch.bucketize(target, torch.tensor([0, 128, 255], device=target.device))"
BEYOND = "torch.isin(target, torch.tensor({}, device=target.device))"
TABLE: dict[str, Row] = {
    "binary mask": Row([0, 255], 2, "target // 255", right=[0, 1], dtype=U8),
    "binary mask in binary mode": Row([0, 255], 1, "target // 255", right=[0, 1], dtype=U8),
    "foreground alone": Row([255], 1, "target // 255", right=[1], dtype=U8),
    "binary mask with void": Row(
        [0, 255, -1], 1, "torch.where(target == 255, 1, target)", {}, [0, 1, -1], ignore_index=-1, dtype=I16
    ),
    "binary mask for many classes": Row([0, 255], 5, "target // 255", {"num_classes": 2}, [0, 1], dtype=U8),
    "void": Row([0, 1, 255], 2, "", {"ignore_index": 255}, [0, 1, 255], dtype=U8),
    "void in binary mode": Row([1, 255], 1, "", {"ignore_index": 255}, [1, 255], dtype=U8),
    "void beside a void label": Row(
        [0, 1, 200, 255], 2, "torch.where(target == 255, 200, target.long())", {}, [0, 1, 200, 200], 200, U8
    ),
    "trimap": Row(
        [0, 128, 255], 2, "torch.where(target == 128, -100, target.long() // 255)", {}, [0, -100, 1], dtype=U8
    ),
    "trimap in binary mode": Row(
        [0, 127, 255], 1, "torch.where(target == 127, -100, target.long() // 255)", {}, [0, -100, 1]
    ),
    "trimap with 255 as void": Row(
        [0, 128, 255], 2, "torch.where(target == 128, 255, target.long() // 255)", {}, [0, 255, 1], 255, U8
    ),
    "three greys as classes": Row([0, 128, 255], 2, GREYS, {"num_classes": 3}, [0, 1, 2], dtype=U8),
    "three greys": Row([0, 128, 255], 3, GREYS, right=[0, 1, 2], dtype=U8),
    "three greys of five classes": Row([0, 128, 255], 5, GREYS, right=[0, 1, 2], dtype=I32),
    "four greys": Row(
        [0, 85, 170, 255], 3, "torch.bucketize(target, torch.tensor([0, 85, 170, 255], device=target.device))",
        {"num_classes": 4}, [0, 1, 2, 3], dtype=U8,
    ),
    "from 1": Row([1, 2, 3, 4, 5], 5, "target - 1", right=FIVE, dtype=U8),
    "from 1 in binary mode": Row([1, 2], 1, "target - 1", right=[0, 1]),
    "from 1 with void": Row(
        [1, 2, 3, 4, 5, 255], 5, "torch.where(target == 255, 255, target - 1)", {"ignore_index": 255}, [*FIVE, 255],
        dtype=U8,
    ),
    "from 1 with the void label": Row(
        [1, 2, 3, 4, 5, 255], 5, "torch.where(target == 255, 255, target - 1)", {}, [*FIVE, 255], 255, U8
    ),
    "from 1 below a void 0": Row(
        [0, 1, 2, 3, 4, 5], 5, "torch.where(target == 0, -1, target.long() - 1)", {"ignore_index": -1}, [-1, *FIVE],
        dtype=U8,
    ),
    "one class too few": Row([0, 1, 2, 3, 4, 5], 5, "", {"num_classes": 6}, [*FIVE, 5]),
    "a void label behind the classes": Row([0, 1, 2, 3, 4, 5], 5, "", {"ignore_index": 5}, [*FIVE, 5]),
    "a third class in binary mode": Row(
        [0, 1, 2], 1, "", {"mode": "multiclass", "num_classes": 3}, [0, 1, 2]
    ),
    "more classes": Row([0, 4, 5, 9], 5, "", {"num_classes": 10}, [0, 4, 5, 9], dtype=U8),
    "more classes made void": Row(
        [0, 4, 5, 9], 5, f"torch.where({BEYOND.format([5, 9])}, -100, target.long())", {}, [0, 4, -100, -100], dtype=U8
    ),
    "one class far off": Row([0, 4, 9], 5, "", {"ignore_index": 9}, [0, 4, 9]),
    "void and more classes": Row(
        [0, 4, 7, 255], 5, "", {"num_classes": 8, "ignore_index": 255}, [0, 4, 7, 255], dtype=U8
    ),
    "minus one": Row([0, 1, -1], 2, "", {"ignore_index": -1}, [0, 1, -1], dtype=torch.int8),
    "nodata": Row([0, 1, -9999], 2, "", {"ignore_index": -9999}, [0, 1, -9999], dtype=I16),
    "nodata alone": Row([-9999], 5, "", {"ignore_index": -9999}, [-9999], dtype=I16),
    "nodata of 16 bits": Row([0, 4, 65535], 5, "", {"ignore_index": 65535}, [0, 4, 65535], dtype=I32),
    "nodata of 32 bits": Row([0, 4, -(2**31)], 5, "", {"ignore_index": -(2**31)}, [0, 4, -(2**31)], dtype=I32),
    "nodata beside void": Row(
        [0, 1, -9999, 255], 2, "torch.where(target == -9999, 255, target.long())", {}, [0, 1, 255, 255], 255, I16
    ),
    "several void labels": Row(
        [0, 1, 2, -1, 255], 5, f"torch.where({BEYOND.format([-1, 255])}, -100, target.long())", {},
        [0, 1, 2, -100, -100], dtype=I16,
    ),
}  # fmt: skip


def labelled(labels: list[int], dtype: torch.dtype) -> Tensor:
    """[1,6,7] with the labels in turn."""
    return torch.tensor(labels).repeat(42)[:42].reshape(1, 6, 7).to(dtype)


def loss_for(classes: int, backend: str, **options: Any) -> tuple[SemedaLoss, Tensor]:
    """A loss for so many classes (1: binary mode), and logits."""
    if classes == 1:
        options.setdefault("mode", "binary")
    channels = options.pop("num_classes", 1 if options.get("mode") == "binary" else classes)
    return SemedaLoss(make_proxy(max(2, channels)), backend=backend, **options), torch.randn(1, channels, 6, 7)


@pytest.mark.parametrize("name", TABLE)
def test_labels(case: Case, name: str) -> None:
    if case.device != "cpu":
        pytest.skip("a device-side assert would end the use of the device in this process")
    row = TABLE[name]
    target = labelled(row.labels, row.dtype)
    wrong, logits = loss_for(row.classes, case.backend, ignore_index=row.ignore_index)
    with pytest.raises(ValueError, match="labels outside") as caught:
        wrong(logits, target)
    text = str(caught.value).partition("; ignore_index=")[2]
    for option, value in row.options.items():
        assert f"{option}={value!r}" in text
    if row.code:
        assert f"pass {row.code}" in text
        target = eval(row.code, {"torch": torch, "target": target})
    assert target.flatten()[: len(row.right)].tolist() == row.right
    criterion, logits = loss_for(row.classes, case.backend, **{"ignore_index": row.ignore_index, **row.options})
    logits.requires_grad_()
    loss = criterion(logits, target)
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    void = criterion.ignore_index
    assert bool(logits.grad.any()) == any(label != void for label in row.right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "name", [name for name, row in TABLE.items() if row.classes == 1 and "mode" not in row.options]
)
def test_labels_as_floats_of_one_channel(case: Case, name: str, dtype: torch.dtype) -> None:
    """What BCEWithLogitsLoss takes; ignore_index is void in it, too."""
    if case.device != "cpu":
        pytest.skip("a device-side assert would end the use of the device in this process")
    row = TABLE[name]
    target = labelled(row.labels, dtype).unsqueeze(1)
    criterion, logits = loss_for(1, case.backend, ignore_index=row.ignore_index)
    assert torch.isfinite(criterion(logits, torch.zeros_like(target)))
    with pytest.raises(ValueError, match="must lie in") as caught:
        criterion(logits, target)
    if row.code:
        assert f"pass {row.code}" in str(caught.value)
        target = eval(row.code, {"torch": torch, "target": target})
    for option, value in row.options.items():
        assert f"{option}={value!r}" in str(caught.value)
        setattr(criterion, option, value)
    assert target.flatten()[: len(row.right)].tolist() == row.right
    assert torch.isfinite(criterion(logits, target))


@pytest.mark.parametrize("classes", [1, 2, 3, 21, 150])
@pytest.mark.parametrize("labels", [[0, 255], [255]])
def test_255_is_no_void_label_where_only_0_is_beside_it(labels: list[int], classes: int) -> None:
    """Who follows that would train without foreground."""
    criterion, logits = loss_for(classes, "reference")
    with pytest.raises(ValueError, match="labels outside") as caught:
        criterion(logits, labelled(labels, torch.uint8))
    assert "ignore_index=255" not in str(caught.value)
    assert "target // 255" in str(caught.value)


def test_a_mask_decides_what_is_looked_at() -> None:
    """Labels at pixels that it leaves out do not change the advice."""
    criterion, logits = loss_for(2, "reference")
    target = labelled([0, 1, 255], torch.uint8)
    with pytest.raises(ValueError, match="pass target // 255"):
        criterion(logits, target, valid_mask=target != 1)


def test_what_is_no_label_map() -> None:
    criterion, logits = loss_for(5, "reference")
    with pytest.raises(ValueError, match="photograph or instance numbers"):
        criterion(logits, torch.arange(42).reshape(1, 6, 7))


def test_more_classes_than_the_bundled_proxy_has() -> None:
    criterion, logits = loss_for(5, "reference")
    with pytest.raises(ValueError, match="pass a proxy for 301 classes, which train_proxy makes, and as many channels"):
        criterion(logits, labelled([0, 300], torch.int16))


def test_always_warns_of_a_binary_mask_with_255_as_void() -> None:
    """A batch without foreground is right in many data sets, so it is no error."""
    criterion, logits = loss_for(1, "reference", ignore_index=255, validate="always")
    with pytest.warns(UserWarning, match=r"every valid pixel is of class 0.*pass target // 255"):
        criterion(logits, labelled([0, 255], torch.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(logits, labelled([0, 1, 255], torch.uint8))
        criterion(logits, labelled([0], torch.uint8))
        criterion.validate = "auto"
        criterion(logits, labelled([0, 255], torch.uint8))


class Wrong(NamedTuple):
    """A soft target, and the code of its message that mends it.

    Attributes:
        values: the pixels [P][C], in turn.
        code: an expression in the message, or "" where it says how to call the loss.
        mask: the valid_mask that the message says, or "".
    """

    values: list[list[float]]
    code: str
    mask: str = ""


NAN = float("nan")
SOFT: dict[str, Wrong] = {
    "grey one-hot": Wrong([[255, 0, 0], [0, 255, 0]], "target / 255"),
    "scaled": Wrong([[100, 100, 50], [0, 200, 50]], "target / target.sum(dim=1, keepdim=True)"),
    "counts": Wrong([[3, 1, 0], [0, 0, 2]], "target / target.sum(dim=1, keepdim=True)"),
    "too small": Wrong([[0.3, 0.1, 0], [0, 0, 0.2]], "target / target.sum(dim=1, keepdim=True)"),
    "several classes": Wrong([[1, 1, 0], [0, 1, 0]], "target / target.sum(dim=1, keepdim=True)"),
    "several and none": Wrong(
        [[1, 1, 0], [0, 0, 0], [0, 0, 1]],
        "target / target.sum(dim=1, keepdim=True).clamp(min=1e-3)",
        "target.sum(dim=1) > 1e-3",
    ),
    "none": Wrong([[1, 0, 0], [0, 0, 0]], "", "target.sum(dim=1) > 0.5"),
    "logits": Wrong([[-3, 2, 5], [0, 1, 0]], "target.softmax(dim=1)"),
    "overshoot": Wrong(
        [[-0.1, 1.1, 0], [0, 1, 0]], "target.clamp(min=0) / target.clamp(min=0).sum(dim=1, keepdim=True)"
    ),
    "NaN": Wrong([[NAN, NAN, NAN], [0, 1, 0]], "", "target.isfinite().all(dim=1)"),
    "one channel, grey": Wrong([[0.0], [127.5], [255.0]], "target / 255"),
    "one channel, overshoot": Wrong([[-0.1], [1.1], [0.5]], "target.clamp(0, 1)"),
    "one channel, logits": Wrong([[-3.5], [2.25]], "target.sigmoid()"),
    "one channel, NaN": Wrong([[NAN], [1.0]], "", "target.isfinite().all(dim=1)"),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SOFT)
def test_soft_targets(case: Case, name: str, masked: bool) -> None:
    if case.device != "cpu":
        pytest.skip("a device-side assert would end the use of the device in this process")
    row = SOFT[name]
    channels = len(row.values[0])
    target = torch.tensor(row.values, dtype=torch.float32).T.repeat(1, 42)[:, :42].reshape(1, channels, 6, 7)
    criterion, logits = loss_for(channels, case.backend)
    given = torch.ones(1, 6, 7, dtype=torch.bool) if masked else None
    assert torch.isfinite(criterion(logits, torch.full_like(target, 1 / max(2, channels)), valid_mask=given))
    with pytest.raises(ValueError, match="must lie in") as caught:
        criterion(logits, target, valid_mask=given)
    text, names = str(caught.value), {"torch": torch, "target": target, "valid_mask": given}
    mask = given
    if row.mask:
        joined = f"valid_mask & ({row.mask})" if masked and channels > 1 else row.mask
        assert f"valid_mask={joined}" in text
        mask = eval(joined, names)
    if row.code:
        assert f"pass {row.code}" in text
        target = eval(row.code, names)
    assert torch.isfinite(criterion(logits, target, valid_mask=mask))


@pytest.mark.parametrize("masked", [False, True])
def test_classes_with_a_sigmoid_each(case: Case, masked: bool) -> None:
    """The call that the message writes: every class is a binary map of its own."""
    if case.device != "cpu":
        pytest.skip("a device-side assert would end the use of the device in this process")
    logits = torch.randn(2, 3, 6, 7)
    target = (torch.rand(2, 3, 6, 7) < 0.5).float()
    given = torch.rand(2, 6, 7) < 0.8 if masked else None
    criterion = loss_for(3, case.backend)[0]
    assert torch.isfinite(criterion(logits, logits.softmax(1)))
    with pytest.raises(ValueError, match="a sigmoid of its own, call ") as caught:
        criterion(logits, target, valid_mask=given)
    code = str(caught.value).partition("a sigmoid of its own, call ")[2].rstrip(".")
    names = {"SemedaLoss": SemedaLoss, "logits": logits, "target": target, "valid_mask": given}
    found = eval(code, names)
    binary = SemedaLoss(mode="binary", reduction="sum")
    parts = [binary(logits[:, c : c + 1], target[:, c : c + 1], valid_mask=given) for c in range(3)]
    count = 3 * (84 if given is None else int(given.sum()))
    torch.testing.assert_close(found, sum(parts) / count)


def test_words_for_arrays() -> None:
    """Of `inspect_mask` and the like, which take NumPy arrays."""
    labels = np.array([[1, 2, 3]])
    seen = advice.Labels([1, 2, 3], [3], 3, None, advice.ARRAY)
    assert "pass labels - 1" in advice.label_advice(seen)
    assert eval("labels - 1", {"labels": labels}).max() == 2
