"""One record of options: signatures, documentation, checks, the operator and the kernels' text are made of it."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import Any

import pytest
import torch
from helpers import NUM_CLASSES, VOID, make_inputs, make_proxy

from semeda_fast import SemedaLoss, semeda_loss
from semeda_fast.backends.config import FusedConfig, config_text, parse_config
from semeda_fast.backends.problem import spec_of
from semeda_fast.options import OPTIONS, OUTSIDE_KERNELS, LossKeywords, LossOptions, options_of
from semeda_fast.spec import ARGUMENTS

DEFAULTS = {each.name: each.default for each in fields(LossOptions)}
# A value of each option that is not its default.
OTHERS: dict[str, Any] = {
    "layer_weights": (1.0, 0.5, 2.0),
    "distance": "l2",
    "ignore_index": VOID,
    "label_smoothing": 0.25,
    "reduction": "sum",
    "mode": "binary",
    "slice_dim": 3,
    "from_logits": False,
    "empty": "nan",
    "upsample": "bilinear",
    "backend": "reference",
    "validate": "never",
}


def criterion(**options: Any) -> SemedaLoss:
    return SemedaLoss(make_proxy(2 if options.get("mode") == "binary" else NUM_CLASSES), **options)


@pytest.mark.parametrize("function", [SemedaLoss, SemedaLoss.__init__, semeda_loss])
def test_a_signature_names_each_option_with_its_default(function: Any) -> None:
    given = inspect.signature(function).parameters
    assert {name: given[name].default for name in OPTIONS} == DEFAULTS
    assert all(given[name].kind is inspect.Parameter.KEYWORD_ONLY for name in OPTIONS)
    assert all(given[name].annotation for name in OPTIONS)
    assert not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in given.values())


def test_what_editors_know_is_the_record() -> None:
    assert tuple(LossKeywords.__annotations__) == OPTIONS
    assert set(OTHERS) == set(OPTIONS), "a new option needs a value here"


def test_the_documentation_explains_each_option() -> None:
    text = SemedaLoss.__doc__ or ""
    assert "{options}" not in text
    for each in fields(LossOptions):
        assert re.search(rf"^        {each.name}: ", text, re.MULTILINE), each.name
        assert len(each.metadata["meaning"]) > 10
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_an_attribute_and_shown(name: str) -> None:
    loss = criterion(**{name: OTHERS[name]})
    assert getattr(loss, name) == OTHERS[name]
    assert f"{name}={OTHERS[name]!r}" in repr(loss)
    plain = criterion(mode="binary") if name == "mode" else criterion()
    setattr(plain, name, OTHERS[name])
    assert getattr(plain, name) == OTHERS[name]


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("mode", "backend", "validate", "empty")])
def test_module_and_function_pass_an_option_on(name: str) -> None:
    logits, target = make_inputs()
    options = {"ignore_index": VOID, name: OTHERS[name]}
    if name == "from_logits":
        logits = logits.softmax(dim=1)
    if name == "upsample":
        logits = logits[:, :, ::2, ::2]
    loss = criterion(**options)
    expected = loss(logits, target)
    assert torch.equal(semeda_loss(logits, target, loss.proxy, **options), expected)
    if name not in ("upsample", "from_logits", "ignore_index", "slice_dim"):
        assert not torch.equal(semeda_loss(logits, target, loss.proxy, ignore_index=VOID), expected)
    changed = criterion(ignore_index=VOID)
    changed(*make_inputs())
    setattr(changed, name, OTHERS[name])
    if name == "distance":
        changed.lambda_semeda = loss.lambda_semeda
    assert torch.equal(changed(logits, target), expected)


BAD = [
    ("distance", "l3", ValueError, "one of 'l1', 'l2', 'smooth_l1', got 'l3'"),
    ("upsample", "nearest", ValueError, "None or 'bilinear', got 'nearest'"),
    ("reduction", "max", ValueError, "one of 'mean', 'sum', 'none', got 'max'"),
    ("mode", "binry", ValueError, "one of 'multiclass'"),
    ("empty", None, ValueError, "one of 'zero', 'nan', got None"),
    ("validate", True, ValueError, "one of 'auto'"),
    ("label_smoothing", 1.5, ValueError, "must lie in [0, 1], got 1.5"),
    ("label_smoothing", "0.1", TypeError, "must be a number in [0, 1]"),
    ("ignore_index", True, TypeError, "ignore_index must be an int"),
]


@pytest.mark.parametrize(("name", "value", "kind", "text"), BAD)
def test_a_value_that_means_nothing(name: str, value: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        SemedaLoss(make_proxy(), **{name: value})
    logits, target = make_inputs()
    with pytest.raises(kind, match=re.escape(text)):
        semeda_loss(logits, target, make_proxy(), **{name: value})


def test_an_unknown_keyword_is_named_with_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"SemedaLoss\(\) got .*'ignore_idx'; did you mean 'ignore_index'"):
        SemedaLoss(make_proxy(), ignore_idx=255)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"semeda_loss\(\) got .*'gamma'; the options are layer_weights, distance"):
        semeda_loss(*make_inputs(), make_proxy(), gamma=2)  # type: ignore[call-arg]


def test_the_operator_takes_what_the_record_holds() -> None:
    schema = torch.ops.semeda_fast.loss_terms.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[6:] == [*ARGUMENTS, "made_by"]
    assert set(OPTIONS) <= set(ARGUMENTS)


def test_one_text_for_all_losses_with_the_same_kernels() -> None:
    proxy = make_proxy()

    def text(**options: Any) -> str:
        return config_text(proxy.weights, spec_of(proxy, options_of(options, "l1", "test")), False)

    assert text() == text(**{name: OTHERS[name] for name in OUTSIDE_KERNELS}) == text(reduction="sum")
    for name in set(OPTIONS) - set(OUTSIDE_KERNELS) - {"reduction"}:
        assert text(**{name: OTHERS[name]}) != text(), name
    assert text(reduction="none") != text()
    config = parse_config(text(label_smoothing=0.1, layer_weights=(0.1, 1 / 3, 2.0)))
    assert isinstance(config, FusedConfig)
    assert (config.label_smoothing, config.layer_weights) == (0.1, (0.1, 1 / 3, 2.0))


def test_compiled_code_sees_each_option() -> None:
    """An assignment between calls reaches compiled code, which makes the record while it traces."""
    logits, target = make_inputs()
    loss = criterion(ignore_index=VOID, backend="reference")
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, target), loss(logits, target))
    loss.label_smoothing = 0.25
    torch.testing.assert_close(compiled(logits, target), loss(logits, target))

    def functional(z: torch.Tensor, y: torch.Tensor) -> Any:
        return semeda_loss(z, y, loss.proxy, ignore_index=VOID, label_smoothing=0.25, backend="reference")

    torch.testing.assert_close(
        torch.compile(functional, fullgraph=True, backend="eager")(logits, target), functional(logits, target)
    )
