"""What the tests share: inputs, proxies, and the error budget that every backend has to keep."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from semeda_fast import EdgeProxy, SemedaLoss, semeda_loss
from semeda_fast.backends import registry as backends
from semeda_fast.functional import LossComponents

# What rounding alone may cost where the reference happens to be exact, relative to the oracle's norm.
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Of backends that multiply half-precision logits in fp16 on tensor cores: features whose difference lies within
# rounding flip the sign of their L1 gradient. Seen on street scenes: 1.0e-2 (default proxy), 0.6e-2 (wide), 1.7e-2
# (deep).
HALF_PRODUCTS_GRADIENT_FLOOR = 2e-2
# Of fp32 gradients in which a few differences at rounding level have the other sign: no rounding costs more.
FLIPPED_SIGNS = 1e-2
NUM_CLASSES = 5
VOID = 255


def make_proxy(num_classes: int = NUM_CLASSES, **options: Any) -> EdgeProxy:
    """A proxy with random weights, biases and scales, so that no term vanishes by chance."""
    shape = EdgeProxy(num_classes, **options)
    generator = torch.Generator().manual_seed(1)
    biases = [0.1 * torch.randn(bias.shape, generator=generator) for bias in shape.biases]
    scales = {
        name: [0.5 + 0.25 * layer + 0.1 * number for layer in range(shape.num_layers)]
        for number, name in enumerate(("l1", "l2", "smooth_l1"))
    }
    return EdgeProxy.from_tensors(
        shape.layers,
        shape.weights,
        biases,
        tap=shape.tap,
        distance=shape.distance,
        layer_weights=shape.layer_weights,
        scales=scales,
    )


def make_inputs(
    n: int = 2,
    c: int = NUM_CLASSES,
    h: int = 13,
    w: int = 17,
    *,
    dtype: torch.dtype = torch.float32,
    labels: torch.dtype = torch.int64,
    void: float = 0.2,
    device: str = "cpu",
    seed: int = 0,
    num_labels: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits [N,C,H,W] and blocky labels [N,H,W] with a share of void pixels (label VOID)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn((n, c, h, w), generator=generator, dtype=torch.float64)
    coarse = torch.randint(0, num_labels or c, (n, (h + 3) // 4, (w + 3) // 4), generator=generator)
    target = coarse.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)[:, :h, :w].clone()
    if void:
        target[torch.rand(target.shape, generator=generator) < void] = VOID
    return logits.to(device, dtype).requires_grad_(), target.to(device, labels)


def value_and_grad(criterion: nn.Module, logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient in the logits, both detached; a fixed random upstream gradient for a map."""
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = criterion(leaf, target, **options)
    upstream = torch.ones_like(loss)
    if loss.dim():
        upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(7)).to(loss)
    loss.backward(upstream)
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def relative_error(x: Tensor, oracle: Tensor) -> float:
    """Relative L2 distance in float64: L1 gradients flip signs at rounding level, so no largest error."""
    x, oracle = x.detach().double().cpu(), oracle.detach().double().cpu()
    return float((x - oracle).norm() / oracle.norm().clamp_min(1e-30))


def assert_within_budget(
    logits: Tensor,
    target: Tensor,
    proxy: EdgeProxy,
    backend: str,
    *,
    valid_mask: Tensor | None = None,
    **options: Any,
) -> None:
    """err(backend, fp64 oracle) <= 2 err(reference in the same dtype, oracle) + floor(dtype), value and gradient.

    Of tensor-core backends an fp32 gradient beyond it must keep it at the pixels that rounding leaves decided.
    """

    def run(name: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        criterion = SemedaLoss(proxy, backend=name, **options).to(x.device)
        return value_and_grad(criterion, x, y, valid_mask=valid_mask)

    wide_target = target.double() if target.is_floating_point() else target
    oracle = run("reference", logits.detach().double(), wide_target)
    reference = run("reference", logits, target)
    ours = run(backend, logits, target)
    for what, a, b, exact in zip(("loss", "gradient"), ours, reference, oracle, strict=True):
        floor = FLOOR[logits.dtype]
        half = logits.dtype in (torch.float16, torch.bfloat16)
        if what == "gradient" and half and backends.get(backend).half_products:
            floor = HALF_PRODUCTS_GRADIENT_FLOOR
        budget = 2 * relative_error(b, exact) + floor
        error = relative_error(a, exact)
        flips = backends.get(backend).half_products and logits.dtype == torch.float32  # three tf32 products round anew
        if what == "gradient" and flips and budget < error <= FLIPPED_SIGNS:
            judge_decided_pixels(logits, target, proxy, backend, valid_mask=valid_mask, **options)
            return
        assert error <= budget, f"{what}: error {error:.3g} above the budget {budget:.3g}"


def judge_decided_pixels(logits: Tensor, target: Tensor, proxy: EdgeProxy, backend: str, **options: Any) -> None:
    """The error budget for fp32 logits where no |d| and no ReLU is at rounding level: `cpu_budget` says why."""
    from cpu_budget import Judge, Outcome, loss_and_grad  # which needs this module

    judge = Judge(logits.detach().cpu(), target.cpu(), copy.deepcopy(proxy).cpu(), **_on("cpu", options))
    assert judge.decided.any()
    ours = loss_and_grad(logits, target, copy.deepcopy(proxy).to(logits.device), backend, **_on(logits.device, options))
    judge.check(Outcome(ours.loss.cpu(), ours.grad.cpu()), backend)


def _on(device: torch.device | str, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}


def components(logits: Tensor, target: Tensor, proxy: EdgeProxy, **options: Any) -> LossComponents:
    """semeda_loss(..., return_components=True) with its type."""
    result = semeda_loss(logits, target, proxy, return_components=True, **options)
    assert isinstance(result, LossComponents)
    return result
