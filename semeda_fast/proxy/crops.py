"""What train_proxy draws from: masks of any source, checked; which are held out; random crops of the others."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..advice import FILES, ITEMS, MASKS, advice_on, lost_foreground
from ..backends import not_ignored
from ..errors import missing_extra
from ..shapes import many_masks, one_mask
from .edges import edge_labels
from .masks import MaskFolder, describe_folder

VOID = -1  # the void label in here, whatever the caller's ignore_index is
_CACHE_BYTES = 512 * 2**20


class Masks(Dataset[Tensor]):
    """Any source of masks as int16 [H,W] with VOID for void; checked, and kept in memory while that is small."""

    def __init__(self, source: Any, num_classes: int, ignore_index: int) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        if isinstance(source, (str, os.PathLike)):
            source = MaskFolder(source, num_classes=num_classes, ignore_index=ignore_index)
        elif isinstance(source, Tensor) and source.dim() != 3:
            remedy = many_masks(source.shape)
            raise ValueError(f"masks as a tensor must have the shape [M,H,W], got {list(source.shape)}; {remedy}")
        elif not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
            raise TypeError(
                f"masks must be a tensor [M,H,W], a folder or a Dataset with a length, got {type(source).__name__}"
            )
        if len(source) == 0:
            raise ValueError("there is no mask to train on: masks is empty")
        self.source = source
        self.cache: dict[int, Tensor] = {}
        self.free = _CACHE_BYTES

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        if index in self.cache:
            return self.cache[index]
        item = self.source[index]
        try:
            mask = torch.as_tensor(item)
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"mask {index} must be integer labels [H,W], got {type(item).__name__}; "
                "a Dataset of masks gives masks alone, no (image, mask) pairs"
            ) from error
        if mask.dim() != 2 or mask.numel() == 0 or mask.is_floating_point():
            remedy = one_mask(mask, self.ignore_index)
            raise ValueError(
                f"mask {index} must be integer labels [H,W], got {list(mask.shape)}, {mask.dtype}; {remedy}"
            )
        valid = not_ignored(mask, self.ignore_index)
        labels = torch.where(valid, mask.long(), 0)
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            place = MASKS if isinstance(self.source, Tensor) else ITEMS
            raise ValueError(
                f"mask {index} holds labels from {int(labels.min())} to {int(labels.max())}, expected 0 to "
                f"{self.num_classes - 1} or ignore_index={self.ignore_index}. "
                f"{advice_on(mask, self.num_classes, self.ignore_index, place)}."
            )
        result = torch.where(valid, labels, VOID).to(torch.int16)
        size = result.numel() * result.element_size()
        if size <= self.free:
            self.free -= size
            self.cache[index] = result
        return result


class Subset(Dataset[Tensor]):
    """Some masks of a Masks."""

    def __init__(self, masks: Dataset[Tensor], indices: list[int]) -> None:
        self.masks, self.indices = masks, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return self.masks[self.indices[index]]


class Crops(Dataset[Tensor]):
    """Random crops with flips, int64; crop i depends only on (seed, i), whoever asks for it."""

    def __init__(self, masks: Dataset[Tensor], length: int, size: int, seed: int, *, fill_void: bool) -> None:
        self.masks, self.length, self.size, self.seed, self.fill_void = masks, length, size, seed, fill_void

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        if index >= self.length:
            raise IndexError(index)
        # Not a torch.Generator, which drops all but the low 32 bits of a seed such as (seed << 32) + index.
        rng = np.random.default_rng((self.seed & 0xFFFF_FFFF_FFFF_FFFF, index))

        def draw(below: int) -> int:
            return int(rng.integers(below))

        mask = self.masks[draw(len(self.masks))]  # type: ignore[arg-type]
        size = self.size
        top, left = (draw(max(1, extent - size + 1)) for extent in mask.shape)
        crop = mask[top : top + size, left : left + size]
        if self.fill_void:
            crop = fill_nearest(crop)
        if draw(2):
            crop = crop.flip(1)
        if draw(2):
            crop = crop.flip(0)
        # Masks smaller than a crop are surrounded by void, which the loss shows as zeros, like its padding.
        full = torch.full((size, size), VOID, dtype=torch.int64)
        full[: crop.shape[0], : crop.shape[1]] = crop
        return full


def fill_nearest(mask: Tensor) -> Tensor:
    """Void pixels take the label of the nearest valid pixel (Euclidean); a mask of void alone stays as it is."""
    try:
        from scipy.ndimage import distance_transform_edt
    except ImportError as error:
        raise missing_extra("void='nearest'", "scipy", "train") from error
    void = mask == VOID
    if not bool(void.any()) or bool(void.all()):
        return mask
    rows, columns = distance_transform_edt(void.numpy(), return_distances=False, return_indices=True)
    return mask[torch.from_numpy(rows).long(), torch.from_numpy(columns).long()]


def split(
    masks: Any,
    val_masks: Any,
    num_classes: int,
    val_classes: int,
    ignore_index: int,
    val_fraction: float,
    seed: int,
) -> tuple[Dataset[Tensor], Dataset[Tensor], bool]:
    """Training masks, validation masks, and whether the latter were held out."""
    train = Masks(masks, num_classes, ignore_index)
    if val_masks is not None:
        return train, Masks(val_masks, val_classes, ignore_index), True
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must lie in [0, 1), got {val_fraction}")
    held = min(len(train) - 1, math.ceil(val_fraction * len(train)))
    if held == 0:
        return train, train, False
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(train, sorted(order[held:])), Subset(train, sorted(order[:held])), True


def read_all(masks: Dataset[Tensor], radius: int) -> bool:
    """Read and check every mask; whether one of them holds an edge."""
    found = False
    for index in range(len(masks)):  # type: ignore[arg-type]
        mask = masks[index]
        found = found or bool(edge_labels(mask, radius=radius, ignore_index=VOID).any())
    return found


def check_edges(crops: Crops, masks: Dataset[Tensor], radius: int) -> None:
    """Raise ValueError where no crop of the training holds an edge; the first few tell as a rule."""
    for begin in range(0, len(crops), 16):
        batch = torch.stack([crops[index] for index in range(begin, min(begin + 16, len(crops)))])
        if bool(edge_labels(batch, radius=radius, ignore_index=VOID).any()):
            return
    if read_all(masks, radius):
        raise ValueError(
            f"no crop that the training would see holds an edge, though the masks do: {len(crops)} crops of "
            f"{crops.size}x{crops.size} pixels; raise crop_size, or steps"
        )
    raise ValueError(
        f"the masks hold no edge: in none of the {len(masks)} do two classes stand side by side; "  # type: ignore[arg-type]
        f"check num_classes and masks{_advice(masks)}"
    )


def _advice(masks: Dataset[Tensor]) -> str:
    """What a foreground that is declared void has to do with masks of one class."""
    source = masks.masks if isinstance(masks, Subset) else masks
    if not isinstance(source, Masks):
        return ""
    place = ITEMS
    if isinstance(source.source, MaskFolder):
        place = FILES
    elif isinstance(source.source, Tensor):
        place = MASKS
    return lost_foreground(source.ignore_index, place)


def describe(masks: object) -> str:
    """What the masks are, for the provenance; a folder by its last two names, not by its full path."""
    if isinstance(masks, (str, os.PathLike)):
        return describe_folder(masks)
    if isinstance(masks, Tensor):
        return f"tensor {list(masks.shape)}"
    return getattr(masks, "description", type(masks).__name__)
