"""Numbers and class weights as users have them, and checkpoints that a torch criterion wrote."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Case
from helpers import NUM_CLASSES, VOID, make_inputs, make_proxy, value_and_grad
from torch import Tensor, nn
from training_fixtures import TINY, same, scenes

from semeda_fast import EdgeProxy, SemedaLoss, semeda_loss, train_proxy
from semeda_fast.proxy import MaskFolder, ProxyLayer, read_mask

WEIGHT = [0.5, 2.0, 1.0, 0.25, 3.0]
INTEGERS: list[Callable[[int], Any]] = [np.int64, np.int32, np.int16, np.uint16, lambda x: np.array([x])[0]]


def loss_and_grad(criterion: nn.Module, case: Case) -> tuple[Tensor, Tensor]:
    logits, target = make_inputs(device=case.device)
    return value_and_grad(criterion.to(case.device), logits, target)


# ----------------------------------------------------------------------------------------------------
# Integers


@pytest.mark.parametrize("number", INTEGERS)
def test_numpy_integers(case: Case, number: Callable[[int], Any], tmp_path: Path) -> None:
    """NumPy counts classes (`labels.max() + 1`), and configuration files come through it."""
    logits, target = make_inputs(device=case.device)
    plain = SemedaLoss(num_classes=NUM_CLASSES, ignore_index=VOID, backend=case.backend).to(case.device)
    given = SemedaLoss(num_classes=number(NUM_CLASSES), ignore_index=number(VOID), backend=case.backend)
    expected, found = value_and_grad(plain, logits, target), value_and_grad(given.to(case.device), logits, target)
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])
    assert type(given.ignore_index) is int
    given.ignore_index = number(VOID)
    assert type(given.ignore_index) is int
    assert torch.equal(given(logits, target).detach(), expected[0])
    twin = semeda_loss(logits, target, plain.proxy, ignore_index=number(VOID), backend=case.backend)
    assert torch.equal(twin.detach(), expected[0])  # type: ignore[union-attr]
    proxy = EdgeProxy.bundled(number(21)).slice_classes(number(NUM_CLASSES))
    proxy.save(tmp_path / "proxy.safetensors")  # as JSON, which has no NumPy numbers
    assert EdgeProxy.load(tmp_path / "proxy.safetensors").num_classes == NUM_CLASSES
    assert SemedaLoss(proxy, num_classes=number(NUM_CLASSES)).proxy is proxy
    assert EdgeProxy(number(4), [number(3)]).widths == (3,)
    assert ProxyLayer(number(4), number(3)) == ProxyLayer(4, 3)


def test_no_ignore_index(case: Case) -> None:
    """As `ignore_index: null` of a configuration: every pixel counts."""
    logits, target = make_inputs(void=0.0, device=case.device)
    expected = value_and_grad(SemedaLoss(make_proxy(), backend=case.backend).to(case.device), logits, target)
    given = SemedaLoss(make_proxy(), ignore_index=None, backend=case.backend).to(case.device)
    assert given.ignore_index == -100
    found = value_and_grad(given, logits, target)
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])
    twin = semeda_loss(logits, target, given.proxy, ignore_index=None, backend=case.backend)
    assert torch.equal(twin.detach(), expected[0])  # type: ignore[union-attr]


NO_INTEGERS = [True, False, np.bool_(True), 255.0, "255", torch.tensor(255), [255]]


@pytest.mark.parametrize("value", NO_INTEGERS)
def test_what_is_no_integer_is_refused(value: Any) -> None:
    logits, target = make_inputs()
    proxy = make_proxy()
    with pytest.raises(TypeError, match="ignore_index must be an int, got"):
        SemedaLoss(proxy, ignore_index=value)
    with pytest.raises(TypeError, match="ignore_index must be an int, got"):
        semeda_loss(logits, target, proxy, ignore_index=value)
    criterion = SemedaLoss(proxy)
    with pytest.raises(TypeError, match="ignore_index must be an int, got"):
        criterion.ignore_index = value
    for make in (
        lambda: SemedaLoss(num_classes=value),
        lambda: SemedaLoss(proxy, num_classes=value),
        lambda: EdgeProxy.bundled(value),
        lambda: EdgeProxy(value),
        lambda: proxy.slice_classes(value),
    ):
        with pytest.raises(TypeError, match="num_classes must be an int, got"):
            make()


def test_masks_take_no_bools_for_numbers(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.ones((3, 4), np.uint8)).save(tmp_path / "mask.png")
    assert len(MaskFolder(tmp_path, num_classes=np.int64(2), ignore_index=np.int64(255))) == 1  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="num_classes must be an int, got True"):
        read_mask(tmp_path / "mask.png", num_classes=True)
    with pytest.raises(TypeError, match="num_classes must be an int, got True"):
        MaskFolder(tmp_path, num_classes=True)
    with pytest.raises(TypeError, match="ignore_index must be an int, got True"):
        MaskFolder(tmp_path, num_classes=2, ignore_index=True)


def test_numbers_of_train_proxy(tmp_path: Path) -> None:
    masks = scenes(4)
    number = np.int64
    expected = train_proxy(masks, 4, **TINY)
    options: dict[str, Any] = {
        **TINY, "steps": number(5), "batch_size": number(4), "crop_size": number(12), "widths": number([4, 6]),
        "seed": number(0), "radius": number(1), "noise": np.float64(0.1), "lr": np.float64(0.01),
    }  # fmt: skip
    found = train_proxy(masks, number(4), ignore_index=None, **options)
    assert same(found, expected)
    found.save(tmp_path / "proxy.safetensors")
    assert EdgeProxy.load(tmp_path / "proxy.safetensors").provenance["steps"] == 5
    assert same(train_proxy(masks, 4, ignore_index=number(255), **TINY), expected)
    for name, value in (
        ("num_classes", True),
        ("ignore_index", True),
        ("steps", 5.0),
        ("seed", None),
        ("columns", 9.0),
    ):
        with pytest.raises(TypeError, match=f"{name} must be an int, got"):
            train_proxy(masks, **{"num_classes": 4, **TINY, name: value})  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------
# Class weights

WEIGHTS = {
    "list": WEIGHT,
    "tuple": tuple(WEIGHT),
    "float64 array": np.array(WEIGHT),
    "float16 array": np.array(WEIGHT, np.float16),
    "list of NumPy numbers": list(np.array(WEIGHT)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_class_weights_need_be_no_tensor(case: Case, name: str) -> None:
    logits, target = make_inputs(device=case.device)
    options: dict[str, Any] = {"ignore_index": VOID, "backend": case.backend}
    tensor = torch.tensor(WEIGHT)
    expected = value_and_grad(SemedaLoss(make_proxy(), weight=tensor, **options).to(case.device), logits, target)
    criterion = SemedaLoss(make_proxy(), weight=WEIGHTS[name], **options).to(case.device)
    assert criterion.weight is not None
    assert criterion.weight.dtype == torch.float32
    found = value_and_grad(criterion, logits, target)
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])
    twin = semeda_loss(logits, target, criterion.proxy, weight=WEIGHTS[name], **options)
    assert torch.equal(twin.detach(), expected[0])  # type: ignore[union-attr]
    criterion.weight = None
    assert not torch.equal(criterion(logits, target).detach(), expected[0])
    criterion.weight = WEIGHTS[name]  # type: ignore[assignment]
    assert torch.equal(criterion(logits, target).detach(), expected[0])


def test_whole_numbers_are_class_weights(case: Case) -> None:
    criteria = [
        SemedaLoss(make_proxy(), weight=weight, ignore_index=VOID, backend=case.backend)
        for weight in ([1, 2, 1, 1, 3], np.array([1, 2, 1, 1, 3]), torch.tensor([1.0, 2, 1, 1, 3]))
    ]
    first, second, third = (loss_and_grad(criterion, case) for criterion in criteria)
    assert torch.equal(first[0], third[0])
    assert torch.equal(second[1], third[1])


def test_the_array_is_copied() -> None:
    array = np.array(WEIGHT, np.float32)
    criterion = SemedaLoss(make_proxy(), weight=array)
    array[:] = 7
    assert criterion.weight is not None
    assert criterion.weight.tolist() == WEIGHT


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (WEIGHT[:3], ValueError, r"shape \[5\], got shape \[3\]"),
        ([WEIGHT], ValueError, r"shape \[5\], got shape \[1, 5\]"),
        (1.0, ValueError, r"shape \[5\], got shape \[\]"),
        ("12345", TypeError, "one number a class"),
        ([True] * 5, TypeError, "one number a class"),
        ([None] * 5, TypeError, "one number a class"),
        ([[1.0], [2.0, 3.0]], TypeError, "one number a class"),
        ({"a": 1}, TypeError, "one number a class"),
        (torch.ones(5, dtype=torch.int64), TypeError, r"got torch.int64; pass weight.float\(\)"),
    ],
)
def test_what_is_no_class_weight_is_refused(weight: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SemedaLoss(make_proxy(), weight=weight)
    with pytest.raises(error, match=words):
        semeda_loss(*make_inputs(void=0.0), make_proxy(), weight=weight)


# ----------------------------------------------------------------------------------------------------
# Checkpoints of training scripts whose criterion was nn.CrossEntropyLoss(weight)


class Model(nn.Module):
    """A network that owns its criterion, as Lightning modules do."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, NUM_CLASSES, 1)
        self.criterion = criterion


def test_a_checkpoint_with_class_weights_loads(case: Case) -> None:
    saved = Model(nn.CrossEntropyLoss(torch.tensor(WEIGHT))).state_dict()
    kept = copy.deepcopy(saved)
    expected = loss_and_grad(SemedaLoss(make_proxy(), weight=WEIGHT, ignore_index=VOID, backend=case.backend), case)
    criterion = SemedaLoss(make_proxy(), weight=[1.0] * 5, ignore_index=VOID, backend=case.backend).to(case.device)
    model = Model(criterion)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(model.load_state_dict(saved)) == "<All keys matched successfully>"
    assert saved.keys() == kept.keys()
    assert torch.equal(model.network.weight, saved["network.weight"])
    assert criterion.weight is not None
    assert criterion.weight.tolist() == WEIGHT
    found = loss_and_grad(criterion, case)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    saved["criterion.weight"][:] = 9
    assert criterion.weight.tolist() == WEIGHT
    assert dict(criterion.state_dict()) == {}  # as before: nothing of it is stored
    criterion.load_state_dict({"weight": torch.tensor(WEIGHT)})  # of a criterion that was saved alone
    criterion.load_state_dict({})


def test_class_weights_that_nobody_asked_for_are_taken_with_a_warning() -> None:
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID)
    with pytest.warns(UserWarning, match=r"'criterion.weight' holds class weights.*criterion.weight = None") as caught:
        Model(criterion).load_state_dict(Model(nn.CrossEntropyLoss(torch.tensor(WEIGHT))).state_dict())
    assert [warning.filename for warning in caught] == [__file__]
    assert criterion.weight is not None
    assert criterion.weight.tolist() == WEIGHT
    criterion.weight = None  # the advice
    assert torch.isfinite(criterion(*make_inputs()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_class_weights_of_other_dtypes_load_as_fp32(dtype: torch.dtype) -> None:
    criterion = SemedaLoss(make_proxy(), weight=WEIGHT)
    criterion.load_state_dict({"weight": torch.tensor(WEIGHT, dtype=dtype)})
    assert criterion.weight is not None
    assert criterion.weight.dtype == torch.float32
    assert criterion.weight.tolist() == WEIGHT


def test_class_weights_of_another_length_are_an_error() -> None:
    model = Model(SemedaLoss(make_proxy(), weight=WEIGHT))
    with pytest.raises(RuntimeError, match=r"size mismatch for criterion.weight: .* shape \[3\], .* 5 classes"):
        model.load_state_dict({**Model(nn.CrossEntropyLoss()).state_dict(), "criterion.weight": torch.ones(3)})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"criterion.pos_weight\""):
        model.load_state_dict({**Model(nn.CrossEntropyLoss()).state_dict(), "criterion.pos_weight": torch.ones(1)})
