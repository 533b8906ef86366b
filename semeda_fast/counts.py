"""What means are divided by, as numbers of their own: they add up over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends import not_ignored
from .folding import of_pixels
from .options import LossOptions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class LossCounts:
    """The divisors of a mean, [] each, on the target's device.

    Attributes:
        ce_weight: of cross-entropy: the sum over valid pixels of class weight times pixel weight.
        valid: of the SEMEDA term: the sum of pixel weights over valid pixels.

    Example:
        >>> counts = sum(criterion.counts(target) for _, target in micro_batches)
        >>> for image, target in micro_batches:
        ...     criterion(network(image), target, counts=counts).backward()
    """

    ce_weight: Tensor
    valid: Tensor

    def __add__(self, other: Any) -> LossCounts:
        if not isinstance(other, LossCounts):
            return NotImplemented
        return LossCounts(self.ce_weight + other.ce_weight, self.valid + other.valid)

    def __radd__(self, other: Any) -> LossCounts:
        """For `sum`, which begins with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def all_reduce(self, group: ProcessGroup | None = None, *, gradients: str = "averaged") -> LossCounts:
        """The counts of the whole batch, of which each rank has a part; without torch.distributed they stay.

        Args:
            group: the ranks, default all.
            gradients: "averaged" over the ranks, as DDP and FSDP do: the sum is then divided by the number of ranks, so
                that the averaged gradient is that of the whole batch. "summed": it is not.

        Raises:
            ValueError: `gradients` is something else.
        """
        if gradients not in ("averaged", "summed"):
            raise ValueError(f"gradients must be 'averaged' or 'summed', got {gradients!r}")
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        both = torch.stack([self.ce_weight.double(), self.valid.double()])
        torch.distributed.all_reduce(both, group=group)
        if gradients == "averaged":
            both /= torch.distributed.get_world_size(group)
        return LossCounts(both[0], both[1])


def counts_of(
    target: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    pixel_weight: Tensor | None,
    options: LossOptions,
) -> LossCounts:
    """The counts of a target, as the loss has it before anything is folded.

    Args:
        weight: [K] class weights, of labels that exclude each other.
    """
    soft, many = target.is_floating_point(), options.mode == "multilabel"
    one_channel = options.mode == "binary" and soft and target.shape[1] == 1
    if soft and not many and not one_channel:
        v = torch.ones((target.shape[0], *target.shape[2:]), dtype=torch.bool, device=target.device)
    else:
        if one_channel:
            target = target.squeeze(1)
        known = [tensor for tensor in (valid, pixel_weight) if tensor is not None]
        if not many and target.shape[1] == 1 and (target.dim() == 5 or (known and known[0].dim() < target.dim())):
            target = target.squeeze(1)
        v = target != options.ignore_index if soft else not_ignored(target, options.ignore_index)

    shape = tuple(v.shape)
    if valid is not None:
        v = v & of_pixels("valid_mask", valid, shape, many)
    shares = None
    if pixel_weight is not None:
        shares = torch.where(v, of_pixels("pixel_weight", pixel_weight, shape, many).detach().float(), 0.0)
    count = v.sum() if shares is None else shares.sum()
    if weight is None or soft or many:
        return LossCounts(count.to(torch.float32), count)
    of_label = weight.float()[torch.where(v, target, 0).long()]
    return LossCounts(torch.where(v, of_label if shares is None else of_label * shares, 0.0).sum(), count)
