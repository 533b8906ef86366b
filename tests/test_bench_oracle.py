"""The benchmarks' check: its oracle is the reference, and it finds what is wrong and passes what is right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import oracle
from benchmarks.contenders import NOT_INDUCTOR, contenders, criterion
from benchmarks.plain import LossFunction, plain_semeda
from benchmarks.workloads import DATASETS, PROXIES, Inputs, Workload, make_inputs, named
from semeda_fast import EdgeProxy

SMALL = {"batch": 2, "height": 40, "width": 24, "labels": "scenes"}


def small(dataset: str = "voc", **changes: object) -> Workload:
    return named(dataset, **{**SMALL, **changes})


def whole(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the float64 reference, all at once."""
    leaf = inputs.logits.double().requires_grad_()
    loss = criterion(inputs, "reference")(leaf, inputs.target)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("dataset", ["voc", "binary"])
def test_strips_add_up_to_the_whole_reference(dataset: str, proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(small(dataset, proxy=proxy))
    loss, gradient = whole(inputs)
    monkeypatch.setattr(oracle, "_STRIP_ELEMENTS", 1)  # as few rows in a strip as it allows: 16
    assert len(oracle._strips(inputs, inputs.proxy.receptive_field // 2)) == 3
    found = oracle.compute_oracle(inputs)
    assert found.loss == pytest.approx(float(loss), rel=1e-13)
    # Rounded to fp32, whose unit is 6e-8.
    torch.testing.assert_close(found.gradient.double(), gradient, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dataset", ["voc", "binary"])
def test_cross_entropy_of_the_oracle(dataset: str) -> None:
    inputs = make_inputs(small(dataset))
    function = contenders()["ce"].make(inputs, NOT_INDUCTOR)
    assert oracle.compute_oracle(inputs).ce == pytest.approx(float(function(inputs.logits, inputs.target)), rel=1e-6)


def run_check(inputs: Inputs, function: LossFunction, checked_as: str = "loss") -> oracle.Check:
    return oracle.check(function, inputs.leaf("nchw"), inputs, oracle.compute_oracle(inputs), checked_as)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_eager_contender_is_right(dataset: str, dtype: str) -> None:
    inputs = make_inputs(small(dataset, dtype=dtype))
    truth = oracle.compute_oracle(inputs)
    for contender in contenders().values():
        if not contender.compiled:
            function = contender.make(inputs, NOT_INDUCTOR)
            result = oracle.check(function, inputs.leaf(contender.layout), inputs, truth, contender.checked_as)
            assert result.ok, f"{contender.name}: {result.describe()}"
            assert result.compared > 0.9


def test_plain_pytorch_is_the_definition() -> None:
    """Without autocast it agrees with the reference to fp32's tolerance, not to the wide one."""
    for dataset in ("voc", "binary"):
        inputs = make_inputs(small(dataset))
        plain = plain_semeda(inputs.proxy, inputs.workload.ignore_index, inputs.workload.mode)
        result = run_check(inputs, plain, "loss")
        assert result.ok, result.describe()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_error_of_one_percent_in_semeda_is_found(dtype: str) -> None:
    inputs = make_inputs(small(dtype=dtype))
    right = criterion(inputs, "reference")
    right.lambda_semeda = 1.01
    result = run_check(inputs, right)
    assert not result.ok
    assert result.loss_error > result.loss_tolerance


class _WrongGradient(torch.autograd.Function):
    """The identity, with a gradient that lacks the last row of each image."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, d_out: Tensor) -> Tensor:
        d_x = d_out.clone()
        d_x[:, :, -1] = 0
        return d_x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gradient_wrong_in_one_row_is_found(dtype: str) -> None:
    inputs = make_inputs(small(dtype=dtype))
    right = criterion(inputs, "reference")
    result = run_check(inputs, lambda z, y: right(_WrongGradient.apply(z), y))
    assert result.loss_error <= result.loss_tolerance
    assert not result.ok
    assert result.gradient_error is not None
    assert result.gradient_error > result.gradient_tolerance


def test_nan_never_passes() -> None:
    inputs = make_inputs(small())
    right = criterion(inputs, "reference")
    assert not run_check(inputs, lambda z, y: right(z, y) * float("nan")).ok
    assert not run_check(inputs, lambda z, y: right(z, y) + 0 * (z * float("nan")).sum().nan_to_num()).ok


def test_kinks_are_found_where_a_difference_is_zero() -> None:
    """Where the prediction is the one-hot target, every |d| is 0: these pixels, and those in reach, are left out."""
    inputs = make_inputs(small())
    logits = inputs.logits.clone()
    labels = torch.where(inputs.target == 255, 0, inputs.target)
    logits[:, :, :20] = 1e4 * torch.nn.functional.one_hot(labels, 21).permute(0, 3, 1, 2).float()[:, :, :20]
    kink = oracle.compute_oracle(Inputs(inputs.workload, logits, inputs.target, inputs.proxy, inputs.facts)).kink
    valid = (inputs.target != 255)[:, :16]
    assert kink[:, :16][valid].all()
    assert kink[:, 24:].double().mean() < 0.1


def test_a_hidden_feature_at_its_relu_is_a_kink_under_void_too() -> None:
    inputs = make_inputs(small())
    target = torch.full_like(inputs.target, inputs.workload.ignore_index)
    target[:, 20, 12] = 1
    weights, biases = inputs.proxy.weights, inputs.proxy.biases
    first = weights[0].clone()
    first[0] = 0  # channel 0 is 0 everywhere, also where nothing but void is in reach
    biases[0] = torch.where(torch.arange(len(biases[0])) == 0, 0.0, 1.0)
    proxy = EdgeProxy.from_tensors(inputs.proxy.layers, [first, *weights[1:]], biases)
    kink = oracle.compute_oracle(Inputs(inputs.workload, inputs.logits, target, proxy, inputs.facts)).kink
    assert kink.all()


def test_the_oracle_is_kept_between_processes(tmp_path: Path) -> None:
    inputs = make_inputs(small())
    first = oracle.cached_oracle(inputs, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    second = oracle.cached_oracle(inputs, tmp_path)
    assert second.loss == first.loss
    assert torch.equal(second.gradient, first.gradient)
    other = make_inputs(small(dtype="bfloat16"))
    assert oracle.cached_oracle(other, tmp_path).loss != first.loss
