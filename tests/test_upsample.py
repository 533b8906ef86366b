"""upsample="bilinear": logits smaller than the labels, scaled up inside the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Case
from cpu_budget import Judge, loss_and_grad
from helpers import NUM_CLASSES, VOID, assert_within_budget, make_inputs, make_proxy, value_and_grad
from torch import Tensor

from semeda_fast import EdgeProxy, SemedaLoss
from semeda_fast.backends import reference
from semeda_fast.backends import registry as backends
from semeda_fast.backends.native import native_info, native_module
from semeda_fast.spec import LossSpec

needs_cpu = pytest.mark.skipif(
    "cpu" not in backends.available_names("cpu"), reason="the CPU kernels are not built here"
)
# Of the logits and of the labels: by 4, by a fraction, by so little or so much that torch does it first, from a point.
SIZES = [((4, 6), (16, 24)), ((5, 7), (18, 23)), ((12, 9), (16, 24)), ((16, 20), (9, 11)), ((1, 1), (7, 18))]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Threads and instruction set are of the process: what a test chose must not stay."""
    threads = torch.get_num_threads()
    name = native_module().instruction_set() if native_info().available else None
    yield
    if name:
        assert native_module().use_instruction_set(name)
    torch.set_num_threads(threads)


def make_small(
    size: tuple[int, int], labels: tuple[int, int], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Tensor, Tensor]:
    """Logits [2,C,*size] and labels [2,*labels]."""
    logits, _ = make_inputs(h=size[0], w=size[1], dtype=dtype, **options)
    _, target = make_inputs(h=labels[0], w=labels[1], **options)
    return logits, target


def by_torch(logits: Tensor, target: Tensor) -> Tensor:
    return F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("sizes", SIZES, ids=[f"sizes{i}" for i in range(len(SIZES))])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaled_up_within_the_budget(case: Case, dtype: torch.dtype, layout: str, sizes: Any) -> None:
    logits, target = make_small(*sizes, dtype=dtype, device=case.device)
    if layout == "channels_last":
        logits = logits.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    proxy = make_proxy()
    distance = "l1" if case.backend == "cuda" else "smooth_l1"  # the CUDA kernels compute l1 alone
    options: dict[str, Any] = {"ignore_index": VOID, "upsample": "bilinear", "distance": distance}
    if backends.get(case.backend).half_products and dtype != torch.float32:
        # There torch rounds the large logits to their dtype, as in a script that scales them itself.
        large, options["upsample"] = by_torch(logits.detach(), target).requires_grad_(), None
        loss = SemedaLoss(proxy, backend=case.backend, **options).to(case.device)(large, target)
        loss.backward()
        ours = value_and_grad(
            SemedaLoss(proxy, backend=case.backend, **{**options, "upsample": "bilinear"}).to(case.device),
            logits,
            target,
        )
        torch.testing.assert_close(ours[0], loss.detach(), rtol=0, atol=0)
        return
    assert_within_budget(logits, target, proxy, case.backend, **options)


@needs_cpu
@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize(
    ("dtype", "small", "large"),
    [
        (torch.float16, (16, 20), (30, 38)),
        (torch.bfloat16, (16, 20), (30, 38)),
        (torch.bfloat16, (20, 16), (16, 12)),
        (torch.float16, (8, 8), (32, 32)),
    ],
)
def test_half_precision_with_the_bundled_proxy(
    dtype: torch.dtype, small: tuple[int, int], large: tuple[int, int], distance: str
) -> None:
    """Also where torch scales first: large logits rounded to half precision would cost four times the error."""
    logits, target = make_small(small, large, c=21, dtype=dtype)
    options: dict[str, Any] = {"ignore_index": VOID, "upsample": "bilinear", "distance": distance}
    assert_within_budget(logits, target, EdgeProxy.bundled(21), "cpu", **options)


def test_the_definition_is_torchs_interpolate() -> None:
    logits, target = make_small((5, 7), (18, 23))
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend="reference")
    outside = logits.detach().clone().requires_grad_()
    loss = criterion(by_torch(outside, target), target)
    loss.backward()
    criterion.upsample = "bilinear"
    inside, grad = value_and_grad(criterion, logits, target)
    assert torch.equal(inside, loss.detach())
    assert outside.grad is not None
    assert torch.equal(grad, outside.grad)


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {"reduction": "none"},
    "sum_l2": {"reduction": "sum", "distance": "l2"},
    "l1_weighted": {"distance": "l1", "weight": torch.tensor([0.5, 1.0, 2.0, 1.0, 0.25]), "label_smoothing": 0.1},
    "masked": {"valid_mask": torch.rand(2, 16, 24, generator=torch.Generator().manual_seed(3)) < 0.7},
    "soft": {"soft": True, "reduction": "none"},
    "binary": {"mode": "binary"},
    "binary_soft": {"mode": "binary", "soft": True},
}


@needs_cpu
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "portable"])
def test_options_of_the_cpu_kernels(isa: str, name: str, channels_last: bool) -> None:
    if not native_module().use_instruction_set(isa):
        pytest.skip(f"this processor or build has no {isa}")
    options = dict(OPTIONS[name])
    classes = 2 if "mode" in options else NUM_CLASSES
    logits, target = make_small((4, 7), (16, 24), c=classes)
    logits = logits.detach()[:, : 1 if "mode" in options else classes]
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    if options.pop("soft", False):
        channels = logits.shape[1]
        target = torch.rand(2, channels, 16, 24, generator=torch.Generator().manual_seed(5)).softmax(1)
        target = target * 0.5 if channels == 1 else target
    options |= {"ignore_index": VOID, "upsample": "bilinear"}
    proxy = make_proxy(classes)
    judge = Judge(logits, target, proxy, **options)
    assert judge.decided.any()
    judge.check(loss_and_grad(logits, target, proxy, "cpu", **options), isa)


# Chunks of rows that share rows of the small gradient, strips of columns that share its columns, both.
SHAPES = [
    ((2, 3, 9, 11), (70, 45)),
    ((1, 2, 20, 300), (41, 2100)),
    ((1, 300, 9, 10), (67, 200)),
    ((3, 2, 1, 1), (35, 5)),
]


@needs_cpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_strips_and_threads(shape: Any, dtype: torch.dtype) -> None:
    (n, c, h, w), size = shape
    logits, _ = make_inputs(n=n, c=c, h=h, w=w, dtype=dtype)
    _, target = make_inputs(n=n, c=c, h=size[0], w=size[1], num_labels=min(c, 255))
    proxy, options = make_proxy(c), {"ignore_index": VOID, "upsample": "bilinear", "distance": "l2"}
    torch.set_num_threads(1)
    alone = loss_and_grad(logits, target, proxy, "cpu", **options)
    Judge(logits, target, proxy, **options).check(alone)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        other = loss_and_grad(logits, target, proxy, "cpu", **options)
        assert torch.equal(other.loss, alone.loss), threads
        assert torch.equal(other.grad, alone.grad), threads


@needs_cpu
@pytest.mark.parametrize(
    ("size", "who"), [((8, 12), "kernels"), ((9, 12), "torch"), ((32, 48), "torch"), ((16, 24), "")]
)
def test_who_scales(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], who: str) -> None:
    """To twice the size and more the kernels do it, and nothing of the large size is kept."""
    calls = []

    def watched(logits: Tensor, size: Any) -> Tensor:
        calls.append(tuple(size))
        return F.interpolate(logits, size=list(size), mode="bilinear", align_corners=False)

    monkeypatch.setattr(reference, "upsampled", watched)
    logits, target = make_small(size, (16, 24))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = SemedaLoss(make_proxy(), ignore_index=VOID, backend="cpu", upsample="bilinear")(logits, target)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape
    assert calls == ([(16, 24)] if who == "torch" else [])
    if who == "kernels":
        assert logits.shape in [x.shape for x in kept]
        assert all(x.shape != (2, NUM_CLASSES, 16, 24) for x in kept)


def test_void_reaches_nothing(case: Case) -> None:
    """A logit that void pixels alone are made of may be NaN, and has no gradient; the others are as without it."""
    logits, target = make_small((4, 6), (16, 24), device=case.device, void=0.0)
    target[:, :, 12:] = VOID  # columns 4 and 5 of the logits are read from column 14 on alone
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=case.backend, upsample="bilinear").to(case.device)
    loss, grad = value_and_grad(criterion, logits, target)
    poisoned = logits.detach().clone()
    poisoned[..., 4:] = torch.nan
    poisoned_loss, poisoned_grad = value_and_grad(criterion, poisoned.requires_grad_(), target)
    assert torch.equal(loss, poisoned_loss)
    # On a GPU torch adds the gradient of its scaling up with atomics, in no fixed order.
    slack = {"rtol": 1e-5, "atol": 1e-8} if case.device != "cpu" else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(poisoned_grad, grad, **slack)
    assert not grad[..., 4:].any()
    assert grad[..., :3].all()
    empty_loss, empty_grad = value_and_grad(criterion, logits, torch.full_like(target, VOID))
    assert empty_loss == 0
    assert not empty_grad.any()


@pytest.mark.parametrize("validate", ["auto", "always", "never"])
def test_values_are_checked_at_the_labels_size(validate: str) -> None:
    logits, target = make_small((4, 6), (16, 24))
    target[1, 9, 3] = 77
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, upsample="bilinear", validate=validate)
    if validate == "never":
        assert criterion(logits, target).isnan()
        return
    with pytest.raises(ValueError, match=r"77 \(1 pixels\); the first at \[n=1, y=9, x=3\]"):
        criterion(logits, target)
    target[1, 9, 3] = 0
    if validate == "always":
        with torch.no_grad():
            logits[0, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"NaN or \+inf values"):
            criterion(logits, target)


def test_an_empty_batch(case: Case) -> None:
    logits = torch.zeros(0, NUM_CLASSES, 4, 6, device=case.device, requires_grad=True)
    target = torch.zeros(0, 16, 24, dtype=torch.int64, device=case.device)
    criterion = SemedaLoss(make_proxy(), backend=case.backend, upsample="bilinear").to(case.device)
    loss, grad = value_and_grad(criterion, logits, target)
    assert loss == 0
    assert grad.shape == logits.shape


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_compiled(backend: str) -> None:
    """Whole graphs, for sizes that change; a map, whose shape the compiler takes from the labels.

    Of the reference the graphs alone: its C++ is torch's, and takes a minute.
    """
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend=backend, upsample="bilinear", reduction="none")
    compiler = "aot_eager" if backend == "reference" else "inductor"
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=compiler)
    for size, labels in (((4, 6), (16, 24)), ((5, 7), (20, 28)), ((3, 9), (19, 37))):
        logits, target = make_small(size, labels)
        for mine, eager in zip(
            value_and_grad(compiled, logits, target), value_and_grad(criterion, logits, target), strict=True
        ):
            torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-6)


@needs_cpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str) -> None:
    logits, target = make_small((4, 6), (16, 24))
    proxy = make_proxy()
    ones, scales = (1, 1, 1), (1.0, 2.0, 3.0)
    options: dict[str, Any] = {"ignore_index": VOID, "label_smoothing": 0.1, "upsample": "bilinear", "backend": "cpu"}
    spec = LossSpec(scales, scales, ones, ones, (0, 0, 0), reduction=reduction, **options)
    arguments = (logits, target, None, None, proxy.weights, proxy.biases, *spec.arguments())
    results = torch.library.opcheck(torch.ops.semeda_fast.loss_terms.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@needs_cpu
def test_function_transforms() -> None:
    logits, target = make_small((4, 6), (16, 24))
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, backend="cpu", upsample="bilinear")
    _, grad = value_and_grad(criterion, logits, target)
    assert torch.equal(torch.func.grad(lambda z: criterion(z, target))(logits.detach()), grad)


def test_bad_arguments() -> None:
    logits, target = make_small((4, 6), (16, 24))
    with pytest.raises(ValueError, match=r"upsample must be None or 'bilinear', got 'nearest'"):
        SemedaLoss(make_proxy(), upsample="nearest")
    with pytest.raises(ValueError, match=r"got \[2, 16, 24\]; pass upsample='bilinear'"):
        SemedaLoss(make_proxy(), ignore_index=VOID)(logits, target)
    criterion = SemedaLoss(make_proxy(), ignore_index=VOID, upsample="bilinear")
    with pytest.raises(ValueError, match=r"labels must have the shape \[2,16,24\]"):
        criterion(logits, target[:1])
    with pytest.raises(ValueError, match="target must have H and W of at least 1"):
        criterion(logits, target[:, :0])
    with pytest.raises(ValueError, match=r"valid_mask must have the shape \[2,16,24\]"):
        criterion(logits, target, valid_mask=torch.ones(2, 4, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"distribution of shape \[2,5,16,24\], got \[2, 4, 16, 24\]"):
        criterion(logits, torch.rand(2, 4, 16, 24))
