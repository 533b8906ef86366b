"""Tiles against row-marching strips for the CUDA kernels, on paper: `python -m benchmarks.gpu.cuda_tiles`.

Both plans run the same layers on 3x3 neighbourhoods; what differs is which pixels are computed more than once, how
many barriers a pixel takes, and what must fit into shared memory. Counts are for the forward kernel in fp16, target
features included where memory is concerned, one product being mma.m16n8k16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

PIECE = 16  # bytes
PRODUCT_ROWS = 16  # pixels
WARPS = 8
UNIT = {1: 4, 2: 4, 4: 2, 8: 2}  # rows of a warp's unit of work by tiles of 8 output channels


@dataclass(frozen=True)
class Costs:
    """Of one plan, a pixel of the image each, but `shared`.

    Attributes:
        products: of 16 x 8 x 16 numbers, times 16.
        softmax: how often the softmax of a pixel is computed.
        barriers: of a block, a thousand pixels.
        busy: share of the eight warps' turns in which there is work, the mean of the layers weighted by products.
        shared: bytes of a block.
    """

    products: float
    softmax: float
    barriers: float
    busy: float
    shared: int


def pieces(channels: int) -> int:
    """Pieces of a pixel in fp16."""
    return -(-channels // 8)


def row_products(channels: int) -> int:
    """Products for one row of a 3x3 kernel."""
    return -(-3 * pieces(channels) // 2)


def layer_products(channels: Sequence[int]) -> list[int]:
    """Products of each layer for 16 pixels; channels are C, K_1, ..., K_L."""
    return [3 * row_products(before) * pieces(out) for before, out in pairwise(channels)]


def weight_bytes(channels: Sequence[int]) -> int:
    """Packed weights of all layers."""
    return sum(count * 32 * 2 * 4 for count in layer_products(channels))


def _busy(rows: Sequence[int], width: int, channels: Sequence[int]) -> float:
    """Units of work over turns of eight warps."""
    work = turns = 0.0
    for count, products, out in zip(rows, layer_products(channels), channels[1:], strict=True):
        unit = UNIT[pieces(out)]
        units = -(-count // unit) * width // PRODUCT_ROWS
        work += units * unit * products
        turns += -(-units // WARPS) * WARPS * unit * products
    return work / turns


def tile(channels: Sequence[int], rows: int, width: int) -> Costs:
    """A tile of `rows` rows whose hidden regions are `width` pixels wide."""
    layers = len(channels) - 1
    owned = rows * (width - 2 * (layers - 1))
    regions = [rows + 2 * (layers - layer) for layer in range(1, layers + 1)]
    products = layer_products(channels)
    inputs = (rows + 2 * layers) * (width + 2)
    areas = [inputs * pieces(channels[0]) * PIECE, 0]
    for layer in range(1, layers):
        branches = 1 if layer == layers - 1 else 2
        need = (regions[layer - 1] * width + 2) * pieces(channels[layer]) * PIECE * branches
        areas[layer % 2] = max(areas[layer % 2], need)
    return Costs(
        products=sum(r * width * p for r, p in zip(regions, products, strict=True)) / owned,
        softmax=inputs / owned,
        barriers=1000 * (layers + 2) / owned,
        busy=_busy(regions, width, channels),
        shared=sum(areas) + 2 * inputs + weight_bytes(channels),
    )


def strip(channels: Sequence[int], rows: int, width: int, height: int = 513) -> Costs:
    """A strip `width` pixels wide that advances by `rows` rows a step, down an image of `height` rows."""
    layers = len(channels) - 1
    owned = rows * (width - 2 * (layers - 1))
    start = (height + 2 * layers) / height  # rows above the image's part that fill the rings
    ring = rows + 2
    memory = ring * (width + 2) * pieces(channels[0]) * PIECE
    for layer in range(1, layers):
        branches = 1 if layer == layers - 1 else 2
        memory += ring * width * pieces(channels[layer]) * PIECE * branches
    return Costs(
        products=start * sum(rows * width * p for p in layer_products(channels)) / owned,
        softmax=start * (width + 2) * rows / owned,
        barriers=1000 * (layers + 1) / owned,
        busy=_busy([rows] * layers, width, channels),
        shared=memory + 2 * (rows + 2 * layers) * (width + 2) + weight_bytes(channels),
    )


def table(channels: Sequence[int]) -> str:
    """Both plans in Markdown."""
    rows = [f"tile {r} x {w - 2 * (len(channels) - 2)}" for r, w in TILES]
    costs = [tile(channels, r, w) for r, w in TILES]
    rows += [f"strip of {w - 2 * (len(channels) - 2)}, {r} rows a step" for r, w in STRIPS]
    costs += [strip(channels, r, w) for r, w in STRIPS]
    lines = ["| plan | products / pixel | softmax / pixel | barriers / 1000 pixels | warps busy | shared KiB |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, cost in zip(rows, costs, strict=True):
        lines.append(
            f"| {name} | {cost.products / PRODUCT_ROWS:.1f} | {cost.softmax:.2f} | {cost.barriers:.1f} | "
            f"{cost.busy:.0%} | {cost.shared / 1024:.0f} |"
        )
    return "\n".join(lines)


TILES = ((16, 32), (20, 32), (16, 48))
STRIPS = ((4, 64), (8, 64), (4, 32), (8, 32))

if __name__ == "__main__":
    print(table((21, 16, 32, 2)))
