"""Choosing a backend: by name or not at all, automatically and visibly, from metadata alone."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import registered_cases
from helpers import VOID, make_inputs, make_proxy
from torch import Tensor

from semeda_fast import SemedaLoss, backend_info
from semeda_fast.backends import reference
from semeda_fast.backends import registry as backends
from semeda_fast.errors import BackendUnavailableError
from semeda_fast.spec import LossSpec, LossTerms


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A fused backend that counts its calls, joined by registering its name beside the reference alone."""
    monkeypatch.setattr(backends, "_registry", {"reference": backends._registry["reference"]})
    made: list[str] = []

    def run(
        logits: Tensor,
        target: Tensor,
        valid: Tensor | None,
        class_weight: Tensor | None,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        spec: LossSpec,
    ) -> LossTerms:
        made.append(spec.distance)
        return reference.loss_terms(logits, target, valid, class_weight, weights, biases, spec)

    def unsupported(logits: Tensor, target: Tensor, weights: Sequence[Tensor], spec: LossSpec) -> str | None:
        if target.is_floating_point():
            return "it takes labels alone"
        return "it has no l2 distance" if spec.distance == "l2" else None

    backends.register(backends.Backend("twin", run, ("cpu",), why_unsupported=unsupported, fused=True))
    yield made
    backends._fallbacks.clear()
    backends._failures.clear()


def register_better(
    calls: list[str], why_unsupported: Callable[..., str | None], why_failing: Callable[..., str | None]
) -> None:
    """A fused backend that "auto" prefers to "twin"; its calls are noted as "better"."""

    def run(*arguments: Any) -> LossTerms:
        calls.append("better")
        return reference.loss_terms(*arguments)

    backends.register(backends.Backend("better", run, ("cpu",), backends._never, why_unsupported, why_failing, True))


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_a_named_backend_that_is_missing_raises(name: str) -> None:
    status = {s.name: s for s in backend_info().backends}[name]
    if status.available:
        pytest.skip(f"backend {name} is available here")
    with pytest.raises(BackendUnavailableError, match=f"'{name}' is not available: .*; use backend="):
        SemedaLoss(make_proxy(), backend=name)


def test_auto_is_visible() -> None:
    info = backend_info()
    assert {s.name for s in info.backends} >= {"reference", "cpu", "triton", "cuda"}
    assert all(bool(s.reason) != s.available for s in info.backends)
    assert set(info.auto) == {"cpu", "cuda"}
    assert info.auto["cpu"] in backends.available_names("cpu")
    text = str(info)
    assert "reference" in text
    assert "auto: cpu -> " in text


def test_a_backend_joins_by_registering(calls: list[str]) -> None:
    assert ("twin", "cpu") in registered_cases()
    assert backend_info().auto["cpu"] == "twin"
    logits, target = make_inputs()
    loss = SemedaLoss(make_proxy(), ignore_index=VOID)(logits, target)
    assert calls == ["l1"]
    assert torch.equal(loss, SemedaLoss(make_proxy(), ignore_index=VOID, backend="reference")(logits, target))
    assert calls == ["l1"]


def test_auto_falls_back_and_says_so_once(calls: list[str]) -> None:
    criterion = SemedaLoss(make_proxy(), distance="l2", ignore_index=VOID)
    with pytest.warns(UserWarning, match="slower reference backend: it has no l2 distance"):
        criterion(*make_inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(*make_inputs())
    assert calls == []
    assert backend_info().fallbacks == ("it has no l2 distance",)
    assert "fell back to reference: it has no l2 distance" in str(backend_info())


def test_a_named_backend_never_falls_back(calls: list[str]) -> None:
    criterion = SemedaLoss(make_proxy(), distance="l2", ignore_index=VOID, backend="twin")
    with pytest.raises(ValueError, match="backend 'twin' cannot do this: it has no l2 distance"):
        criterion(*make_inputs())


def test_a_backend_is_asked_about_the_target(calls: list[str]) -> None:
    logits, target = make_inputs(void=0.0)
    soft = torch.nn.functional.one_hot(target).movedim(-1, 1).float()
    with pytest.raises(ValueError, match="backend 'twin' cannot do this: it takes labels alone"):
        SemedaLoss(make_proxy(), backend="twin")(logits, soft)
    with pytest.warns(UserWarning, match="slower reference backend: it takes labels alone"):
        SemedaLoss(make_proxy())(logits, soft)
    assert calls == []


def test_what_one_fused_backend_leaves_another_takes_silently(calls: list[str]) -> None:
    register_better(calls, lambda logits, target, weights, spec: "a map" if spec.per_pixel else None, backends._works)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SemedaLoss(make_proxy(), ignore_index=VOID)(*make_inputs())
        SemedaLoss(make_proxy(), ignore_index=VOID, reduction="none")(*make_inputs())
    assert calls == ["better", "l1"]
    assert backend_info().fallbacks == backend_info().failures == ()


def test_a_failed_trial_means_one_warning_and_the_next_fused_backend(calls: list[str]) -> None:
    register_better(calls, backends._anything, lambda logits, weights, spec: "its driver is broken")
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID)
    with pytest.warns(UserWarning, match="SemedaLoss runs on the backend 'twin': its driver is broken"):
        criterion(*make_inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(*make_inputs())
    assert calls == ["l1", "l1"]
    assert backend_info().failures == ("its driver is broken",)
    assert backend_info().fallbacks == ()
    assert "fell back to another fused backend: its driver is broken" in str(backend_info())
    with pytest.raises(ValueError, match="backend 'better' does not work here: its driver is broken; use backend="):
        SemedaLoss(make_proxy(), ignore_index=VOID, backend="better")(*make_inputs())


def test_no_trial_of_what_a_backend_refuses(calls: list[str]) -> None:
    def trial(*_: Any) -> str:
        raise AssertionError("a trial takes time")

    register_better(calls, lambda *_: "never", trial)
    SemedaLoss(make_proxy(), ignore_index=VOID)(*make_inputs())
    assert calls == ["l1"]


def test_triton_goes_before_cuda_until_measurements_say_otherwise() -> None:
    assert [name for name in backends.names() if name in ("cuda", "triton")] == ["cuda", "triton"]


def test_a_wide_proxy_runs_on_the_reference_and_says_so_once() -> None:
    backends._fallbacks.clear()
    criterion = SemedaLoss(make_proxy(widths=(65, 4)), ignore_index=VOID)
    with pytest.warns(UserWarning, match="layer 0 has 65 channels"):
        wide = criterion(*make_inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(*make_inputs())
        if "cpu" in backends.available_names("cpu"):  # else that is another reason
            SemedaLoss(make_proxy(), ignore_index=VOID)(*make_inputs())
    named = SemedaLoss(make_proxy(widths=(65, 4)), ignore_index=VOID, backend="reference")
    assert torch.equal(wide, named(*make_inputs()))
    backends._fallbacks.clear()


@pytest.mark.parametrize("what", ["float64 logits", "probabilities", "classes"])
def test_what_the_cpu_kernels_leave_to_the_reference(what: str) -> None:
    if "cpu" not in backends.available_names("cpu"):
        pytest.skip("the CPU kernels are not built here")
    logits, target = make_inputs(c=3, h=4, w=5)
    proxy, options = make_proxy(3), {}
    if what == "float64 logits":
        logits = logits.detach().double()
    elif what == "probabilities":
        logits, options = logits.detach().softmax(1), {"from_logits": False}
    else:
        proxy, logits, target = make_proxy(1025), torch.zeros(1, 1025, 4, 5), target[:1]
    backends._fallbacks.clear()
    with pytest.warns(UserWarning, match="slower reference backend: the fused CPU kernels"):
        loss = SemedaLoss(proxy, ignore_index=VOID, **options)(logits, target)
    named = SemedaLoss(proxy, ignore_index=VOID, backend="reference", **options)(logits, target)
    assert torch.equal(loss, named)
    with pytest.raises(ValueError, match="backend 'cpu' cannot do this: the fused CPU kernels"):
        SemedaLoss(proxy, ignore_index=VOID, backend="cpu", **options)(logits, target)
    backends._fallbacks.clear()


def test_the_choice_survives_compilation(calls: list[str]) -> None:
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*make_inputs()), criterion(*make_inputs()))
    assert "l1" in calls


def test_auto_is_no_name_to_register() -> None:
    with pytest.raises(ValueError, match="auto"):
        backends.register(backends.Backend("auto", None))


def test_import_needs_no_gpu_no_triton_and_no_compiler() -> None:
    """Importing must not even look for a device."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "torch.cuda._lazy_init = lambda: (_ for _ in ()).throw(RuntimeError('touched the GPU'))\n"
        "import semeda_fast\n"
        "print(semeda_fast.backend_info())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": ""}, check=False)
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout
