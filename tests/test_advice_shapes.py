"""What an error about shapes and dtypes advises works: the code in its text is run, and gives the right loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import Case
from helpers import make_proxy
from PIL import Image
from torch import Tensor

from semeda_fast import EdgeProxy, SemedaLoss, semeda_loss

C, H, W = 5, 6, 9


def right(binary: bool = False, n: int = 2) -> tuple[Tensor, Tensor]:
    """Logits and labels that fit."""
    generator = torch.Generator().manual_seed(n)
    logits = torch.randn(n, 1 if binary else C, H, W, generator=generator)
    return logits, torch.randint(2 if binary else C, (n, H, W), generator=generator)


class Row(NamedTuple):
    """A wrong call, and the code of its message that mends it.

    Attributes:
        spoil: (logits, labels) -> what is handed over.
        logits, target: expressions in the message, or "": they are right.
        mode: of the loss.
        same: whether the loss is then that of the right tensors.
        n: images.
        options: that the message names, besides.
    """

    spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    logits: str = ""
    target: str = ""
    mode: str = "multiclass"
    same: bool = True
    n: int = 2
    options: dict[str, Any] = {}  # noqa: RUF012  # never written to


def one_hot(y: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(y, C).movedim(3, 1)


TABLE: dict[str, Row] = {
    "logits with the classes last": Row(lambda z, y: (z.movedim(1, 3), y), "logits.permute(0, 3, 1, 2)"),
    "the channel last": Row(lambda z, y: (z.movedim(1, 3), y), "logits.permute(0, 3, 1, 2)", mode="binary"),
    "no batch": Row(lambda z, y: (z[0], y[0]), "logits.unsqueeze(0)", "target.unsqueeze(0)", n=1),
    "logits without a batch": Row(lambda z, y: (z[0], y), "logits.unsqueeze(0)", n=1),
    "labels without a batch": Row(lambda z, y: (z, y[0]), "", "target.unsqueeze(0)", n=1),
    "no batch, soft": Row(
        lambda z, y: (z[0], one_hot(y)[0].float()), "logits.unsqueeze(0)", "target.unsqueeze(0)", n=1
    ),
    "binary logits without a channel": Row(lambda z, y: (z[:, 0], y), "logits.unsqueeze(1)", mode="binary"),
    "one channel less, multiclass": Row(
        lambda z, y: (z[:, 0], y % 2), "logits.unsqueeze(1)", same=False, options={"mode": "binary"}
    ),
    "one channel, multiclass": Row(lambda z, y: (z[:, :1], y % 2), same=False, options={"mode": "binary"}),
    "other classes": Row(lambda z, y: (z[:, :3], y % 3), same=False, options={"num_classes": 3}),
    "several channels in binary mode": Row(
        lambda z, y: (z.repeat(1, 3, 1, 1), y), same=False, mode="binary",
        options={"mode": "multiclass", "num_classes": 3},
    ),
    "several maps in binary mode": Row(
        lambda z, y: (z.repeat(1, 3, 1, 1), y.unsqueeze(1).repeat(1, 3, 1, 1)), mode="binary",
        options={"mode": "multilabel"},
    ),
    "half logits of 8 bits": Row(lambda z, y: (z.to(torch.float8_e4m3fn), y), "logits.float()", same=False),
    "a last channel in labels": Row(lambda z, y: (z, y.unsqueeze(3)), "", "target.squeeze(3)"),
    "one-hot labels": Row(lambda z, y: (z, one_hot(y)), "", "target.argmax(dim=1)"),
    "one-hot labels, classes last": Row(lambda z, y: (z, one_hot(y).movedim(1, 3)), "", "target.argmax(dim=3)"),
    "height and width exchanged": Row(lambda z, y: (z, y.transpose(1, 2)), "", "target.transpose(1, 2)"),
    "flat labels": Row(lambda z, y: (z, y.flatten()), "", f"target.reshape(2, {H}, {W})"),
    "larger labels": Row(
        lambda z, y: (z, y.repeat_interleave(4, 1).repeat_interleave(4, 2)), same=False,
        options={"upsample": "bilinear"},
    ),
    "larger distributions": Row(
        lambda z, y: (z, one_hot(y).float().repeat_interleave(4, 2).repeat_interleave(4, 3)), same=False,
        options={"upsample": "bilinear"},
    ),
    "labels as floats": Row(lambda z, y: (z, y.float()), "", "target.long()"),
    "labels as floats, a channel": Row(lambda z, y: (z, y.float().unsqueeze(1)), "", "target.squeeze(1).long()"),
    "labels as floats, a last channel": Row(lambda z, y: (z, y.double().unsqueeze(3)), "", "target.squeeze(3).long()"),
    "labels by ToTensor": Row(
        lambda z, y: (z, y.unsqueeze(1).float() / 255), "", "(target.squeeze(1) * 255).round().long()"
    ),
    "labels by ToTensor in bfloat16": Row(
        lambda z, y: (z, (y.float() / 255).bfloat16()), "", "(target * 255).round().long()"
    ),
    "labels with NaN": Row(
        lambda z, y: (z, torch.where(y == 1, torch.nan, y.float())), "", "torch.nan_to_num(target, nan=-100).long()",
        same=False,
    ),
    "binary floats without a channel": Row(lambda z, y: (z, y.float()), "", "target.unsqueeze(1)", "binary"),
    "distribution with the classes last": Row(
        lambda z, y: (z, one_hot(y).float().movedim(1, 3)), "", "target.permute(0, 3, 1, 2)"
    ),
    "distribution, height and width exchanged": Row(
        lambda z, y: (z, one_hot(y).float().transpose(2, 3)), "", "target.transpose(2, 3)"
    ),
}  # fmt: skip


def loss_for(backend: str, options: dict[str, Any]) -> SemedaLoss:
    options = dict(options)
    classes = options.pop("num_classes", 2 if options.get("mode") in ("binary", "multilabel") else C)
    return SemedaLoss(make_proxy(classes), backend=backend, **options)


@pytest.mark.parametrize("name", TABLE)
def test_shapes(case: Case, name: str) -> None:
    if case.device != "cpu":
        pytest.skip("the right loss is computed on the CPU")
    row = TABLE[name]
    fitting = right(row.mode == "binary", row.n)
    logits, target = row.spoil(*fitting)
    options = {"mode": row.mode}
    with pytest.raises((ValueError, TypeError)) as caught:
        loss_for(case.backend, options)(logits, target)
    text = str(caught.value)
    for option, value in row.options.items():
        assert f"{option}={value!r}" in text
    names = {"torch": torch, "logits": logits, "target": target}
    for code in (row.logits, row.target):
        assert code in text
    for code in ("squeeze", "permute", "transpose", "argmax", "reshape", "flatten", "long()"):
        assert code not in text or code in row.logits + row.target or row.options, "advice that the row does not follow"
    logits = eval(row.logits or "logits", names)
    target = eval(row.target or "target", names)
    loss = loss_for(case.backend, {**options, **row.options})(logits, target)
    assert torch.isfinite(loss)
    if row.same:
        torch.testing.assert_close(loss, loss_for("reference", options)(*fitting), rtol=1e-4, atol=1e-5)


WITHOUT_CODE: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], str]] = {
    "the prediction": (lambda z, y: (z.argmax(1, keepdim=True), y), "pass the network's output itself"),
    "colours": (lambda z, y: (z, y.unsqueeze(1).repeat(1, 3, 1, 1)), "map each colour to a label first"),
    "colours last": (lambda z, y: (z, y.unsqueeze(3).repeat(1, 1, 1, 3)), "map each colour to a label first"),
    "blurred labels": (lambda z, y: (z, y + 0.37), "masks are resized to the nearest neighbour"),
    "another batch": (lambda z, y: (z, y[:1]), "the batches differ, 2 and 1 images"),
    "other classes, soft": (lambda z, y: (z, torch.rand(2, 4, H, W)), "the network gives 5 channels"),
    "rows of pixels": (lambda z, y: (z.movedim(1, 3).reshape(-1, C), y.flatten()), "it takes whole images"),
    "many classes": (lambda z, y: (torch.zeros(2, 300, H, W), y), "a proxy for 300 classes, which train_proxy makes"),
}


@pytest.mark.parametrize("name", WITHOUT_CODE)
def test_what_no_code_mends(case: Case, name: str) -> None:
    spoil, advice = WITHOUT_CODE[name]
    with pytest.raises((ValueError, TypeError), match=advice):
        loss_for(case.backend, {})(*spoil(*right()))


def test_the_sizes_may_hide_the_classes(case: Case) -> None:
    """As many rows as classes: the channels look right."""
    logits, target = torch.randn(2, C, W, C), torch.zeros(2, C, W).long()  # [N,H,W,C]
    with pytest.raises(ValueError, match=r"pass logits.permute\(0, 3, 1, 2\)"):
        loss_for(case.backend, {})(logits, target)
    assert torch.isfinite(loss_for(case.backend, {})(logits.permute(0, 3, 1, 2), target))


def test_no_values_are_read_while_a_graph_is_made() -> None:
    """Where labels as floats are told from labels / 255, which waits for the device."""
    logits, target = right()
    compiled = torch.compile(loss_for("reference", {}), fullgraph=True)
    with pytest.raises(Exception, match="pass labels as integers, target"):
        compiled(logits, target.float())
    with pytest.raises(ValueError, match="pass labels as integers, target"):
        loss_for("reference", {})(logits.to("meta"), target.float().to("meta"))


def test_tensors_in_other_things() -> None:
    logits, target = right()
    criterion = loss_for("reference", {})
    picture = Image.fromarray(np.zeros((H, W), np.uint8))
    batch = {"name": "a.png", "mask": target}
    for x, y, code in (
        ({"out": logits, "aux": logits}, target, "pass its ['out']"),
        (logits, batch, "pass its ['mask']"),
        (logits, picture, "pass torch.from_numpy(np.array(target))"),
        (logits, target.numpy(), "pass torch.from_numpy(target)"),
        (logits, [target, target], "pass one of its 2 elements"),
        (logits, {}, "pass a torch.Tensor"),
    ):
        with pytest.raises(TypeError) as caught:
            criterion(x, y)
        assert str(caught.value).endswith(code)
    assert torch.isfinite(criterion(logits[:1], torch.from_numpy(np.array(picture)).unsqueeze(0)))


def test_masks() -> None:
    logits, target = right()
    criterion = loss_for("reference", {})
    valid = torch.rand(2, H, W) < 0.5
    with pytest.raises(TypeError, match=r"pass valid_mask.bool\(\)"):
        criterion(logits, target, valid_mask=valid.to(torch.uint8) * 255)
    with pytest.raises(ValueError, match=r"pass valid_mask.squeeze\(1\)"):
        criterion(logits, target, valid_mask=valid.unsqueeze(1))


def test_what_is_on_another_device() -> None:
    logits, target = right()
    for name, arguments in (
        ("target", (logits, target.to("meta"), None)),
        ("valid_mask", (logits, target, torch.ones(2, H, W, dtype=torch.bool, device="meta"))),
    ):
        with pytest.raises(ValueError, match=rf"pass {name}\.to\(logits.device\)"):
            loss_for("reference", {})(*arguments[:2], valid_mask=arguments[2])


def test_a_proxy_of_other_classes() -> None:
    logits, target = right(binary=True)
    with pytest.raises(ValueError, match=r"take EdgeProxy\.bundled\(2\)"):
        semeda_loss(logits, target, make_proxy(), mode="binary")
    assert torch.isfinite(semeda_loss(logits, target, EdgeProxy.bundled(2), mode="binary"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cut this one with proxy") as caught:
        SemedaLoss(make_proxy(), num_classes=3)
    assert "slice_classes(3)" in str(caught.value)
    assert SemedaLoss(make_proxy().slice_classes(3), num_classes=3).proxy.num_classes == 3
    with pytest.raises(ValueError, match="but the proxy has 5") as caught:
        SemedaLoss(make_proxy(), num_classes=7)
    assert "slice_classes" not in str(caught.value)
