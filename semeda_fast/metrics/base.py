"""What the boundary metrics share: settings, counts per class, one image at a time, the average over classes."""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from .inputs import bad_labels, check_tensors, choice, class_count, to_int64, void_label


class BoundaryMetric(Metric):
    """Counts of pixels per class, int64 [rows, num_classes], under a name that spells what they depend on.

    torchmetrics lets the metrics of a collection share their states for good where states of one name were equal
    after the first batch. So the name holds the class and the settings that decide what is counted, and these
    are fixed. A subclass may count by options that nothing here knows of: its instances never share.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    num_classes: int
    ignore_index: int

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int | None,
        average: str,
        rows: int,
        settings: dict[str, Any],
        **kwargs: Any,
    ):
        """`settings`: what decides about the counts, beside num_classes and ignore_index; each becomes an attribute."""
        super().__init__(**kwargs)
        settings = {"num_classes": class_count(num_classes), "ignore_index": void_label(ignore_index), **settings}
        for name, value in settings.items():
            setattr(self, name, value)
        self.average = choice("average", average, ("macro", "none"))
        self._settings = settings
        self._state = _state_name(type(self), settings)
        self.add_state(self._state, torch.zeros(rows, self.num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        if not _is_ours(type(self)):
            # Small numbers: torchmetrics compares states with a relative tolerance.
            self.add_state(_INSTANCE, torch.tensor(list(uuid.uuid4().bytes)), dist_reduce_fx="max")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_settings", ()):
            kind = type(self).__name__
            raise AttributeError(
                f"{name} is fixed, since the counts depend on it; make a new {kind}(..., {name}={value!r})"
            )
        super().__setattr__(name, value)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch: preds [N,H,W] labels or [N,C,H,W] logits, target [N,H,W] labels."""
        check_tensors(preds, target, self.num_classes)
        if target.numel() == 0:
            return
        # Image by image: what one needs stays in the processor's cache, and is all the memory needed.
        counts = [self._count_image(*self._image(preds, target, index)) for index in range(target.shape[0])]
        self._counts = self._counts + torch.stack(counts).sum(dim=0).to(self._counts.device)

    @abstractmethod
    def _count_image(self, pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """int64 [rows, num_classes] for int64, int64 and bool [1,H,W]; labels at void pixels are 0."""

    @property
    def _counts(self) -> Tensor:
        return getattr(self, self._state)

    @_counts.setter
    def _counts(self, counts: Tensor) -> None:
        setattr(self, self._state, counts)

    def _image(self, preds: Tensor, target: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """(pred, target, valid) of one image, as `_count_image` takes them; ValueError for a label that is no class."""
        pred, labels = preds[index : index + 1], to_int64(target[index : index + 1])
        valid = labels != self.ignore_index
        labels = labels.where(valid, 0)
        if self._out_of_range(labels):
            raise self._bad_labels("target", target, target)
        if pred.dim() == 4:
            return pred.argmax(dim=1).where(valid, 0), labels, valid
        pred = to_int64(pred).where(valid, 0)
        if self._out_of_range(pred):
            raise self._bad_labels("preds (at valid pixels)", preds, target)
        return pred, labels, valid

    def _out_of_range(self, labels: Tensor) -> bool:
        low, high = labels.aminmax()
        return bool((low < 0) | (high >= self.num_classes))

    def _bad_labels(self, name: str, labels: Tensor, target: Tensor) -> ValueError:
        """The error for labels of a batch."""
        pairs = [(to_int64(image), to_int64(its)) for image, its in zip(labels, target, strict=True)]
        valid = [image[its != self.ignore_index] for image, its in pairs]
        return bad_labels(name, valid, self.num_classes, self.ignore_index)

    def _count(self, labels: Tensor, where: Tensor) -> Tensor:
        """Pixels of each class among those marked: labels, where [1,H,W] -> int64 [num_classes]."""
        counts = torch.bincount(labels.where(where, self.num_classes).flatten(), minlength=self.num_classes + 1)
        return counts[: self.num_classes]

    def _average(self, scores: Tensor) -> Tensor:
        """Macro mean over the classes that are not NaN, or the [num_classes] scores themselves."""
        foreign = [name for name in vars(self) if name.startswith(_PREFIX) and name != self._state]
        if foreign:
            raise RuntimeError(
                "compute_groups of a MetricCollection puts metrics that count different things into one group with "
                f"{self._description()}; leave compute_groups out, and those that can will share"
            )
        if 0 <= self.ignore_index < self.num_classes:
            # Such a class is never in the target, so a score for it would always be 0.
            scores = scores.clone()
            scores[self.ignore_index] = torch.nan
        return scores if self.average == "none" else scores.nanmean()

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the counts of another instance of the same metric and settings (or its `metric_state`)."""
        if isinstance(incoming_state, BoundaryMetric) and incoming_state._state != self._state:
            raise ValueError(
                f"only counts of equal settings can be merged: this is {self._description()}, "
                f"the other is {incoming_state._description()}"
            )
        super().merge_state(incoming_state)
        self._computed = None  # torchmetrics 1.9 would go on returning the result cached before the merge

    def _description(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._settings.items() if value is not None)
        return f"{type(self).__name__}({options})"

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        """Counts move with the module and stay what they are: `set_dtype` would round them, `to_empty` lose them."""
        ours = {name: default for name, default in self._defaults.items() if name in (self._state, _INSTANCE)}
        super()._apply(fn, exclude_state=[*exclude_state, *ours])
        for name, default in ours.items():
            assert isinstance(default, Tensor)
            self._defaults[name] = _moved(default, fn)
            setattr(self, name, _moved(getattr(self, name), fn))
        self._computed = None  # a score in another dtype
        return self


_PREFIX = "counts_of_"
_INSTANCE = "instance_bytes"


def _is_ours(kind: type) -> bool:
    return kind.__module__.rpartition(".")[0] == __package__


def _state_name(kind: type, settings: dict[str, Any]) -> str:
    """An identifier, the same in every process; different for different settings."""
    values = [f"{name}_{value!r}" for name, value in settings.items()]
    return _PREFIX + "_".join([kind.__name__, *values]).translate({ord("."): "p", ord("-"): "m", ord("+"): None})


def _moved(counts: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Counts on the device to which `fn` takes them, with their values and dtype."""
    moved = fn(counts)
    if moved is counts:
        return counts
    if counts.is_meta:  # made on the meta device, where nothing was counted
        return torch.zeros_like(counts, device=moved.device)
    return counts.to(moved.device)


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole in float32, NaN where whole is 0."""
    return part.to(torch.float32) / whole.to(torch.float32)
