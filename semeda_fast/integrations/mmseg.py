"""The loss in MMSegmentation's registry, `type="SemedaLoss"`, with the call that its decode heads make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import loss as plain_loss
from ..counts import LossCounts
from ..errors import missing_extra

try:
    from mmengine.registry import MODELS  # the root: every OpenMMLab project finds what is in it
except ImportError:
    raise missing_extra("semeda_fast.integrations.mmseg", "mmengine", "mmseg") from None

__all__ = ["SemedaLoss"]

REDUCTIONS = ("none", "mean", "sum")


@MODELS.register_module()
class SemedaLoss(nn.Module):
    """`semeda_fast.SemedaLoss` as a `loss_decode`.

    Means are over pixels that are not void, as with `avg_non_ignore=True`; a sampler's weights count in the divisor.

    Args:
        num_classes: of the decode head.
        loss_weight: multiplies the loss.
        loss_name: in the log; it must hold "loss", or else it would not be trained on.
        options: of `semeda_fast.SemedaLoss`: proxy, lambda_ce, lambda_semeda, weight (class weights), ...
            `ignore_index` comes with the call.

    Raises:
        ValueError: a loss_name without "loss"; and what `semeda_fast.SemedaLoss` raises.

    Example:
        >>> custom_imports = dict(imports=["semeda_fast.integrations.mmseg"])
        >>> loss_decode = dict(type="SemedaLoss", num_classes=19)
    """

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        loss_weight: float = 1.0,
        loss_name: str = "loss_semeda",
        **options: Any,
    ) -> None:
        super().__init__()
        if "loss" not in loss_name:
            raise ValueError(f"loss_name must hold 'loss', or mmengine logs it alone, got {loss_name!r}")
        self.criterion = plain_loss.SemedaLoss(num_classes=num_classes, **options)
        self.loss_weight = loss_weight
        self._loss_name = loss_name

    def forward(
        self,
        pred: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
        ignore_index: int | None = 255,
    ) -> Tensor:
        """The loss, [], or with reduction "none" of the label's shape.

        Args:
            pred: logits [N,C,H,W].
            label: [N,H,W] integers.
            weight: [N,H,W] >= 0, of each pixel.
            avg_factor: what the mean divides by in the place of the sum of weights of valid pixels.
            reduction_override: "none", "mean" or "sum" in the place of the option `reduction`.
            ignore_index: the void label; None is -100.

        Raises:
            ValueError: another reduction, or an avg_factor without a mean; and what `semeda_fast.SemedaLoss` raises.
        """
        if reduction_override not in (None, *REDUCTIONS):
            raise ValueError(f"reduction_override must be None or one of {REDUCTIONS}, got {reduction_override!r}")
        criterion = self.criterion
        before = criterion.reduction
        reduction = reduction_override or before
        counts = None
        if avg_factor is not None:
            if reduction != "mean":
                raise ValueError(f"avg_factor divides a mean, and the reduction is {reduction!r}; leave avg_factor out")
            divisor = torch.as_tensor(avg_factor, dtype=torch.float32, device=pred.device)
            counts = LossCounts(divisor, divisor)
        if ignore_index is None:
            ignore_index = -100
        if criterion.ignore_index != ignore_index:
            criterion.ignore_index = ignore_index
        if reduction == before:
            loss = criterion(pred, label, pixel_weight=weight, counts=counts)
        else:
            criterion.reduction = reduction
            try:
                loss = criterion(pred, label, pixel_weight=weight, counts=counts)
            finally:
                criterion.reduction = before
        return loss if self.loss_weight == 1 else self.loss_weight * loss

    @property
    def loss_name(self) -> str:
        """The name in the log."""
        return self._loss_name
