"""The ramp of the SEMEDA term's weight."""

from __future__ import annotations

import math

import pytest
import torch

from semeda_fast import SemedaLoss
from semeda_fast.schedule import ramp


def test_the_ramp_is_zero_then_rises_then_one() -> None:
    assert [ramp(position, 2, 4) for position in (0, 2, 3, 4, 6, 9)] == [0, 0, 0.25, 0.5, 1, 1]
    assert ramp(4, 2, 4, power=2) == 0.25
    assert [ramp(position, 2, 0) for position in (0, 2, 2.01, 9)] == [0, 0, 1, 1]
    assert ramp(0.5, 0, 1) == 0.5
    for power in (0.5, 1.0, 3.0):
        values = [ramp(i / 10, 0.25, 0.5, power) for i in range(11)]
        assert values == sorted(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0, -1), "length >= 0"),
        ((1, 0, 1, 0), "power > 0"),
        ((math.nan, 0, 1), "finite"),
        ((1, 0, math.inf), "finite"),
    ],
)
def test_numbers_that_make_no_ramp_are_refused(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ramp(*arguments)


def test_a_tensor_lambda_follows_the_ramp() -> None:
    criterion = SemedaLoss(num_classes=3, lambda_semeda=torch.tensor(0.0))
    logits, target = torch.randn(1, 3, 8, 8), torch.randint(0, 3, (1, 8, 8))
    assert isinstance(criterion.lambda_semeda, torch.Tensor)
    for step in range(4):
        criterion.lambda_semeda.fill_(0.3 * ramp(step, start=1, length=1))
        parts = criterion(logits, target, return_components=True)
        expected = parts.ce + 0.3 * min(1, max(0, step - 1)) * parts.semeda
        assert float(parts.loss) == pytest.approx(float(expected), rel=1e-6)
