"""The loss in `transformers.Trainer`: the gradient of the whole batch, over micro-batches and processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..counts import LossCounts
from ..errors import missing_extra
from ..loss import SemedaLoss
from ..outputs import MultiScaleLoss, named_logits

try:
    import transformers  # noqa: F401
except ImportError:
    raise missing_extra("semeda_fast.integrations.transformers", "transformers", "transformers") from None

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["compute_loss_func", "count_whole_batches"]

NO_LABEL = -100  # what the Trainer does not count


class TrainerLoss:
    """A criterion with the call that the Trainer makes; `compute_loss_func` makes one."""

    def __init__(self, criterion: SemedaLoss | MultiScaleLoss) -> None:
        if not isinstance(criterion, (SemedaLoss, MultiScaleLoss)):
            raise TypeError(f"criterion must be a SemedaLoss or a MultiScaleLoss, got {type(criterion).__name__}")
        self.criterion = criterion
        self.loss = criterion.criterion if isinstance(criterion, MultiScaleLoss) else criterion
        if self.loss.reduction != "mean":
            raise ValueError(f"the Trainer needs one number, so reduction='mean', got {self.loss.reduction!r}")
        self.gradients: str | None = None  # of LossCounts.all_reduce, once whole batches are counted
        self.whole: LossCounts | None = None  # of the batch in training
        self._checked: set[bool] = set()

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The part of one micro-batch in the mean over the whole batch, [].

        Args:
            outputs: of the network: logits of any size, as `MultiScaleLoss` takes them; a SemedaLoss takes `logits`.
            labels: [N,H,W] integers, or another target of the criterion.
            num_items_in_batch: the Trainer's count of labels that are not -100, over all micro-batches.

        Raises:
            ValueError: no labels; or the whole batch is not known, and `count_whole_batches` has to be called.
        """
        if labels is None:
            raise ValueError("the batch holds no 'labels'; let the dataset return {'pixel_values': ..., 'labels': ...}")
        self.criterion.to(labels.device)
        counts = self._counts(labels, num_items_in_batch)
        if isinstance(self.criterion, MultiScaleLoss):
            return self.criterion(outputs, labels, counts=counts)
        found = named_logits(outputs)
        logits = found.get("logits", next(iter(found.values())))  # a tuple begins with them
        return cast(Tensor, self.criterion.scaled(logits, labels, counts=counts))

    def of_batches(self, batches: list[dict[str, Any]], device: torch.device) -> LossCounts | None:
        """The counts of all micro-batches, of all processes."""
        self.criterion.to(device)
        counts = [self.loss.counts(batch["labels"].to(device)) for batch in batches if "labels" in batch]
        return sum(counts[1:], counts[0]).all_reduce(gradients=self.gradients or "averaged") if counts else None

    def _counts(self, labels: Tensor, num_items: Tensor | int | None) -> LossCounts | None:
        training = torch.is_grad_enabled()
        if self.gradients is not None:
            return self.whole if training else self.loss.counts(labels).all_reduce(gradients=self.gradients)
        if num_items is None:
            return None
        if isinstance(num_items, Tensor) and num_items.dim():
            raise ValueError("one process with several GPUs (DataParallel) has no mean; start one a GPU by torchrun")
        if self.loss.ignore_index == NO_LABEL and self.loss.weight is None and not labels.is_floating_point():
            valid = torch.as_tensor(num_items, device=labels.device)
            return LossCounts(valid, valid)
        if training not in self._checked:  # once: it waits for the device
            if int(num_items) != int(labels.ne(NO_LABEL).sum()):
                raise ValueError(
                    "this is a part of a batch (accumulation, or several processes), and the Trainer's "
                    f"num_items_in_batch counts neither the void label {self.loss.ignore_index} nor class weights; "
                    "call semeda_fast.integrations.transformers.count_whole_batches(trainer) before trainer.train()"
                )
            self._checked.add(training)
        return None


def compute_loss_func(criterion: SemedaLoss | MultiScaleLoss) -> Callable[..., Tensor]:
    """For `Trainer(compute_loss_func=...)`: the network's own loss is not computed.

    Logits are scaled to the labels inside the loss, the criterion moves to the labels' device, and void counts nowhere.

    Args:
        criterion: with reduction="mean". With `gradient_accumulation_steps` or several processes, and void other than
            -100 or class weights, `count_whole_batches(trainer)` has to be called, too; else the first step raises.

    Raises:
        TypeError, ValueError: a criterion of another class, or one whose reduction is not "mean".

    Example:
        >>> criterion = SemedaLoss(num_classes=21, ignore_index=255)
        >>> trainer = Trainer(model=model, args=args, compute_loss_func=compute_loss_func(criterion), ...)
        >>> count_whole_batches(trainer)
        >>> trainer.train()
    """
    return TrainerLoss(criterion)


def count_whole_batches(trainer: Trainer) -> None:
    """Let means divide by the counts of the whole batch: over micro-batches and processes, void and class weights in.

    The Trainer fetches all micro-batches of a step before the first one runs; their labels are counted there.

    Args:
        trainer: made with `compute_loss_func=compute_loss_func(criterion)`.

    Raises:
        TypeError: it was made with another loss.
    """
    loss = trainer.compute_loss_func
    if not isinstance(loss, TrainerLoss):
        raise TypeError(
            f"the trainer's compute_loss_func must be compute_loss_func(criterion), got {type(loss).__name__}"
        )
    if loss.gradients is not None:
        return
    # Where the Trainer averages tokens over devices, it multiplies the loss by their number.
    loss.gradients = "summed" if trainer.args.average_tokens_across_devices else "averaged"
    fetch = trainer.get_batch_samples

    def get_batch_samples(epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, num_items = fetch(epoch_iterator, num_batches, device)
        loss.whole = loss.of_batches(batches, device)
        return batches, num_items

    trainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]
