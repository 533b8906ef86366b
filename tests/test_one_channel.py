"""One output channel is for mode="binary": a softmax over one class is 1 everywhere, so its gradient is exactly 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Case
from helpers import VOID, make_inputs, make_proxy, value_and_grad

from semeda_fast import EdgeProxy, SemedaLoss, semeda_loss

CONSTRUCTIONS: dict[str, Callable[[Path], object]] = {
    "num_classes": lambda folder: SemedaLoss(num_classes=1),
    "a proxy": lambda folder: SemedaLoss(make_proxy(1)),
    "a proxy and num_classes": lambda folder: SemedaLoss(make_proxy(1), num_classes=1),
    "a file": lambda folder: SemedaLoss(folder / "one.safetensors"),
    "probabilities": lambda folder: SemedaLoss(num_classes=1, from_logits=False),
}


@pytest.mark.parametrize("how", CONSTRUCTIONS)
def test_no_loss_is_built_for_one_class(how: str, tmp_path: Path) -> None:
    make_proxy(1).save(tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"gradient of 0.*SemedaLoss\(mode='binary'\)"):
        CONSTRUCTIONS[how](tmp_path)


@pytest.mark.parametrize("soft", [False, True])
def test_the_function_refuses_a_proxy_of_one_class(case: Case, soft: bool) -> None:
    logits, target = make_inputs(c=1, num_labels=1, void=0.0, device=case.device)
    target = torch.ones_like(logits).detach() if soft else target
    with pytest.raises(ValueError, match=r"gradient of 0.*mode='binary' and EdgeProxy\.bundled\(2\)"):
        semeda_loss(logits, target, make_proxy(1).to(case.device), backend=case.backend)


def test_a_mode_that_is_changed_later_is_looked_at(case: Case) -> None:
    """The attribute may be assigned between calls."""
    logits, target = make_inputs(c=1, num_labels=2, void=0.0, device=case.device)
    criterion = SemedaLoss(mode="binary", backend=case.backend).to(case.device)
    assert torch.isfinite(criterion(logits, target))
    criterion.mode = "multiclass"
    with pytest.raises(ValueError, match="mode='binary'") as caught:
        criterion(logits, target)
    assert "num_classes=1" not in str(caught.value)  # which would be refused


def test_what_the_messages_advise_works(case: Case) -> None:
    logits, target = make_inputs(c=1, num_labels=2, device=case.device)
    criterion = SemedaLoss(mode="binary", ignore_index=VOID, backend=case.backend).to(case.device)
    loss, grad = value_and_grad(criterion, logits, target)
    assert torch.isfinite(loss)
    assert (grad != 0).any()
    function = semeda_loss(
        logits,
        target,
        EdgeProxy.bundled(2).to(case.device),
        mode="binary",
        ignore_index=VOID,
        lambda_semeda=criterion.lambda_semeda,
        backend=case.backend,
    )
    torch.testing.assert_close(function, loss)
