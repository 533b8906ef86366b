"""Small masks for the tests of train_proxy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from semeda_fast import EdgeProxy

# As little as shows what a test is about.
TINY: dict[str, Any] = {
    "widths": (4, 6),
    "steps": 5,
    "batch_size": 4,
    "crop_size": 12,
    "progress": False,
}


def scenes(count: int, size: int = 40, num_classes: int = 4, *, seed: int = 0) -> Tensor:
    """Overlapping rectangles of random classes, [count,size,size] int64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    masks = torch.zeros(count, size, size, dtype=torch.int64)
    for mask in masks:
        for _ in range(6):
            y, x = draw(0, size - 6), draw(0, size - 6)
            mask[y : y + draw(5, size // 2), x : x + draw(5, size // 2)] = draw(0, num_classes)
    return masks


def weights(proxy: EdgeProxy) -> list[Tensor]:
    return [*proxy.weights, *proxy.biases]


def same(a: EdgeProxy, b: EdgeProxy) -> bool:
    """Bit for bit, in all that was learnt and measured."""
    return (
        all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))
        and a.scales == b.scales
        and a.quality == b.quality
    )


class Items(Dataset[Any]):
    """Any items as a Dataset."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def write_folder(folder: Path, masks: Tensor) -> Path:
    folder.mkdir()
    for number, mask in enumerate(masks):
        Image.fromarray(mask.numpy().astype(np.uint8)).save(folder / f"{number:03}.png")
    return folder
