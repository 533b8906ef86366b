"""torch.onnx.export, both ways: the graph computes eager's value; what it cannot hold is named with a remedy."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from capturing import NUM_CLASSES, VOID, Step, make_batch, make_step
from conftest import Case
from helpers import make_proxy
from torch import Tensor, nn

from semeda_fast import SemedaLoss, semeda_loss

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
evaluator = pytest.importorskip("onnx.reference")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.onnx about itself
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # its own, while it looks at `upsample`
]
WAYS = {"by torch.export": True, "by torch.jit.trace": False}


def exported(module: nn.Module, inputs: tuple[Tensor, ...], dynamo: bool, dynamic: bool = False) -> Any:
    """The ONNX graph; `dynamic`: for any number of images and any size."""
    file = io.BytesIO()
    sizes: dict[str, Any] = {}
    if dynamic and dynamo:
        sizes["dynamic_shapes"] = ({0: "n", 2: "h", 3: "w"}, {0: "n", 1: "h", 2: "w"})
    elif dynamic:
        sizes["dynamic_axes"] = {"images": {0: "n", 2: "h", 3: "w"}, "target": {0: "n", 1: "h", 2: "w"}}
    torch.onnx.export(
        module.eval(), inputs, file, dynamo=dynamo, input_names=["images", "target"], verbose=False, **sizes
    )
    graph = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(graph)
    return graph


def value_of(graph: Any, images: Tensor, target: Tensor) -> float:
    names = [entry.name for entry in graph.graph.input]
    run = evaluator.ReferenceEvaluator(graph).run
    (value,) = run(None, dict(zip(names, (images.cpu().numpy(), target.cpu().numpy()), strict=True)))
    assert value.dtype == np.float32
    return float(value)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_of_whatever_auto_takes(way: str) -> None:
    case = Case("auto", "cpu")
    step = make_step(case)
    graph = exported(step, make_batch(case), WAYS[way])
    inputs = make_batch(case, seed=5)
    with torch.no_grad():
        expected = float(step(*inputs))
    assert value_of(graph, *inputs) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_other_sizes_than_those_of_the_example(way: str) -> None:
    case = Case("auto", "cpu")
    step = make_step(case)
    graph = exported(step, make_batch(case), WAYS[way], dynamic=True)
    inputs = make_batch(case, seed=5, n=3, h=10, w=12)
    with torch.no_grad():
        expected = float(step(*inputs))
    assert value_of(graph, *inputs) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_backends_by_name(case: Case, way: str) -> None:
    """The reference is translated; the others say what to do."""
    step = make_step(case)
    inputs = make_batch(case, seed=5)
    with torch.no_grad():
        expected = float(step(*inputs))
    if case.backend != "reference":
        with pytest.raises(Exception, match=rf"cannot translate.*{case.backend}.*criterion\.backend = 'auto'"):
            exported(step, make_batch(case), WAYS[way])
        step.criterion.backend = "auto"  # as it says
    graph = exported(step, make_batch(case), WAYS[way])
    assert value_of(graph, *inputs) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_checks_of_values(way: str) -> None:
    """None in an ONNX graph: a label that is no class makes a NaN, and who asks for more is told so."""
    case = Case("auto", "cpu")
    step = make_step(case, validate="always")
    with pytest.raises(Exception, match=r"validate='always'.*criterion\.validate = 'auto'"):
        exported(step, make_batch(case), WAYS[way])
    step.criterion.validate = "auto"  # as it says
    images, target = make_batch(case)
    graph = exported(step, (images, target), WAYS[way])
    assert np.isfinite(value_of(graph, images, target))
    target[0, 2, 3] = NUM_CLASSES
    assert np.isnan(value_of(graph, images, target))


class Functional(nn.Module):
    """What the module form cannot be given: a mask, options at the call."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.proxy = make_proxy()
        self.options = options

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        logits = torch.cat([images, images[:, :2]], dim=1)
        if self.options.get("upsample"):
            logits = nn.functional.avg_pool2d(logits, 2)
        loss = semeda_loss(logits, target, self.proxy, ignore_index=VOID, **self.options)
        assert isinstance(loss, Tensor)
        return loss.mean()


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"distance": "l2", "label_smoothing": 0.1, "weight": torch.linspace(0.5, 2.0, NUM_CLASSES)},
        {"upsample": "bilinear"},
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_options(way: str, options: dict[str, Any]) -> None:
    case = Case("auto", "cpu")
    module = Functional(**options)
    graph = exported(module, make_batch(case), WAYS[way])
    inputs = make_batch(case, seed=5)
    assert value_of(graph, *inputs) == pytest.approx(float(module(*inputs)), rel=1e-5)


def test_a_program_of_torch_export() -> None:
    """As it was exported, not decomposed: then the backend is still open."""
    step, inputs = make_step(Case("auto", "cpu")), make_batch(Case("auto", "cpu"))
    program = torch.onnx.export(torch.export.export(step, inputs), dynamo=True, verbose=False)
    other = make_batch(Case("auto", "cpu"), seed=5)
    with torch.no_grad():
        assert value_of(program.model_proto, *other) == pytest.approx(float(step(*other)), rel=1e-5)


def test_smooth_l1() -> None:
    module, inputs = Functional(distance="smooth_l1"), make_batch(Case("auto", "cpu"))
    with pytest.raises(ValueError, match="export with dynamo=True"):
        exported(module, inputs, dynamo=False)
    graph = exported(module, inputs, dynamo=True)  # as it says
    assert value_of(graph, *inputs) == pytest.approx(float(module(*inputs)), rel=1e-5)


def test_after_an_export_eager_calls_are_what_they_were() -> None:
    case = Case("auto", "cpu")
    step = make_step(case)
    inputs = make_batch(case)
    before = step(*inputs)
    for dynamo in WAYS.values():
        exported(step, inputs, dynamo)
        assert torch.equal(step(*inputs), before)
    assert isinstance(step, Step)
    assert isinstance(step.criterion, SemedaLoss)
