"""The short way of an eager call: the same bits as the general way, taken when it may be, and forgetting in time."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import NUM_CLASSES, VOID, make_inputs, make_proxy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from semeda_fast import EdgeProxy, SemedaLoss, functional, loss, semeda_loss
from semeda_fast.backends import cpu
from semeda_fast.backends import prepared as eager
from semeda_fast.backends import registry as backends

pytestmark = pytest.mark.skipif(
    "cpu" not in backends.available_names("cpu"), reason="the CPU kernels are not built here"
)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each direction that goes the short way."""
    seen: list[str] = []

    def noting(name: str) -> Any:
        function = getattr(cpu._PreparedCall, name)

        def run(*arguments: Any) -> Any:
            seen.append(name)
            return function(*arguments)

        return run

    for name in ("forward", "backward", "watched_backward"):
        monkeypatch.setattr(cpu._PreparedCall, name, noting(name))
    return seen


@pytest.fixture
def general(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A context in which every call goes the general way."""
    patch = pytest.MonkeyPatch()

    class General:
        def __enter__(self) -> None:
            for module in (functional, loss):
                patch.setattr(module, "eager_loss", lambda *_: None)

        def __exit__(self, *_: object) -> None:
            patch.undo()

    yield General()
    patch.undo()


def step(criterion: Any, logits: Tensor, target: Tensor, scale: float = 1.0, **options: Any) -> tuple[Tensor, Tensor]:
    z = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = criterion(z, target, **options)
    (gradient,) = torch.autograd.grad(value, z, torch.full_like(value, scale))
    return value.detach(), gradient


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())


WEIGHT = torch.linspace(0.25, 2.0, NUM_CLASSES)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "sum": ({"reduction": "sum", "lambda_ce": 0.3}, {}),
    "lambdas": ({"lambda_ce": 0.7, "lambda_semeda": 1.3}, {}),
    "no semeda": ({"lambda_semeda": 0.0}, {}),
    "weights": ({"weight": WEIGHT, "lambda_ce": 0.7}, {}),
    "weights, sum": ({"weight": WEIGHT, "reduction": "sum"}, {}),
    "smoothing": ({"weight": WEIGHT, "label_smoothing": 0.1}, {}),
    "layer weights": ({"layer_weights": (0.5, 0.0, 2.0)}, {}),
    "l2": ({"distance": "l2"}, {}),
    "smooth l1": ({"distance": "smooth_l1"}, {}),
    "empty nan": ({"empty": "nan"}, {}),
    "no labels checked": ({"validate": "never"}, {}),
    "bf16": ({}, {"dtype": torch.bfloat16}),
    "fp16, bytes": ({}, {"dtype": torch.float16, "labels": torch.uint8}),
}


@pytest.mark.parametrize("tap", ["pre", "post"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_the_general_way(kind: str, tap: str, short: list[str], general: Any) -> None:
    options, inputs = KINDS[kind]
    criterion = SemedaLoss(make_proxy(tap=tap), ignore_index=VOID, **options)
    logits, target = make_inputs(**inputs)
    for z in (logits, logits.detach().to(memory_format=torch.channels_last)):
        found = step(criterion, z, target, 0.37)
        assert short == ["forward", "backward"]
        short.clear()
        with general:
            same(found, step(criterion, z, target, 0.37))
        assert not short
        for leaf, requires_grad in ((z.detach(), False), (z, True)):  # first one that needs no gradient
            with torch.set_grad_enabled(requires_grad):
                assert torch.equal(criterion(leaf, target).detach(), found[0])
        with torch.no_grad():
            assert torch.equal(criterion(z, target), found[0])
        assert short == ["forward"] * 3
        short.clear()


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("what", ["mask", "distribution", "small logits", "all void", "no image"])
def test_the_bits_of_the_general_way_on_other_inputs(
    what: str, weight: Tensor | None, short: list[str], general: Any
) -> None:
    options: dict[str, Any] = {"upsample": "bilinear"} if what == "small logits" else {}
    logits, target = make_inputs(n=0 if what == "no image" else 2)
    mask = None
    if what == "mask":
        mask = torch.rand(target.shape) < 0.6
    elif what == "distribution":
        target = torch.rand_like(logits).softmax(1)
    elif what == "small logits":
        logits = logits[:, :, :5, :7]
    elif what == "all void":
        target = torch.full_like(target, VOID)
    for empty in ("zero", "nan"):
        criterion = SemedaLoss(make_proxy(), ignore_index=VOID, weight=weight, empty=empty, **options)
        found = step(criterion, logits, target, valid_mask=mask)
        assert short == ["forward", "backward"]
        short.clear()
        with general:
            expected = step(criterion, logits, target, valid_mask=mask)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
            assert torch.equal(a.isnan(), b.isnan())


def test_binary_mode(short: list[str], general: Any) -> None:
    criterion = SemedaLoss(make_proxy(2), mode="binary", ignore_index=VOID)
    logits, target = make_inputs(c=1, num_labels=2)
    found = step(criterion, logits, target)
    assert short == ["forward", "backward"]
    with general:
        same(found, step(criterion, logits, target))
    same(step(criterion, logits, target.unsqueeze(1)), found)


class _Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_which_calls_go_the_general_way(short: list[str]) -> None:
    logits, target = make_inputs()
    proxy = make_proxy()

    def goes_short(z: Tensor = logits, **options: Any) -> bool:
        short.clear()
        semeda_loss(z, target, proxy, **{"ignore_index": VOID, **options})
        return bool(short)

    assert goes_short()
    assert goes_short(backend="cpu")
    assert not goes_short(backend="reference")
    assert not goes_short(reduction="none")
    assert not goes_short(return_components=True)
    assert not goes_short(validate="always")
    assert not goes_short(lambda_semeda=torch.tensor(0.5))
    assert not goes_short(lambda_ce=torch.tensor(0.5))
    assert not goes_short(layer_weights=[1.0, 1.0, 1.0])  # no part of a key
    assert not goes_short(weight=WEIGHT.double())  # needs a copy
    assert not goes_short(logits.double())
    with _Watcher():
        assert not goes_short()
    with torch.profiler.profile():
        assert not goes_short()
    assert goes_short()


def test_what_changes_between_calls_is_seen(general: Any, short: list[str]) -> None:
    """Everything that a prepared call could have remembered, changed one after the other."""
    proxy = make_proxy()
    criterion = SemedaLoss(proxy, ignore_index=VOID)
    logits, target = make_inputs()
    last = step(criterion, logits, target)

    def changed(short_way: bool = True) -> None:
        nonlocal last
        short.clear()
        found = step(criterion, logits, target)
        assert bool(short) == short_way
        with general:
            same(found, step(criterion, logits, target))
        assert not torch.equal(found[0], last[0])
        last = found

    proxy.weights[0].mul_(1.5)
    changed()
    proxy.weights[1].data = proxy.weights[1].flip(2).contiguous()
    changed()
    proxy.weights[1].data = proxy.weights[1].transpose(2, 3)
    changed(short_way=False)  # not contiguous
    proxy.weights[1].data = proxy.weights[1].contiguous() * 1.1
    changed()
    proxy.bias0 = torch.full_like(proxy.biases[0], 0.3)
    changed()
    proxy.scales["l1"] = (3.0, 2.0, 1.0)
    changed()
    proxy.tap = "post"
    changed()
    for name, value in (
        ("lambda_ce", 0.5),
        ("lambda_semeda", 0.7),
        ("layer_weights", (2.0, 1.0, 0.0)),
        ("distance", "l2"),
        ("ignore_index", 0),
        ("label_smoothing", 0.2),
        ("reduction", "sum"),
        ("weight", WEIGHT),
    ):
        setattr(criterion, name, value)
        if name == "ignore_index":
            target = target.clamp(max=NUM_CLASSES - 1)
        changed()
    target = target.flip(1)
    changed()
    target = target.to(torch.uint8)[:, :, :9].contiguous()
    logits = logits[:, :, :, :9]
    changed()


def test_layer_weights_of_the_proxy_may_change() -> None:
    proxy = make_proxy()
    logits, target = make_inputs()
    before = semeda_loss(logits, target, proxy, ignore_index=VOID)
    proxy.layer_weights = (2.0, 1.0, 0.0)
    after = semeda_loss(logits, target, proxy, ignore_index=VOID)
    assert after != before
    assert after == semeda_loss(logits, target, proxy, ignore_index=VOID, layer_weights=(2.0, 1.0, 0.0))


def test_the_registry_is_asked_again_after_a_change(short: list[str]) -> None:
    logits, target = make_inputs()
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID)
    criterion(logits, target)
    backend = backends.get("cpu")
    backends.unregister("cpu")
    short.clear()
    try:
        criterion(logits, target)
        assert not short
    finally:
        order = [backends.get(name) for name in backends.names() if name != "reference"]
        for other in (backend, *order):
            backends.register(other)
    criterion(logits, target)
    assert short


def test_a_mistake_is_found_after_calls_that_were_right() -> None:
    proxy = make_proxy()
    criterion = SemedaLoss(proxy)
    logits, target = make_inputs(void=0.0)
    for _ in range(2):
        criterion(logits, target)
        with pytest.raises(ValueError, match="labels outside"):
            criterion(logits, torch.full_like(target, NUM_CLASSES))
        with pytest.raises(ValueError, match="labels must have the shape"):
            criterion(logits, target[:, :-1])
        with pytest.raises(ValueError, match="lambda_semeda must be finite"):
            semeda_loss(logits, target, proxy, lambda_semeda=-1.0)
        with pytest.raises(ValueError, match="reduction must be one of"):
            semeda_loss(logits, target, proxy, reduction="average")
        with pytest.raises(ValueError, match="distance must be one of"):
            semeda_loss(logits, target, proxy, distance="cosine")
        with pytest.raises(ValueError, match="distance must be one of"):
            semeda_loss(logits, target, proxy, distance=["l1"], lambda_semeda=1.0)  # type: ignore[arg-type]
        proxy.weights[0].requires_grad_()
        with pytest.raises(ValueError, match="the proxy is frozen"):
            criterion(logits, target)
        proxy.weights[0].requires_grad_(False)


def test_backward_uses_the_proxy_of_forward() -> None:
    proxy = make_proxy()
    logits, target = make_inputs()
    (expected,) = torch.autograd.grad(semeda_loss(logits, target, proxy, ignore_index=VOID), logits)
    value = semeda_loss(logits, target, proxy, ignore_index=VOID)
    for weight in proxy.weights:
        weight.zero_()
    assert torch.equal(torch.autograd.grad(value, logits)[0], expected)


def test_logits_changed_before_backward_are_an_error() -> None:
    logits, target = make_inputs()
    z = logits * 1.0
    value = SemedaLoss(make_proxy(), ignore_index=VOID)(z, target)
    z.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_saved_tensors_that_come_back_from_elsewhere(distance: str, short: list[str]) -> None:
    """As from a hook that keeps them on disk, and lays them out anew."""
    logits, target = make_inputs()
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, distance=distance)
    expected = step(criterion, logits, target)

    def turned(tensor: Tensor) -> Tensor:
        return tensor.clone().to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.clone()

    for unpack, way in ((torch.clone, "backward"), (turned, "watched_backward")):
        short.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), unpack):
            found = step(criterion, logits, target)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-9)
        assert short[-1] == way


def test_whoever_asks_for_more_is_served_by_the_operator(short: list[str]) -> None:
    logits, target = make_inputs()
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID)
    value = criterion(logits, target)
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()
    scales = torch.tensor([1.0, 3.0])
    found = torch.autograd.grad(criterion(logits, target), logits, scales, is_grads_batched=True)[0]
    torch.testing.assert_close(found[1], 3 * found[0])
    torch.testing.assert_close(found[0], gradient.detach())
    value = criterion(logits, target)
    with _Watcher():
        (watched,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(watched, gradient.detach())
    assert short.count("watched_backward") == 3
    assert "backward" not in short


def test_what_is_remembered_is_bounded_and_goes_with_the_proxy() -> None:
    proxy = make_proxy()
    for width in range(1, eager.MAX_PREPARED + 10):
        logits, target = make_inputs(n=1, h=2, w=width)
        semeda_loss(logits, target, proxy, ignore_index=VOID)
        assert 0 < len(proxy.__dict__["_calls"]) <= eager.MAX_PREPARED + 1
    for other in (copy.deepcopy(proxy), pickle.loads(pickle.dumps(proxy))):
        assert "_calls" not in other.__dict__
        assert torch.equal(loss_of(other), loss_of(proxy))
    gone = weakref.ref(proxy)
    del proxy
    gc.collect()
    assert gone() is None


def loss_of(proxy: EdgeProxy) -> Tensor:
    logits, target = make_inputs(n=1, h=2, w=eager.MAX_PREPARED + 9)
    value = semeda_loss(logits, target, proxy, ignore_index=VOID)
    assert isinstance(value, Tensor)
    return value.detach()


def test_a_gradient_after_a_call_without_one() -> None:
    logits, target = make_inputs()
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID)
    with torch.no_grad():
        alone = criterion(logits, target)
    found, gradient = step(criterion, logits, target)
    assert torch.equal(found, alone)
    assert gradient.any()
    assert not criterion(logits.detach(), target).requires_grad


def test_a_schedule_prepares_nothing_anew() -> None:
    logits, target = make_inputs()
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID)
    for epoch in range(5):
        criterion.lambda_semeda = 0.1 * epoch
        criterion(logits, target)
    assert len(criterion.proxy.__dict__["_calls"]) == 1
