"""No synchronisation, CUDA graphs, streams, devices: what a loss must not do to a training loop on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gpu_cases import criterion, each_backend, exact_cudnn, same_bits, step
from helpers import NUM_CLASSES, VOID, make_inputs, relative_error
from torch import Tensor

__all__ = ["exact_cudnn"]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "none"},
    {"weight": torch.rand(NUM_CLASSES, generator=torch.Generator().manual_seed(5)) + 0.5, "label_smoothing": 0.1},
    {"distance": "l2", "reduction": "sum"},
]


@contextmanager
def no_sync() -> Iterator[None]:
    """Raise on any operation of torch that waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_guard_finds_a_synchronisation() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here; on a machine with one run: make gpu")
    x = torch.ones(3, device="cuda")
    with no_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()


@each_backend
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_the_device(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    loss = criterion(backend, **options)
    logits, target = make_inputs(h=33, w=35, dtype=dtype, labels=torch.uint8, device="cuda")
    mask = torch.rand(target.shape, device="cuda") < 0.9
    expected = step(loss, logits, target, valid_mask=mask)  # compiles, and fills caches
    with no_sync():
        found = step(loss, logits, target, valid_mask=mask)
        components = loss(logits, target, return_components=True)
    assert torch.isfinite(components.loss).all()
    assert same_bits(found[0], expected[0])
    assert same_bits(found[1], expected[1])


def captured(
    loss: torch.nn.Module, logits: Tensor, target: Tensor
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
    """Forward and backward as one CUDA graph over these very tensors, after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(loss, logits, target)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(loss, logits, target)
    return graph, outputs


def replacements(logits: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Inputs that differ in what could be skipped: one class everywhere, noise, nothing valid, blocks."""
    n, c, h, w = logits.shape
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(logits.shape, generator=generator)
    everywhere = torch.randint(0, c, (n, h, w), generator=generator)
    blocks, block_labels = make_inputs(n, c, h, w, seed=3)
    return [
        (noise, torch.full((n, h, w), 2)),
        (3 * noise.flip(0), everywhere),
        (noise, torch.full((n, h, w), VOID)),
        (blocks.detach(), block_labels),
    ]


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_captured_graph_follows_changed_inputs(backend: str, reduction: str) -> None:
    """Replayed with other logits and labels it equals eager: bit for bit where kernels are ours."""
    loss = criterion(backend, reduction=reduction)
    logits, target = make_inputs(h=37, w=41, device="cuda")
    graph, outputs = captured(loss, logits, target)
    for new_logits, new_target in replacements(logits):
        with torch.no_grad():
            logits.copy_(new_logits)
            target.copy_(new_target)
        for output in outputs:
            output.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [output.clone() for output in outputs]
        eager = step(loss, logits, target)
        for ours, expected in zip(replayed, eager, strict=True):
            if backend == "reference":  # cuDNN may choose another algorithm under capture
                assert relative_error(ours, expected) < 1e-5
            else:
                assert same_bits(ours, expected)


@each_backend
def test_work_goes_to_the_current_stream(backend: str) -> None:
    """Inputs that are written late on a side stream: a launch on another stream would read the NaN before them."""
    loss = criterion(backend)
    source, target = make_inputs(h=65, w=67, device="cuda")
    expected = step(loss, source, target)
    late = torch.full_like(source, torch.nan).requires_grad_()
    late_target = torch.zeros_like(target)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        with torch.no_grad():
            late.copy_(source)
            late_target.copy_(target)
        found = step(loss, late, late_target)
    side.synchronize()
    assert same_bits(found[0], expected[0])
    assert same_bits(found[1], expected[1])


@each_backend
def test_a_second_device(backend: str) -> None:
    """Tensors on cuda:1 while cuda:0 is current: computed there, and cuda:0 stays current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here; this needs a second")
    logits, target = make_inputs(h=33, w=35, device="cuda:0")
    expected = step(criterion(backend, device="cuda:0"), logits, target)
    other = logits.detach().to("cuda:1").requires_grad_()
    found = step(criterion(backend, device="cuda:1"), other, target.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert {x.device.index for x in found} == {1}
    for ours, first in zip(found, expected, strict=True):
        assert relative_error(ours, first) < 1e-6


@each_backend
def test_two_runs_are_bit_equal_while_others_run(backend: str) -> None:
    """At a size of many tiles, with other work on the device in between."""
    loss = criterion(backend)
    logits, target = make_inputs(n=2, h=257, w=263, dtype=torch.bfloat16, device="cuda")
    first = step(loss, logits, target)
    noise = torch.randn(512, 512, device="cuda")
    side = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(side):
            for _ in range(20):
                noise = (noise @ noise).tanh()
        again = step(loss, logits, target)
        assert same_bits(first[0], again[0])
        assert same_bits(first[1], again[1])
    side.synchronize()
