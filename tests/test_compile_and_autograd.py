"""torch.compile without graph breaks, gradcheck, opcheck, second derivatives, determinism, no hidden state."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import pytest
import torch
from conftest import Case
from helpers import NUM_CLASSES, VOID, make_inputs, make_proxy, relative_error, value_and_grad
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from semeda_fast import SemedaLoss, semeda_loss
from semeda_fast.backends import registry as backends
from semeda_fast.spec import LossSpec

# Compiled code may fuse and reorder; equal is judged as for another backend.
COMPILED = 1e-6


def compiler_of(case: Case) -> str:
    """Of the reference on a CPU the graphs alone: its C++ takes a minute a test, and is torch's own to get right.

    `test_compile_static` generates it once, with a gradient, for what `test_a_bad_label_is_found_in_compiled_code`
    then finds on the disk.
    """
    return "aot_eager" if case == Case("reference", "cpu") else "inductor"


def compare(compiled: torch.nn.Module, eager: torch.nn.Module, logits: Tensor, target: Tensor) -> None:
    a, b = value_and_grad(compiled, logits, target), value_and_grad(eager, logits, target)
    assert relative_error(a[0], b[0]) < COMPILED
    assert relative_error(a[1], b[1]) < 10 * COMPILED
    assert a[1].dtype == logits.dtype


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_static(case: Case, reduction: str) -> None:
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, reduction=reduction, backend=case.backend).to(case.device)
    compiler = "inductor" if reduction == "mean" else compiler_of(case)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=False, backend=compiler)
    compare(compiled, criterion, *make_inputs(device=case.device))
    if compiler != compiler_of(case):
        compiled = torch.compile(criterion, fullgraph=True, dynamic=False, backend=compiler_of(case))
    channels_last, target = make_inputs(device=case.device, labels=torch.uint8, seed=3)
    compare(compiled, criterion, channels_last.detach().to(memory_format=torch.channels_last), target)


def test_compile_dynamic(case: Case) -> None:
    """Equal to eager at every size. A fused backend must not recompile; PyTorch's own compiled convolutions do
    (on a CPU, with a gradient, the compiler fixes their sizes), and the reference is made of those."""
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=compiler_of(case))
    compare(compiled, criterion, *make_inputs(device=case.device))
    stance = "default" if case.backend == "reference" else "fail_on_recompile"
    with torch.compiler.set_stance(stance):
        for n, h, w in ((3, 9, 8), (2, 30, 11)):
            compare(compiled, criterion, *make_inputs(n=n, h=h, w=w, device=case.device))


def test_compile_reduce_overhead_and_the_bundled_proxy(case: Case) -> None:
    criterion = SemedaLoss(num_classes=21, ignore_index=VOID, backend=case.backend).to(case.device)
    how = {"mode": "reduce-overhead"} if compiler_of(case) == "inductor" else {"backend": compiler_of(case)}
    compiled = torch.compile(criterion, fullgraph=True, **how)
    compare(compiled, criterion, *make_inputs(c=21, n=1, device=case.device))


def test_compile_with_a_tensor_lambda_does_not_recompile(case: Case) -> None:
    logits, target = make_inputs(device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, lambda_semeda=torch.tensor(0.5), backend=case.backend).to(
        case.device
    )
    compiled = torch.compile(criterion, fullgraph=True, backend=compiler_of(case))
    compare(compiled, criterion, logits, target)
    before = float(compiled(logits, target).detach())
    with torch.compiler.set_stance("fail_on_recompile"):
        assert isinstance(criterion.lambda_semeda, Tensor)
        criterion.lambda_semeda.fill_(2.0)
        compare(compiled, criterion, logits, target)
        criterion.lambda_semeda = torch.tensor(3.0, device=case.device)
        compare(compiled, criterion, logits, target)
    assert float(compiled(logits, target).detach()) > 2 * before


def test_the_functional_form_compiles(case: Case) -> None:
    proxy = make_proxy().to(case.device)

    @torch.compile(fullgraph=True, backend=compiler_of(case))
    def step(logits: Tensor, target: Tensor) -> Tensor:
        result = semeda_loss(
            logits * 1.0, target, proxy, ignore_index=VOID, backend=case.backend, return_components=True
        )
        return result.loss + 0 * result.per_layer.sum()

    logits, target = make_inputs(device=case.device)
    expected = semeda_loss(logits, target, proxy, ignore_index=VOID, backend=case.backend)
    assert relative_error(step(logits, target), expected) < COMPILED


def test_a_bad_label_is_found_in_compiled_code(case: Case) -> None:
    if case.device != "cpu":
        pytest.skip("a device-side assert would end the use of the device in this process")
    logits, target = make_inputs()
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=False)
    compiled(logits, target)
    with pytest.raises(ValueError, match="labels outside"):
        compiled(logits, torch.full_like(target, NUM_CLASSES))


def test_compiled_with_a_network_in_front(case: Case) -> None:
    """One graph of network and loss, as a compiled training step has it."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, NUM_CLASSES, 1).to(case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)

    def step(image: Tensor, target: Tensor) -> Tensor:
        return criterion(network(image), target)

    image = torch.randn(2, 3, 13, 17, device=case.device)
    _, target = make_inputs(device=case.device)
    grads = []
    for run in (step, torch.compile(step, fullgraph=True, backend=compiler_of(case))):
        network.zero_grad()
        run(image, target).backward()
        assert network.weight.grad is not None
        grads.append(network.weight.grad.clone())
    assert relative_error(grads[1], grads[0]) < 10 * COMPILED


@pytest.mark.parametrize("tap", ["pre", "post"])
@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(case: Case, tap: str, distance: str, reduction: str) -> None:
    if case.backend != "reference":
        pytest.skip("gradcheck needs fp64, which only the reference computes in")
    logits, target = make_inputs(n=1, h=4, w=5, dtype=torch.float64, device=case.device)
    criterion = SemedaLoss(
        make_proxy(tap=tap, distance=distance),
        ignore_index=VOID,
        reduction=reduction,
        label_smoothing=0.1,
        weight=torch.rand(NUM_CLASSES) + 0.5,
        backend=case.backend,
    ).to(case.device)
    assert torch.autograd.gradcheck(lambda z: criterion(z, target), logits)


@pytest.mark.parametrize("options", [{"mode": "binary"}, {"from_logits": False}])
def test_gradcheck_of_the_modes(case: Case, options: dict[str, object]) -> None:
    if case.backend != "reference":
        pytest.skip("gradcheck needs fp64, which only the reference computes in")
    binary = options.get("mode") == "binary"
    logits, target = make_inputs(
        n=1,
        c=1 if binary else 3,
        h=4,
        w=4,
        num_labels=2 if binary else 3,
        dtype=torch.float64,
        device=case.device,
    )
    if not binary:
        logits = logits.detach().softmax(1).requires_grad_()
    criterion = SemedaLoss(make_proxy(2 if binary else 3), ignore_index=VOID, backend=case.backend, **options)
    criterion.to(case.device)
    assert torch.autograd.gradcheck(lambda z: criterion(z, target), logits)


def test_second_derivatives(case: Case) -> None:
    """The reference has them; any other backend must say that it does not."""
    logits, target = make_inputs(n=1, h=4, w=4, dtype=torch.float64, device=case.device)
    distance = "l2" if case.backend == "reference" else "l1"  # l1 has none to speak of
    criterion = SemedaLoss(make_proxy(distance=distance), ignore_index=VOID, backend=case.backend).to(case.device)
    if case.backend == "reference":
        assert torch.autograd.gradgradcheck(lambda z: criterion(z, target), logits)
        return
    z = logits.detach().float().requires_grad_()
    (grad,) = torch.autograd.grad(criterion(z, target), z, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(("reduction", "labels"), [("sum", torch.int64), ("none", torch.uint8)])
def test_opcheck(case: Case, reduction: str, labels: torch.dtype) -> None:
    logits, target = make_inputs(device=case.device)
    proxy = make_proxy().to(case.device)
    spec = LossSpec(
        *((1.0, 0.5, 2.0), (1.0, 2.0, 3.0), (1,) * 3, (1,) * 3, (0,) * 3),
        **{"ignore_index": VOID, "label_smoothing": 0.1, "reduction": reduction, "backend": case.backend},
    )
    arguments = (
        logits,
        target.to(labels),
        torch.rand(target.shape, device=case.device) < 0.9,
        torch.rand(NUM_CLASSES, device=case.device),
        proxy.weights,
        proxy.biases,
        *spec.arguments(),
    )
    results = torch.library.opcheck(torch.ops.semeda_fast.loss_terms.default, arguments)
    assert set(results.values()) == {"SUCCESS"}
    check = (logits.detach(), target, None, VOID, "multiclass", True, False)
    assert set(torch.library.opcheck(torch.ops.semeda_fast.check_values.default, check).values()) == {"SUCCESS"}


class _Watcher(TorchDispatchMode):
    """Notes the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_whoever_watches_operators_sees_them_and_changes_nothing(case: Case) -> None:
    if case.backend == "reference":
        pytest.skip("the reference is made of torch's own operators")
    logits, target = make_inputs(device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        z = logits.detach().requires_grad_()
        loss = criterion(z, target)
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    alone = step()
    names = [f"semeda_fast.{case.backend}_{direction}" for direction in ("forward", "backward")]
    with _Watcher() as watcher:
        watched = step()
    assert all(any(name in seen for seen in watcher.seen) for name in names), watcher.seen
    with torch.profiler.profile() as profile:
        profiled = step()
    events = {event.key for event in profile.key_averages()}
    assert {name.replace(".", "::") for name in names} <= events
    for other in (watched, profiled):
        assert torch.equal(alone[0], other[0])
        assert torch.equal(alone[1], other[1])


class _WatchingLabels(torch.Tensor):
    """Labels without memory of their own, which note the operators that take them and hand on those they stand for."""

    plain: torch.Tensor
    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, plain: torch.Tensor) -> _WatchingLabels:
        made: _WatchingLabels = torch.Tensor._make_wrapper_subclass(
            cls, plain.shape, dtype=plain.dtype, device=plain.device
        )
        made.plain = plain
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return func(*(x.plain if isinstance(x, cls) else x for x in args), **(kwargs or {}))


def test_labels_of_a_class_of_their_own_see_the_operators(case: Case) -> None:
    if case.backend == "reference":
        pytest.skip("the reference is made of torch's own operators")
    logits, target = make_inputs(device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    wanted = value_and_grad(criterion, logits, target)
    _WatchingLabels.seen.clear()
    found = value_and_grad(criterion, logits, _WatchingLabels(target))
    for direction in ("forward", "backward"):
        assert any(f"semeda_fast.{case.backend}_{direction}" in seen for seen in _WatchingLabels.seen)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_gradients_by_torch_func(case: Case) -> None:
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    logits, target = make_inputs(device=case.device)
    _, expected = value_and_grad(criterion, logits, target)
    gradient = torch.func.grad(lambda x: criterion(x, target))
    assert torch.equal(gradient(logits.detach()), expected)
    if case.backend != "reference":
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.func.grad(lambda x: gradient(x).square().sum())(logits.detach())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_many_gradients_by_torch_func(case: Case) -> None:
    """vmap over the gradients of single images, and jacrev; the operators are called one by one."""
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    logits, target = make_inputs(device=case.device)
    x = logits.detach()

    def of_image(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.func.grad(lambda one: criterion(one[None], y[None]))(z)
        return found

    found = torch.func.vmap(of_image)(x, target)
    for number in range(len(x)):
        torch.testing.assert_close(found[number], of_image(x[number], target[number]), rtol=1e-4, atol=1e-6)
    _, expected = value_and_grad(criterion, logits, target)
    jacobian = torch.func.jacrev(lambda z: criterion(z, target))(x)
    torch.testing.assert_close(jacobian, expected, rtol=1e-4, atol=1e-6)
    if case.backend != "reference":
        with pytest.raises(NotImplementedError, match=r"hessian.*backend='reference'"):
            torch.func.hessian(lambda z: criterion(z, target))(x)


def test_forward_mode_is_right_or_an_error(case: Case) -> None:
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    logits, target = make_inputs(device=case.device)
    _, gradient = value_and_grad(criterion, logits, target)
    x, direction = logits.detach(), torch.ones_like(logits).cumsum(1)

    def by_hand() -> torch.Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, direction)
            return torch.autograd.forward_ad.unpack_dual(criterion(dual, target)).tangent

    ways = (lambda: torch.func.jvp(lambda z: criterion(z, target), (x,), (direction,))[1], by_hand)
    for way in ways:
        if case.backend == "reference":
            torch.testing.assert_close(way(), (gradient * direction).sum(), rtol=1e-4, atol=1e-6)
            continue
        with pytest.raises(NotImplementedError, match=r"no forward-mode derivative.*backend='reference'"):
            way()


def test_logits_whose_sign_is_still_to_be_turned(case: Case) -> None:
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    logits, target = make_inputs(device=case.device)
    lazy = torch.complex(torch.zeros_like(logits), -logits).detach().conj().imag
    assert lazy.is_neg()
    assert torch.equal(criterion(lazy.requires_grad_(), target), criterion(logits, target))
    upstream = torch.complex(torch.zeros(()), torch.tensor(-0.5)).to(case.device).conj().imag
    found = torch.autograd.grad(criterion(logits, target), logits, upstream)
    expected = torch.autograd.grad(criterion(logits, target), logits, torch.full_like(upstream, 0.5))
    assert torch.equal(found[0], expected[0])


def test_several_gradients_at_once(case: Case) -> None:
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, reduction="none", backend=case.backend).to(case.device)
    logits, target = make_inputs(device=case.device)
    upstream = torch.rand((3, *target.shape), generator=torch.Generator().manual_seed(3)).to(case.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it goes one by one
        (found,) = torch.autograd.grad(criterion(logits, target), logits, upstream, is_grads_batched=True)
    for one, of_one in zip(found, upstream, strict=True):
        (expected,) = torch.autograd.grad(criterion(logits, target), logits, of_one)
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-6)


def test_two_runs_are_bit_equal(case: Case) -> None:
    logits, target = make_inputs(n=3, h=65, w=67, device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    first = value_and_grad(criterion, logits, target)
    for _ in range(1 if case == Case("cuda", "cpu") else 3):  # the emulation has one thread
        again = value_and_grad(criterion, logits, target)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


def test_deterministic_algorithms(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    logits, target = make_inputs(device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    expected = value_and_grad(criterion, logits, target)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN, too
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss, grad = value_and_grad(criterion, logits, target)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


def test_inputs_are_never_modified(case: Case) -> None:
    logits, target = make_inputs(device=case.device)
    proxy = make_proxy().to(case.device)
    copies = [t.detach().clone() for t in (logits, target, *proxy.weights, *proxy.biases)]
    versions = [t._version for t in (logits, target)]
    SemedaLoss(proxy, ignore_index=VOID, backend=case.backend).to(case.device)(logits, target).backward()
    for before, after in zip(copies, (logits, target, *proxy.weights, *proxy.biases), strict=True):
        assert torch.equal(before, after)
    assert [t._version for t in (logits, target)] == versions


def test_logits_may_feed_other_losses(case: Case) -> None:
    logits, target = make_inputs(void=0.0, device=case.device)
    criterion = SemedaLoss(make_proxy(), backend=case.backend).to(case.device)
    _, grad = value_and_grad(criterion, logits, target)
    leaf = logits.detach().clone().requires_grad_()
    hidden = leaf * 1.0
    other = torch.nn.functional.cross_entropy(hidden, target)
    (other_grad,) = torch.autograd.grad(other, leaf, retain_graph=True)
    (criterion(hidden, target) + other).backward()
    torch.testing.assert_close(leaf.grad, grad + other_grad)


def test_backward_twice_with_retain_graph(case: Case) -> None:
    logits, target = make_inputs(device=case.device)
    loss = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)(logits, target)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)


def test_no_gradient_asked_for(case: Case) -> None:
    logits, target = make_inputs(device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    with torch.no_grad():
        loss = criterion(logits, target)
    assert not loss.requires_grad
    assert torch.equal(loss, criterion(logits, target).detach())
    with torch.inference_mode():
        assert torch.equal(loss, criterion(logits.detach().clone(), target))


def test_components_are_detached_and_add_up(case: Case) -> None:
    logits, target = make_inputs(device=case.device)
    criterion = SemedaLoss(
        make_proxy(),
        ignore_index=VOID,
        lambda_ce=0.5,
        lambda_semeda=2.0,
        layer_weights=(1, 0, 3),
        backend=case.backend,
    ).to(case.device)
    result = criterion(logits, target, return_components=True)
    assert result._fields == ("loss", "ce", "semeda", "per_layer", "valid_count")
    assert result.loss.requires_grad
    assert not any(value.requires_grad for value in result[1:])
    assert {value.device.type for value in result} == {case.device}
    torch.testing.assert_close(result.loss.detach(), 0.5 * result.ce + 2 * result.semeda)
    torch.testing.assert_close(result.semeda, result.per_layer[0] + 3 * result.per_layer[2])
    assert torch.equal(result.loss, criterion(logits, target))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_uninitialised_memory_is_never_read(case: Case, reduction: str) -> None:
    """Fresh memory filled with NaN (torch's own switch) must not reach any result."""
    logits, target = make_inputs(device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, reduction=reduction, backend=case.backend).to(case.device)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        loss, grad = value_and_grad(criterion, logits, target)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(grad).all()


def test_the_case_list_comes_from_the_registry(case: Case) -> None:
    assert case.backend in backends.available_names(case.device)
