"""Bad input gets an error that names what was expected, what came and what to do. docs/guarantees.md lists the rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import Case
from helpers import NUM_CLASSES, VOID, make_inputs, make_proxy, value_and_grad

from semeda_fast import EdgeProxy, SemedaLoss, semeda_loss


def test_label_out_of_range(case: Case) -> None:
    """The range found, the count, where the first is, ignore_index, and what to do."""
    if case.device != "cpu":
        pytest.skip("a device-side assert would end the use of the device in this process")
    logits, target = make_inputs(void=0.0)
    target[0, 2, 3] = 7
    target[1, 4, 5] = -1
    target[1, 4, 6] = 255
    criterion = SemedaLoss(make_proxy(), backend=case.backend)
    with pytest.raises(ValueError, match="labels outside") as caught:
        criterion(logits, target)
    text = str(caught.value)
    for part in (
        "[0, 5)",
        "from -1 to 255",
        "3 of 442 pixels",
        "7 (1 pixels)",
        "[n=0, y=2, x=3]",
        "ignore_index=-100",
        "-1, 255 can hardly be classes",
        "pass num_classes=8 and as many channels if the others are classes",
    ):
        assert part in text
    with pytest.raises(ValueError, match="pass ignore_index=255"):
        criterion(logits, torch.where(target == 7, 255, target).clamp(0).to(torch.uint8))
    assert torch.isfinite(SemedaLoss(make_proxy(), ignore_index=255, backend=case.backend)(logits, target.clamp(0, 4)))


@pytest.mark.parametrize("wrong", [-1, NUM_CLASSES, 2**40])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_unchecked_bad_labels_make_nan_not_garbage(case: Case, wrong: int, reduction: str) -> None:
    logits, target = make_inputs(void=0.0, device=case.device)
    target[0, 2, 3] = wrong
    criterion = SemedaLoss(make_proxy(), validate="never", reduction=reduction, backend=case.backend).to(case.device)
    loss, grad = value_and_grad(criterion, logits, target)
    if reduction == "none":
        assert loss[0, 2, 3].isnan()
        assert int(loss.isnan().sum()) == 1
    else:
        assert loss.isnan()
    assert grad[0, :, 2, 3].isnan().any()


def test_nan_logits_make_a_nan_loss_or_an_error(case: Case) -> None:
    logits, target = make_inputs(void=0.0, device=case.device)
    broken = logits.detach().clone()
    broken[1, 2, 3, 4] = torch.nan
    criterion = SemedaLoss(make_proxy(), backend=case.backend).to(case.device)
    loss, grad = value_and_grad(criterion, broken, target)
    assert loss.isnan()
    assert grad.isnan().any()  # so that a GradScaler skips the step
    careful = SemedaLoss(make_proxy(), backend=case.backend, validate="always").to(case.device)
    with pytest.raises(ValueError, match=r"logits hold 1 NaN.*\[n=1, c=2, y=3, x=4\]"):
        careful(broken, target)
    assert torch.isfinite(careful(logits, target))
    target[1, 3, 4] = VOID
    assert torch.isfinite(SemedaLoss(make_proxy(), ignore_index=VOID, validate="always")(broken.cpu(), target.cpu()))


def test_distributions_are_checked_on_request(case: Case) -> None:
    logits, target = make_inputs(void=0.0, device=case.device)
    careful = SemedaLoss(make_proxy(), backend=case.backend, validate="always").to(case.device)
    assert torch.isfinite(careful(logits, logits.detach().softmax(1)))
    with pytest.raises(ValueError, match="target must lie in"):
        careful(logits, 2 * logits.detach().softmax(1))
    # The fused backends take logits alone, and "auto" is what a user gets then.
    backend = case.backend if case.backend == "reference" else "auto"
    probabilities = SemedaLoss(make_proxy(), backend=backend, validate="always", from_logits=False)
    with pytest.raises(ValueError, match=r"probabilities must lie in .* from_logits=True"):
        probabilities.to(case.device)(logits, target)
    assert torch.isfinite(probabilities(logits.detach().softmax(1), target))


def shapes(logits: torch.Tensor, target: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor, type, str]]:
    """name -> logits, target, error, pattern."""
    return {
        "class mismatch": (logits[:, :3], target, ValueError, r"3 classes .* proxy has 5.*num_classes=3"),
        "one channel": (logits[:, :1], target, ValueError, "mode='binary'"),
        "unbatched": (logits[0], target[0], ValueError, r"\[N,C,H,W\].*unsqueeze"),
        "no pixels": (logits[..., :0], target[..., :0], ValueError, "H and W of at least 1"),
        "integer logits": (logits.long(), target, TypeError, "torch.int64"),
        "complex logits": (logits.to(torch.complex64), target, TypeError, "complex64"),
        "size mismatch": (logits[..., :8, :8], target, ValueError, r"\[2,8,8\].*\[2, 13, 17\].*upsample='bilinear'"),
        "batch mismatch": (logits[:1], target, ValueError, r"\[1,13,17\].*\[2, 13, 17\]"),
        "channels in labels": (logits, torch.stack([target] * 2, 1), ValueError, r"\[2,13,17\].*\[2, 2, 13, 17\]"),
        "float labels": (logits, target.float(), ValueError, r"distribution .*target.long"),
        "uint32 labels": (logits, target.to(torch.uint32), TypeError, r"torch.uint32; pass target.to\(torch.int64\)"),
        "uint64 labels": (logits, target.to(torch.uint64), TypeError, r"torch.uint64; pass target.to\(torch.int64\)"),
        "complex labels": (logits, target.to(torch.complex64), TypeError, "integer labels"),
        "soft class mismatch": (logits, logits[:, :4].detach().softmax(1), ValueError, r"\[2,5,13,17\]"),
        "target with gradient": (logits, logits.softmax(1), ValueError, r"target.detach\(\)"),
        "meta target": (logits, target.to("meta"), ValueError, "logits are on .* but target is on meta"),
    }


@pytest.mark.parametrize("name", list(shapes(*make_inputs(void=0.0))))
def test_shapes_dtypes_devices(case: Case, name: str) -> None:
    logits, target, error, pattern = shapes(*make_inputs(void=0.0, device=case.device))[name]
    criterion = SemedaLoss(make_proxy(), backend=case.backend).to(case.device)
    with pytest.raises(error, match=pattern):
        criterion(logits, target)


def test_the_proxy_on_another_device(case: Case) -> None:
    logits, target = make_inputs(void=0.0, device=case.device)
    with pytest.raises(ValueError, match=r"logits are on .* the proxy is on meta; call criterion.to\(logits.device\)"):
        SemedaLoss(make_proxy(), backend=case.backend).to("meta")(logits, target)


def test_valid_mask(case: Case) -> None:
    logits, target = make_inputs(void=0.0, device=case.device)
    criterion = SemedaLoss(make_proxy(), backend=case.backend).to(case.device)
    with pytest.raises(TypeError, match="bool"):
        criterion(logits, target, valid_mask=target)
    with pytest.raises(ValueError, match=r"\[2,13,17\].*\[1, 13, 17\]"):
        criterion(logits, target, valid_mask=target[:1] > 0)


def test_binary_mode(case: Case) -> None:
    logits, target = make_inputs(c=2, num_labels=2, void=0.0, device=case.device)
    criterion = SemedaLoss(make_proxy(2), mode="binary", backend=case.backend).to(case.device)
    with pytest.raises(ValueError, match="mode='multiclass'"):
        criterion(logits, target)
    with pytest.raises(ValueError, match="2 classes, got one with 5"):
        SemedaLoss(make_proxy(), mode="binary", backend=case.backend).to(case.device)(logits[:, :1], target)


def test_the_frozen_proxy_refuses_a_gradient(case: Case) -> None:
    logits, target = make_inputs(void=0.0, device=case.device)
    criterion = SemedaLoss(make_proxy(), backend=case.backend).to(case.device)
    criterion.proxy.weights[0].requires_grad_()
    with pytest.raises(ValueError, match="frozen"):
        criterion(logits, target)


class _Output(dict):  # type: ignore[type-arg]
    """What transformers' networks return: a dictionary with attributes."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__(logits=logits)
        self.logits = logits


def test_what_networks_and_loaders_give_beside_tensors(case: Case) -> None:
    logits, target = make_inputs(void=0.0, device=case.device)
    criterion = SemedaLoss(make_proxy(), backend=case.backend).to(case.device)
    wrong = {
        r"logits must be a tensor, got _Output; pass its \.logits": (_Output(logits), target, None),
        r"logits must be a tensor, got dict; pass its \['out'\]": ({"out": logits}, target, None),
        "logits must be a tensor, got tuple; pass one of its 2 elements": ((logits, logits), target, None),
        r"logits must be a tensor, got ndarray; .*from_numpy\(logits\)": (np.zeros((2, 5, 13, 17)), target, None),
        r"target must be a tensor, got ndarray; .*from_numpy\(target\)": (logits, np.zeros((2, 13, 17)), None),
        r"valid_mask must be a tensor, got ndarray": (logits, target, np.ones((2, 13, 17), bool)),
        "target must be a tensor, got NoneType": (logits, None, None),
    }
    for pattern, (x, y, mask) in wrong.items():
        with pytest.raises(TypeError, match=pattern):
            criterion(x, y, valid_mask=mask)


CONFIGURATIONS: list[tuple[dict[str, object], type[Exception], str]] = [
    ({"lambda_ce": -1.0}, ValueError, "lambda_ce must be finite and not negative, got -1.0"),
    ({"lambda_semeda": float("inf")}, ValueError, "lambda_semeda must be finite"),
    ({"lambda_semeda": "0.1"}, TypeError, "number"),
    ({"lambda_semeda": torch.ones(3)}, ValueError, "one floating-point number"),
    ({"layer_weights": (1, 1)}, ValueError, "3 layers, got 2"),
    ({"layer_weights": (1, 1, -1)}, ValueError, "not negative"),
    ({"distance": "cosine"}, ValueError, "'l1', 'l2', 'smooth_l1', got 'cosine'"),
    ({"weight": torch.ones(4)}, ValueError, r"shape \[5\], got shape \[4\]"),
    ({"weight": torch.ones(5).long()}, TypeError, "floating-point"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
    ({"ignore_index": 2**63}, ValueError, "must fit in 64 bits"),
    ({"label_smoothing": 1.5}, ValueError, r"\[0, 1\], got 1.5"),
    ({"label_smoothing": None}, TypeError, "must be a number"),
    ({"layer_weights": 1.0}, TypeError, "one number a layer, 3 in all, got 1.0"),
    ({"lambda_semeda": torch.nn.Parameter(torch.ones(()))}, TypeError, r"holds none.*criterion.lambda_semeda ="),
    ({"mode": "binary"}, ValueError, "2 classes, got one with 5; leave num_classes out"),
    ({"reduction": "average"}, ValueError, "'mean', 'sum', 'none', got 'average'"),
    ({"mode": "multilabel"}, ValueError, "2 classes, got one with 5; leave num_classes out"),
    ({"mode": "overlapping"}, ValueError, "'multiclass', 'binary', 'multilabel'"),
    ({"empty": "one"}, ValueError, "'zero', 'nan'"),
    ({"validate": True}, ValueError, "'auto', 'always', 'never'"),
    ({"backend": "tpu"}, ValueError, "'auto', 'reference'.*got 'tpu'"),
    ({"num_classes": 7}, ValueError, "num_classes=7, but the proxy has 5"),
]


@pytest.mark.parametrize(("options", "error", "pattern"), CONFIGURATIONS, ids=lambda v: str(v)[:40])
def test_configuration(options: dict[str, object], error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        SemedaLoss(make_proxy(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "error", "pattern"),
    [
        (lambda: SemedaLoss(), ValueError, "pass num_classes=C"),
        (lambda: SemedaLoss(num_classes=0), ValueError, "1 to 256"),
        (lambda: SemedaLoss(num_classes=257), ValueError, "train one"),
        (lambda: SemedaLoss(torch.nn.Conv2d(3, 2, 3)), TypeError, "from_sequential"),
        (lambda: SemedaLoss(21), TypeError, r"SemedaLoss\(num_classes=21\)"),  # type: ignore[arg-type]
        (lambda: SemedaLoss(torch.ones(21)), TypeError, "weight="),  # type: ignore[arg-type]
        (lambda: SemedaLoss(num_classes=1, mode="binary"), ValueError, "2 classes, got one with 1"),
        (lambda: SemedaLoss("missing.safetensors"), FileNotFoundError, "missing.safetensors"),
        (lambda: semeda_loss(*make_inputs(), "proxy.safetensors"), TypeError, "EdgeProxy.load"),  # type: ignore[arg-type]
        (lambda: EdgeProxy.bundled("21"), TypeError, "must be an int"),  # type: ignore[arg-type]
        (lambda: EdgeProxy.bundled(np.float64(21)), TypeError, "must be an int"),  # type: ignore[arg-type]
    ],
)
def test_proxy_arguments(build: Callable[[], object], error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        build()


def test_positional_options_are_refused() -> None:
    with pytest.raises(TypeError, match="positional"):
        SemedaLoss(make_proxy(), 5)  # type: ignore[misc]
