"""torch.jit.trace and what stands on it; torch.jit.script and torch.fx.symbolic_trace say what to do in their place."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from capturing import (
    NUM_CLASSES,
    VOID,
    Step,
    assert_same_loss,
    assert_same_step,
    close,
    make_batch,
    make_criterion,
    make_step,
    other_logits,
)
from conftest import Case
from helpers import make_inputs, make_proxy
from torch import nn

from semeda_fast import SemedaLoss

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_warning_of_the_tracer(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each would say that the graph holds for the example alone."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", torch.jit.TracerWarning)
        yield
    if "scales_logits_up" not in request.node.name:  # whose choice between two ways is fixed by the example
        assert not [str(warning.message) for warning in seen if warning.category is torch.jit.TracerWarning]


@pytest.mark.parametrize("gradient", [False, True])
def test_a_traced_loss(case: Case, gradient: bool) -> None:
    """Traced with and without a gradient: the value and the gradient of other inputs, of other sizes, too."""
    criterion = make_criterion(case)
    logits, target = make_inputs(device=case.device)
    traced = torch.jit.trace(criterion, (logits if gradient else logits.detach(), target))
    assert_same_loss(traced, criterion, *other_logits(case))
    assert_same_loss(traced, criterion, *other_logits(case, n=1, h=20, w=9))


def test_a_loss_that_was_traced_without_gradients(case: Case) -> None:
    """Nothing but the graph remembers how it was traced."""
    criterion = make_criterion(case)
    with torch.no_grad():
        traced = torch.jit.trace(criterion, other_logits(case))
    assert_same_loss(traced, criterion, *other_logits(case, seed=6))


def test_a_traced_step_saved_and_loaded(case: Case) -> None:
    step = make_step(case)
    traced = torch.jit.trace(step, make_batch(case))
    assert_same_step(traced, step, *make_batch(case, seed=5))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert_same_step(torch.jit.load(file), step, *make_batch(case, seed=6, n=1, h=9, w=8))


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"weight": torch.linspace(0.5, 2.0, NUM_CLASSES), "label_smoothing": 0.1},
        {"validate": "always"},
        {"lambda_semeda": torch.tensor(0.5), "reduction": "sum"},
    ],
)
def test_options_in_a_traced_loss(case: Case, options: dict[str, Any]) -> None:
    criterion = make_criterion(case, **options)
    traced = torch.jit.trace(criterion, other_logits(case))
    assert_same_loss(traced, criterion, *other_logits(case, seed=6))


@pytest.mark.parametrize("kind", ["labels", "one channel", "floats"])
def test_a_traced_loss_in_binary_mode(case: Case, kind: str) -> None:
    criterion = SemedaLoss(make_proxy(2), mode="binary", ignore_index=VOID, backend=case.backend).to(case.device)
    inputs = [other_logits(case, c=1, num_labels=2, seed=seed) for seed in (5, 6)]
    if kind != "labels":
        inputs = [(z, y.unsqueeze(1)) for z, y in inputs]
    if kind == "floats":
        inputs = [(z, y.to(torch.float32)) for z, y in inputs]
    traced = torch.jit.trace(criterion, inputs[0])
    assert_same_loss(traced, criterion, *inputs[1])


def test_a_traced_loss_in_double_precision(case: Case) -> None:
    """Each size is a tensor while the tracer looks, and would be rounded to float32."""
    if case.backend != "reference":
        pytest.skip("only the reference computes in it")
    criterion = make_criterion(case, distance="l2")  # whose scales are none of float32
    traced = torch.jit.trace(criterion, other_logits(case, dtype=torch.float64))
    logits, target = other_logits(case, seed=6, dtype=torch.float64)
    torch.testing.assert_close(traced(logits, target), criterion(logits, target), rtol=1e-14, atol=0)


def test_a_traced_loss_that_scales_logits_up(case: Case) -> None:
    """It gives eager's value at any scale up, or says that it was traced for another one."""
    criterion = make_criterion(case, upsample="bilinear")
    logits, target = other_logits(case)
    traced = torch.jit.trace(criterion, (logits[:, :, :6, :8], target))
    for h, w in ((6, 8), (3, 4), (11, 15), (13, 17), (26, 40)):
        small = other_logits(case, h=h, w=w)[0]
        if case.backend == "cpu" and h > target.shape[1]:
            with pytest.raises(RuntimeError, match=r"at most as large; trace it again for such sizes"):
                traced(small, target)
        else:
            close(traced(small, target), criterion(small, target))


def test_sizes_that_do_not_fit_are_an_error_in_a_traced_loss(case: Case) -> None:
    logits, target = other_logits(case)
    traced = torch.jit.trace(make_criterion(case), (logits, target))
    with pytest.raises(RuntimeError, match=r"traced for sizes that are equal|must match the size|Sizes of tensors"):
        traced(logits[:, :, :7, :9], target)


def test_a_label_that_is_no_class_is_an_error_in_a_traced_loss(case: Case) -> None:
    if case.device != "cpu":
        pytest.skip("a device-side assert would end the use of the device in this process")
    logits, target = other_logits(case, void=0.0)
    traced = torch.jit.trace(make_criterion(case), (logits, target))
    with pytest.raises(RuntimeError, match="labels outside"):
        traced(logits, torch.full_like(target, NUM_CLASSES))


def test_tensorboards_graph(case: Case, tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(make_step(case), make_batch(case))
    (file,) = tmp_path.iterdir()
    name = "scatter" if case.backend == "reference" else f"semeda_fast::{case.backend}_forward"
    assert name.encode() in file.read_bytes()


@pytest.mark.parametrize("inside", [False, True])
def test_script_says_what_to_do(case: Case, inside: bool) -> None:
    step = make_step(case)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace\(criterion, \(logits, target\)\)"):
        torch.jit.script(step if inside else step.criterion)
    traced = torch.jit.trace(step.criterion, other_logits(case))  # as it says
    close(traced(*other_logits(case, seed=6)), step.criterion(*other_logits(case, seed=6)))
    network = torch.jit.script(step.network)
    images, target = make_batch(case)
    close(step.criterion(network(images), target).detach(), step(images, target).detach())


def test_symbolic_trace_says_what_to_do(case: Case) -> None:
    step = make_step(case)
    with pytest.raises(TypeError, match=r"torch\.fx\.symbolic_trace cannot look inside the loss.*is_leaf_module"):
        torch.fx.symbolic_trace(step)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, SemedaLoss) or super().is_leaf_module(m, module_qualified_name)

    graph = torch.fx.GraphModule(step, Tracer().trace(step))
    assert_same_step(graph, step, *make_batch(case, seed=5))
    assert isinstance(step, Step)
