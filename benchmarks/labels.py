"""Labels of the workloads: CamVid masks where they are present, drawn scenes, random labels; and what is in them."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semeda_fast.proxy import MaskFolder, SyntheticMasks

KINDS = ("camvid", "scenes", "random")
TILE = 512  # pixels; larger maps are mosaics of tiles, so that the density of edges does not fall with the size
CAMVID_CLASSES = 11
CAMVID_VOID = 11
CAMVID_VARIABLE = "SEMEDA_FAST_CAMVID"  # environment variable that names another folder
_CAMVID_DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data" / "camvid"


@dataclass(frozen=True)
class LabelFacts:
    """What a result says of the labels it was measured with.

    Attributes:
        source: "camvid", "scenes" or "random": what was used, which `note` explains where it was not asked for.
        edge_share: share of pixels whose 3x3 neighbourhood is not one label, void being a label of its own.
        mixed_share: the same for the receptive field of the proxy (7x7 for the default one).
        void_share: share of pixels that hold ignore_index.
        note: why another kind than the one asked for was used; "" otherwise.
    """

    source: str
    edge_share: float
    mixed_share: float
    void_share: float
    note: str = ""


def camvid_folder() -> Path:
    """Where CamVid is looked for: $SEMEDA_FAST_CAMVID, else ../shared/data/camvid beside the repository."""
    return Path(os.environ.get(CAMVID_VARIABLE) or _CAMVID_DEFAULT)


def camvid_masks() -> MaskFolder | None:
    """The validation masks of CamVid, or None where they are not present."""
    folder = camvid_folder() / "val" / "masks"
    return MaskFolder(folder) if folder.is_dir() else None


def make_labels(
    kind: str, num_classes: int, size: tuple[int, int, int], ignore_index: int, receptive_field: int
) -> tuple[Tensor, LabelFacts]:
    """Labels [N,H,W] int64 in [0, C) or ignore_index, the same on every machine, and what is in them.

    Args:
        kind: one of KINDS; "camvid" falls back to "scenes", with a note, where the masks are not present.
        size: (N, H, W).
        receptive_field: side in pixels of the window that `mixed_share` looks at; odd.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"labels must be one of {', '.join(KINDS)}, got {kind!r}")
    note = ""
    if kind == "camvid" and camvid_masks() is None:
        kind = "scenes"
        note = f"CamVid masks not found (set {CAMVID_VARIABLE}): synthetic scenes instead"
    if kind == "random":
        labels = _random(num_classes, size, ignore_index)
    else:
        tile = _camvid_tile if kind == "camvid" else _scene_tile
        n, height, width = size
        maps = [_mosaic(tile, i, height, width, num_classes, ignore_index) for i in range(n)]
        labels = torch.stack(maps)
    facts = LabelFacts(
        source=kind,
        edge_share=mixed_share(labels, 3),
        mixed_share=mixed_share(labels, receptive_field),
        void_share=float((labels == ignore_index).double().mean()),
        note=note,
    )
    return labels, facts


def mixed_share(labels: Tensor, window: int) -> float:
    """Share of the pixels of [N,H,W] labels whose window x window neighbourhood holds more than one label.

    The neighbourhood ends at the image's border. Labels up to 2^24 are exact in the fp32 that pooling takes.
    """
    return float(_mixed(labels, window).double().mean())


def _mixed(labels: Tensor, window: int) -> Tensor:
    x = labels.float().unsqueeze(1)
    largest = F.max_pool2d(x, window, 1, window // 2)
    smallest = -F.max_pool2d(-x, window, 1, window // 2)
    return (largest != smallest)[:, 0]


def spread_classes(mask: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """CamVid's 11 classes spread evenly over [0, C), or folded into it where C is smaller; void stays void."""
    classes = mask.to(torch.int64)
    spread = classes * num_classes // CAMVID_CLASSES if num_classes >= CAMVID_CLASSES else classes % num_classes
    return torch.where(classes == CAMVID_VOID, ignore_index, spread)


def _random(num_classes: int, size: tuple[int, int, int], ignore_index: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, num_classes, size, generator=generator)
    labels[torch.rand(size, generator=generator) < 0.02] = ignore_index
    return labels


def _mosaic(tile: object, image: int, height: int, width: int, num_classes: int, ignore_index: int) -> Tensor:
    """[H,W] cut from a mosaic of TILE x TILE maps, or from one of them, where it is typical of the whole."""
    assert callable(tile)
    rows, columns = -(-height // TILE), -(-width // TILE)
    first = image * rows * columns
    grid = [
        torch.cat([tile(first + r * columns + c, num_classes, ignore_index) for c in range(columns)], dim=1)
        for r in range(rows)
    ]
    return _typical_crop(torch.cat(grid, dim=0), height, width)


def _typical_crop(whole: Tensor, height: int, width: int) -> Tensor:
    """The [height,width] part of [H,W] labels, of those on a 9 x 9 grid, whose share of edges is nearest to theirs."""
    edges = _mixed(whole.unsqueeze(0), 3)[0].double()
    share = edges.mean()
    tops = {i * (whole.shape[0] - height) // 8 for i in range(9)}
    lefts = {i * (whole.shape[1] - width) // 8 for i in range(9)}
    places = [(slice(top, top + height), slice(left, left + width)) for top in sorted(tops) for left in sorted(lefts)]
    best = min(places, key=lambda place: abs(float(edges[place].mean() - share)))
    return whole[best].contiguous()


@functools.lru_cache(maxsize=64)
def _camvid_tile(number: int, num_classes: int, ignore_index: int) -> Tensor:
    """One CamVid mask (480x360 pixels), resized to TILE x TILE by nearest neighbour."""
    masks = camvid_masks()
    assert masks is not None
    mask = masks[number * 37 % len(masks)]  # 37: neighbouring files are frames of one drive
    rows = torch.from_numpy(np.arange(TILE) * mask.shape[0] // TILE)
    columns = torch.from_numpy(np.arange(TILE) * mask.shape[1] // TILE)
    return spread_classes(mask[rows][:, columns], num_classes, ignore_index)


@functools.lru_cache(maxsize=64)
def _scene_tile(number: int, num_classes: int, ignore_index: int) -> Tensor:
    return SyntheticMasks(number + 1, num_classes, (TILE, TILE), seed=0, ignore_index=ignore_index)[number]
