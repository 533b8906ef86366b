"""torch.export: whole, decomposed, saved and loaded, compiled ahead; whatever was traced can be trained afterwards."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from capturing import (
    NUM_CLASSES,
    VOID,
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
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from semeda_fast import SemedaLoss
from semeda_fast.backends import registry as backends
from semeda_fast.backends.config import config_text, parse_config
from semeda_fast.spec import LossSpec


def exported(module: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> ExportedProgram:
    program: ExportedProgram = torch.export.export(copy.deepcopy(module), inputs, **options)
    return program


def test_an_exported_and_decomposed_step_trains_as_eager_does(case: Case) -> None:
    """20 steps, after which losses and parameters are the same to 1e-5."""
    eager = make_step(case)
    captured = exported(eager, make_batch(case)).run_decompositions().module()
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9) for module in (eager, captured)]
    losses: list[list[float]] = []
    for number in range(20):
        losses.append([])
        for module, optimizer in zip((eager, captured), optimizers, strict=True):
            optimizer.zero_grad()
            loss = module(*make_batch(case, seed=number % 2))
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
    for found, expected in losses:
        assert found == pytest.approx(expected, rel=1e-5)
    assert losses[-1][0] < losses[1][0] - 0.02  # of the same batch
    for a, b in zip(eager.parameters(), captured.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_step(case: Case, strict: bool, decomposed: bool) -> None:
    eager = make_step(case)
    program = exported(eager, make_batch(case), strict=strict)
    if decomposed:
        program = program.run_decompositions()
    assert_same_step(program.module(), eager, *make_batch(case, seed=5))


def test_a_decomposed_loss_alone(case: Case) -> None:
    """In which nothing requires a gradient while it is traced."""
    criterion = make_criterion(case)
    captured = exported(criterion, other_logits(case)).run_decompositions().module()
    assert_same_loss(captured, criterion, *other_logits(case, seed=6))


def test_what_was_exported_without_gradients_can_be_trained(case: Case) -> None:
    eager = make_step(case)
    with torch.no_grad():
        captured = exported(eager, make_batch(case)).run_decompositions().module()
    assert_same_step(captured, eager, *make_batch(case, seed=5))


@pytest.mark.parametrize("decomposed", [False, True])
def test_other_sizes_than_those_of_the_example(case: Case, decomposed: bool) -> None:
    eager = make_step(case)
    sizes = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO})
    program = exported(eager, make_batch(case), dynamic_shapes=sizes)
    if decomposed:
        program = program.run_decompositions()
    captured = program.module()
    for n, h, w in ((3, 9, 8), (2, 20, 11)):
        assert_same_step(captured, eager, *make_batch(case, n=n, h=h, w=w))


def test_a_program_that_was_saved_and_loaded(case: Case) -> None:
    eager = make_step(case)
    file = io.BytesIO()
    torch.export.save(exported(eager, make_batch(case)).run_decompositions(), file)
    file.seek(0)
    assert_same_step(torch.export.load(file).module(), eager, *make_batch(case, seed=5))


def test_a_label_that_is_no_class_is_an_error_in_a_decomposed_program(case: Case) -> None:
    if case.device != "cpu":
        pytest.skip("a device-side assert would end the use of the device in this process")
    logits, target = other_logits(case, void=0.0)
    captured = exported(make_criterion(case), (logits, target)).run_decompositions().module()
    with pytest.raises(ValueError, match="labels outside"):
        captured(logits, torch.full_like(target, NUM_CLASSES))


WEIGHT = torch.linspace(0.5, 2.0, NUM_CLASSES)
OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weights, smoothing": {"weight": WEIGHT, "label_smoothing": 0.1},
    "l2": {"distance": "l2"},
    "lambdas": {"lambda_ce": 0.5, "lambda_semeda": torch.tensor(0.7)},
    "checked": {"validate": "always"},
    "unchecked": {"validate": "never"},
    "empty nan": {"empty": "nan"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_in_a_decomposed_program(case: Case, options: str) -> None:
    criterion = make_criterion(case, **OPTIONS[options])
    captured = exported(criterion, other_logits(case)).run_decompositions().module()
    assert_same_loss(captured, criterion, *other_logits(case, seed=6))


@pytest.mark.parametrize("kind", ["bytes", "bf16", "soft", "small logits", "hardly smaller logits", "binary"])
def test_inputs_of_a_decomposed_program(case: Case, kind: str) -> None:
    options: dict[str, Any] = {}
    inputs = [other_logits(case), other_logits(case, seed=6)]
    if kind == "bytes":
        inputs = [(z, y.to(torch.uint8)) for z, y in inputs]
    elif kind == "bf16":
        inputs = [(z.to(torch.bfloat16), y) for z, y in inputs]
    elif kind == "soft":
        inputs = [(z, (3 * z.roll(1, 1)).softmax(1)) for z, _ in inputs]
    elif kind in ("small logits", "hardly smaller logits"):
        options["upsample"] = "bilinear"
        h, w = (6, 7) if kind == "small logits" else (9, 12)
        inputs = [(z[:, :, :h, :w].contiguous(), y) for z, y in inputs]
    if kind == "binary":
        criterion = SemedaLoss(make_proxy(2), mode="binary", ignore_index=VOID, backend=case.backend).to(case.device)
        inputs = [other_logits(case, c=1, num_labels=2, seed=seed) for seed in (5, 6)]
    else:
        criterion = make_criterion(case, **options)
    captured = exported(criterion, inputs[0]).run_decompositions().module()
    assert_same_loss(captured, criterion, *inputs[1])


def test_compiled_ahead_for_evaluation(case: Case, tmp_path: Path) -> None:
    if case.backend not in ("cpu", "reference"):
        pytest.skip("the compiler takes half a minute each time")
    eager = make_step(case)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            exported(eager, make_batch(case)), package_path=str(tmp_path / "step.pt2")
        )
    compiled = torch._inductor.aoti_load_package(package)
    images, target = make_batch(case, seed=5)
    close(compiled(images, target), eager(images, target).detach())


@pytest.mark.parametrize("gradient", [False, True])
def test_torch_compile_saves_where_a_gradient_is_asked_for_alone(case: Case, gradient: bool) -> None:
    """It knows what will be asked of a graph: an evaluation step keeps nothing."""
    if case.backend == "reference":
        pytest.skip("the reference keeps what torch keeps")
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    saves: list[bool] = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        saves.extend(node.args[-1] for node in graph.graph.nodes if "_forward" in str(node.target))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(make_criterion(case), fullgraph=True, backend=aot_autograd(fw_compiler=note))
    logits, target = make_inputs(device=case.device)
    compiled(logits if gradient else logits.detach(), target)
    assert saves == [gradient]


def test_backward_of_a_forward_that_kept_nothing_is_an_error(case: Case) -> None:
    """As in a graph by some other tracer, which wrote down what one call without a gradient did."""
    if case.backend == "reference":
        pytest.skip("its graph is torch's")
    proxy = make_proxy().to(case.device)
    logits, target = make_inputs(device=case.device)
    flat = torch.cat([tensor.reshape(-1) for tensor in (*proxy.weights, *proxy.biases)])
    spec = LossSpec((1.0,) * 3, (1.0,) * 3, (1,) * 3, (1,) * 3, (0,) * 3, ignore_index=VOID)
    forward = getattr(torch.ops.semeda_fast, f"{case.backend}_forward")
    ce = forward(logits, target, None, None, flat, config_text(proxy.weights, spec, True), False)[0]
    with pytest.raises(RuntimeError, match="no gradient was"):
        ce.backward()


def test_torchs_cache_on_disk_keeps_no_graph_of_another_backend() -> None:
    """Its key holds the operator's name and arguments, and "auto" is the same word on every installation."""
    if "cpu" not in backends.available_names("cpu"):
        pytest.skip("the CPU kernels are not built here")
    from torch._inductor.utils import fresh_cache

    criterion = make_criterion(Case("auto", "cpu"))
    inputs = other_logits(Case("auto", "cpu"))
    order = [backends.get(name) for name in backends.names() if name != "reference"]

    def operators() -> set[str]:
        torch.compiler.reset()
        with torch.no_grad(), torch.profiler.profile() as profile:
            torch.compile(criterion, fullgraph=True)(*inputs)
        return {event.key for event in profile.key_averages() if event.key.startswith("semeda_fast::")}

    with fresh_cache():
        assert "semeda_fast::cpu_forward" in operators()
        backends.unregister("cpu")
        try:
            assert "semeda_fast::cpu_forward" not in operators()
        finally:
            for backend in order:
                backends.register(backend)


def test_a_graph_of_a_newer_version_is_named() -> None:
    with pytest.raises(ValueError, match=r"another version of semeda_fast, which knows tomorrow; capture it again"):
        parse_config('{"tomorrow": 1}')
