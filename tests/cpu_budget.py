"""The error budget for random inputs: gradients are judged where rounding decides nothing.

The gradient of this loss jumps: under l1 it holds sign(d) of each feature's difference d, and in every case the
ReLU's mask of each hidden feature t(p). Where d or t(p) is zero up to the rounding of float32, a correct float32
implementation may land on either side, and one such feature changes the gradient of a whole receptive field by
much more than rounding. Loosening a tolerance would hide real faults there and everywhere else. So the float64
oracle tells where it is undecided (`undecided_pixels`); those pixels' gradients are only asked to be finite, and all
others must keep the budget of `helpers.assert_within_budget` with nothing added. The value of the loss is continuous
and is always judged. Without an undecided feature this is `assert_within_budget`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from helpers import FLOOR
from torch import Tensor

from semeda_fast import EdgeProxy, semeda_loss
from semeda_fast.backends.reference import features, not_ignored, upsampled

# Of the largest |t_l|: rounding of sums of up to 64 * 49 products, with the growth of F(4,3) or F(4x4,3x3).
UNDECIDED = 4e-5


class Outcome(NamedTuple):
    """The loss ([] or [N,H,W]) and the gradient of the logits under a fixed upstream gradient."""

    loss: Tensor
    grad: Tensor


def loss_and_grad(logits: Tensor, target: Tensor, proxy: EdgeProxy, backend: str, **options: Any) -> Outcome:
    """Run the loss on these very strides; the upstream gradient of a map is random, the same for all backends."""
    leaf = logits.detach().requires_grad_()
    loss = semeda_loss(leaf, target, proxy, backend=backend, **options)
    assert isinstance(loss, Tensor)
    upstream = torch.ones_like(loss)
    if loss.dim():
        upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(loss)
    (grad,) = torch.autograd.grad(loss, leaf, upstream)
    return Outcome(loss.detach(), grad)


def valid_pixels(logits: Tensor, target: Tensor, options: dict[str, Any]) -> Tensor:
    """[N,H,W] bool: what valid_mask and ignore_index leave."""
    mask = options.get("valid_mask")
    v = torch.ones(target.shape[0], *target.shape[-2:], dtype=torch.bool) if mask is None else mask
    return v if target.is_floating_point() else v & not_ignored(target, options.get("ignore_index", -100))


def undecided_pixels(
    logits: Tensor, target: Tensor, proxy: EdgeProxy, options: dict[str, Any]
) -> tuple[Tensor, list[float]]:
    """[N,H,W] bool: pixels whose gradient a feature at a jump has a part in; and the largest |t_l| of each layer.

    Of `semeda_loss`'s arguments; tensors may have any dtype, the features are computed in float64.
    """
    distance = options.get("distance") or proxy.distance
    z = logits.detach().double()
    if z.shape[2:] != target.shape[-2:]:
        z = upsampled(z, target.shape[-2:])
    v = valid_pixels(logits, target, options)
    plane = v.unsqueeze(1)
    if options.get("mode") == "binary":
        z = torch.cat([torch.zeros_like(z), z], dim=1)
    p = torch.softmax(torch.where(plane, z, 0.0), dim=1) * plane
    if target.is_floating_point():
        q = torch.where(plane, target.double(), 0.0)
        q = q if q.shape[1] == p.shape[1] else torch.cat([1 - q, q], dim=1) * plane
    else:
        labels = torch.where(plane, target.unsqueeze(1).long(), 0)
        q = torch.zeros_like(p).scatter_(1, labels, 1.0) * plane
    geometry = ([1] * proxy.num_layers, [1] * proxy.num_layers, [0] * proxy.num_layers)
    t_p = features(p, proxy.weights, proxy.biases, *geometry, "pre")
    t_q = features(q, proxy.weights, proxy.biases, *geometry, "pre")
    undecided = torch.zeros_like(v)
    reach, largest = 0, []
    for number, (a, b) in enumerate(zip(t_p, t_q, strict=True)):
        reach += proxy.layers[number].kernel_size // 2
        largest.append(max(float(a.abs().max()), float(b.abs().max())))
        limit = UNDECIDED * largest[-1]
        jump = torch.zeros_like(a, dtype=torch.bool)
        if number + 1 < proxy.num_layers or proxy.tap == "post":
            jump |= a.abs() < limit  # the ReLU's mask
        if distance == "l1":
            d = a - b if proxy.tap == "pre" else a.relu() - b.relu()
            # An exact zero comes from equal inputs or two closed ReLUs: no rounding, so it is decided.
            jump |= (d.abs() < limit) & (d != 0) & plane
        near = jump.any(dim=1, keepdim=True).double()
        undecided |= F.max_pool2d(near, 2 * reach + 1, stride=1, padding=reach).squeeze(1) > 0
    return undecided, largest


def read_by(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """[N,h,w] bool: the small logits that any of these pixels [N,H,W] is made of, where logits are scaled up."""
    if tuple(pixels.shape[1:]) == size:
        return pixels
    small = torch.zeros(pixels.shape[0], 1, *size, dtype=torch.float64, requires_grad=True)
    (d_small,) = torch.autograd.grad(upsampled(small, pixels.shape[1:]), small, pixels.unsqueeze(1).double())
    return d_small.squeeze(1) > 0


class Judge:
    """The oracle and the budget of one problem; `check` holds a backend's outcome against them.

    Attributes:
        decided: bool, of the logits' size [N,H,W], where gradients are compared.
    """

    def __init__(self, logits: Tensor, target: Tensor, proxy: EdgeProxy, **options: Any) -> None:
        wide_target = target.double() if target.is_floating_point() else target
        self.oracle = loss_and_grad(logits.detach().double(), wide_target, proxy, "reference", **options)
        self.reference = loss_and_grad(logits, target, proxy, "reference", **options)
        undecided, largest = undecided_pixels(logits, target, proxy, options)
        self.decided = ~read_by(undecided, (logits.shape[2], logits.shape[3]))
        self.floor = FLOOR[logits.dtype]
        counted = int(valid_pixels(logits, target, options).sum())
        self.slack = _cancellation(logits, counted, options)
        # One small logit sums that of so many pixels.
        self.slack *= (target.shape[-1] * target.shape[-2] / (logits.shape[2] * logits.shape[3])) ** 0.5
        self.value_slack = _feature_rounding(largest, proxy, counted, options)

    def check(self, ours: Outcome, who: str = "cpu") -> None:
        """AssertionError where the value or a decided pixel's gradient is outside the budget."""
        assert ours.grad.dtype == self.reference.grad.dtype
        assert ours.loss.dtype == torch.float32
        if not torch.isfinite(self.reference.loss).all():  # empty="nan" with nothing to look at, logits of -inf
            torch.testing.assert_close(ours.loss, self.reference.loss, rtol=1e-5, atol=1e-6, equal_nan=True)
            torch.testing.assert_close(ours.grad.isnan(), self.reference.grad.isnan())
            return
        assert torch.isfinite(ours.grad).all(), f"{who}: gradient not finite"
        self._within("loss", who, ours.loss, self.reference.loss, self.oracle.loss, self.value_slack)
        mask = self.decided.unsqueeze(1)
        grads = (ours.grad * mask, self.reference.grad * mask, self.oracle.grad * mask)
        self._within("gradient", who, *grads, slack=self.slack)

    def _within(self, what: str, who: str, ours: Tensor, reference: Tensor, exact: Tensor, slack: float = 0.0) -> None:
        norm = float(exact.norm())
        budget = 2 * float((reference.double() - exact).norm()) + self.floor * norm + slack
        error = float((ours.double() - exact).norm())
        assert error <= budget, f"{who}: {what}: error {error:.3g} above the budget {budget:.3g}, norm {norm:.3g}"


def _cancellation(logits: Tensor, counted: int, options: dict[str, Any]) -> float:
    """One rounding of g w p and of g w q, whose difference is cross-entropy's gradient: with one class it is all
    that is left, and the norm of the exact gradient, zero, says nothing of it. L2 over all pixels."""
    if logits.shape[1] > 1 or counted == 0:
        return 0.0
    weight = options.get("weight")
    largest, least = (1.0, 1.0) if weight is None else (float(weight.max()), float(weight.min()))
    divisor = counted * least if options.get("reduction", "mean") == "mean" else 1.0
    g = float(options.get("lambda_ce", 1.0)) * largest / divisor
    return torch.finfo(torch.float32).eps * g * counted**0.5


def _feature_rounding(largest: list[float], proxy: EdgeProxy, counted: int, options: dict[str, Any]) -> float:
    """One float32 rounding of the features of a pixel, in the loss: the difference of two nearly equal features, and
    a loss made of few of them, cannot be more exact, however small they are. L2 over the map, or of the scalar."""
    scales = proxy.layer_scales(options.get("distance") or proxy.distance)
    weights = options.get("layer_weights") or proxy.layer_weights
    pixel = sum(w * t / s for w, t, s in zip(weights, largest, scales, strict=True))
    pixel *= torch.finfo(torch.float32).eps * float(options.get("lambda_semeda", 0.1))
    return pixel * {"mean": 1.0, "sum": float(counted), "none": counted**0.5}[options.get("reduction", "mean")]
