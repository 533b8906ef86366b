"""Half precision, autocast, memory layouts and label widths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import Case
from helpers import NUM_CLASSES, VOID, assert_within_budget, make_inputs, make_proxy, relative_error, value_and_grad

from semeda_fast import SemedaLoss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("tap", ["pre", "post"])
@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1"])
def test_error_budget(case: Case, dtype: torch.dtype, tap: str, distance: str) -> None:
    logits, target = make_inputs(dtype=dtype, device=case.device)
    if dtype == torch.float64 and case.backend != "reference":
        with pytest.raises(ValueError, match="float64; use backend='auto' or 'reference'"):
            SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)(logits, target)
        return
    assert_within_budget(
        logits,
        target,
        make_proxy(tap=tap, distance=distance),
        case.backend,
        ignore_index=VOID,
        label_smoothing=0.1,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_at_512(case: Case, dtype: torch.dtype) -> None:
    """Where a sum over 2^18 pixels in fp16 would overflow, and a gradient of 1/2^18 would underflow before scaling."""
    logits, target = make_inputs(n=1, c=3, h=512, w=520, dtype=dtype, device=case.device)
    logits = (20 * logits.detach()).requires_grad_()
    criterion = SemedaLoss(make_proxy(3), ignore_index=VOID, backend=case.backend).to(case.device)
    loss, grad = value_and_grad(criterion, logits, target)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert grad.dtype == dtype
    assert torch.isfinite(grad).all()
    summed = SemedaLoss(make_proxy(3), ignore_index=VOID, backend=case.backend, reduction="sum").to(case.device)
    total, total_grad = value_and_grad(summed, logits, target)
    assert total > 65504  # beyond fp16
    assert torch.isfinite(total)
    assert torch.isfinite(total_grad).all()
    assert total_grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_is_fp32(case: Case, dtype: torch.dtype) -> None:
    logits, target = make_inputs(dtype=dtype, device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    result = criterion(logits, target, return_components=True)
    assert {result.loss.dtype, result.ce.dtype, result.semeda.dtype, result.per_layer.dtype} == {torch.float32}
    assert result.valid_count.dtype == torch.int64


def test_autocast_changes_nothing_inside(case: Case) -> None:
    logits, target = make_inputs(device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    loss, grad = value_and_grad(criterion, logits, target)
    with torch.autocast(case.device, dtype=torch.bfloat16):
        loss_auto, grad_auto = value_and_grad(criterion, logits, target)
    assert torch.equal(loss, loss_auto)
    assert torch.equal(grad, grad_auto)


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: F.pad(x, (2, 1, 1, 3))[:, :, 1:-3, 2:-1],
    "every_other_column": lambda x: torch.stack([x, x + 9], dim=-1).flatten(-2)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "hwnc": lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(case: Case, layout: str, dtype: torch.dtype) -> None:
    logits, target = make_inputs(dtype=dtype, device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    loss, grad = value_and_grad(criterion, logits, target)
    other = LAYOUTS[layout](logits.detach()).requires_grad_()
    assert torch.equal(other, logits)
    assert other.stride() != logits.stride()
    other_loss = criterion(other, target)
    torch.testing.assert_close(other_loss.detach(), loss, rtol=1e-6, atol=0)
    (other_grad,) = torch.autograd.grad(other_loss, other)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(other_grad, grad, rtol=tolerance, atol=1e-7)
    if layout in ("channels_last", "hwnc", "transposed"):  # dense: the gradient takes the same strides
        leaf = other.detach().requires_grad_()
        criterion(leaf, target).backward()
        assert leaf.grad is not None
        assert leaf.grad.stride() == other.stride()


def test_expanded_logits_and_labels(case: Case) -> None:
    """Strides of 0: one image against a batch, and one label map for all."""
    logits, target = make_inputs(n=1, device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    loss, grad = value_and_grad(criterion, logits, target)
    leaf = logits.detach().clone().requires_grad_()
    expanded = criterion(leaf.expand(3, -1, -1, -1), target.expand(3, -1, -1))
    expanded.backward()
    torch.testing.assert_close(expanded.detach(), loss, rtol=1e-6, atol=0)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("labels", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_label_widths_agree(case: Case, labels: torch.dtype) -> None:
    logits, target = make_inputs(device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    loss, grad = value_and_grad(criterion, logits, target)
    narrow_loss, narrow_grad = value_and_grad(criterion, logits, target.to(labels))
    assert torch.equal(loss, narrow_loss)
    assert torch.equal(grad, narrow_grad)


@pytest.mark.parametrize("void", [65535, 40000])
def test_the_upper_half_of_uint16(case: Case, void: int) -> None:
    """Read as int16 these would be negative, and -1 or another label."""
    logits, target = make_inputs(device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    expected = value_and_grad(criterion, logits, target)
    wide = torch.where(target == VOID, void, target).to(torch.uint16)
    other = SemedaLoss(make_proxy(), ignore_index=void, backend=case.backend).to(case.device)
    for found in (value_and_grad(other, logits, wide), value_and_grad(other, logits, wide.mT.contiguous().mT)):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    unknown = SemedaLoss(make_proxy(), ignore_index=void - 65536, backend=case.backend).to(case.device)
    if case.device == "cpu":
        with pytest.raises(ValueError, match=f"from {void} to {void}"):
            unknown(logits, wide)
    silent = SemedaLoss(make_proxy(), ignore_index=void - 65536, validate="never", backend=case.backend).to(case.device)
    assert silent(logits, wide).isnan()


def test_strided_labels(case: Case) -> None:
    logits, target = make_inputs(device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend).to(case.device)
    loss, _ = value_and_grad(criterion, logits, target)
    wide = torch.stack([target, torch.full_like(target, 99)], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(value_and_grad(criterion, logits, wide)[0], loss)


def test_an_ignore_index_that_the_labels_cannot_hold(case: Case) -> None:
    """-100 wraps to 156 in uint8: class 156 must still count, and 256 classes must not wrap to 0."""
    num_classes = 256
    logits = torch.randn(1, num_classes, 3, 4, device=case.device)
    target = torch.full((1, 3, 4), 156, dtype=torch.uint8, device=case.device)
    criterion = SemedaLoss(make_proxy(num_classes), backend=case.backend, lambda_semeda=0.0).to(case.device)
    result = criterion(logits, target, return_components=True)
    assert int(result.valid_count) == 12
    torch.testing.assert_close(result.ce, F.cross_entropy(logits, target.long()), rtol=1e-6, atol=0)


def test_ignore_index_may_be_a_class(case: Case) -> None:
    logits, target = make_inputs(void=0.0, device=case.device)
    criterion = SemedaLoss(make_proxy(), ignore_index=2, backend=case.backend, lambda_semeda=0.0).to(case.device)
    theirs = F.cross_entropy(logits, target, ignore_index=2)
    torch.testing.assert_close(criterion(logits, target), theirs, rtol=1e-6, atol=0)
    assert (target == 2).any()


@pytest.mark.parametrize(
    ("n", "h", "w"),
    [(1, 1, 1), (3, 1, 7), (2, 5, 1), (1, 2, 3), (2, 6, 6), (1, 7, 7), (1, 31, 37), (1, 101, 3)],
)
def test_sizes(case: Case, n: int, h: int, w: int) -> None:
    """Single pixels, smaller than the 7x7 receptive field, primes."""
    logits, target = make_inputs(n=n, h=h, w=w, void=0.1, device=case.device)
    assert_within_budget(logits, target, make_proxy(), case.backend, ignore_index=VOID)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 19, 21, 64, 150, 256])
def test_class_counts(case: Case, num_classes: int) -> None:
    classes = max(num_classes, 2)  # one channel is binary, its labels are 0 and 1
    labels = min(classes, 255)  # VOID is 255
    logits, target = make_inputs(n=1, c=num_classes, h=9, w=10, num_labels=labels, device=case.device)
    mode = "binary" if num_classes == 1 else "multiclass"
    assert_within_budget(logits, target, make_proxy(classes), case.backend, ignore_index=VOID, mode=mode)


def test_one_channel_is_binary(case: Case) -> None:
    logits, target = make_inputs(c=1, num_labels=2, device=case.device)
    assert_within_budget(logits, target, make_proxy(2), case.backend, ignore_index=VOID, mode="binary")


def test_soft_targets_within_the_budget(case: Case) -> None:
    logits, target = make_inputs(device=case.device)
    q = torch.softmax(torch.randn(logits.shape), dim=1).to(case.device)
    assert_within_budget(logits, q, make_proxy(), case.backend, valid_mask=target != VOID, label_smoothing=0.1)
    assert q.shape[1] == NUM_CLASSES


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_soft_targets_of_other_widths(case: Case, dtype: torch.dtype) -> None:
    logits, _ = make_inputs(device=case.device)
    target = make_inputs(device=case.device, seed=3)[0].detach().softmax(1).to(dtype)
    criterion = SemedaLoss(make_proxy(), backend=case.backend).to(case.device)
    found = criterion(logits, target)
    criterion.validate = "never"  # a float32 target that sums to 1 as roughly as a float8 one would be refused
    torch.testing.assert_close(found, criterion(logits, target.float()), rtol=1e-5, atol=0)


def test_void_in_one_channel_targets_of_floats(case: Case) -> None:
    """As pipelines for BCEWithLogitsLoss have it: 0.0, 1.0 and 255.0."""
    logits, target = make_inputs(c=1, num_labels=2, device=case.device)
    criterion = SemedaLoss(make_proxy(2), mode="binary", ignore_index=VOID, backend=case.backend).to(case.device)
    expected, gradient = value_and_grad(criterion, logits, target)
    floats = target.unsqueeze(1).float()
    found, found_gradient = value_and_grad(criterion, logits, floats)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert relative_error(found_gradient, gradient) < 1e-3  # a few signs at rounding level
    rows = torch.zeros_like(target, dtype=torch.bool)
    rows[:, 2:9] = True
    masked = criterion(logits, floats, valid_mask=rows)
    torch.testing.assert_close(masked, criterion(logits, target, valid_mask=rows), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="valid_mask must have the shape"):
        criterion(logits, floats, valid_mask=rows[:1])
    with pytest.raises(TypeError, match="valid_mask must be a bool"):
        criterion(logits, floats, valid_mask=rows.long())
