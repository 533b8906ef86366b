"""A trainer for nnU-Net v2: its own Dice + cross-entropy, and the SEMEDA term beside them at each supervised level."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import missing_extra
from ..loss import SemedaLoss
from ..schedule import ramp

try:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
except ImportError as error:
    if error.name and error.name.partition(".")[0] != "nnunetv2":
        raise
    raise missing_extra("semeda_fast.integrations.nnunet", "nnunetv2", "nnunet") from None

__all__ = ["nnUNetTrainerSEMEDA"]


class _Beside(nn.Module):
    """nnU-Net's loss of one level plus the term."""

    def __init__(self, own: nn.Module, semeda: SemedaLoss, ignores: bool) -> None:
        super().__init__()
        self.own = own
        self.semeda = semeda
        self.ignores = ignores  # with regions the last plane of the target marks what is ignored

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = self.own(output, target)
        if self.semeda.lambda_semeda == 0:
            return loss
        if self.semeda.mode == "multilabel" and self.ignores:
            return loss + self.semeda(output, target[:, :-1], valid_mask=target[:, -1] == 0)
        return loss + self.semeda(output, target)


class nnUNetTrainerSEMEDA(nnUNetTrainer):
    """nnU-Net's default trainer with the SEMEDA term; 2d, 3d_fullres, regions and an ignore label.

    Volumes are seen slice by slice along the first axis, which nnU-Net gives the largest spacing. Subclass to change:

    Attributes:
        lambda_semeda: the term's weight.
        semeda_start, semeda_length: the term grows between these parts of the epochs (`semeda_fast.schedule.ramp`).
        semeda_options: more arguments of `SemedaLoss`, such as `proxy`.
    """

    lambda_semeda = 0.1
    semeda_start = 0.1
    semeda_length = 0.1
    semeda_options: dict[str, Any] = {}  # noqa: RUF012  read alone

    def _build_loss(self) -> nn.Module:
        labels = self.label_manager
        options: dict[str, Any] = {
            "num_classes": labels.num_segmentation_heads,
            "lambda_ce": 0.0,
            **self.semeda_options,
        }
        if labels.has_regions:
            options["mode"] = "multilabel"
        elif labels.ignore_label is not None:
            options["ignore_index"] = labels.ignore_label
        self.semeda = SemedaLoss(**options).to(self.device)
        self._set_lambda()
        loss = super()._build_loss()
        ignores = labels.ignore_label is not None
        if self.enable_deep_supervision:
            loss.loss = _Beside(loss.loss, self.semeda, ignores)
            return loss
        return _Beside(loss, self.semeda, ignores)

    def on_train_epoch_start(self) -> None:
        """Set the term's weight of the epoch."""
        super().on_train_epoch_start()
        self._set_lambda()

    def _set_lambda(self) -> None:
        epochs = self.num_epochs
        grown = ramp(self.current_epoch, self.semeda_start * epochs, self.semeda_length * epochs)
        self.semeda.lambda_semeda = self.lambda_semeda * grown
