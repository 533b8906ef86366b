"""Volumes, overlapping classes and labels with a channel equal the batch of images that they are folded to."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import Case
from helpers import NUM_CLASSES, VOID, make_proxy
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from semeda_fast import SemedaLoss, semeda_loss
from semeda_fast.backends import registry as backends
from semeda_fast.folding import Call, folded
from semeda_fast.options import LossOptions

N, C, D, H, W = 2, 3, 4, 11, 14


def rng(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def planes(dims: tuple[int, ...], soft: bool = False, void: bool = True, number: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and a target of overlapping classes."""
    logits = 2 * torch.randn(dims, generator=rng(number))
    target: Tensor = torch.rand(dims, generator=rng(number + 1))
    if not soft:
        target = (target < 0.4).long()
    if void:
        target[torch.rand(dims, generator=rng(number + 2)) < 0.1] = VOID
    return logits, target


def volume(number: int = 0) -> tuple[Tensor, Tensor]:
    logits = 2 * torch.randn(N, NUM_CLASSES, D, H, W, generator=rng(number))
    target = torch.randint(NUM_CLASSES, (N, D, H, W), generator=rng(number + 1))
    target[:, :, :2] = VOID
    return logits, target


def on(case: Case, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(case.device) for tensor in tensors]


class Outcome(NamedTuple):
    loss: Tensor
    grad: Tensor


def run(criterion: SemedaLoss, logits: Tensor, target: Tensor, **options: Any) -> Outcome:
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = criterion(leaf, target, **options)
    assert isinstance(loss, Tensor)
    loss.sum().backward()
    assert leaf.grad is not None
    return Outcome(loss.detach(), leaf.grad)


def same(got: Outcome, loss: Tensor, grad: Tensor) -> None:
    """The same kernels on the same images: equal but for the order in which images are added up."""
    torch.testing.assert_close(got.loss, loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got.grad, grad, rtol=1e-5, atol=1e-8)


def make(case: Case, classes: int = 2, **options: Any) -> SemedaLoss:
    options = {"ignore_index": VOID, "backend": case.backend, **options}
    return SemedaLoss(make_proxy(classes), **options).to(case.device)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("masked", [None, "pixels", "entries"])
def test_overlapping_classes_are_binary_planes(case: Case, soft: bool, masked: str | None) -> None:
    logits, target = on(case, *planes((N, C, H, W), soft))
    options, folded = {}, {}
    if masked is not None:
        shape = (N, H, W) if masked == "pixels" else (N, C, H, W)
        mask = (torch.rand(shape, generator=rng(9)) < 0.8).to(case.device)
        options["valid_mask"] = mask
        whole = mask if masked == "entries" else mask.unsqueeze(1).expand(N, C, H, W)
        folded["valid_mask"] = whole.reshape(-1, H, W)
    got = run(make(case, mode="multilabel"), logits, target, **options)
    images = target.reshape(-1, 1, H, W) if soft else target.reshape(-1, H, W)
    expected = run(make(case, mode="binary"), logits.reshape(-1, 1, H, W), images, **folded)
    same(got, expected.loss, expected.grad.view(logits.shape))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_planes_are_those_of_binary_cross_entropy(case: Case, soft: bool, smoothing: float) -> None:
    logits, target = on(case, *planes((N, C, H, W), soft))
    weight, pos_weight = on(case, torch.tensor([0.5, 1.0, 3.0]), torch.tensor([2.0, 0.25, 5.0]))
    options = {"mode": "multilabel", "weight": weight, "pos_weight": pos_weight, "label_smoothing": smoothing}
    got = run(make(case, lambda_semeda=0.0, **options), logits, target)
    leaf = logits.clone().requires_grad_()
    v = target != VOID
    goal = torch.where(v, target, 0).float() * (1 - smoothing) + smoothing / 2
    each = F.binary_cross_entropy_with_logits(
        leaf, goal, weight[:, None, None].expand_as(leaf), pos_weight=pos_weight[:, None, None], reduction="none"
    )
    loss = (each * v).sum() / v.sum()
    loss.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.grad, leaf.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("soft", [False, True])
def test_pos_weight_in_binary_mode(case: Case, soft: bool) -> None:
    logits, target = on(case, *planes((N, 1, H, W), soft))
    got = run(make(case, mode="binary", pos_weight=[3.0], lambda_semeda=0.0), logits, target)
    leaf = logits.clone().requires_grad_()
    v = target != VOID
    each = F.binary_cross_entropy_with_logits(
        leaf, torch.where(v, target, 0).float(), pos_weight=torch.tensor([3.0], device=leaf.device), reduction="none"
    )
    loss = (each * v).sum() / v.sum()
    loss.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(got.loss, loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.grad, leaf.grad, rtol=1e-4, atol=1e-7)


def test_pos_weight_beside_class_weights(case: Case) -> None:
    """The mean divides by the class weights of the labels, as without pos_weight."""
    logits, target = on(case, *planes((N, 1, H, W)))
    options: dict[str, Any] = {"mode": "binary", "weight": [0.5, 2.0], "lambda_semeda": 0.0}
    got = make(case, pos_weight=[3.0], **options)(logits, target)
    v = target.squeeze(1) != VOID
    maps = make(case, reduction="none", **options)(logits, target)
    positive = (target.squeeze(1) == 1) & v
    divisor = torch.where(positive, 2.0, 0.5)[v].sum()
    torch.testing.assert_close(got, torch.where(positive, 3 * maps, maps).sum() / divisor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slice_dim", [2, 3, 4])
@pytest.mark.parametrize("kind", ["labels", "a channel", "soft", "weights", "channels_last_3d"])
def test_a_volume_is_its_slices(case: Case, slice_dim: int, kind: str) -> None:
    logits, target = on(case, *volume())
    options: dict[str, Any] = {"weight": [1.0, 2.0, 0.5, 1.0, 3.0]} if kind == "weights" else {}
    given = target
    images = target.movedim(slice_dim - 1, 1).flatten(0, 1)
    if kind == "a channel":
        given = target.unsqueeze(1)
    elif kind == "soft":
        given = torch.softmax(torch.randn(logits.shape, generator=rng(5)), dim=1).to(case.device)
        images = given.movedim(slice_dim, 1).flatten(0, 1)
    elif kind == "channels_last_3d":
        logits = logits.to(memory_format=torch.channels_last_3d)
    criterion = make(case, NUM_CLASSES, slice_dim=slice_dim, **options)
    got = run(criterion, logits, given)
    assert got.grad.stride() == logits.stride()
    expected = run(criterion, logits.movedim(slice_dim, 1).flatten(0, 1).contiguous(), images)
    back = expected.grad.unflatten(0, (N, -1)).movedim(1, slice_dim)
    same(got, expected.loss, back)


@pytest.mark.parametrize("slice_dim", [2, 4])
def test_planes_of_a_volume(case: Case, slice_dim: int) -> None:
    logits, target = on(case, *planes((N, C, D, H, W)))
    mask = (torch.rand((N, D, H, W), generator=rng(3)) < 0.8).to(case.device)
    weight = [0.5, 1.0, 3.0]
    criterion = make(case, mode="multilabel", slice_dim=slice_dim, weight=weight)
    got = run(criterion, logits, target, valid_mask=mask)
    alike = make(case, mode="multilabel", weight=weight)
    batch = [x.movedim(slice_dim, 1).flatten(0, 1) for x in (logits, target)]
    expected = run(alike, *batch, valid_mask=mask.movedim(slice_dim - 1, 1).flatten(0, 1))
    same(got, expected.loss, expected.grad.unflatten(0, (N, -1)).movedim(1, slice_dim))


LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slice_dim", [2, 3, 4])
def test_a_fold_copies_nothing(layout: str, slice_dim: int) -> None:
    """Of a volume; planes of a volume in channels_last_3d alone are copied (docs/how/shapes.md)."""
    logits, target = volume()
    options = LossOptions(slice_dim=slice_dim, distance="l1")
    mask = torch.ones(N, D, H, W, dtype=torch.bool)
    given = Call(logits.contiguous(memory_format=LAYOUTS[layout]), target, mask, None, None, None)
    call, _, shape = folded(given, options)
    assert shape == (N, D, H, W)
    for before, after in ((given.logits, call.logits), (target, call.target), (mask, call.valid)):
        assert after is not None
        assert after.data_ptr() == before.data_ptr()


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("soft", [False, True])
def test_planes_are_not_copied(order: torch.memory_format, soft: bool) -> None:
    logits, target = (x.contiguous(memory_format=order) for x in planes((N, C, H, W), soft))
    mask = torch.ones(N, H, W, dtype=torch.bool)
    call, options, _ = folded(Call(logits, target, mask, None, None, None), LossOptions(mode="multilabel"))
    assert options.mode == "binary"
    assert call.valid is not None
    assert call.logits.data_ptr() == logits.data_ptr()
    assert call.target.data_ptr() == target.data_ptr()
    assert call.valid.data_ptr() == mask.data_ptr()


def test_labels_with_a_channel(case: Case) -> None:
    logits, target = on(case, *volume())
    logits, target = logits[:, :, 0], target[:, 0]
    criterion = make(case, NUM_CLASSES)
    assert torch.equal(criterion(logits, target.unsqueeze(1)), criterion(logits, target))


@pytest.mark.parametrize("mode", ["multiclass", "multilabel"])
@pytest.mark.parametrize("slice_dim", [2, 3, 4])
def test_maps_have_the_targets_shape(case: Case, mode: str, slice_dim: int) -> None:
    many = mode == "multilabel"
    logits, target = on(case, *(planes((N, C, D, H, W)) if many else volume()))
    criterion = make(case, 2 if many else NUM_CLASSES, mode=mode, slice_dim=slice_dim, reduction="none")
    maps = criterion(logits, target)
    assert maps.shape == target.shape
    assert (maps[target == VOID] == 0).all()
    criterion.reduction = "sum"
    torch.testing.assert_close(maps.sum(), criterion(logits, target), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", ["multiclass", "multilabel"])
def test_small_logits_of_a_volume(case: Case, mode: str) -> None:
    many = mode == "multilabel"
    logits, target = on(case, *(planes((N, C, D, 12, 16)) if many else volume()))
    logits = logits[..., :4, :5]
    criterion = make(case, 2 if many else NUM_CLASSES, mode=mode, upsample="bilinear")
    large = F.interpolate(logits.transpose(1, 2).flatten(0, 1), size=target.shape[-2:], mode="bilinear")
    large = large.unflatten(0, (N, D)).transpose(1, 2)
    criterion_of_large = make(case, 2 if many else NUM_CLASSES, mode=mode)
    torch.testing.assert_close(criterion(logits, target), criterion_of_large(large, target), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"slice|upsample"):
        criterion(logits[:, :, :2], target)


def test_values_at_void_entries_reach_nothing(case: Case) -> None:
    logits, target = on(case, *planes((N, C, H, W)))
    criterion = make(case, mode="multilabel")
    expected = run(criterion, logits, target)
    got = run(criterion, torch.where(target == VOID, torch.nan, logits), target)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.grad, expected.grad)


def test_empty(case: Case) -> None:
    logits, target = on(case, *planes((N, C, H, W)))
    nothing = torch.full_like(target, VOID)
    assert make(case, mode="multilabel")(logits, nothing) == 0
    assert make(case, mode="multilabel", empty="nan")(logits, nothing).isnan()
    assert make(case, mode="multilabel")(logits[:0], nothing[:0]) == 0


@pytest.mark.parametrize("kind", ["planes", "volume"])
def test_compiled_and_under_autocast(case: Case, kind: str) -> None:
    if case.backend == "triton":
        pytest.skip("the interpreter does not run in compiled code")
    many = kind == "planes"
    logits, target = on(case, *(planes((N, C, H, W)) if many else volume()))
    criterion = make(case, 2 if many else NUM_CLASSES, mode="multilabel" if many else "multiclass")
    expected = run(criterion, logits, target)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    leaf = logits.clone().requires_grad_()
    loss = compiled(leaf, target)
    loss.backward()
    assert leaf.grad is not None
    same(Outcome(loss.detach(), leaf.grad), expected.loss, expected.grad)
    with torch.autocast(case.device, torch.bfloat16):
        got = criterion(logits.bfloat16(), target)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected.loss, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["planes", "volume"])
def test_traced_exported_and_compiled_for_any_size(case: Case, kind: str) -> None:
    if case.backend == "triton":
        pytest.skip("the interpreter does not run in compiled code")
    many = kind == "planes"
    logits, target = on(case, *(planes((N, C, H, W)) if many else volume()))
    options: dict[str, Any] = {"mode": "multilabel", "weight": [0.5, 1.0, 3.0]} if many else {}
    criterion = make(case, 2 if many else NUM_CLASSES, **options)
    expected = criterion(logits, target)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Converting a tensor")
        traced = torch.jit.trace(criterion, (logits.clone().requires_grad_(), target))
    torch.testing.assert_close(traced(logits, target), expected)
    exported = torch.export.export(criterion, (logits, target)).run_decompositions().module()
    torch.testing.assert_close(exported(logits, target), expected)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), expected)
    small = [x[..., :-2, :-3] for x in (logits, target)]
    torch.testing.assert_close(compiled(*small), criterion(*small))


WRONG: list[tuple[dict[str, Any], tuple[int, ...], Any, str]] = [
    ({"mode": "multilabel"}, (N, C, H, W), torch.zeros(N, H, W).long(), r"shape of the logits.*one_hot\(target.long"),
    ({"mode": "multilabel"}, (N, C, H, W), torch.zeros(N, C, H, 2 * W).long(), "pass upsample='bilinear'"),
    ({"mode": "multilabel"}, (C, H, W), torch.zeros(C, H, W).long(), r"\[N,C,H,W\] or \[N,C,D,H,W\], got"),
    ({"mode": "multilabel", "num_classes": 4}, (N, C, H, W), torch.zeros(N, C, H, W).long(), "num_classes=3"),
    ({}, (N, NUM_CLASSES, D, H, W), torch.zeros(N, H, W).long(), rf"must have the shape \[{N},{D},{H},{W}\], got"),
    ({}, (N, NUM_CLASSES, D, H, W), torch.zeros(N, D, H, 2 * W).long(), r"torch.nn.functional.interpolate\(logits"),
    ({}, (N, NUM_CLASSES, D, H, W), torch.zeros(N, C, D, H, W), rf"shape \[{N},{NUM_CLASSES},{D},{H},{W}\]"),
]


@pytest.mark.parametrize(("options", "shape", "target", "text"), WRONG)
def test_shapes_that_do_not_fit(options: dict[str, Any], shape: tuple[int, ...], target: Tensor, text: str) -> None:
    classes = 2 if "mode" in options else NUM_CLASSES
    with pytest.raises(ValueError, match=text):
        SemedaLoss(make_proxy(classes), **options)(torch.zeros(shape), target)


def test_other_wrong_arguments() -> None:
    logits, target = planes((N, C, H, W))
    many = SemedaLoss(mode="multilabel", ignore_index=VOID)
    with pytest.raises(ValueError, match=r"weight must hold one number a class, shape \[3\], got shape \[2\]"):
        semeda_loss(logits, target, many.proxy, mode="multilabel", weight=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"pos_weight must hold one number a class, shape \[4\]"):
        SemedaLoss(mode="multilabel", num_classes=4, pos_weight=[1.0, 2.0])
    with pytest.raises(ValueError, match="pos_weight is for mode='binary' and mode='multilabel'"):
        SemedaLoss(num_classes=3, pos_weight=[1.0])
    with pytest.raises(ValueError, match="pos_weight holds one number"):
        SemedaLoss(mode="binary", pos_weight=[1.0, 2.0])
    with pytest.raises(ValueError, match="slice_dim must be 2, 3 or 4"):
        SemedaLoss(num_classes=3, slice_dim=1)
    with pytest.raises(ValueError, match=r"valid_mask must have the shape \[2, 3, 11, 14\]"):
        many(logits, target, valid_mask=torch.ones(N, H, 2, dtype=torch.bool))


def test_the_bundled_proxy_serves_any_number_of_planes() -> None:
    assert SemedaLoss(mode="multilabel", num_classes=70).proxy.num_classes == 2
    assert SemedaLoss(mode="multilabel").proxy.num_classes == 2


def test_labels_that_are_neither_0_nor_1(case: Case) -> None:
    logits, target = on(case, *planes((N, C, H, W)))
    target[1, 2, 3, 4] = 7
    with pytest.raises(ValueError, match=r"labels|7"):
        make(case, mode="multilabel")(logits, target)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_random_configurations(backend: str) -> None:
    """Each equals its fold: 100 of them a backend."""
    if backend not in backends.available_names("cpu"):
        pytest.skip("the CPU kernels are not built here")

    @seed(0)
    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def one(data: st.DataObject) -> None:
        def draw(low: int, high: int) -> int:
            return data.draw(st.integers(low, high))

        many, deep = data.draw(st.booleans()), data.draw(st.booleans())
        n, c, sizes = draw(1, 3), draw(1, 4), [draw(1, 9) for _ in range(3 if deep else 2)]
        if not (many or deep):
            return
        number, dim = draw(0, 1000), draw(2, 4)
        order = data.draw(st.permutations(range(2 + len(sizes))))  # of memory
        options: dict[str, Any] = {
            "ignore_index": VOID,
            "backend": backend,
            "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
            "distance": data.draw(st.sampled_from(["l1", "l2"])),
            "label_smoothing": data.draw(st.sampled_from([0.0, 0.1])),
        }
        if many:
            logits, target = planes((n, c, *sizes), data.draw(st.booleans()), True, number)
            criterion = SemedaLoss(make_proxy(2), mode="multilabel", slice_dim=dim, **options)
            fold = SemedaLoss(make_proxy(2), mode="binary", **options)
            both = [x.movedim(dim, 2) if deep else x for x in (logits, target)]
            images = [x.reshape(-1, 1, *_of_slice(sizes, dim)) for x in both]
        else:
            c += 1
            logits = torch.randn((n, c, *sizes), generator=rng(number))
            target = torch.randint(c, (n, *sizes), generator=rng(number + 1))
            criterion = SemedaLoss(make_proxy(c), slice_dim=dim, **options)
            fold = SemedaLoss(make_proxy(c), **options)
            images = [logits.movedim(dim, 1).flatten(0, 1), target.movedim(dim - 1, 1).flatten(0, 1)]
        laid = logits.permute(order).contiguous().permute([order.index(i) for i in range(logits.dim())])
        got, expected = run(criterion, laid, target), run(fold, *images)
        torch.testing.assert_close(got.loss.sum(), expected.loss.sum(), rtol=1e-5, atol=1e-5)
        lead = 2 if many else 1
        back = expected.grad
        if many:
            moved = [n, c, *sizes]
            if deep:
                moved.insert(2, moved.pop(dim))
            back = back.reshape(moved).movedim(2, dim) if deep else back.reshape(moved)
        else:
            back = back.unflatten(0, (n, -1)).movedim(lead, dim)
        torch.testing.assert_close(got.grad, back, rtol=1e-4, atol=1e-6)

    one()


def _of_slice(sizes: list[int], dim: int) -> list[int]:
    return [size for i, size in enumerate(sizes) if len(sizes) == 2 or i != dim - 2]
