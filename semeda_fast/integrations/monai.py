"""The loss in MONAI's engines: labels [N,1,...] of any dtype, MetaTensors, beside a loss of MONAI's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..loss import SemedaLoss
from ..outputs import MultiScaleLoss

__all__ = ["MonaiLoss"]


class MonaiLoss(nn.Module):
    """A criterion as `SupervisedTrainer(loss_function=...)` and `DeepSupervisionLoss` call it.

    MONAI's volumes end in the axis that scanners step along: [N,C,H,W,D]. For slices along it build the criterion with
    `slice_dim=4`.

    Args:
        criterion: a SemedaLoss, or a MultiScaleLoss for networks with several outputs.
        beside: another loss, called as beside(logits, labels) and added. Build the criterion with `lambda_ce=0` where
            that one has a cross-entropy, as DiceCELoss does.

    Shape:
        input [N,C,H,W] or [N,C,H,W,D], or several of them for a MultiScaleLoss; target [N,1,...] or [N,...] whole
        numbers, float or integer; float targets [N,C,...] are distributions. The loss is a plain 0-d tensor.

    Raises:
        TypeError: `criterion` is of another class.
        ValueError: labels that are no whole numbers (on the CPU; elsewhere an asynchronous assert); and what
            `criterion` raises.

    Example:
        >>> criterion = SemedaLoss(num_classes=3, lambda_ce=0, slice_dim=4)
        >>> loss_function = MonaiLoss(criterion, beside=DiceCELoss(to_onehot_y=True, softmax=True))
        >>> trainer = SupervisedTrainer(..., loss_function=loss_function)
    """

    def __init__(
        self, criterion: SemedaLoss | MultiScaleLoss, *, beside: Callable[[Any, Any], Tensor] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(criterion, (SemedaLoss, MultiScaleLoss)):
            raise TypeError(f"criterion must be a SemedaLoss or a MultiScaleLoss, got {type(criterion).__name__}")
        self.criterion = criterion
        self.beside = beside

    def forward(self, input: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """The loss of `input` against `target`, []."""
        logits = plain(input) if isinstance(input, Tensor) else [plain(each) for each in input]
        loss = self.criterion(logits, self._labels(plain(target)))
        return loss if self.beside is None else loss + plain(self.beside(input, target))

    def _labels(self, target: Tensor) -> Tensor:
        """Whole numbers where the loss reads labels; MONAI's transforms hand them over as floats."""
        inner = self.criterion.criterion if isinstance(self.criterion, MultiScaleLoss) else self.criterion
        if not target.is_floating_point() or inner.mode != "multiclass" or target.shape[1] != 1:
            return target
        labels = target.to(torch.int16)
        whole = (labels == target).all()
        if target.device.type == "cpu" and not whole:
            raise ValueError("target [N,1,...] must hold whole numbers; resample labels with mode='nearest'")
        torch._assert_async(whole, "target [N,1,...] must hold whole numbers; resample labels with mode='nearest'")
        return labels


def plain(tensor: Tensor) -> Tensor:
    """A MetaTensor as the tensor that it is; it keeps its place in the graph."""
    return tensor.as_subclass(Tensor)
