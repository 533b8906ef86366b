"""The reference equals an independent NumPy/SciPy form of the definition to 1e-10 in float64."""

from __future__ import annotations

import itertools

import numpy as np
import numpy_form as form
import pytest
import torch
import torch.nn.functional as F
from helpers import NUM_CLASSES, VOID, make_inputs, make_proxy
from torch import Tensor

from semeda_fast import EdgeProxy, SemedaLoss
from semeda_fast.functional import LossComponents

TOLERANCE = 1e-10


def numpy_layers(proxy: EdgeProxy) -> list[form.Layer]:
    return [
        form.Layer(w.double().numpy(), b.double().numpy()) for w, b in zip(proxy.weights, proxy.biases, strict=True)
    ]


def run(
    proxy: EdgeProxy, logits: Tensor, target: Tensor, valid: Tensor | None = None, **options: object
) -> LossComponents:
    criterion = SemedaLoss(proxy, backend="reference", **options)  # type: ignore[arg-type]
    result = criterion(logits, target, valid_mask=valid, return_components=True)
    assert isinstance(result, LossComponents)
    return result


@pytest.mark.parametrize("tap", ["pre", "post"])
@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_hard_labels(tap: str, distance: str, reduction: str) -> None:
    proxy = make_proxy(tap=tap, layer_weights=(0.5, 1.0, 2.0))
    logits, target = make_inputs(dtype=torch.float64)
    weight = torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0], dtype=torch.float64)
    got = run(
        proxy,
        logits,
        target,
        distance=distance,
        reduction=reduction,
        weight=weight,
        ignore_index=VOID,
        label_smoothing=0.1,
        lambda_ce=0.7,
        lambda_semeda=1.3,
    )
    z, y = logits.detach().numpy(), target.numpy()
    v = y != VOID
    q = form.one_hot(y, NUM_CLASSES, v)
    maps = form.maps(z, q, v, numpy_layers(proxy), scales=proxy.layer_scales(distance), tap=tap, distance=distance)
    ce_map, divisor = form.cross_entropy(z, q, v, weight.numpy(), 0.1, soft=False)
    semeda_map = 0.5 * maps[0] + 1.0 * maps[1] + 2.0 * maps[2]
    count = v.sum()
    ce, semeda, per_layer = {
        "none": (ce_map, semeda_map, [m.sum() / count for m in maps]),
        "sum": (ce_map.sum(), semeda_map.sum(), [m.sum() for m in maps]),
        "mean": (ce_map.sum() / divisor, semeda_map.sum() / count, [m.sum() / count for m in maps]),
    }[reduction]
    np.testing.assert_allclose(got.ce.numpy(), ce, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(got.semeda.numpy(), semeda, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(got.per_layer.numpy(), per_layer, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(got.loss.detach().numpy(), 0.7 * ce + 1.3 * semeda, rtol=TOLERANCE, atol=TOLERANCE)
    assert int(got.valid_count) == count


@pytest.mark.parametrize(("kernel_size", "widths"), [(1, (4,)), (5, (3, 7)), (3, ()), (3, (4, 5, 6, 7, 8))])
def test_other_networks(kernel_size: int, widths: tuple[int, ...]) -> None:
    proxy = make_proxy(kernel_size=kernel_size, widths=widths)
    logits, target = make_inputs(n=1, h=7, w=9, dtype=torch.float64)
    got = run(proxy, logits, target, ignore_index=VOID)
    v = target.numpy() != VOID
    q = form.one_hot(target.numpy(), NUM_CLASSES, v)
    maps = form.maps(
        logits.detach().numpy(),
        q,
        v,
        numpy_layers(proxy),
        scales=proxy.layer_scales("l1"),
        tap="pre",
        distance="l1",
    )
    np.testing.assert_allclose(got.per_layer.numpy(), [m.sum() / v.sum() for m in maps], rtol=TOLERANCE)


def test_soft_targets_with_a_validity_mask() -> None:
    proxy = make_proxy()
    logits, _ = make_inputs(dtype=torch.float64)
    q = torch.softmax(3 * torch.randn(2, NUM_CLASSES, 13, 17, dtype=torch.float64), dim=1)
    valid = torch.rand(2, 13, 17) < 0.8
    weight = torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0], dtype=torch.float64)
    got = run(proxy, logits, q, valid, weight=weight, label_smoothing=0.2)
    z, v = logits.detach().numpy(), valid.numpy()
    maps = form.maps(z, q.numpy(), v, numpy_layers(proxy), scales=proxy.layer_scales("l1"), tap="pre", distance="l1")
    ce_map, divisor = form.cross_entropy(z, q.numpy(), v, weight.numpy(), 0.2, soft=True)
    np.testing.assert_allclose(float(got.ce), ce_map.sum() / divisor, rtol=TOLERANCE)
    np.testing.assert_allclose(float(got.semeda), sum(m.sum() for m in maps) / v.sum(), rtol=TOLERANCE)


def test_binary_mode_is_two_classes_with_a_sigmoid() -> None:
    proxy = make_proxy(2)
    logits, target = make_inputs(c=1, num_labels=2, dtype=torch.float64)
    got = run(proxy, logits, target, mode="binary", ignore_index=VOID)
    z = np.concatenate([np.zeros_like(logits.detach().numpy()), logits.detach().numpy()], axis=1)
    v = target.numpy() != VOID
    maps = form.maps(
        z,
        form.one_hot(target.numpy(), 2, v),
        v,
        numpy_layers(proxy),
        scales=proxy.layer_scales("l1"),
        tap="pre",
        distance="l1",
    )
    np.testing.assert_allclose(float(got.semeda), sum(m.sum() for m in maps) / v.sum(), rtol=TOLERANCE)
    bce = F.binary_cross_entropy_with_logits(logits[:, 0][target != VOID], target[target != VOID].double())
    np.testing.assert_allclose(float(got.ce), float(bce.detach()), rtol=TOLERANCE)
    # every way to say the same target
    keep = target != VOID
    hard = torch.where(keep, target, 0)
    for same in (
        hard.bool(),
        hard.unsqueeze(1),
        hard.unsqueeze(1).double(),
        torch.stack([1.0 - hard, 1.0 * hard], 1),
    ):
        again = run(proxy, logits, same, keep, mode="binary")
        np.testing.assert_allclose(float(again.loss.detach()), float(got.loss.detach()), rtol=TOLERANCE)


def test_probabilities_in_place_of_logits() -> None:
    proxy = make_proxy()
    logits, target = make_inputs(dtype=torch.float64)
    from_logits = run(proxy, logits, target, ignore_index=VOID)
    from_probs = run(proxy, logits.softmax(1), target, ignore_index=VOID, from_logits=False)
    for a, b in zip(from_logits, from_probs, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    binary = make_proxy(2)
    z, y = make_inputs(c=1, num_labels=2, dtype=torch.float64)
    a = run(binary, z, y, ignore_index=VOID, mode="binary")
    b = run(binary, z.sigmoid(), y, ignore_index=VOID, mode="binary", from_logits=False)
    torch.testing.assert_close(a.loss, b.loss, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("weighted", "smoothing", "soft", "reduction"),
    list(itertools.product([False, True], [0.0, 0.3], [False, True], ["mean", "sum", "none"])),
)
def test_lambda_zero_is_torch_cross_entropy(weighted: bool, smoothing: float, soft: bool, reduction: str) -> None:
    proxy = make_proxy()
    void = -100 if soft else VOID  # torch takes no other ignore_index beside a float target
    logits, target = make_inputs(dtype=torch.float64, void=0.0 if soft else 0.2)
    weight = torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0], dtype=torch.float64) if weighted else None
    if soft:
        target = torch.softmax(torch.randn(logits.shape, dtype=torch.float64), dim=1)
    criterion = SemedaLoss(
        proxy,
        lambda_semeda=0.0,
        weight=weight,
        label_smoothing=smoothing,
        ignore_index=void,
        reduction=reduction,
        backend="reference",
    )
    theirs = F.cross_entropy(
        logits, target, weight=weight, ignore_index=void, label_smoothing=smoothing, reduction=reduction
    )
    ours = criterion(logits, target)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.rand(ours.shape, dtype=torch.float64)
    (a,) = torch.autograd.grad(ours, logits, upstream)
    (b,) = torch.autograd.grad(theirs, logits, upstream)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_scale_divides_its_layer() -> None:
    proxy = make_proxy()
    plain = EdgeProxy.from_tensors(proxy.layers, proxy.weights, proxy.biases)
    logits, target = make_inputs(dtype=torch.float64)
    a = run(proxy, logits, target, ignore_index=VOID).per_layer
    b = run(plain, logits, target, ignore_index=VOID).per_layer
    torch.testing.assert_close(a * torch.tensor(proxy.layer_scales("l1")).double(), b, rtol=1e-6, atol=0)


def test_the_gradient_of_the_semeda_term_alone_lowers_it() -> None:
    """Not vanishing by construction, as in a released boundary loss that took log_softmax over one channel."""
    proxy = make_proxy()
    logits, target = make_inputs()
    criterion = SemedaLoss(proxy, lambda_ce=0.0, lambda_semeda=1.0, ignore_index=VOID)
    z = logits.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.2)
    first = float(criterion(z, target).detach())
    for _ in range(60):
        optimizer.zero_grad()
        criterion(z, target).backward()
        optimizer.step()
    assert float(criterion(z, target).detach()) < 0.2 * first
    valid = target != VOID
    right = (z.argmax(1) == target)[valid].double().mean()
    before = (logits.argmax(1) == target)[valid].double().mean()
    assert right > 0.95 > before


def test_a_layer_at_lower_resolution_counts_each_position_for_its_pixels() -> None:
    """Strided and pooled layers, against a direct evaluation at the sampled pixels."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(NUM_CLASSES, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(4, 3, 3, padding=1, stride=2),
    )
    proxy = EdgeProxy.from_sequential(network)
    logits, target = make_inputs(dtype=torch.float64)
    criterion = SemedaLoss(
        proxy, ignore_index=VOID, reduction="none", lambda_ce=0.0, lambda_semeda=1.0, backend="reference"
    )
    got = criterion(logits, target)
    v = (target != VOID).double()
    p = logits.softmax(1) * v.unsqueeze(1)
    q = F.one_hot(torch.where(target == VOID, 0, target), NUM_CLASSES).permute(0, 3, 1, 2).double() * v.unsqueeze(1)
    network = network.double()
    first = (network[0](p) - network[0](q)).abs().mean(1) * v
    second = (network(p) - network(q)).abs().mean(1)
    expected = first.clone()
    for i, j in itertools.product(range(second.shape[1]), range(second.shape[2])):
        expected[:, 4 * i, 4 * j] += 16 * second[:, i, j] * v[:, 4 * i, 4 * j]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
