"""What the tests of captured graphs share: a network with its loss, and one step of eager mode to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import Case
from helpers import NUM_CLASSES, VOID, make_inputs, make_proxy, value_and_grad
from torch import Tensor, nn

from semeda_fast import SemedaLoss


class Step(nn.Module):
    """Network and loss in one module, as a training step is exported."""

    def __init__(self, criterion: SemedaLoss) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, criterion.proxy.num_classes, 1)
        )
        self.criterion = criterion

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.network(images), target)
        return loss


def make_criterion(case: Case, **options: Any) -> SemedaLoss:
    return SemedaLoss(make_proxy(), **{"ignore_index": VOID, "backend": case.backend, **options}).to(case.device)


def make_step(case: Case, **options: Any) -> Step:
    torch.manual_seed(0)
    return Step(make_criterion(case, **options)).to(case.device)


def make_batch(case: Case, seed: int = 0, n: int = 2, h: int = 13, w: int = 17) -> tuple[Tensor, Tensor]:
    """Images [N,3,H,W] and labels [N,H,W]."""
    images = torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(seed)).to(case.device)
    return images, make_inputs(n=n, h=h, w=w, device=case.device, seed=seed)[1]


def step_of(module: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradient of each parameter."""
    parameters = list(module.parameters())
    loss = module(images, target)
    return loss.detach(), list(torch.autograd.grad(loss, parameters))


def assert_same_step(captured: nn.Module, eager: nn.Module, images: Tensor, target: Tensor) -> None:
    found, expected = step_of(captured, images, target), step_of(eager, images, target)
    close(found[0], expected[0])
    assert len(found[1]) == len(expected[1])
    assert any(gradient.any() for gradient in expected[1])
    for a, b in zip(found[1], expected[1], strict=True):
        close(a, b)


def assert_same_loss(captured: Callable[..., Tensor], eager: nn.Module, logits: Tensor, target: Tensor) -> None:
    """Value and gradient in the logits, and the value alone."""
    found, expected = value_and_grad(captured, logits, target), value_and_grad(eager, logits, target)  # type: ignore[arg-type]
    close(found[0], expected[0])
    close(found[1], expected[1])
    assert expected[1].any()
    with torch.no_grad():
        close(captured(logits.detach(), target), expected[0])


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums."""
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def other_logits(case: Case, seed: int = 5, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits without a gradient and labels, others than `make_inputs` gives by default."""
    logits, target = make_inputs(device=case.device, seed=seed, **options)
    return logits.detach(), target


__all__ = [
    "NUM_CLASSES",
    "VOID",
    "Step",
    "assert_same_loss",
    "assert_same_step",
    "close",
    "make_batch",
    "make_criterion",
    "make_step",
    "other_logits",
]
