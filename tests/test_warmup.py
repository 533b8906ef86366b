"""warmup: it runs what a step runs, on the dtypes and layouts named, and changes nothing of the caller's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Case
from helpers import NUM_CLASSES, VOID, make_proxy
from torch import Tensor

from semeda_fast import SemedaLoss
from semeda_fast.backends.warmup import warmup

SHAPE = (1, NUM_CLASSES, 6, 9)


class Recorder(SemedaLoss):
    """A loss that remembers what it was called with."""

    calls: list[tuple[Tensor, Tensor, bool]]

    def forward(self, logits: Tensor, target: Tensor, **options: Any) -> Any:
        self.__dict__.setdefault("calls", []).append((logits, target, torch.is_grad_enabled()))
        return super().forward(logits, target, **options)


def make(case: Case | None = None, **options: Any) -> Recorder:
    backend = "reference" if case is None else case.backend
    criterion = Recorder(make_proxy(), backend=backend, **{"ignore_index": VOID, **options})
    return criterion if case is None else criterion.to(case.device)


def test_it_runs_on_every_backend_with_and_without_a_gradient(case: Case) -> None:
    criterion = make(case)
    seconds = warmup(criterion, SHAPE)
    assert seconds > 0
    (logits, target, first), (again, _, second) = criterion.calls
    assert (first, second) == (True, False)
    assert logits is again
    assert logits.shape == SHAPE
    assert logits.dtype == torch.float32
    assert logits.device.type == case.device  # the criterion's
    assert target.shape == (1, 6, 9)
    assert target.dtype == torch.int64
    assert len(target.unique()) == NUM_CLASSES


@pytest.mark.parametrize("labels_dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_dtypes_and_layout_are_those_named(labels_dtype: torch.dtype) -> None:
    criterion = make()
    warmup(criterion, SHAPE, dtype=torch.bfloat16, channels_last=True, labels_dtype=labels_dtype)
    logits, target, _ = criterion.calls[0]
    assert logits.dtype == torch.bfloat16
    assert logits.is_contiguous(memory_format=torch.channels_last)
    assert not logits.is_contiguous()
    assert target.dtype == labels_dtype


def test_labels_fit_a_narrow_dtype() -> None:
    criterion = Recorder(make_proxy(num_classes=150), ignore_index=-100, backend="reference")
    warmup(criterion, (1, 150, 16, 16), labels_dtype=torch.int8)
    target = criterion.calls[0][1]
    assert 0 <= int(target.min()) <= int(target.max()) <= 127


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_soft_targets_and_every_reduction(case: Case, reduction: str) -> None:
    criterion = make(case, reduction=reduction)
    warmup(criterion, SHAPE, labels_dtype=torch.float32)
    target = criterion.calls[0][1]
    assert target.shape == SHAPE
    torch.testing.assert_close(target.sum(dim=1), torch.ones_like(target[:, 0]))


@pytest.mark.parametrize("labels_dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("from_logits", [True, False])
def test_binary_mode_and_probabilities(labels_dtype: torch.dtype, from_logits: bool) -> None:
    criterion = Recorder(make_proxy(num_classes=2), mode="binary", from_logits=from_logits, validate="always")
    criterion.backend = "reference"
    warmup(criterion, (1, 1, 6, 9), labels_dtype=labels_dtype)
    assert len(criterion.calls) == 2


def test_probabilities_of_several_classes() -> None:
    warmup(make(from_logits=False, validate="always"), SHAPE)


def test_nothing_of_the_callers_changes(case: Case) -> None:
    schedule = torch.tensor(0.5, requires_grad=True, device=case.device)
    criterion = make(case, lambda_semeda=schedule)
    called = []
    criterion.register_forward_hook(lambda *_: called.append(1))
    state = torch.get_rng_state()
    device_state = torch.cuda.get_rng_state() if case.device == "cuda" else None
    with torch.no_grad():
        warmup(criterion, SHAPE)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    if device_state is not None:
        assert torch.equal(torch.cuda.get_rng_state(), device_state)
    assert criterion._lambda_semeda_tensor is not None
    assert criterion._lambda_semeda_tensor.grad is None
    assert not called


def test_the_callers_modes_do_not_reach_it() -> None:
    criterion = make()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        warmup(criterion, SHAPE)
    assert not criterion.calls[0][0].is_inference()


@pytest.mark.parametrize(
    ("shape", "options", "error", "text"),
    [
        ((5, 6, 9), {}, ValueError, r"four sizes \(N, C, H, W\).*got \(5, 6, 9\)"),
        ((1, NUM_CLASSES, 0, 9), {}, ValueError, r"at least 1.*got \(1, 5, 0, 9\)"),
        (SHAPE, {"dtype": torch.int64}, TypeError, "floating-point one, got torch.int64"),
        ((1, NUM_CLASSES + 1, 6, 9), {}, ValueError, f"{NUM_CLASSES + 1}"),
    ],
)
def test_bad_calls(shape: tuple[int, ...], options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        warmup(make(), shape, **options)
