"""How the Triton backend is chosen, tried out and left alone; what its kernels compute is tested elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from helpers import VOID, make_inputs, make_proxy, value_and_grad
from torch import Tensor

from semeda_fast import SemedaLoss, backend_info
from semeda_fast.backends import registry as backends
from semeda_fast.backends import trial
from semeda_fast.backends import triton as triton_ops
from semeda_fast.backends.config import config_text
from semeda_fast.backends.problem import Outputs, Problem
from semeda_fast.spec import LossSpec

pytest.importorskip("triton")
needs_interpreter = pytest.mark.skipif(not triton_ops.interpreted(), reason="needs Triton's interpreter")
CPU = torch.device("cpu")
NCHW = torch.contiguous_format
CONTEXTS = [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]


@pytest.fixture(autouse=True)
def _no_trial_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(trial, "TRIAL_SIZE", (6, 9))  # the interpreter takes seconds for more
    trial.trial.cache_clear()
    yield
    trial.trial.cache_clear()


@pytest.fixture
def compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a GPU on which kernels have to be compiled."""
    monkeypatch.setattr(triton_ops, "_is_compiled_for", lambda device: True)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, compiled_here: None) -> None:
    """A Triton that cannot compile a kernel."""

    def fail() -> None:
        raise RuntimeError("PassManager::run failed\nand many lines more")

    monkeypatch.setattr(triton_ops, "_launches", fail)


def some_config(reduction: str = "mean") -> str:
    proxy = make_proxy()
    ones = (1.0,) * proxy.num_layers
    return config_text(proxy.weights, LossSpec(ones, ones, (1,), (1,), (0,), reduction=reduction), False)


@needs_interpreter
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_a_trial_that_works(context: Callable[[], AbstractContextManager[None]], reduction: str) -> None:
    with context():
        assert trial.trial(triton_ops.ops, some_config(reduction), torch.bfloat16, torch.channels_last, CPU) is None


@needs_interpreter
def test_a_trial_leaves_the_callers_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    trial.trial(triton_ops.ops, some_config(), torch.float32, NCHW, CPU)
    assert torch.equal(before, torch.get_rng_state())


@needs_interpreter
@pytest.mark.parametrize("wrong", ["semeda", "gradient"])
def test_a_trial_that_computes_something_else(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = triton_ops.ops.forward, triton_ops.ops.backward

    def wrong_forward(problem: Problem, outputs: Outputs) -> None:
        forward(problem, outputs)
        outputs.semeda.mul_(1.05)

    def wrong_backward(problem: Problem, *tensors: Tensor) -> None:
        backward(problem, *tensors)
        tensors[-1].neg_()

    if wrong == "semeda":
        monkeypatch.setattr(triton_ops.ops, "forward", wrong_forward)
    else:
        monkeypatch.setattr(triton_ops.ops, "backward", wrong_backward)
    reason = trial.trial(triton_ops.ops, some_config(), torch.float32, NCHW, CPU)
    assert reason is not None
    what = {"semeda": "the SEMEDA term is off by 0.05", "gradient": "the gradient is off by 2"}[wrong]
    assert reason == f"the Triton kernels compute wrong values on cpu: {what} of its size; please report this"


def test_a_trial_that_fails_says_why(broken: None) -> None:
    reason = trial.trial(triton_ops.ops, some_config(), torch.float32, NCHW, CPU)
    assert reason == "the Triton kernels do not compile or run on cpu: RuntimeError: PassManager::run failed"


@needs_interpreter
def test_by_name_a_failed_trial_is_an_error(broken: None) -> None:
    logits, target = make_inputs()
    with pytest.raises(ValueError, match="do not compile or run on cpu: RuntimeError: PassManager::run failed; use"):
        SemedaLoss(make_proxy(), ignore_index=VOID, backend="triton")(logits, target)


def test_automatically_a_failed_trial_means_one_warning_and_the_reference(broken: None) -> None:
    logits, target = make_inputs()
    expected = value_and_grad(SemedaLoss(make_proxy(), ignore_index=VOID, backend="reference"), logits, target)
    backends.register(
        backends.Backend(
            "triton_on_cpu",
            triton_ops.run,
            ("cpu",),
            why_unsupported=triton_ops.why_unsupported,
            why_failing=triton_ops.why_failing,
            fused=True,
            checks_labels=True,
        )
    )
    cpu = backends._registry.pop("cpu")  # else "auto" goes on to it
    try:
        criterion = SemedaLoss(make_proxy(), ignore_index=VOID)
        with pytest.warns(UserWarning, match="slower reference backend: the Triton kernels do not compile"):
            first = value_and_grad(criterion, logits, target)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = value_and_grad(criterion, logits, target)
    finally:
        backends.unregister("triton_on_cpu")
        backends._registry["cpu"] = cpu
        failures = [reason for reason in backends._fallbacks if "do not compile" in reason]
        for reason in failures:
            del backends._fallbacks[reason]
    assert len(failures) == 1
    for result in (first, second):
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])


@needs_interpreter
def test_a_trial_happens_with_real_tensors_while_a_compiler_traces(compiled_here: None) -> None:
    logits, target = make_inputs(n=1, h=5, w=6)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend="triton")
    eager = criterion(logits, target)
    trial.trial.cache_clear()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, target), eager)
    assert trial.trial.cache_info().misses == 1


@needs_interpreter
def test_the_interpreter_is_never_chosen_by_itself() -> None:
    assert "triton" in backends.available_names("cpu")
    assert backend_info().auto["cpu"] != "triton"
    logits, target = make_inputs()
    ours = SemedaLoss(make_proxy(), ignore_index=VOID)(logits, target)
    fused = SemedaLoss(make_proxy(), ignore_index=VOID, backend=backend_info().auto["cpu"])(logits, target)
    assert torch.equal(ours, fused)


@pytest.mark.parametrize(
    ("options", "dtype", "reason"),
    [
        ({}, torch.float64, "the logits are float64"),
        ({"from_logits": False}, torch.float32, "not probabilities"),
    ],
)
def test_what_is_left_to_the_reference(options: dict[str, bool], dtype: torch.dtype, reason: str) -> None:
    logits, target = torch.zeros(1, 5, 4, 4, dtype=dtype), torch.zeros(1, 4, 4, dtype=torch.int64)
    spec = LossSpec((), (), **options)
    assert reason in str(triton_ops.why_unsupported(logits, target, make_proxy().weights, spec))


def test_more_classes_than_a_program_holds() -> None:
    logits, target = torch.zeros(1, 257, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    reason = triton_ops.why_unsupported(logits, target, make_proxy(257).weights, LossSpec((), ()))
    assert reason == "the Triton kernels take up to 256 classes, the proxy has 257"


WITHOUT_TRITON = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else found(name, package)
import torch, semeda_fast
sys.meta_path.insert(0, Blocker())
status = {s.name: s for s in semeda_fast.backend_info().backends}["triton"]
assert not status.available
print(status.reason)
logits = torch.zeros(1, 3, 4, 4, requires_grad=True)
semeda_fast.SemedaLoss(num_classes=3)(logits, torch.zeros(1, 4, 4, dtype=torch.int64)).backward()
"""


@pytest.mark.parametrize(("interpret", "reason"), [("1", "Triton is not installed"), ("0", "torch sees no GPU")])
def test_without_triton_everything_else_works(interpret: str, reason: str) -> None:
    if interpret == "0" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert reason in result.stdout
