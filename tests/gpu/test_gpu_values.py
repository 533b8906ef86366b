"""Values and gradients on a GPU: the error budget against float64, large maps, memory, and nobody else's memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_cases import (
    FUSED,
    assert_budget,
    criterion,
    each_backend,
    each_fused_backend,
    exact_cudnn,
    free_bytes,
    same_bits,
    step,
)
from helpers import VOID, make_inputs, make_proxy, relative_error
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from semeda_fast import EdgeProxy, SemedaLoss

__all__ = ["exact_cudnn"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N, C, H, W: below a tile, odd, a tile and a bit, several tiles.
SIZES = ((1, 21, 5, 7), (2, 19, 65, 67), (2, 21, 128, 130), (1, 150, 96, 97))
PROXIES: dict[str, dict[str, Any]] = {
    "default": {},
    "wide": {"widths": (32, 64), "edge_classes": 64},
    "deep": {"widths": (16, 32, 32, 32, 32, 32), "edge_classes": 16},
    "two layers": {"widths": (8,), "edge_classes": 4},
    "odd": {"widths": (7, 19), "edge_classes": 3, "kernel_size": 5},
}


def in_layout(logits: Tensor, layout: str) -> Tensor:
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return logits.detach().contiguous(memory_format=form).requires_grad_()


@each_fused_backend
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_error_budget(backend: str, size: tuple[int, int, int, int], dtype: torch.dtype, layout: str) -> None:
    n, c, h, w = size
    logits, target = make_inputs(n, c, h, w, dtype=dtype, device="cuda")
    assert_budget(in_layout(logits, layout), target, make_proxy(c), backend, ignore_index=VOID)


@each_fused_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tap", ["pre", "post"])
@pytest.mark.parametrize("shape", list(PROXIES))
def test_error_budget_of_proxies(backend: str, shape: str, tap: str, dtype: torch.dtype) -> None:
    proxy = make_proxy(21, tap=tap, **PROXIES[shape])
    logits, target = make_inputs(2, 21, 45, 47, dtype=dtype, device="cuda")
    assert_budget(logits, target, proxy, backend, ignore_index=VOID)


@each_fused_backend
@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_error_budget_of_distances(backend: str, distance: str, reduction: str) -> None:
    logits, target = make_inputs(2, 21, 45, 47, dtype=torch.bfloat16, device="cuda")
    options = {"ignore_index": VOID, "distance": distance, "reduction": reduction}
    assert_budget(logits, target, make_proxy(21), backend, **options)


@each_fused_backend
@pytest.mark.parametrize("kind", ["one class", "noise", "mostly void"])
def test_error_budget_of_labels(backend: str, kind: str) -> None:
    """From labels where the target needs no work to labels where every pixel does."""
    logits, target = make_inputs(2, 21, 70, 75, void=0.9 if kind == "mostly void" else 0.0, device="cuda")
    if kind == "one class":
        target.fill_(4)
    elif kind == "noise":
        target = torch.randint(0, 21, target.shape, generator=torch.Generator().manual_seed(2)).cuda()
    assert_budget(logits, target, make_proxy(21), backend, ignore_index=VOID)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_voc_batch_in_half_precision(backend: str, dtype: torch.dtype, layout: str) -> None:
    """16x21x513x513: finite, the gradient in the logits' dtype and layout, zero at void pixels and nowhere else."""
    if free_bytes() < 24 * 2**30:
        pytest.skip(f"needs 24 GiB of the GPU's memory, {free_bytes() / 2**30:.0f} GiB are free")
    base, labels = make_inputs(2, 21, 513, 513, dtype=dtype, void=0.1)
    logits = in_layout(base.detach().cuda().repeat(8, 1, 1, 1), layout)
    target = labels.cuda().repeat(8, 1, 1)
    loss = criterion(backend, EdgeProxy.bundled(21))
    scale = 65536.0 if dtype == torch.float16 else 1.0  # as a GradScaler starts
    value = loss(logits, target)
    value.backward(torch.full_like(value, scale))
    grad = logits.grad
    assert grad is not None
    assert torch.isfinite(value)
    assert torch.isfinite(grad).all()
    assert grad.dtype == dtype
    assert grad.stride() == logits.stride()
    norms = grad.float().abs().amax(dim=1)
    assert not norms[target == VOID].any()
    assert float((norms[target != VOID] > 0).float().mean()) > 0.99
    if backend != "reference":  # every pair of images is the same, so is its gradient
        assert same_bits(grad[:2], grad[-2:])


@each_fused_backend
def test_more_than_two_billion_elements(backend: str) -> None:
    """64 copies of one image, 2.2e9 logits: the loss of one, and a 64th of its gradient in the first and the last."""
    copies, c, h, w = 64, 32, 1040, 1032
    need = copies * h * w * (3 * 2 * c + 400)
    if free_bytes() < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of the GPU's memory, {free_bytes() / 2**30:.0f} GiB are free")
    one, labels = make_inputs(1, c, h, w, dtype=torch.bfloat16, device="cuda")
    loss = criterion(backend, EdgeProxy.bundled(c))
    expected = step(loss, one, labels)
    logits = one.detach().expand(copies, -1, -1, -1).contiguous().requires_grad_()
    assert logits.numel() > 2**31
    target = labels.expand(copies, -1, -1).contiguous()
    value, grad = step(loss, logits, target)
    assert relative_error(value, expected[0]) < 1e-5
    for image in (0, 31, copies - 1):
        assert relative_error(copies * grad[image].float(), expected[1][0]) < 1e-3


@each_fused_backend
def test_memory_saved_for_backward(backend: str) -> None:
    """At most 24 bytes a pixel for the default proxy: by autograd's hooks, and by what the allocator holds."""
    logits, target = make_inputs(4, 21, 512, 513, dtype=torch.bfloat16, device="cuda")
    loss = criterion(backend, EdgeProxy.bundled(21))
    step(loss, logits, target)
    given = {t.untyped_storage().data_ptr() for t in (logits, target, *loss.proxy.weights, *loss.proxy.biases)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(logits, target)
    saved = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in given)
    assert 0 < saved <= 24 * target.numel()
    del value
    kept.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    value = loss(logits, target)
    assert torch.cuda.memory_allocated() - before <= 24 * target.numel() + 2**20
    del value


def poison(amount: int) -> None:
    """Leave the allocator's free memory full of NaN, in blocks of many sizes."""
    for size in (2**9, 2**12, 2**16, 2**19, 2**20, 2**22, amount):
        blocks = [torch.full((max(1, size // 4),), torch.nan, device="cuda") for _ in range(8)]
        del blocks
    torch.cuda.synchronize()


@each_backend
@pytest.mark.parametrize("size", [(1, 5, 3, 5), (2, 21, 61, 67)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fresh_memory_full_of_nan(backend: str, size: tuple[int, int, int, int], reduction: str) -> None:
    """Nothing that is read was not written before."""
    n, c, h, w = size
    loss = criterion(backend, make_proxy(c), reduction=reduction)
    logits, target = make_inputs(n, c, h, w, device="cuda")
    expected = step(loss, logits, target)
    for _ in range(2):
        poison(64 * n * c * h * w)
        found = step(loss, logits, target)
        assert same_bits(found[0], expected[0])
        assert same_bits(found[1], expected[1])
    assert torch.isfinite(expected[1]).all()


def inside(tensor: Tensor, filler: float) -> tuple[Tensor, Tensor]:
    """A copy in the middle of a larger buffer of `filler`, and that buffer."""
    pad = 4096
    buffer = torch.full((tensor.numel() + 2 * pad,), filler, dtype=tensor.dtype, device=tensor.device)
    view = buffer[pad : pad + tensor.numel()].view(tensor.shape)
    view.copy_(tensor.detach())
    return view, buffer


@each_fused_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_are_neither_read_nor_written(backend: str, dtype: torch.dtype) -> None:
    """Logits between NaN, labels between labels of no class: the same bits, and the buffers as they were."""
    loss = criterion(backend)
    logits, target = make_inputs(2, 5, 31, 37, dtype=dtype, labels=torch.uint8, device="cuda")
    expected = step(loss, logits, target)
    framed, buffer = inside(logits, torch.nan)
    framed_target, target_buffer = inside(target, 254)
    before, target_before = buffer.clone(), target_buffer.clone()
    found = step(loss, framed.requires_grad_(), framed_target)
    assert same_bits(found[0], expected[0])
    assert same_bits(found[1], expected[1])
    assert same_bits(buffer.detach(), before)
    assert torch.equal(target_buffer, target_before)


@each_fused_backend
def test_auto_takes_a_fused_backend(backend: str) -> None:
    logits, target = make_inputs(device="cuda")
    automatic = SemedaLoss(make_proxy(), ignore_index=VOID).cuda()
    newest = criterion(FUSED[-1])
    assert backend in FUSED
    for a, b in zip(step(automatic, logits, target), step(newest, logits, target), strict=True):
        assert same_bits(a, b)
