"""What the GPU tests share. Without a GPU each of them is skipped with the reason; backends come from the registry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import VOID, assert_within_budget, judge_decided_pixels, make_proxy
from torch import Tensor

from semeda_fast import EdgeProxy, SemedaLoss, backend_info
from semeda_fast.backends import registry as backends


def why_no_gpu() -> str:
    """Why no GPU test can run here, "" where they can."""
    if torch.cuda.is_available():
        return ""
    return "torch sees no CUDA device here; on a machine with one run: make gpu"


def _named(names: tuple[str, ...], missing: str) -> Any:
    """A decorator that runs a test on each backend, or skips it once with the reason."""
    reason = why_no_gpu() or ("" if names else missing)
    if reason:
        return pytest.mark.parametrize("backend", [pytest.param("none", marks=pytest.mark.skip(reason=reason))])
    return pytest.mark.parametrize("backend", names)


ALL = backends.available_names("cuda") if torch.cuda.is_available() else ()
FUSED = tuple(name for name in ALL if name != "reference")
_MISSING = [status for status in backend_info().backends if "cuda" in status.devices and status.reason]
_REASONS = "; ".join(f"{status.name}: {status.reason}" for status in _MISSING)
each_backend = _named(ALL, "no backend can run on this GPU")
each_fused_backend = _named(FUSED, f"no fused backend can run on this GPU: {_REASONS}")


@pytest.fixture(autouse=True)
def exact_cudnn() -> Iterator[None]:
    """cuDNN in fp32 proper and with fixed algorithms: the reference is the yardstick. Import it to switch it on."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, cudnn.deterministic = False, True
    yield
    cudnn.allow_tf32, cudnn.deterministic = before


def criterion(backend: str, proxy: EdgeProxy | None = None, *, device: str = "cuda", **options: Any) -> SemedaLoss:
    """A loss with a random proxy, VOID as ignore_index, on the GPU."""
    options = {"ignore_index": VOID, **options}
    return SemedaLoss(make_proxy() if proxy is None else proxy, backend=backend, **options).to(device)


def step(loss: torch.nn.Module, logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Forward and backward without anything that waits for the device: the loss, detached, and d_logits."""
    value = loss(logits, target, **options)
    (grad,) = torch.autograd.grad(value, logits, torch.ones_like(value))
    return value.detach(), grad


def assert_budget(logits: Tensor, target: Tensor, proxy: EdgeProxy, backend: str, **options: Any) -> None:
    """The error budget of tensors on the GPU; for fp32 logits at pixels that fp32 rounding leaves decided.

    In fp32 one sign of an |d| at rounding level weighs more than all rounding: `cpu_budget` says why.
    """
    if logits.dtype != torch.float32:
        assert_within_budget(logits, target, proxy, backend, **options)
        return
    judge_decided_pixels(logits, target, proxy, backend, **options)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that takes a NaN for itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def free_bytes() -> int:
    """Memory of the GPU that nobody holds, torch's cache given back."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
