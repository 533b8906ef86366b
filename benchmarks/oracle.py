"""The float64 reference of a whole workload, and the check that every contender has to pass before it is timed.

The oracle computes what `semeda_fast.backends.reference` defines, with its functions, in float64 over strips of rows
with a halo of the proxy's reach, so a workload of any size fits in memory and nothing is cropped. Zero padding at a
strip's edge changes features only in the halo, whose values are not used.

What agrees: the loss to LOSS[dtype] (relative), the gradient to GRADIENT[dtype] (relative L2). In fp32 the
gradient is compared away from kinks: an L1 distance |d| or a hidden feature t that is 0 up to fp32 rounding
(KINK times the layer's root mean square) may have the sign it did not have in float64, and the gradient then
differs wherever that feature reaches. These pixels are found in float64, their share is reported, and
over all pixels the relative L2 may not exceed OVERALL. The reference itself in fp32 needs the same allowance.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from semeda_fast.backends.reference import features, rho, sum_in_order, upsampled
from semeda_fast.files import atomic_path

from .plain import LossFunction
from .workloads import LAMBDA_CE, LAMBDA_SEMEDA, Inputs

# fp32: the project's figures. bf16 and fp16: the gradient is rounded to 8 and 11 bits, and a kernel may
# multiply in that dtype; the loss is a mean over all pixels, so its rounding averages out.
LOSS = {"float32": 1e-6, "bfloat16": 1e-3, "float16": 1e-4}
GRADIENT = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}
OVERALL = 1e-2
KINK = 4e-6
# bf16 convolutions keep 8 bits of each feature, so many |d| change sign: 1 to 4 % was found on small workloads.
AUTOCAST_LOSS, AUTOCAST_GRADIENT = 1e-2, 0.1
_STRIP_ELEMENTS = 24_000_000  # feature values of a strip in float64: 192 MB for one copy of each


@dataclass(frozen=True)
class Oracle:
    """What is right: losses in float64, the gradient [N,C,H,W] rounded to fp32, which pixels lie at a kink [N,H,W]."""

    loss: float
    ce: float
    gradient: Tensor
    kink: Tensor


@dataclass(frozen=True)
class Check:
    """How far a contender is from the oracle, and whether that is within the tolerance.

    Attributes:
        loss_error: relative. gradient_error: relative L2 over the pixels compared; NaN for cross-entropy alone.
        overall_error: relative L2 over all pixels.
        compared: share of the pixels away from kinks.
        loss_tolerance, gradient_tolerance: the limits.
    """

    ok: bool
    loss_error: float
    gradient_error: float | None
    overall_error: float | None
    compared: float
    loss_tolerance: float
    gradient_tolerance: float

    def describe(self) -> str:
        """One line with the numbers."""
        text = f"loss off by {self.loss_error:.2g} (allowed {self.loss_tolerance:g})"
        if self.gradient_error is not None:
            text += f", gradient by {self.gradient_error:.2g} (allowed {self.gradient_tolerance:g})"
        if self.overall_error is not None:
            text += f", at kinks too by {self.overall_error:.2g}"
        return text


def compute_oracle(inputs: Inputs) -> Oracle:
    """The loss, its gradient (for an upstream gradient of 1) and the kinks, in float64 on the inputs' device."""
    z, y = inputs.logits, inputs.target
    height = z.shape[2]
    halo = inputs.proxy.receptive_field // 2
    count = float((y != inputs.workload.ignore_index).sum())
    gradient = torch.zeros(z.shape, dtype=torch.float32, device=z.device)
    kink = torch.zeros(y.shape, dtype=torch.bool, device=z.device)
    total, total_ce = 0.0, 0.0
    scales = _feature_scales(inputs)
    for top, bottom in _strips(inputs, halo):
        # Twice the reach: the gradient of the strip's rows needs features one reach away, all of them exact.
        first, last = max(0, top - 2 * halo), min(height, bottom + 2 * halo)
        rows, kept = slice(first, last), slice(top - first, bottom - first)
        leaf = z[:, :, rows].double().requires_grad_()
        labels = y[:, rows]
        taps = _branches(leaf, labels, inputs)
        ce, semeda = _loss_maps(leaf, labels, taps, inputs)
        losses = LAMBDA_CE * ce + LAMBDA_SEMEDA * semeda
        # Each row's loss is added up once; the gradient of a row comes from every row within reach of it.
        near = slice(max(0, top - halo) - first, min(height, bottom + halo) - first)
        (d_leaf,) = torch.autograd.grad(losses[:, near].sum() / count, leaf)
        gradient[:, :, top:bottom] = d_leaf[:, :, kept]
        total += float(losses.detach()[:, kept].sum())
        total_ce += float(ce.detach()[:, kept].sum())
        kink[:, top:bottom] = _kinks(taps, labels, inputs, scales)[:, kept]
    return Oracle(total / count, total_ce / count, gradient, kink)


def of_small_logits(oracle: Oracle, size: tuple[int, int]) -> Oracle:
    """The same for logits [N,C,*size] that are scaled up bilinearly to those the oracle is of."""

    def scaled_down(x: Tensor) -> Tensor:
        small = torch.zeros((*x.shape[:2], *size), dtype=torch.float64, device=x.device, requires_grad=True)
        (d_small,) = torch.autograd.grad(upsampled(small, x.shape[2:]), small, x.double())
        return d_small

    gradient = torch.cat([scaled_down(image.unsqueeze(0)).float() for image in oracle.gradient])
    kink = scaled_down(oracle.kink.unsqueeze(1))[:, 0] > 0
    return Oracle(oracle.loss, oracle.ce, gradient, kink)


def cached_oracle(inputs: Inputs, folder: Path | None) -> Oracle:
    """`compute_oracle`, kept in `folder` between the processes of one run."""
    if folder is None:
        return compute_oracle(inputs)
    key = hashlib.sha256(repr((inputs.workload, inputs.facts.source)).encode()).hexdigest()[:16]
    path = folder / f"oracle-{key}.pt"
    if path.is_file():
        return Oracle(**torch.load(path, map_location=inputs.logits.device, weights_only=True))
    oracle = compute_oracle(inputs)
    with atomic_path(path, overwrite=True) as temporary:
        torch.save({name: getattr(oracle, name) for name in Oracle.__dataclass_fields__}, temporary)
    return oracle


def check(function: LossFunction, leaf: Tensor, inputs: Inputs, oracle: Oracle, checked_as: str) -> Check:
    """Run once, forward and backward, and compare; leaves no gradient behind.

    Args:
        checked_as: "loss", "half", "autocast" or "ce", see `Contender.checked_as`.
    """
    dtype, scale = inputs.workload.dtype, inputs.workload.grad_scale
    allowed = "bfloat16" if (checked_as, dtype) == ("half", "float16") else dtype
    loss_tolerance, gradient_tolerance = LOSS[allowed], GRADIENT[allowed]
    if checked_as == "autocast":
        loss_tolerance, gradient_tolerance = AUTOCAST_LOSS, AUTOCAST_GRADIENT
    value = function(leaf, inputs.target)
    expected = oracle.ce if checked_as == "ce" else oracle.loss
    loss_error = abs(float(value.detach()) - expected) / max(abs(expected), 1e-30)
    value.backward(torch.full_like(value, scale))
    assert leaf.grad is not None
    d_logits, leaf.grad = leaf.grad, None
    if checked_as == "ce":
        wanted, kink = _ce_gradient(inputs), None
    else:
        wanted, kink = oracle.gradient, oracle.kink
    exact = dtype == "float32" and checked_as in ("loss", "half")
    squares, norms = _squares(d_logits, wanted, 1 / scale)
    far = torch.ones_like(squares, dtype=torch.bool) if kink is None or not exact else ~kink
    overall = float((squares.sum() / norms.sum().clamp_min(1e-60)).sqrt())
    error = float((squares[far].sum() / norms[far].sum().clamp_min(1e-60)).sqrt())
    # Written so that a NaN fails.
    ok = loss_error <= loss_tolerance and error <= gradient_tolerance and (not exact or overall <= OVERALL)
    return Check(
        bool(ok),
        loss_error,
        error,
        overall if exact else None,
        float(far.double().mean()),
        loss_tolerance,
        gradient_tolerance,
    )


def as_json(result: Check) -> dict[str, Any]:
    """The check as plain values."""
    return asdict(result)


def _squares(d_logits: Tensor, wanted: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Squared error and squared norm of each pixel's gradient, [N,H,W] float64, image by image to save memory."""
    errors, norms = [], []
    for ours, exact in zip(d_logits, wanted, strict=True):
        exact = exact.double()
        errors.append((ours.double() * factor - exact).square().sum(dim=0))
        norms.append(exact.square().sum(dim=0))
    return torch.stack(errors), torch.stack(norms)


def _ce_gradient(inputs: Inputs) -> Tensor:
    """The gradient of cross-entropy alone in float64, rounded to fp32, image by image to save memory."""
    parts = []
    count = float((inputs.target != inputs.workload.ignore_index).sum())
    for image in range(inputs.workload.batch):
        leaf = inputs.logits[image : image + 1].double().requires_grad_()
        ce = _cross_entropy_map(leaf, inputs.target[image : image + 1], inputs)
        (d_leaf,) = torch.autograd.grad(ce.sum() / count, leaf)
        parts.append(d_leaf.float())
    return torch.cat(parts)


def _cross_entropy_map(logits: Tensor, target: Tensor, inputs: Inputs) -> Tensor:
    """torch's cross-entropy of each pixel [N,H,W] in the logits' dtype, 0 at void pixels."""
    void = inputs.workload.ignore_index
    if inputs.workload.mode == "binary":
        positive, valid = (target == 1).to(logits.dtype), (target != void).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits[:, 0], positive, valid, reduction="none")
    return F.cross_entropy(logits, target, ignore_index=void, reduction="none")


def _strips(inputs: Inputs, halo: int) -> list[tuple[int, int]]:
    """Rows [top, bottom) of each strip, such that a strip's features stay under _STRIP_ELEMENTS."""
    n, height, width = inputs.target.shape
    channels = 4 * inputs.proxy.num_classes + 4 * sum(layer.out_channels for layer in inputs.proxy.layers)
    rows = max(16, _STRIP_ELEMENTS // (n * width * channels) - 4 * halo)
    return [(top, min(height, top + rows)) for top in range(0, height, rows)]


def _branches(logits: Tensor, target: Tensor, inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """Features before the ReLU of both branches, in float64 for float64 logits."""
    proxy, void = inputs.proxy, inputs.workload.ignore_index
    valid = (target != void).unsqueeze(1)
    z = torch.cat([torch.zeros_like(logits), logits], dim=1) if inputs.workload.mode == "binary" else logits
    p = torch.softmax(z, dim=1) * valid
    q = torch.zeros_like(p).scatter_(1, torch.where(valid, target.unsqueeze(1), 0), 1.0) * valid
    ones = [1] * proxy.num_layers
    shape = (proxy.weights, proxy.biases, ones, ones, [0] * proxy.num_layers, "pre")
    return features(p, *shape), features(q, *shape)


def _loss_maps(
    logits: Tensor, target: Tensor, taps: tuple[list[Tensor], list[Tensor]], inputs: Inputs
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and SEMEDA terms [N,H,W] as `reference.loss_terms` has them, from features at hand.

    The features are needed for the kinks too, and float64 convolutions are slow: computing them once halves
    the time. The tests compare the result with the reference itself.
    """
    proxy, valid = inputs.proxy, target != inputs.workload.ignore_index
    layers = zip(*taps, proxy.layer_weights, proxy.layer_scales(proxy.distance), strict=True)
    terms = [w * rho(a - b, proxy.distance).sum(dim=1) / (a.shape[1] * s) for a, b, w, s in layers]
    return _cross_entropy_map(logits, target, inputs), torch.where(valid, sum_in_order(terms), 0.0)


@torch.no_grad()
def _feature_scales(inputs: Inputs) -> list[float]:
    """Root mean square of each layer's features on a patch in the middle of the first image."""
    height, width = inputs.target.shape[1:]
    rows = slice(max(0, height // 2 - 32), height // 2 + 32)
    columns = slice(max(0, width // 2 - 32), width // 2 + 32)
    t, _ = _branches(inputs.logits[:1, :, rows, columns].double(), inputs.target[:1, rows, columns], inputs)
    return [float(x.square().mean().sqrt()) for x in t]


@torch.no_grad()
def _kinks(taps: tuple[list[Tensor], list[Tensor]], target: Tensor, inputs: Inputs, scales: list[float]) -> Tensor:
    """[N,H,W] bool: pixels whose gradient a feature at a kink reaches.

    The gradient of |d_l| flows from layer l to the input through l layers, that of a hidden ReLU likewise.
    """
    proxy = inputs.proxy
    reached = torch.zeros(target.shape, dtype=torch.bool, device=target.device)
    reach = 0
    for layer, (a, b, scale) in enumerate(zip(*taps, scales, strict=True)):
        reach += proxy.layers[layer].kernel_size // 2
        limit = KINK * scale
        at_kink = ((a - b).abs() < limit).any(dim=1) & (target != inputs.workload.ignore_index)
        if layer + 1 < proxy.num_layers:  # at void pixels, too: they hand on what their neighbours see
            at_kink |= (a.abs() < limit).any(dim=1)
        window = 2 * reach + 1
        reached |= F.max_pool2d(at_kink.float().unsqueeze(1), window, 1, reach)[:, 0] > 0
    return reached
