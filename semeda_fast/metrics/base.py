"""What the boundary metrics share: settings, counts per class, one image at a time, the average over classes."""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from semeda_fast.warn import warn_user

from .inputs import (
    bad_labels,
    choice,
    class_count,
    slice_dimension,
    spacing_of_voxels,
    threshold_of,
    to_int64,
    void_label,
)
from .layouts import MODES, Layout


class BoundaryMetric(Metric):
    """Counts of pixels per class or plane, int64 [rows, num_classes], under a name that spells what they depend on.

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
    mode: str
    threshold: float | None
    slice_dim: int
    spacing: tuple[float, ...] | None

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int | None,
        mode: str,
        threshold: float | None,
        slice_dim: int,
        average: str,
        rows: int,
        settings: dict[str, Any],
        **kwargs: Any,
    ):
        """`settings`: what decides about the counts beside the options named here; each becomes an attribute."""
        super().__init__(**kwargs)
        if mode == "binary":
            raise ValueError(
                "mode must be 'multiclass' or 'multilabel', got 'binary'; for one map per image pass "
                "mode='multilabel', num_classes=1, which scores the foreground alone"
            )
        spacing = spacing_of_voxels(settings.get("spacing"))
        settings = {
            "num_classes": class_count(num_classes, choice("mode", mode, MODES)),
            "ignore_index": void_label(ignore_index, mode),
            "mode": mode,
            "threshold": threshold_of(threshold, mode),
            "slice_dim": slice_dimension(slice_dim, spacing),
            **settings,
            "spacing": spacing,
        }
        for name, value in settings.items():
            setattr(self, name, value)
        self.average = choice("average", average, ("macro", "none"))
        self._settings = settings
        self._layout = Layout(self.num_classes, mode, self.slice_dim, spacing)
        self._labels = 2 if mode == "multilabel" else self.num_classes  # of one label map: a plane holds 0 and 1
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
        """Add a batch, of shapes that the module's text lists."""
        target = self._layout.check(preds, target)
        if target.numel() == 0:
            return
        if self.mode == "multilabel":
            self._warn_of_probabilities(preds)
            planes = [self._count_maps(preds[:, c], target[:, c], f"[:, {c}]")[:, 1:2] for c in range(self.num_classes)]
            counts = torch.cat(planes, dim=1)
        else:
            counts = self._count_maps(preds, target)
        # A plain tensor, where MONAI's labels carry their affine map with them.
        self._counts = self._counts + counts.as_subclass(torch.Tensor).to(self._counts.device)

    def _count_maps(self, preds: Tensor, target: Tensor, which: str = "") -> Tensor:
        """int64 [rows, labels] of a batch of label maps, target [N, *space]; `which` says where errors point."""
        batch = (which, preds, target)
        # Image by image: what one needs stays in the processor's cache, and is all the memory needed.
        pieces = self._layout.pieces(preds, target)
        return reduce(torch.add, (self._count_image(*self._image(*piece, batch)) for piece in pieces))

    def _image(self, pred: Tensor, target: Tensor, batch: tuple[str, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(pred, target, valid) of one image, as `_count_image` takes them; ValueError for a label that is no class."""
        which, all_preds, all_targets = batch
        labels = to_int64(target)
        valid = labels != self.ignore_index
        labels = labels.where(valid, 0)
        if self._out_of_range(labels):
            raise self._bad_labels(f"target{which}", all_targets, all_targets)
        if pred.dim() > labels.dim():
            return pred.argmax(dim=1).where(valid, 0), labels, valid
        if pred.is_floating_point():
            return ((pred > (self.threshold or 0.0)) & valid).long(), labels, valid
        pred = to_int64(pred).where(valid, 0)
        if self._out_of_range(pred):
            raise self._bad_labels(f"preds{which} (at valid pixels)", all_preds, all_targets)
        return pred, labels, valid

    def _warn_of_probabilities(self, preds: Tensor) -> None:
        """Above 0 all of them would be foreground, and no number would show it."""
        if self.threshold != 0 or not preds.is_floating_point():
            return
        first = preds[0]
        if bool(((first >= 0) & (first <= 1)).all() & ((first > 0) & (first < 1)).any()):
            warn_user(
                "preds look like probabilities, since all lie from 0 to 1, and count as foreground above 0 here; "
                "pass threshold=0.5 to the metric, or logits to update"
            )

    @abstractmethod
    def _count_image(self, pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """int64 [rows, labels] for int64, int64 and bool [1, *space]; labels at void pixels are 0."""

    @property
    def _counts(self) -> Tensor:
        return getattr(self, self._state)

    @_counts.setter
    def _counts(self, counts: Tensor) -> None:
        setattr(self, self._state, counts)

    def _out_of_range(self, labels: Tensor) -> bool:
        low, high = labels.aminmax()
        return bool((low < 0) | (high >= self._labels))

    def _bad_labels(self, name: str, labels: Tensor, target: Tensor) -> ValueError:
        """The error for labels of a batch."""
        pairs = [(to_int64(image), to_int64(its)) for image, its in zip(labels, target, strict=True)]
        valid = [image[its != self.ignore_index] for image, its in pairs]
        return bad_labels(name, valid, self._labels, self.ignore_index)

    def _count(self, labels: Tensor, where: Tensor) -> Tensor:
        """Pixels of each label among those marked: labels, where [1, *space] -> int64 [labels]."""
        counts = torch.bincount(labels.where(where, self._labels).flatten(), minlength=self._labels + 1)
        return counts[: self._labels]

    def _average(self, scores: Tensor) -> Tensor:
        """Macro mean over the classes that are not NaN, or the [num_classes] scores themselves."""
        foreign = [name for name in vars(self) if name.startswith(_PREFIX) and name != self._state]
        if foreign:
            raise RuntimeError(
                "compute_groups of a MetricCollection puts metrics that count different things into one group with "
                f"{self._description()}; leave compute_groups out, and those that can will share"
            )
        if self.mode == "multiclass" and 0 <= self.ignore_index < self.num_classes:
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
    values = [f"{name}_{_spelled(value)}" for name, value in settings.items()]
    return _PREFIX + "_".join([kind.__name__, *values]).translate({ord("."): "p", ord("-"): "m", ord("+"): None})


def _spelled(value: Any) -> str:
    return "x".join(map(repr, value)) if isinstance(value, tuple) else str(value)


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
