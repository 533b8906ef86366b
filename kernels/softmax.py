"""Softmax, cross-entropy and the difference of the branches: (1'), (6) of README.md.

Logits are read once, in their own dtype and strides; all other kernels read `e`, which is planar no more:

    e       [P, IN]       p - q, channels last, zero beyond class C and at void pixels; P = N H W
    q       [P, IN]       the target distribution, written where it is soft
    labels  [P]           class of each pixel, C where it is void
    partial [4, tiles]    sums of each tile: cross-entropy, its divisor, valid pixels, those of a bad target

A program takes a tile of BLOCK_H x BLOCK_W pixels with all their classes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import image_offset, read_distribution, read_labels, read_logits, tile_pixels, to_storage


@triton.jit(
    do_not_specialize=[
        "H", "W", "tiles_x", "tiles_per_image", "tiles",
        "fold", "z_outer", "z_stride_n", "z_stride_c", "z_stride_h", "z_stride_w",
        "t_outer", "t_stride_n", "t_stride_c", "t_stride_h", "t_stride_w",
        "v_outer", "v_stride_n", "v_stride_h", "v_stride_w", "weight_rows",
        "ignore_index", "label_smoothing", "tolerance",
    ]
)  # fmt: skip
def softmax_fwd_kernel(
    logits,  # [N, C, H, W]
    target,  # [N, H, W] labels, or [N, C, H, W] where SOFT
    valid,  # [N, H, W] bool, or None
    class_weight,  # [weight_rows, C] fp32, or None: image n has row n % weight_rows
    e,  # [P, IN]
    q,  # [P, IN], or None
    labels,  # [P] uint8 or int16
    partial,  # [4, tiles] fp32
    ce_map,  # [P] fp32, or None
    semeda_map,  # [P] fp32, or None; set to 0, or NaN at bad targets: the layers add to it
    H,
    W,
    tiles_x,
    tiles_per_image,
    tiles,
    fold,  # images of a group
    z_outer,  # from group to group
    z_stride_n,
    z_stride_c,
    z_stride_h,
    z_stride_w,
    t_outer,
    t_stride_n,
    t_stride_c,
    t_stride_h,
    t_stride_w,
    v_outer,
    v_stride_n,
    v_stride_h,
    v_stride_w,
    weight_rows,
    ignore_index,
    label_smoothing,
    tolerance,  # of a distribution's sum; 0: it is not looked at
    C: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BINARY: tl.constexpr,
    SOFT: tl.constexpr,
    ONE_CHANNEL: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    UNIT_C: tl.constexpr,
    UNIT_W: tl.constexpr,
    DTYPE: tl.constexpr,
):
    if UNIT_C:  # channels_last: the compiler has to know which neighbours are adjacent
        z_stride_c = 1
    if UNIT_W:
        z_stride_w = 1
    tile = tl.program_id(0)
    n, y, x = tile_pixels(tile, tiles_x, tiles_per_image, BLOCK_H, BLOCK_W)
    inside = (y < H) & (x < W)
    if valid is not None:
        valid += image_offset(n, fold, v_outer, v_stride_n)
    target += image_offset(n, fold, t_outer, t_stride_n)
    logits += image_offset(n, fold, z_outer, z_stride_n)
    c = tl.arange(0, BLOCK_C)
    real = c < C

    # 1. labels and logits
    v, bad, label = read_labels(
        target, valid, y, x, inside, t_stride_h, t_stride_w, v_stride_h, v_stride_w, ignore_index, C, SOFT
    )  # fmt: skip
    z = read_logits(logits, y, x, v, z_stride_c, z_stride_h, z_stride_w, C, BLOCK_C, BINARY)

    # 2. softmax
    shifted = z - tl.max(z, axis=1)[:, None]
    exponential = tl.exp(shifted)
    total = tl.sum(exponential, axis=1)
    p = exponential / total[:, None]
    log_p = tl.where(real[None, :], shifted - tl.log(total)[:, None], 0.0)

    # 3. cross-entropy; selected, not multiplied by the one-hot map: 0 * -inf is NaN
    weight = tl.full([BLOCK_C], 1.0, tl.float32)
    if class_weight is not None:
        weight = tl.load(class_weight + (n % weight_rows) * C + c, mask=real, other=0.0)
    if SOFT:
        goal = read_distribution(target, y, x, v, t_stride_c, t_stride_h, t_stride_w, C, BLOCK_C, ONE_CHANNEL)
        fine = (tl.abs(tl.sum(goal, axis=1) - 1.0) < tolerance) & (tl.min(goal, axis=1) > -0.01)
        bad = v & (fine == 0) & (tolerance > 0)  # a NaN is not fine, and no value above 1 leaves a sum of 1
        smoothed = (1.0 - label_smoothing) * goal + label_smoothing / C
        ce = -tl.sum(weight[None, :] * smoothed * log_p, axis=1)
        ce_weight = tl.where(v, 1.0, 0.0)
    else:
        hit = c[None, :] == label[:, None]
        goal = tl.where(hit & real[None, :], 1.0, 0.0)
        own = tl.sum(goal * weight[None, :], axis=1)
        ce = -(1.0 - label_smoothing) * own * tl.sum(tl.where(hit, log_p, 0.0), axis=1)
        if HAS_SMOOTHING:
            ce -= label_smoothing / C * tl.sum(weight[None, :] * log_p, axis=1)
        ce_weight = tl.where(v, own, 0.0)
    ce = tl.where(v, ce, 0.0)
    ce = tl.where(bad, float("nan"), ce)

    # 4. what the layers read
    row = n.to(tl.int64) * H * W + y * W + x
    e_at = row[:, None] * IN + c[None, :]
    stored = inside[:, None] & (c < IN)[None, :]
    tl.store(e + e_at, to_storage(tl.where(v[:, None], p - goal, 0.0), DTYPE), mask=stored)
    if SOFT:
        tl.store(q + e_at, to_storage(goal, DTYPE), mask=stored)
    tl.store(labels + row, tl.where(v, label, C).to(labels.dtype.element_ty), mask=inside)

    # 5. sums
    tl.store(partial + tile, tl.sum(ce))
    tl.store(partial + tiles + tile, tl.sum(ce_weight))
    tl.store(partial + 2 * tiles + tile, tl.sum(tl.where(v, 1.0, 0.0)))
    tl.store(partial + 3 * tiles + tile, tl.sum(tl.where(bad, 1.0, 0.0)))
    if ce_map is not None:
        tl.store(ce_map + row, ce, mask=inside)
        tl.store(semeda_map + row, tl.where(bad, float("nan"), 0.0), mask=inside)
