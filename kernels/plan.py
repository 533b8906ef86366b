"""Sizes of everything for one problem: tiles, padded channels, buffers, and launch configurations from a table.

Knows shapes and dtypes alone, so the tests compile and count with the very numbers that a launch uses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from semeda_fast.backends.config import FusedConfig

MAX_CLASSES = 256
MAX_LAYERS = 8
TILE = 4, 32  # rows and columns, of the layers and of the classes of tiles, which belong together


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched; block_h x block_w pixels a program."""

    block_h: int
    block_w: int
    num_warps: int
    num_stages: int = 2


# By what limits a kernel: the widest of its channels. Chosen by registers, spills and shared memory as compiled for
# sm_80, sm_90 and sm_100 (tests/triton_resources.json).
SOFTMAX = {
    16: LaunchConfig(4, 32, 4),
    32: LaunchConfig(4, 32, 4),
    64: LaunchConfig(4, 32, 8),
    128: LaunchConfig(2, 32, 8),
    256: LaunchConfig(1, 32, 8),
}
LAYER = {16: LaunchConfig(*TILE, 4, 3), 32: LaunchConfig(*TILE, 4, 3), 64: LaunchConfig(*TILE, 8, 3)}
LOGITS_GRAD = {
    16: LaunchConfig(4, 32, 4, 3),
    32: LaunchConfig(4, 32, 4, 3),
    64: LaunchConfig(4, 32, 8, 3),
    128: LaunchConfig(2, 32, 8, 2),
    256: LaunchConfig(1, 32, 8, 2),
}
LAYER_BWD_FP32 = {**LAYER, 64: LaunchConfig(1, 32, 8, 3)}  # 64 pixels spill on sm_80 where seeds come from codes


def power_of_two(x: int, least: int = 16) -> int:
    """The smallest power of 2 that is at least x and `least`; matrix products take blocks of 16 or more."""
    return max(least, 1 << (x - 1).bit_length())


@dataclass(frozen=True)
class LayerPlan:
    """One layer: channels, padded channels, and how its codes lie."""

    number: int  # from 0
    k: int  # K_l
    c: int  # K_{l-1}
    size: int
    in_pad: int  # channels as stored, multiples of block_k
    out_pad: int
    block_k: int
    planes: int  # of codes, in words of word_bytes
    coefficient: float  # w_l / (K_l s_l)
    inverse: float  # 1 / (K_l s_l)
    last: bool

    @property
    def words(self) -> int:
        """Words of codes a plane and pixel."""
        return (self.out_pad + 31) // 32

    @property
    def word_dtype(self) -> torch.dtype:
        """Of a word of codes: as narrow as the channels that are really there allow."""
        if self.k <= 8:
            return torch.int8
        return torch.int16 if self.k <= 16 else torch.int32

    @property
    def code_bytes(self) -> int:
        """Bytes of codes a pixel."""
        return self.planes * self.words * self.word_dtype.itemsize

    @property
    def weights(self) -> int:
        """Elements of the packed weights."""
        return self.size * self.size * self.in_pad * self.out_pad


@dataclass(frozen=True)
class Plan:
    """One loss on one shape; see `make_plan`."""

    config: FusedConfig
    n: int
    h: int
    w: int
    dtype: torch.dtype  # of activations and matrix products; see `storage_dtype`
    layers: tuple[LayerPlan, ...]
    soft: bool
    tile: tuple[int, int] = TILE  # a multiple of TILE; blocks of pixels of all kernels grow with it

    @property
    def classes(self) -> int:
        """C."""
        return self.config.channels[0]

    @property
    def pixels(self) -> int:
        """P = N H W."""
        return self.n * self.h * self.w

    @property
    def block_c(self) -> int:
        """Classes that a program holds."""
        return power_of_two(self.classes)

    @property
    def label_dtype(self) -> torch.dtype:
        """Of the map of classes 0..C."""
        return torch.uint8 if self.classes <= 255 else torch.int16

    @property
    def target_layers(self) -> int:
        """t_l(q) is needed of so many layers: the last only where the tap lies behind the ReLU."""
        return len(self.layers) if self.config.tap == "post" else len(self.layers) - 1

    @property
    def unit(self) -> float:
        """What seeds are divided by, so that the largest is 1: fp16 has no room for 1 / (V K_l)."""
        return max((abs(layer.coefficient) for layer in self.layers), default=0.0) or 1.0

    @property
    def code_offsets(self) -> list[int]:
        """Where each layer's codes begin, in bytes, on 16-byte boundaries; then the end."""
        offsets = [0]
        for layer in self.layers:
            offsets.append(offsets[-1] + (layer.code_bytes * self.pixels + 15) // 16 * 16)
        return offsets

    @property
    def saved_offsets(self) -> list[int]:
        """Where each layer's kept d begins, in elements; then the end. Nothing is kept for L1."""
        offsets = [0]
        for layer in self.layers:
            size = 0 if self.config.distance == "l1" else layer.k * self.pixels
            offsets.append(offsets[-1] + (size + 15) // 16 * 16)
        return offsets

    def softmax_config(self, channels_last: bool) -> LaunchConfig:
        """Of the softmax kernel; classes that are adjacent in memory are spread over fewer threads."""
        config = self._scaled(SOFTMAX[self.block_c])
        return replace(config, num_warps=8) if channels_last else config

    def layer_config(self, layer: LayerPlan) -> LaunchConfig:
        """Of one layer forward."""
        return self._scaled(LAYER[max(layer.out_pad, min(layer.in_pad, 64) if layer.number else 16)])

    def layer_bwd_config(self, layer: LayerPlan) -> LaunchConfig:
        """Of one layer backward."""
        table = LAYER_BWD_FP32 if self.dtype == torch.float32 else LAYER
        return self._scaled(table[max(layer.out_pad, layer.in_pad)])

    def logits_grad_config(self) -> LaunchConfig:
        """Of the kernel that writes the gradient."""
        return self._scaled(LOGITS_GRAD[self.block_c])

    def tile_config(self) -> LaunchConfig:
        """Of the kernel that finds the classes of tiles."""
        return LaunchConfig(*self.tile, 1)

    def _scaled(self, config: LaunchConfig) -> LaunchConfig:
        rows, columns = self.tile[0] // TILE[0], self.tile[1] // TILE[1]
        return replace(config, block_h=config.block_h * rows, block_w=config.block_w * columns)

    def tiles(self, config: LaunchConfig) -> tuple[int, int, int]:
        """Tiles in a row, in an image, and in all."""
        across = -(-self.w // config.block_w)
        image = across * -(-self.h // config.block_h)
        return across, image, image * self.n


def storage_dtype(config: FusedConfig, logits_dtype: torch.dtype) -> torch.dtype:
    """float16 for half-precision logits: bf16's 8 bits move the gradient three times as far (README.md).

    float32 for float32 logits, and where an upstream map of any size multiplies the seeds.
    """
    return torch.float32 if logits_dtype == torch.float32 or config.per_pixel else torch.float16


def make_plan(
    config: FusedConfig,
    shape: tuple[int, int, int],
    logits_dtype: torch.dtype,
    soft: bool,
    tile: tuple[int, int] = TILE,
) -> Plan:
    """The plan of logits [N, ., H, W], shape = (N, H, W)."""
    layers = []
    post, l1 = config.tap == "post", config.distance == "l1"
    last = len(config.sizes) - 1
    for number, size in enumerate(config.sizes):
        c, k = config.channels[number], config.channels[number + 1]
        inverse = 1 / (k * config.layer_scales[number])
        block_k = 16 if c <= 16 else 32
        in_pad = -(-c // block_k) * block_k if number == 0 else power_of_two(c)
        off_or_signs = 2 if post or number == last else 3
        planes = off_or_signs if l1 else int(number != last)
        layers.append(
            LayerPlan(
                number=number,
                k=k,
                c=c,
                size=size,
                in_pad=in_pad,
                out_pad=power_of_two(k),
                block_k=block_k,
                planes=planes,
                coefficient=config.layer_weights[number] * inverse,
                inverse=inverse,
                last=number == last,
            )
        )
    n, h, w = shape
    return Plan(config, n, h, w, storage_dtype(config, logits_dtype), tuple(layers), soft, tile)
