"""Images and masks for examples/train.py: pairs of files in, batches of tensors out.

What a sample looks like depends on (seed, epoch, index) alone, and the order of the samples on (seed, epoch)
alone. So a run is the same with any number of loader workers or processes, and a resumed run goes on with
exactly the samples that the interrupted one would have seen.
"""

from __future__ import annotations

import signal
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from semeda_fast.advice import FILES, VOID, lost_foreground
from semeda_fast.proxy.masks import pair_files, read_pair

Pair = tuple[Path, Path]
Key = tuple[int, int]  # (epoch, index)

# Colour statistics of ImageNet, which pretrained networks expect and which do no harm to others.
MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


class InputError(ValueError):
    """Something the user gave cannot be used; the text says what was expected, what came and what to do."""


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Image and mask files as (image float32 [3,H,W], target int64 [H,W]).

    Args:
        pairs: (image file, mask file) of each sample.
        num_classes: labels lie in 0 .. num_classes - 1, or are `ignore_index`.
        ignore_index: the label of void pixels.
        size: (H, W) to resize to, or None to keep each file's own size.
        crop: (H, W) of a random crop; smaller images are padded with void.
        augment_seed: seed of flips and crops, or None to read the files as they are.
        cache: keep what was read (at `size`) in memory, for sets that fit.

    Items are asked for as (epoch, index). A wrong label or an unreadable file is an error that names it.
    """

    def __init__(
        self,
        pairs: list[Pair],
        *,
        num_classes: int,
        ignore_index: int,
        size: tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
        augment_seed: int | None = None,
        cache: bool = False,
    ):
        self.pairs = pairs
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.size = size
        self.crop = crop
        self.augment_seed = augment_seed
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        epoch, index = key
        image, mask = self.read(index)
        if self.augment_seed is not None:
            rng = np.random.default_rng([self.augment_seed, epoch, index])
            if rng.random() < 0.5:
                image, mask = image[:, ::-1], mask[:, ::-1]
            if self.crop is not None:
                image, mask = self._random_crop(image, mask, rng)
        return to_tensor(image), torch.from_numpy(mask.astype(np.int64))

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample `index` without augmentation: RGB uint8 [H,W,3] and labels [H,W], at `size`. Not to be written to."""
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        image, mask = read_pair(*self.pairs[index], num_classes=self.num_classes, ignore_index=self.ignore_index)
        if self.size is not None and self.size != image.shape[:2]:
            height, width = self.size
            image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
            mask = _nearest(mask, height, width)
        if self._kept is not None:
            self._kept[index] = image, mask
        return image, mask

    def _random_crop(
        self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        assert self.crop is not None
        height, width = self.crop
        below, right = max(0, height - mask.shape[0]), max(0, width - mask.shape[1])
        if below or right:
            image = np.pad(image, ((0, below), (0, right), (0, 0)))
            mask = np.pad(mask.astype(np.int64), ((0, below), (0, right)), constant_values=self.ignore_index)
        top = rng.integers(mask.shape[0] - height + 1)
        left = rng.integers(mask.shape[1] - width + 1)
        box = np.s_[top : top + height, left : left + width]
        return image[box], mask[box]


class EpochBatches(Sampler[list[Key]]):
    """Shuffled batches of (epoch, index); the last, incomplete batch of an epoch is dropped.

    Call `start_at(epoch, step)` before each pass over the loader; `step` batches of that epoch are left out.
    Accelerate reads `batch_size` and `drop_last` when it deals a share of each batch to every process.
    """

    drop_last = True

    def __init__(self, length: int, batch_size: int, seed: int):
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = length // batch_size
        self.start_at(0, 0)

    def start_at(self, epoch: int, step: int) -> None:
        self._epoch, self._step = epoch, step

    def __len__(self) -> int:
        return self.steps_per_epoch - self._step

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng([self.seed, self._epoch]).permutation(self.length)
        for step in range(self._step, self.steps_per_epoch):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self._epoch, int(index)) for index in chosen]


def make_datasets(args: Namespace) -> tuple[Pairs, Pairs]:
    """The training and validation sets that the command line describes."""
    pairs = pair_files(args.images, args.masks)
    if args.val_images is not None:
        val_pairs = pair_files(args.val_images, args.val_masks)
    else:
        order = np.random.default_rng(args.seed).permutation(len(pairs))
        count = max(1, round(args.val_fraction * len(pairs)))
        val_pairs = [pairs[i] for i in sorted(order[:count])]
        pairs = [pairs[i] for i in sorted(order[count:])]
    pairs, val_pairs = _evenly(pairs, args.limit), _evenly(val_pairs, args.limit)
    if len(pairs) < args.batch_size:
        raise InputError(
            f"{len(pairs)} training images are too few for --batch-size {args.batch_size} "
            "(incomplete batches are dropped); give more images or a smaller batch"
        )
    common: dict[str, Any] = {
        "num_classes": args.num_classes,
        "ignore_index": args.ignore_index,
        "size": args.size,
        "cache": args.cache,
    }
    train_set = Pairs(pairs, crop=args.crop, augment_seed=args.seed, **common)
    val_set = Pairs(val_pairs, **common)
    # A wrong --num-classes shows in the first few masks; find it before the training starts.
    for dataset in (train_set, val_set):
        for index in range(0, len(dataset), max(1, len(dataset) // 8)):
            dataset.read(index)
    if args.num_classes == 2 and args.ignore_index == VOID:
        _look_for_foreground(train_set)
    return train_set, val_set


def _look_for_foreground(dataset: Pairs) -> None:
    """Binary masks of 0 and 255 lose their foreground where 255 is void; reads masks until one holds a 1."""
    found: set[int] = set()
    for index in range(len(dataset)):
        found |= set(np.unique(dataset.read(index)[1]).tolist())
        if 1 in found:
            return
    if VOID in found:
        remedy = lost_foreground(VOID, FILES)
        raise InputError(f"no training mask holds class 1, all {len(dataset)} are of class 0 and void alone{remedy}")


def make_loader(
    dataset: Pairs, batches: Sampler[list[Key]] | list[list[Key]], workers: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    """A loader over `batches`, lists of (epoch, index); it leaves torch's global random numbers alone."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
    )


def class_weights(dataset: Pairs) -> Tensor:
    """[C] weights 1 / ln(1.02 + share of the class's pixels); Paszke et al., ENet, arXiv 1606.02147."""
    counts = np.zeros(dataset.num_classes)
    for index in range(len(dataset)):
        mask = dataset.read(index)[1]
        counts += np.bincount(mask[mask != dataset.ignore_index].astype(np.intp), minlength=dataset.num_classes)
    shares = counts / max(1.0, counts.sum())
    return torch.from_numpy(1 / np.log(1.02 + shares)).float()


def to_tensor(image: np.ndarray) -> Tensor:
    """RGB uint8 [H,W,3] -> normalised float32 [3,H,W]."""
    scaled = (image.astype(np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))


def _evenly(pairs: list[Pair], limit: int | None) -> list[Pair]:
    if limit is None or limit >= len(pairs):
        return pairs
    return [pairs[i * len(pairs) // limit] for i in range(limit)]


def _nearest(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Labels [h,w] -> [height,width]; each new pixel takes the label under its centre."""
    rows = ((np.arange(height) + 0.5) * mask.shape[0] / height).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * mask.shape[1] / width).astype(np.intp)
    return mask[rows[:, None], columns]


def _collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    sizes = {tuple(target.shape) for _, target in samples}
    if len(sizes) > 1:
        found = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise InputError(f"the images of a batch have different sizes ({found}); give --size HxW or --crop HxW")
    return torch.stack([image for image, _ in samples]), torch.stack([target for _, target in samples])


def _ignore_signals(worker: int) -> None:
    # Ctrl-C reaches the loader's workers too; they go on until the main process has saved its checkpoint.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
