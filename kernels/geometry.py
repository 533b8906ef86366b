"""Device functions that several kernels share: where a tile's pixels lie, and how labels are read."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_pixels(tile, tiles_x, tiles_per_image, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Image number, and row and column [BLOCK_H * BLOCK_W] of each pixel of a tile; beyond the image, too."""
    number = tl.arange(0, BLOCK_H * BLOCK_W)
    n = tile // tiles_per_image
    rest = tile % tiles_per_image
    y = (rest // tiles_x) * BLOCK_H + number // BLOCK_W
    x = (rest % tiles_x) * BLOCK_W + number % BLOCK_W
    return n, y, x


@triton.jit
def image_offset(n, fold, outer, stride):
    """Of image n, in elements: images come in groups of `fold`, which lie `outer` apart. n: one number."""
    group = n // fold
    return group.to(tl.int64) * outer + (n - group * fold).to(tl.int64) * stride


@triton.jit
def read_labels(
    target,  # [H, W] any integer type
    valid,  # [H, W] bool, or None
    y,
    x,
    inside,
    t_stride_h,
    t_stride_w,
    v_stride_h,
    v_stride_w,
    ignore_index,
    C: tl.constexpr,
    SOFT: tl.constexpr,
):
    """Of each pixel: v, whether it is a bad label, and the class (C where there is none)."""
    v = inside
    if valid is not None:
        offset = y.to(tl.int64) * v_stride_h + x.to(tl.int64) * v_stride_w
        v = v & (tl.load(valid + offset, mask=inside, other=0) != 0)
    if SOFT:
        bad = v & False
        label = tl.where(v, 0, C)
    else:
        offset = y.to(tl.int64) * t_stride_h + x.to(tl.int64) * t_stride_w
        wide = tl.load(target + offset, mask=v, other=0).to(tl.int64)
        v = v & (wide != ignore_index)
        bad = v & ((wide < 0) | (wide >= C))
        label = tl.where(v & (bad == 0), wide, C).to(tl.int32)
    return v, bad, label


@triton.jit
def read_logits(
    logits,  # [C, H, W], [1, H, W] where BINARY
    y,
    x,
    v,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BINARY: tl.constexpr,
):
    """z [pixels, BLOCK_C] in fp32: 0 at void pixels, so that nothing under them gets anywhere; -inf beyond class C."""
    c = tl.arange(0, BLOCK_C)
    pixel = y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    if BINARY:  # softmax([0, z]) = [1 - sigma(z), sigma(z)]
        one = tl.load(logits + pixel, mask=v, other=0.0).to(tl.float32)
        z = tl.where((c == 1)[None, :], one[:, None], 0.0)
    else:
        at = logits + pixel[:, None] + c.to(tl.int64)[None, :] * stride_c
        z = tl.load(at, mask=v[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    return tl.where((c < C)[None, :], z, float("-inf"))


@triton.jit
def read_distribution(
    target,  # [C, H, W], or [1, H, W]: the probability of class 1
    y,
    x,
    v,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ONE_CHANNEL: tl.constexpr,
):
    """q [pixels, BLOCK_C] in fp32, zero at void pixels and beyond class C."""
    c = tl.arange(0, BLOCK_C)
    pixel = y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    real = v[:, None] & (c < C)[None, :]
    if ONE_CHANNEL:
        one = tl.load(target + pixel, mask=v, other=0.0).to(tl.float32)
        q = tl.where((c == 1)[None, :], one[:, None], 1.0 - one[:, None])
        q = tl.where(real, q, 0.0)
    else:
        at = target + pixel[:, None] + c.to(tl.int64)[None, :] * stride_c
        q = tl.load(at, mask=real, other=0.0).to(tl.float32)
    return q


@triton.jit
def to_storage(value, DTYPE: tl.constexpr):
    """fp32 -> the dtype of activations; saturated, since fp16 ends at 65504."""
    if tl.float16 == DTYPE:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0)
    return value.to(DTYPE)
