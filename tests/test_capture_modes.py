"""make_fx, fake tensors, the meta device, FlopCounterMode, checkpoints and functional transforms: eager's results."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from capturing import NUM_CLASSES, VOID, assert_same_loss, close, make_criterion, other_logits
from conftest import Case
from helpers import make_inputs, make_proxy, value_and_grad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from semeda_fast import EdgeProxy, SemedaLoss

TRACING = [
    {"tracing_mode": "real"},
    {"tracing_mode": "real", "pre_dispatch": True},
    {"tracing_mode": "fake", "_allow_non_fake_inputs": True},
    {"tracing_mode": "symbolic", "_allow_non_fake_inputs": True},
]


@pytest.mark.parametrize("options", TRACING, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("gradient", [False, True])
def test_make_fx(case: Case, gradient: bool, options: dict[str, Any]) -> None:
    criterion = make_criterion(case)
    logits, target = make_inputs(device=case.device)
    graph = make_fx(criterion, **options)(logits if gradient else logits.detach(), target)
    assert_same_loss(graph, criterion, *other_logits(case))
    if options["tracing_mode"] == "symbolic":
        assert_same_loss(graph, criterion, *other_logits(case, n=1, h=20, w=9))


def autograd_inside(criterion: SemedaLoss) -> Callable[..., Tensor]:
    def gradient(logits: Tensor, target: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        return torch.autograd.grad(criterion(logits, target), logits)[0]

    return gradient


@pytest.mark.parametrize("gradient", [autograd_inside, torch.func.grad])
@pytest.mark.parametrize("options", [TRACING[0], *TRACING[2:]], ids=lambda options: options["tracing_mode"])
def test_make_fx_of_a_gradient(case: Case, options: dict[str, Any], gradient: Any) -> None:
    criterion = make_criterion(case)
    graph = make_fx(gradient(criterion), **options)(*other_logits(case))
    logits, target = other_logits(case, seed=6)
    close(graph(logits, target), value_and_grad(criterion, logits, target)[1])


@pytest.mark.parametrize("gradient", [False, True])
def test_fake_tensors(case: Case, gradient: bool) -> None:
    criterion = make_criterion(case, reduction="mean")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        logits, target = (mode.from_tensor(tensor) for tensor in other_logits(case))
        loss = criterion(logits.requires_grad_(gradient), target)
        assert isinstance(loss, FakeTensor)
        assert (loss.shape, loss.dtype, loss.requires_grad) == ((), torch.float32, gradient)
        if gradient:
            loss.backward()
            assert logits.grad is not None
            assert (logits.grad.shape, logits.grad.dtype) == (logits.shape, logits.dtype)


def test_everything_made_of_fake_tensors(case: Case) -> None:
    """As for an estimate of memory; nothing is remembered of them afterwards."""
    with FakeTensorMode():
        criterion = SemedaLoss(EdgeProxy(NUM_CLASSES), backend=case.backend).to(case.device)
        logits = torch.randn(2, NUM_CLASSES, 9, 11, device=case.device, requires_grad=True)
        criterion(logits, torch.zeros(2, 9, 11, dtype=torch.int64, device=case.device)).backward()
        assert isinstance(logits.grad, FakeTensor)


def test_the_bundled_proxy_stays_real_under_fake_tensors() -> None:
    from semeda_fast.proxy import storage

    storage._bundled.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        EdgeProxy.bundled(NUM_CLASSES)
    assert not any(isinstance(weight, FakeTensor) for weight in EdgeProxy.bundled(NUM_CLASSES).weights)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("validate", ["auto", "always", "never"])
def test_the_meta_device(backend: str, validate: str, autocast: bool) -> None:
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=backend, validate=validate).to("meta")
    logits, target = make_inputs(device="meta", dtype=torch.bfloat16 if autocast else torch.float32)
    logits = logits.detach().requires_grad_()
    with torch.autocast("cpu", enabled=autocast):
        loss = criterion(logits, target)
    assert (loss.device.type, loss.shape, loss.dtype) == ("meta", (), torch.float32)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad.shape, logits.grad.dtype) == (logits.shape, logits.dtype)
    with torch.no_grad():
        assert criterion(logits, target).is_meta


def test_the_meta_device_by_name(case: Case) -> None:
    if case.backend == "reference":
        pytest.skip("it runs there")
    logits, target = make_inputs(device="meta")
    criterion = copy.deepcopy(make_criterion(case)).to("meta")
    with pytest.raises(ValueError, match=r"logits are on meta; use backend='auto' or 'reference'"):
        criterion(logits, target)
    criterion.backend = "auto"  # as it says
    assert criterion(logits, target).is_meta


def test_an_untrained_proxy_may_be_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert EdgeProxy(NUM_CLASSES).weights[0].is_meta


@pytest.mark.parametrize("gradient", [False, True])
def test_the_flop_counter(case: Case, gradient: bool) -> None:
    """Counts for each backend what the definition takes."""
    logits, target = make_inputs(device=case.device)
    counts, values = [], []
    for backend in ("reference", case.backend):
        criterion = make_criterion(case, backend=backend)
        expected = value_and_grad(criterion, logits, target)
        leaf = logits.detach().requires_grad_(gradient)
        with FlopCounterMode(display=False) as counter:
            loss = criterion(leaf, target)
            if gradient:
                loss.backward()
                assert leaf.grad is not None
                assert torch.equal(leaf.grad, expected[1])
        values.append(loss.detach())
        assert torch.equal(values[-1], expected[0])
        counts.append(counter.get_total_flops())
    pixels, layers = 2 * 13 * 17, 9 * (NUM_CLASSES * 16 + 16 * 32 + 32 * 2)
    assert counts[0] == counts[1] == 2 * pixels * layers * (3 if gradient else 2)


def test_the_flop_counter_in_backward_alone(case: Case) -> None:
    counts = []
    for backend in ("reference", case.backend):
        logits, target = make_inputs(device=case.device)
        loss = make_criterion(case, backend=backend)(logits, target)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(case: Case, reentrant: bool) -> None:
    criterion = make_criterion(case)

    def checkpointed(logits: Tensor, target: Tensor) -> Tensor:
        result: Tensor = checkpoint(criterion, logits, target, use_reentrant=reentrant)
        return result

    assert_same_loss(checkpointed, criterion, *other_logits(case))


@pytest.mark.parametrize("policy", list(CheckpointPolicy))
def test_selective_checkpoints(case: Case, policy: CheckpointPolicy) -> None:
    criterion = make_criterion(case)
    contexts = functools.partial(create_selective_checkpoint_contexts, lambda *_, **__: policy)

    def checkpointed(logits: Tensor, target: Tensor) -> Tensor:
        result: Tensor = checkpoint(criterion, logits, target, use_reentrant=False, context_fn=contexts)
        return result

    assert_same_loss(checkpointed, criterion, *other_logits(case))


def test_functionalize(case: Case) -> None:
    criterion = make_criterion(case)
    assert_same_loss(torch.func.functionalize(criterion), criterion, *other_logits(case))
    graph = make_fx(torch.func.functionalize(criterion))(*other_logits(case))
    assert_same_loss(graph, criterion, *other_logits(case, seed=6))


def test_functionalize_with_derivatives(case: Case) -> None:
    logits, target = other_logits(case)
    criterion = make_criterion(case)
    expected = value_and_grad(criterion, logits, target)[1]
    for both in (
        torch.func.functionalize(torch.func.grad(criterion)),
        torch.func.grad(torch.func.functionalize(criterion)),
    ):
        if case.backend == "reference":
            close(both(logits, target), expected)
            continue
        with pytest.raises(NotImplementedError, match=r"leave functionalize out.*backend='reference'"):
            both(logits, target)
    close(torch.func.grad(criterion)(logits, target), expected)  # as it says


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_inside_autograd(case: Case) -> None:
    """Batched logits do not say that the tensor in them requires a gradient."""
    criterion = make_criterion(case)
    logits, target = other_logits(case)

    def of_images(z: Tensor, y: Tensor) -> Tensor:
        losses: Tensor = torch.func.vmap(lambda one, labels: criterion(one[None], labels[None]))(z, y)
        return losses.sum()

    def one_by_one(z: Tensor, y: Tensor) -> Tensor:
        return torch.stack([criterion(one[None], labels[None]) for one, labels in zip(z, y, strict=True)]).sum()

    found, expected = (value_and_grad(f, logits, target) for f in (of_images, one_by_one))  # type: ignore[arg-type]
    close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        close(of_images(logits, target), expected[0])


def test_value_and_gradient_by_vjp(case: Case) -> None:
    criterion = make_criterion(case)
    logits, target = other_logits(case)
    expected = value_and_grad(criterion, logits, target)
    value, backward = torch.func.vjp(lambda z: criterion(z, target), logits)
    close(value, expected[0])
    close(backward(torch.ones_like(value))[0], expected[1])


def of_images(criterion: SemedaLoss) -> Callable[..., Tensor]:
    """The loss of each image."""
    mapped: Callable[..., Tensor] = torch.func.vmap(lambda one, labels: criterion(one[None], labels[None]))
    return mapped


def gradients_of_images(criterion: SemedaLoss) -> Callable[..., Tensor]:
    gradient = torch.func.grad(lambda one, labels: criterion(one[None], labels[None]))
    mapped: Callable[..., Tensor] = torch.func.vmap(gradient)
    return mapped


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, of_images, gradients_of_images])
def test_torch_func_in_a_compiled_graph(case: Case, transform: Any) -> None:
    function, inputs = transform(make_criterion(case)), other_logits(case)
    torch.testing.assert_close(
        torch.compile(function, fullgraph=True)(*inputs), function(*inputs), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_gradient_by_torch_func_of_an_exported_program(case: Case, decomposed: bool) -> None:
    criterion = make_criterion(case)
    program = torch.export.export(criterion, other_logits(case))
    logits, target = other_logits(case, seed=6)
    if decomposed and case.backend != "reference":
        with pytest.raises(RuntimeError, match="setup_context"):  # of torch: it transforms no custom operator
            torch.func.grad(program.run_decompositions().module())(logits, target)
        return
    captured = (program.run_decompositions() if decomposed else program).module()
    close(torch.func.grad(captured)(logits, target), value_and_grad(criterion, logits, target)[1])
