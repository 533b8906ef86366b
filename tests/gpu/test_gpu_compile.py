"""torch.compile on a GPU: modes, CUDA graphs, dynamic shapes, always as one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_cases import criterion, each_backend, each_fused_backend, exact_cudnn, step
from helpers import make_inputs, relative_error
from torch._dynamo.utils import counters

__all__ = ["exact_cudnn"]

FUSED_LIMIT = 1e-6  # compiled code may fuse what is around our kernels
REFERENCE_LIMIT = 1e-4  # the compiler changes layouts, and cuDNN its algorithm: |d| near 0 may change its sign


def compare(compiled: Any, loss: torch.nn.Module, limit: float, **inputs: Any) -> None:
    """Value and gradient against eager on fresh inputs."""
    logits, target = make_inputs(device="cuda", **inputs)
    torch.compiler.cudagraph_mark_step_begin()
    found = [x.clone() for x in step(compiled, logits, target)]  # a graph's outputs are overwritten by its next run
    expected = step(loss, logits, target)
    assert found[1].dtype == logits.dtype
    for ours, eager in zip(found, expected, strict=True):
        assert relative_error(ours, eager) <= limit


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_mode(backend: str, dtype: torch.dtype) -> None:
    loss = criterion(backend)
    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    limit = REFERENCE_LIMIT if backend == "reference" else FUSED_LIMIT
    if dtype == torch.bfloat16:
        limit = max(limit, 2e-3)  # one rounding to bf16 more or less
    for seed in (0, 1):
        compare(compiled, loss, limit, h=33, w=35, dtype=dtype, seed=seed)


@each_fused_backend
def test_reduce_overhead_runs_as_cuda_graphs(backend: str) -> None:
    """The second call records, the third replays; none may fall back to plain launches."""
    counters.clear()
    loss = criterion(backend)
    compiled = torch.compile(loss, fullgraph=True, dynamic=False, mode="reduce-overhead")
    for seed in range(4):
        compare(compiled, loss, FUSED_LIMIT, h=33, w=35, seed=seed)
    assert counters["inductor"]["cudagraph_skips"] == 0, dict(counters["inductor"])


@each_fused_backend
def test_dynamic_shapes_compile_once(backend: str) -> None:
    loss = criterion(backend)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    compare(compiled, loss, FUSED_LIMIT, n=2, h=33, w=35)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n, h, w in ((3, 9, 8), (2, 64, 64), (5, 31, 127)):
            compare(compiled, loss, FUSED_LIMIT, n=n, h=h, w=w)


@each_fused_backend
def test_a_compiled_training_step_learns(backend: str) -> None:
    """Network, loss and gradient in one graph; the loss falls, and falls as in eager."""
    losses = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        network = torch.nn.Conv2d(3, 5, 3, padding=1).cuda()
        loss = criterion(backend)
        _, target = make_inputs(h=33, w=35, device="cuda")
        image = torch.randn(2, 3, 33, 35, device="cuda")

        def training_loss(
            image: torch.Tensor, target: torch.Tensor, network: torch.nn.Module = network, loss: torch.nn.Module = loss
        ) -> torch.Tensor:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return loss(network(image), target)

        run = torch.compile(training_loss, fullgraph=True, dynamic=False) if compile_it else training_loss
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        course = []
        for _ in range(5):
            optimizer.zero_grad()
            value = run(image, target)
            value.backward()
            optimizer.step()
            course.append(float(value.detach()))
        losses.append(course)
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
