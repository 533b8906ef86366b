"""Counts, pixel weights and several outputs: what means divide by, and what is added up."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import Case
from helpers import NUM_CLASSES, VOID, make_inputs, make_proxy
from test_more_shapes import Outcome, make, on, planes, rng, run, volume
from torch import Tensor

from semeda_fast import LossCounts, MultiScaleLoss, SemedaLoss, semeda_loss
from semeda_fast.functional import LossComponents
from semeda_fast.outputs import MultiScaleComponents, named_logits

N = 4


def batch(mode: str) -> tuple[Tensor, Tensor]:
    """Four images whose shares of void are 0, 30, 95 and 100 %."""
    if mode == "multiclass":
        logits = 2 * torch.randn(N, NUM_CLASSES, 11, 14, generator=rng())
        target = torch.randint(NUM_CLASSES, (N, 11, 14), generator=rng(1))
    elif mode == "volume":
        logits = 2 * torch.randn(N, NUM_CLASSES, 3, 11, 14, generator=rng())
        target = torch.randint(NUM_CLASSES, (N, 3, 11, 14), generator=rng(1))
    else:
        logits, target = planes((N, 1 if mode == "binary" else 3, 11, 14), void=False)
    for image, share in zip(target, (0.0, 0.3, 0.95, 1.0), strict=True):
        image[torch.rand(image.shape, generator=rng(2)) < share] = VOID
    return logits, target


MODES: dict[str, dict[str, Any]] = {
    "multiclass": {},
    "binary": {"mode": "binary"},
    "multilabel": {"mode": "multilabel"},
    "volume": {},
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "multiclass": {"weight": [1.0, 2.0, 0.5, 0.0, 3.0]},
    "binary": {"weight": [0.5, 2.0], "pos_weight": [3.0]},
    "multilabel": {"weight": [0.5, 1.0, 2.0], "pos_weight": [3.0, 1.0, 0.2]},
    "volume": {"weight": [1.0, 2.0, 0.5, 0.0, 3.0]},
}


def loss_of(case: Case, mode: str, weighted: bool = False, **options: Any) -> SemedaLoss:
    classes = NUM_CLASSES if mode in ("multiclass", "volume") else 2
    return make(case, classes, **MODES[mode], **(WEIGHTS[mode] if weighted else {}), **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pixels", ["all", "masked", "masked and weighted"])
def test_micro_batches_add_up_to_the_whole_batch(case: Case, mode: str, weighted: bool, pixels: str) -> None:
    logits, target = on(case, *batch(mode))
    criterion = loss_of(case, mode, weighted)
    options: dict[str, Tensor] = {}
    shape = target.shape if mode != "binary" else (N, 11, 14)
    if "masked" in pixels:
        options["valid_mask"] = (torch.rand(shape, generator=rng(4)) < 0.7).to(case.device)
    if "weighted" in pixels:
        options["pixel_weight"] = torch.rand(shape, generator=rng(3)).to(case.device)
    whole = run(criterion, logits, target, **options)
    parts = [slice(0, 1), slice(1, 2), slice(2, 4)]

    def of(part: slice) -> dict[str, Tensor]:
        return {name: tensor[part] for name, tensor in options.items()}

    counts = sum(criterion.counts(target[part], **of(part)) for part in parts)
    assert isinstance(counts, LossCounts)
    found = [run(criterion, logits[part], target[part], counts=counts, **of(part)) for part in parts]
    torch.testing.assert_close(sum(each.loss for each in found), whole.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([each.grad for each in found]), whole.grad, rtol=1e-5, atol=1e-8)


def test_counts_of_soft_targets(case: Case) -> None:
    """Cross-entropy divides by the number of pixels, whatever the classes weigh, as torch does."""
    logits, target = on(case, *batch("multiclass"))
    soft = torch.softmax(torch.randn(logits.shape, generator=rng(6)), dim=1).to(case.device)
    criterion = loss_of(case, "multiclass", True)
    mask = target != VOID
    counts = criterion.counts(soft, valid_mask=mask)
    assert float(counts.ce_weight) == int(counts.valid) == int(mask.sum())
    plain, counted = (criterion(logits, soft, valid_mask=mask, **more) for more in ({}, {"counts": counts}))
    torch.testing.assert_close(counted, plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True])
def test_own_counts_change_nothing(case: Case, mode: str, weighted: bool) -> None:
    logits, target = on(case, *batch(mode))
    criterion = loss_of(case, mode, weighted)
    plain, counted = run(criterion, logits, target), run(criterion, logits, target, counts=criterion.counts(target))
    torch.testing.assert_close(counted.loss, plain.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(counted.grad, plain.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_of_1_change_nothing(case: Case, mode: str, weighted: bool) -> None:
    logits, target = on(case, *batch(mode))
    criterion = loss_of(case, mode, weighted)
    ones = torch.ones(target.shape, device=case.device)
    plain, weighed = run(criterion, logits, target), run(criterion, logits, target, pixel_weight=ones)
    torch.testing.assert_close(weighed.loss, plain.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weighed.grad, plain.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_pixel_weights_multiply_the_maps(case: Case, mode: str, reduction: str) -> None:
    logits, target = on(case, *batch(mode))
    shares = torch.rand(target.shape, generator=rng(5)).to(case.device)
    maps = loss_of(case, mode, reduction="none")(logits, target)
    assert isinstance(maps, Tensor)
    flat = shares.reshape(maps.shape)
    v = (target != VOID).reshape(maps.shape)
    expected = {"none": maps * flat, "sum": (maps * flat).sum(), "mean": (maps * flat).sum() / (flat * v).sum()}
    found = loss_of(case, mode, reduction=reduction)(logits, target, pixel_weight=shares)
    torch.testing.assert_close(found, expected[reduction], rtol=1e-5, atol=1e-6)


def test_cross_entropy_divides_by_class_weight_times_pixel_weight(case: Case) -> None:
    logits, target = on(case, *batch("multiclass"))
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0], device=case.device)
    shares = torch.rand(target.shape, generator=rng(5)).to(case.device)
    criterion = make(case, NUM_CLASSES, weight=weight, lambda_semeda=0.0)
    v = target != VOID
    each = F.cross_entropy(logits, target, weight, ignore_index=VOID, reduction="none") * shares
    divisor = (weight[torch.where(v, target, 0)] * shares)[v].sum()
    torch.testing.assert_close(criterion(logits, target, pixel_weight=shares), each.sum() / divisor)


def test_a_pixel_of_weight_0_is_still_seen_by_its_neighbours(case: Case) -> None:
    logits, target = on(case, *batch("multiclass"))
    target[target == VOID] = 0
    shares = torch.ones(target.shape, device=case.device)
    shares[:, 5, 7] = 0
    criterion = make(case, NUM_CLASSES, reduction="none")
    weighed = criterion(logits, target, pixel_weight=shares)
    assert isinstance(weighed, Tensor)
    assert (weighed[:, 5, 7] == 0).all()
    others = torch.ones_like(target, dtype=torch.bool)
    others[:, 5, 7] = False
    plain, void = criterion(logits, target), criterion(logits, target, valid_mask=others)
    assert torch.equal(weighed[others], plain[others])
    assert not torch.equal(void[others], plain[others])


def test_components_are_weighted(case: Case) -> None:
    logits, target = on(case, *batch("multiclass"))
    shares = torch.rand(target.shape, generator=rng(5)).to(case.device)
    criterion = make(case, NUM_CLASSES)
    found = criterion(logits, target, pixel_weight=shares, return_components=True)
    assert isinstance(found, LossComponents)
    torch.testing.assert_close(found.loss, criterion(logits, target, pixel_weight=shares))
    torch.testing.assert_close(found.loss, criterion.lambda_ce * found.ce + criterion.lambda_semeda * found.semeda)


def test_nothing_valid(case: Case) -> None:
    logits, target = on(case, *batch("multiclass"))
    nothing = torch.full_like(target, VOID)
    criterion = make(case, NUM_CLASSES)
    got = run(criterion, logits, nothing, counts=criterion.counts(nothing))
    assert got.loss == 0
    assert (got.grad == 0).all()
    got = run(criterion, logits, target, pixel_weight=torch.zeros(target.shape, device=case.device))
    assert got.loss == 0
    assert (got.grad == 0).all()


def test_counts_add_up() -> None:
    one, two = LossCounts(torch.tensor(1.5), torch.tensor(2)), LossCounts(torch.tensor(3.0), torch.tensor(4))
    both = one + two
    assert (float(both.ce_weight), int(both.valid)) == (4.5, 6)
    assert sum([one, two]).valid == 6  # type: ignore[union-attr]
    assert one.all_reduce() is one  # alone
    with pytest.raises(TypeError):
        one + 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="'averaged' or 'summed', got 'mean'"):
        one.all_reduce(gradients="mean")


ONE = torch.ones(())
WRONG: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"counts": 5}, {}, TypeError, r"counts must be what criterion.counts\(target\) gives, got int"),
    (
        {"counts": LossCounts(torch.ones(()), torch.ones(()))},
        {"reduction": "sum"},
        ValueError,
        "reduction='sum' is none",
    ),
    ({"pixel_weight": torch.ones(2, 13, 17).long()}, {}, TypeError, "floating-point tensor, one number a pixel"),
    ({"pixel_weight": [1.0]}, {}, TypeError, "got list"),
    ({"pixel_weight": torch.ones(2, 13, 5)}, {}, ValueError, r"pixel_weight must have the shape \[2, 13, 17\]"),
    ({"pixel_weight": torch.ones(2, 13, 17, requires_grad=True)}, {}, ValueError, r"pass .detach\(\)"),
]


@pytest.mark.parametrize(("arguments", "options", "kind", "text"), WRONG)
def test_wrong_arguments(arguments: Any, options: Any, kind: type[Exception], text: str) -> None:
    logits, target = make_inputs()
    with pytest.raises(kind, match=text):
        SemedaLoss(make_proxy(), ignore_index=VOID, **options)(logits, target, **arguments)
    with pytest.raises(kind, match=text):
        semeda_loss(logits, target, make_proxy(), ignore_index=VOID, **options, **arguments)


# --- several outputs


class Output(NamedTuple):
    """As transformers' models return it."""

    logits: Tensor
    aux_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] = ()


def pyramid(count: int = 3) -> list[Tensor]:
    return [2 * torch.randn(2, NUM_CLASSES, 16 >> i, 24 >> i, generator=rng(i)) for i in range(count)]


def labels() -> Tensor:
    target = torch.randint(NUM_CLASSES, (2, 16, 24), generator=rng(9))
    target[:, :3] = VOID
    return target


@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "object", "tensor"])
def test_outputs_are_scaled_and_weighted(case: Case, kind: str) -> None:
    first, *others = on(case, *pyramid(2 if kind == "object" else 3))
    (target,) = on(case, labels())
    outputs: Any
    weights: Any = (1.0, 0.5, 0.25)
    if kind in ("list", "tuple"):
        outputs = [first, *others] if kind == "list" else (first, *others)
    elif kind == "dict":
        outputs = {"out": first, "aux": others[0], "deep": others[1]}
        weights = {"aux": 0.5, "deep": 0.25, "out": 1.0}
    elif kind == "object":
        outputs, weights = Output(first, others[0], (first,)), {"logits": 1.0, "aux_logits": 0.5}
    else:
        outputs, weights, others = first, None, []
    criterion = make(case, NUM_CLASSES)
    found = MultiScaleLoss(criterion, weights)(outputs, target, return_components=True)
    assert isinstance(found, MultiScaleComponents)
    parts = [
        criterion(F.interpolate(each, size=(16, 24), mode="bilinear", align_corners=False), target)
        for each in (first, *others)
    ]
    expected = sum(w * part for w, part in zip((1.0, 0.5, 0.25), parts, strict=False))
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
    losses = [each.loss.detach() for each in found.outputs.values()]
    torch.testing.assert_close(losses, [part.detach() for part in parts], rtol=1e-5, atol=1e-6)
    assert list(found.outputs) == list(named_logits(outputs))
    assert criterion.upsample is None


def test_each_output_gets_its_gradient(case: Case) -> None:
    outputs = [each.requires_grad_() for each in on(case, *pyramid())]
    (target,) = on(case, labels())
    loss = MultiScaleLoss(make(case, NUM_CLASSES), [1.0, 0.0, 0.5])(outputs, target)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert outputs[0].grad is not None
    assert outputs[2].grad is not None
    assert outputs[1].grad is None


def test_a_target_an_output(case: Case) -> None:
    outputs = on(case, *pyramid(2))
    (target,) = on(case, labels())
    small = target[:, ::2, ::2]
    criterion = make(case, NUM_CLASSES)
    found = MultiScaleLoss(criterion)(outputs, [target, small])
    torch.testing.assert_close(found, criterion(outputs[0], target) + criterion(outputs[1], small))


@pytest.mark.parametrize("mode", ["multiclass", "multilabel"])
def test_outputs_of_a_volume(case: Case, mode: str) -> None:
    logits, target = on(case, *(volume() if mode == "multiclass" else planes((2, 3, 4, 11, 14))))
    criterion = make(case, NUM_CLASSES if mode == "multiclass" else 2, mode=mode)
    small = logits[:, :, ::2, ::2, ::2]
    found = MultiScaleLoss(criterion)([logits, small], target)
    large = F.interpolate(small, size=logits.shape[2:], mode="trilinear", align_corners=False)
    torch.testing.assert_close(found, criterion(logits, target) + criterion(large, target), rtol=1e-5, atol=1e-6)


def test_several_outputs_compiled(case: Case) -> None:
    if case.backend == "triton":
        pytest.skip("the interpreter does not run in compiled code")
    outputs = on(case, *pyramid())
    (target,) = on(case, labels())
    criterion = MultiScaleLoss(make(case, NUM_CLASSES), [1.0, 0.5, 0.25])
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(outputs, target), criterion(outputs, target), rtol=1e-5, atol=1e-6)


def test_outputs_that_do_not_fit() -> None:
    criterion, target = SemedaLoss(make_proxy(), ignore_index=VOID), labels()
    with pytest.raises(TypeError, match=r"outputs hold no logits: .*, got dict"):
        MultiScaleLoss(criterion)({"loss": 1.0}, target)
    with pytest.raises(ValueError, match="weights have no 'aux'; the outputs are 'out', 'aux'"):
        MultiScaleLoss(criterion, {"out": 1.0})({"out": pyramid()[0], "aux": pyramid()[1]}, target)
    with pytest.raises(ValueError, match="2 weights for 3 outputs"):
        MultiScaleLoss(criterion, [1.0, 2.0])(pyramid(), target)
    with pytest.raises(ValueError, match="weights must be finite numbers >= 0"):
        MultiScaleLoss(criterion, [-1.0])
    with pytest.raises(ValueError, match="hold one an output, 3, got 2"):
        MultiScaleLoss(criterion)(pyramid(), [target, target])
    with pytest.raises(ValueError, match="each output has the weight 0"):
        MultiScaleLoss(criterion, [0.0] * 3)(pyramid(), target)
    with pytest.raises(TypeError, match="criterion must be a SemedaLoss, got CrossEntropyLoss"):
        MultiScaleLoss(torch.nn.CrossEntropyLoss())  # type: ignore[arg-type]


def test_gradients_of_scaled_outputs(case: Case) -> None:
    """Of logits at half the size, by the loss and by torch."""
    (logits,), (target,) = on(case, pyramid()[1]), on(case, labels())
    criterion = make(case, NUM_CLASSES)
    leaf = logits.clone().requires_grad_()
    loss = criterion.scaled(leaf, target)
    assert isinstance(loss, Tensor)
    loss.backward()
    other = logits.clone().requires_grad_()
    criterion(F.interpolate(other, size=(16, 24), mode="bilinear", align_corners=False), target).backward()
    assert leaf.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(Outcome(loss.detach(), leaf.grad).grad, other.grad, rtol=1e-4, atol=1e-7)
