"""The target's branch away from label edges: classes of whole tiles, and the tables that replace convolutions.

tiles [reaches, T]  the class that fills a tile and `reach` pixels around it, or -1: near an edge or the image's
                    border, where zero padding changes features. Void counts as class C.
table [C + 1, OUT]  t_l(q) inside a region of one class (void: the zero vector), fp32; and relu of it as stored
"""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import to_storage


@triton.jit(do_not_specialize=["H", "W", "tiles_x", "tiles_per_image", "tiles"])
def tile_class_kernel(
    labels,  # [P]
    classes,  # [REACHES, tiles] int16
    H,
    W,
    tiles_x,
    tiles_per_image,
    tiles,
    REACH: tl.constexpr,  # the sum of PADS
    PADS: tl.constexpr,  # a tuple: by how much each layer's receptive field grows
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SIDE_H: tl.constexpr,  # a power of 2 that holds BLOCK_H + 2 * the last reach
    SIDE_W: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tile // tiles_per_image
    rest = tile % tiles_per_image
    y0 = (rest // tiles_x) * BLOCK_H
    x0 = (rest % tiles_x) * BLOCK_W
    i = tl.arange(0, SIDE_H)[:, None]
    j = tl.arange(0, SIDE_W)[None, :]
    y = y0 + i - REACH
    x = x0 + j - REACH
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    at = n.to(tl.int64) * H * W + y * W + x
    label = tl.load(labels + at, mask=inside, other=0).to(tl.int32)
    reach = 0
    for number in tl.static_range(len(PADS)):
        reach += PADS[number]
        rows = (i >= REACH - reach) & (i < REACH + BLOCK_H + reach)
        near = rows & (j >= REACH - reach) & (j < REACH + BLOCK_W + reach)
        low = tl.min(tl.min(tl.where(near, label, 32767), axis=1), axis=0)
        high = tl.max(tl.max(tl.where(near, label, -1), axis=1), axis=0)
        border = (y0 < reach) | (x0 < reach) | (y0 + BLOCK_H + reach > H) | (x0 + BLOCK_W + reach > W)
        one = (low == high) & (border == 0)
        tl.store(classes + number * tiles + tile, tl.where(one, low, -1).to(tl.int16))


@triton.jit
def pack_weights(
    weight, bias, packed, packed_bias, program, C: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of the packed weights; the first program moves the bias, too."""
    k = tl.arange(0, OUT)
    at = program * BLOCK + tl.arange(0, BLOCK)
    out = at % OUT
    channel = at // OUT % IN
    tap = at // OUT // IN
    real = (out < K) & (channel < C) & (tap < TAPS)
    value = tl.load(weight + (out * C + channel) * TAPS + tap, mask=real, other=0.0)
    tl.store(packed + at, to_storage(value, DTYPE), mask=tap < TAPS)
    if program == 0:
        tl.store(packed_bias + k, tl.load(bias + k, mask=k < K, other=0.0))


@triton.jit
def fill_table(
    weight, bias, before, table, activated, first, C: tl.constexpr, K: tl.constexpr, CLASSES: tl.constexpr,
    TAPS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK_C: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows [first, first + BLOCK_C) of the table."""
    k = tl.arange(0, OUT)
    c = first + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C, OUT], tl.float32) + tl.load(bias + k, mask=k < K, other=0.0)[None, :]
    if before is None:
        for tap in range(TAPS):
            at = (k[None, :] * C + c[:, None]) * TAPS + tap
            total += tl.load(weight + at, mask=(k < K)[None, :] & (c < C)[:, None], other=0.0)
    else:
        for channel in range(C):
            column = tl.zeros([OUT], tl.float32)
            for tap in range(TAPS):
                column += tl.load(weight + (k * C + channel) * TAPS + tap, mask=k < K, other=0.0)
            value = tl.load(before + c * IN + channel, mask=c <= CLASSES, other=0.0).to(tl.float32)
            total += value[:, None] * column[None, :]
    at = c[:, None] * OUT + k[None, :]
    stored = (c <= CLASSES)[:, None]
    tl.store(table + at, total, mask=stored)
    tl.store(activated + at, to_storage(tl.maximum(total, 0.0), DTYPE), mask=stored)


@triton.jit(do_not_specialize=["pack_programs"])
def prepare_kernel(
    weight,  # [K, C, KSIZE, KSIZE] fp32 of this layer
    bias,  # [K] fp32
    packed,  # [KSIZE * KSIZE, IN, OUT], zero where padded
    packed_bias,  # [OUT] fp32
    before,  # [CLASSES + 1, IN] relu of the table of the layer before; None for the first layer
    table,  # [CLASSES + 1, OUT] fp32, or None
    activated,  # [CLASSES + 1, OUT] relu of it
    pack_programs,
    C: tl.constexpr,  # input channels of this layer
    K: tl.constexpr,
    CLASSES: tl.constexpr,
    TAPS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The first programs put the weights in the kernels' order, the others fill BLOCK_C rows of the table each."""
    program = tl.program_id(0)
    if program < pack_programs:
        pack_weights(weight, bias, packed, packed_bias, program, C, K, TAPS, IN, OUT, BLOCK, DTYPE)
    elif table is not None:
        first = (program - pack_programs) * BLOCK_C
        fill_table(weight, bias, before, table, activated, first, C, K, CLASSES, TAPS, IN, OUT, BLOCK_C, DTYPE)
