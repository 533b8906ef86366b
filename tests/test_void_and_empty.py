"""Void pixels influence nothing, bit for bit; nothing to look at gives a loss and a gradient of zero."""

from __future__ import annotations

import pytest
import torch
from conftest import Case
from helpers import NUM_CLASSES, VOID, assert_within_budget, make_inputs, make_proxy, value_and_grad

from semeda_fast import SemedaLoss

POISONS = [0.0, 1e4, -1e4, float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_void_logits_change_nothing(case: Case, poison: float, reduction: str) -> None:
    logits, target = make_inputs(device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, reduction=reduction, backend=case.backend).to(case.device)
    loss, grad = value_and_grad(criterion, logits, target)
    changed = logits.detach().clone()
    void = (target == VOID).unsqueeze(1).expand_as(changed)
    changed[void] = poison
    loss_changed, grad_changed = value_and_grad(criterion, changed, target)
    assert torch.equal(loss, loss_changed)
    assert torch.equal(grad, grad_changed)
    assert not grad[void].any()
    assert void.any()
    if reduction == "none":
        assert not loss[target == VOID].any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1"])
def test_what_comes_down_at_void_pixels_changes_nothing(case: Case, distance: str, poison: float) -> None:
    """A map of pixel weights may hold anything where there is nothing to weigh."""
    logits, target = make_inputs(device=case.device)
    criterion = SemedaLoss(
        make_proxy(), ignore_index=VOID, reduction="none", distance=distance, lambda_semeda=1.0, backend=case.backend
    ).to(case.device)
    weights = torch.rand(target.shape, generator=torch.Generator().manual_seed(3)).to(case.device)
    void = target == VOID

    def gradient(of_void: float) -> torch.Tensor:
        x = logits.detach().requires_grad_()
        criterion(x, target).backward(torch.where(void, of_void, weights))
        assert x.grad is not None
        return x.grad

    expected, found = gradient(0.0), gradient(poison)
    assert void.any()
    assert expected.any()
    assert torch.equal(found, expected)


def test_void_is_what_the_mask_says(case: Case) -> None:
    """A label map with void equals the same map with those pixels masked out."""
    logits, target = make_inputs(device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    loss, grad = value_and_grad(criterion, logits, target)
    valid = target != VOID
    loss_masked, grad_masked = value_and_grad(criterion, logits, torch.where(valid, target, 3), valid_mask=valid)
    assert torch.equal(loss, loss_masked)
    assert torch.equal(grad, grad_masked)


def test_the_mean_counts_valid_pixels_only(case: Case) -> None:
    logits, target = make_inputs(device=case.device)
    results = {}
    for reduction in ("mean", "sum"):
        criterion = SemedaLoss(make_proxy(), ignore_index=VOID, reduction=reduction, backend=case.backend)
        results[reduction] = criterion.to(case.device)(logits, target, return_components=True)
    count = int((target != VOID).sum())
    assert 0 < count < target.numel()
    assert int(results["mean"].valid_count) == count
    for mean, total in zip(results["mean"][:4], results["sum"][:4], strict=True):
        torch.testing.assert_close(mean, total / count, rtol=1e-6, atol=0)
    # Void rows below change nothing for cross-entropy.
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, lambda_semeda=0.0, backend=case.backend).to(case.device)
    more = torch.cat([logits.detach(), torch.randn_like(logits)], dim=2)
    more_target = torch.cat([target, torch.full_like(target, VOID)], dim=1)
    torch.testing.assert_close(criterion(more, more_target), criterion(logits, target), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(2, 6, 7), (0, 6, 7)])
def test_everything_ignored_or_empty(case: Case, reduction: str, shape: tuple[int, int, int]) -> None:
    n, h, w = shape
    logits = torch.randn(n, NUM_CLASSES, h, w, device=case.device)
    target = torch.full(shape, VOID, device=case.device)
    weight = torch.rand(NUM_CLASSES)
    criterion = SemedaLoss(
        make_proxy(), ignore_index=VOID, reduction=reduction, weight=weight, backend=case.backend
    ).to(case.device)
    loss, grad = value_and_grad(criterion, logits, target)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(grad, torch.zeros_like(grad))
    assert loss.shape == (shape if reduction == "none" else ())


def test_empty_nan_is_torchs_nan(case: Case) -> None:
    logits = torch.randn(1, NUM_CLASSES, 4, 4, device=case.device)
    target = torch.full((1, 4, 4), VOID, device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, empty="nan", backend=case.backend).to(case.device)
    assert criterion(logits, target).isnan()
    theirs = torch.nn.CrossEntropyLoss(ignore_index=VOID)(logits, target)
    assert theirs.isnan()


def test_gradient_within_the_budget(case: Case) -> None:
    logits, target = make_inputs(device=case.device)
    assert_within_budget(logits, target, make_proxy(), case.backend, ignore_index=VOID)
