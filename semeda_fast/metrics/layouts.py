"""What the shapes of predictions and targets mean: images or volumes, labels, logits or planes.

Space is H,W for an image and D,H,W for a volume. `check` reads metadata alone; `pieces` cuts a batch into single
images (or whole volumes), so that what is needed at a time does not grow with the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import is_integer

MODES = ("multiclass", "multilabel")


@dataclass(frozen=True)
class Layout:
    """How a metric reads its tensors: the settings that decide it."""

    num_classes: int
    mode: str
    slice_dim: int
    spacing: tuple[float, ...] | None

    def check(self, preds: Tensor, target: Tensor) -> Tensor:
        """The target without its one channel, once ranks, shapes, dtypes and devices fit.

        Raises:
            TypeError: no tensor, or a dtype that does not fit.
            ValueError: a rank, a size or a device that does not fit.
        """
        for name, value in (("preds", preds), ("target", target)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if preds.device != target.device:
            raise ValueError(f"preds and target must be on one device, got {preds.device} and {target.device}")
        target = self._planes(preds, target) if self.mode == "multilabel" else self._labels(preds, target)
        if self.spacing is not None and not self._is_volume(target):
            raise ValueError(
                f"spacing={self.spacing} measures volumes, and target is images, of shape {tuple(target.shape)}; "
                "leave spacing out for images, or add the depth with unsqueeze"
            )
        return target

    def pieces(self, preds: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(pred [1, *space] or [1, C, *space], target [1, *space]) of each image, slice, or volume under `spacing`.

        preds [N, *space] or [N, C, *space], target [N, *space].
        """
        dim = self.slice_dim - 5  # from the end: D is -3 with a channel and without one
        for index in range(target.shape[0]):
            pred, labels = preds[index : index + 1], target[index : index + 1]
            if labels.dim() == 3 or self.spacing is not None:
                yield pred, labels
            else:
                yield from zip(pred.unbind(dim), labels.unbind(dim), strict=True)

    def _is_volume(self, target: Tensor) -> bool:
        return target.dim() == (5 if self.mode == "multilabel" else 4)

    def _labels(self, preds: Tensor, target: Tensor) -> Tensor:
        """Multiclass: labels [N,H,W] or [N,D,H,W], of predictions with or without classes."""
        rank = self._rank(preds)
        logits = preds.is_floating_point() and rank is not None
        if rank is not None and target.dim() == rank + 2 and target.shape[1] == 1:
            target = target.squeeze(1)
        elif (
            target.dim() not in (3, 4)
            or (target.dim() == 4 and rank == 2)
            or (logits and target.dim() != preds.dim() - 1)
        ):
            volume = rank == 3 or target.dim() == 5
            wanted = "labels [N,D,H,W] or [N,1,D,H,W]" if volume else "labels [N,H,W] or [N,1,H,W]"
            raise ValueError(f"target must be {wanted}, got shape {tuple(target.shape)}{self._target_hint(target)}")
        if not is_integer(target):
            raise TypeError(f"target must have an integer dtype, got {target.dtype}")
        image = target.dim() == 3
        classes, plain = ("[N,C,H,W]", "[N,H,W]") if image else ("[N,C,D,H,W]", "[N,D,H,W]")
        if logits:
            self._check_channels(preds, classes)
        elif preds.dim() == target.dim() + 1:
            hint = ", preds.squeeze(1)" if preds.shape[1] == 1 else ""
            raise TypeError(
                f"preds {classes} must be floating-point logits, got {preds.dtype}; pass labels as {plain}{hint}"
            )
        elif preds.dim() != target.dim():
            raise ValueError(f"preds must be labels {plain} or logits {classes}, got shape {tuple(preds.shape)}")
        elif not is_integer(preds):
            raise TypeError(
                f"preds {plain} must be labels of an integer dtype, got {preds.dtype}; pass logits as {classes}"
            )
        space = target.dim() - 1
        if (preds.shape[0], *preds.shape[-space:]) != tuple(target.shape):
            way = "bilinear" if image else "trilinear"
            raise ValueError(
                f"preds and target must agree in N, {'H and W' if image else 'D, H and W'}, "
                f"got {tuple(preds.shape)} and {tuple(target.shape)}; resize smaller logits first: "
                f"torch.nn.functional.interpolate(logits, target.shape[-{space}:], mode='{way}')"
            )
        if not logits and not image and preds.shape[1] == self.num_classes and _one_hot(preds) and _one_hot(target):
            raise ValueError(
                f"preds and target of shape {tuple(target.shape)} would be volumes of {self.num_classes} slices, and "
                "are one-hot; pass labels, preds.argmax(1) and target.argmax(1)"
            )
        return target

    def _rank(self, preds: Tensor) -> int | None:
        """Dimensions of space that predictions of labels have, by their shape alone; None where they have none."""
        rank = preds.dim() - (2 if preds.is_floating_point() else 1)
        return rank if rank in (2, 3) else None

    def _target_hint(self, target: Tensor) -> str:
        if target.dim() == 2:
            return "; add the batch dimension with target.unsqueeze(0)"
        if target.dim() == 4 and target.shape[1] == self.num_classes:
            return (
                "; for one-hot maps pass target.argmax(1), for overlapping masks make the metric of mode='multilabel'"
            )
        if target.dim() == 4:
            return "; volumes need logits [N,C,D,H,W] or labels [N,D,H,W]"
        return ""

    def _check_channels(self, preds: Tensor, classes: str) -> None:
        if preds.shape[1] == self.num_classes:
            return
        hint = "; for one channel of a binary network pass labels, (preds[:, 0] > 0).long()"
        raise ValueError(
            f"preds {classes} must have C = num_classes = {self.num_classes} channels, got shape {tuple(preds.shape)}"
            f"{hint if preds.shape[1] == 1 and self.num_classes == 2 else ''}"
        )

    def _planes(self, preds: Tensor, target: Tensor) -> Tensor:
        """Multilabel: planes [N,C,H,W] or [N,C,D,H,W] on both sides."""
        for name, value in (("preds", preds), ("target", target)):
            if value.dim() not in (4, 5) or value.shape[1] != self.num_classes:
                lone = self.num_classes == 1 and value.dim() in (3, 4)
                hint = (
                    f"; add the plane dimension with {name}.unsqueeze(1)"
                    if lone
                    else "; labels of one map need mode='multiclass'"
                    if value.dim() in (3, 4) and (value.dim() == 3 or value.shape[1] == 1)
                    else ""
                )
                raise ValueError(
                    f"{name} must be planes [N,C,H,W] or [N,C,D,H,W] with C = num_classes = {self.num_classes}, "
                    f"got shape {tuple(value.shape)}{hint}"
                )
        if target.dtype != torch.bool and not is_integer(target):
            raise TypeError(
                f"target must be planes of bool or an integer dtype, got {target.dtype}; "
                "pass target.long() where it holds 0, 1 and ignore_index, target > 0.5 where it holds probabilities"
            )
        if preds.is_complex():
            raise TypeError(f"preds must be planes of bool, integers or floating-point logits, got {preds.dtype}")
        if preds.shape != target.shape:
            way = "bilinear" if target.dim() == 4 else "trilinear"
            raise ValueError(
                f"preds and target must have one shape, got {tuple(preds.shape)} and {tuple(target.shape)}; "
                f"resize smaller logits first: torch.nn.functional.interpolate(logits, target.shape[2:], mode='{way}')"
            )
        return target


def _one_hot(labels: Tensor) -> bool:
    """Whether the first of [N,D,H,W] has a single 1 at each place, and 0 besides; looked at where D = C alone."""
    first = labels[:1].to(torch.int64)
    if first.numel() == 0:
        return False
    return bool((first >= 0).all() & (first.sum(1) == 1).all())
