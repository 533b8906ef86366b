"""The first layer backward, softmax backward and the cross-entropy gradient, written once: (9) to (12) of README.md.

    d_t       [P, OUT]        gradient of the first layer's t(p); P = N H W, channels last
    d_logits  [N, C, H, W]    in the logits' dtype and strides

Softmax is computed anew from the logits, so nothing of it was kept. A program takes a tile of BLOCK_H x BLOCK_W pixels
with all their classes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import image_offset, read_distribution, read_labels, read_logits, tile_pixels
from .layers import gradient_products


@triton.jit(
    do_not_specialize=[
        "H", "W", "P", "tiles_x", "tiles_per_image", "unit",
        "fold", "z_outer", "z_stride_n", "z_stride_c", "z_stride_h", "z_stride_w",
        "g_outer", "g_stride_n", "g_stride_c", "g_stride_h", "g_stride_w",
        "t_outer", "t_stride_n", "t_stride_c", "t_stride_h", "t_stride_w",
        "v_outer", "v_stride_n", "v_stride_h", "v_stride_w", "weight_rows", "ignore_index", "label_smoothing",
    ]
)  # fmt: skip
def logits_bwd_kernel(
    logits,  # [N, C, H, W]
    target,
    valid,
    class_weight,
    d_t,  # [P, OUT]
    packed,  # [KSIZE * KSIZE, IN, OUT]
    d_ce,  # [1] fp32, or [P] where MAPS
    d_semeda,  # [1] fp32; where MAPS it is already in d_t
    d_logits,
    H,
    W,
    P,
    tiles_x,
    tiles_per_image,
    unit,  # what the seeds were divided by
    fold,  # images of a group
    z_outer,  # from group to group
    z_stride_n,
    z_stride_c,
    z_stride_h,
    z_stride_w,
    g_outer,
    g_stride_n,
    g_stride_c,
    g_stride_h,
    g_stride_w,
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
    C: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    KSIZE: tl.constexpr,
    BINARY: tl.constexpr,
    SOFT: tl.constexpr,
    ONE_CHANNEL: tl.constexpr,
    MAPS: tl.constexpr,
    UNIT_C: tl.constexpr,
    UNIT_W: tl.constexpr,
    G_UNIT_C: tl.constexpr,
    G_UNIT_W: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if UNIT_C:  # the compiler has to know which neighbours are adjacent
        z_stride_c = 1
    if UNIT_W:
        z_stride_w = 1
    if G_UNIT_C:
        g_stride_c = 1
    if G_UNIT_W:
        g_stride_w = 1
    tile = tl.program_id(0)
    n, y, x = tile_pixels(tile, tiles_x, tiles_per_image, BLOCK_H, BLOCK_W)
    inside = (y < H) & (x < W)
    logits += image_offset(n, fold, z_outer, z_stride_n)
    target += image_offset(n, fold, t_outer, t_stride_n)
    if valid is not None:
        valid += image_offset(n, fold, v_outer, v_stride_n)
    if class_weight is not None:
        class_weight += (n % weight_rows) * C
    d_logits += image_offset(n, fold, g_outer, g_stride_n)
    row = n.to(tl.int64) * H * W + y * W + x
    c = tl.arange(0, BLOCK_C)
    real = c < C

    # 1. d_p from the first layer
    d_p = gradient_products(
        d_t, None, None, None, packed, n, y, x, H, W, P, 1.0,
        OUT, IN, OUT, BLOCK_C, BLOCK_H, BLOCK_W, KSIZE, 0, DTYPE, PRECISION,
    )  # fmt: skip

    # 2. softmax again
    v, bad, label = read_labels(
        target, valid, y, x, inside, t_stride_h, t_stride_w, v_stride_h, v_stride_w, ignore_index, C, SOFT
    )  # fmt: skip
    z = read_logits(logits, y, x, v, z_stride_c, z_stride_h, z_stride_w, C, BLOCK_C, BINARY)
    exponential = tl.exp(z - tl.max(z, axis=1)[:, None])
    s = exponential / tl.sum(exponential, axis=1)[:, None]

    # 3. (10)
    d_p = tl.where(real[None, :], d_p, 0.0)
    d_z = s * (d_p - tl.sum(s * d_p, axis=1)[:, None])
    if MAPS:
        d_z = d_z * unit
        scale = tl.load(d_ce + row, mask=inside, other=0.0)
    else:
        d_z = d_z * (tl.load(d_semeda) * unit)
        scale = tl.load(d_ce) + tl.zeros([BLOCK_H * BLOCK_W], tl.float32)

    # 4. (11)
    weight = tl.full([BLOCK_C], 1.0, tl.float32)
    if class_weight is not None:
        weight = tl.load(class_weight + c, mask=real, other=0.0)
    if SOFT:
        goal = read_distribution(target, y, x, v, t_stride_c, t_stride_h, t_stride_w, C, BLOCK_C, ONE_CHANNEL)
    else:
        goal = tl.where(c[None, :] == label[:, None], 1.0, 0.0)
    r = weight[None, :] * ((1.0 - label_smoothing) * goal + label_smoothing / C)
    r = tl.where(real[None, :], r, 0.0)
    d_z += scale[:, None] * (s * tl.sum(r, axis=1)[:, None] - r)

    # 5. the gradient, zero at void pixels whatever their logits hold
    d_z = tl.where(v[:, None], d_z, 0.0)
    d_z = tl.where(bad[:, None], float("nan"), d_z)
    pixel = y.to(tl.int64) * g_stride_h + x.to(tl.int64) * g_stride_w
    if BINARY:
        d_one = tl.sum(tl.where((c == 1)[None, :], d_z, 0.0), axis=1)
        tl.store(d_logits + pixel, d_one.to(d_logits.dtype.element_ty), mask=inside)
    else:
        at = d_logits + pixel[:, None] + c.to(tl.int64)[None, :] * g_stride_c
        tl.store(at, d_z.to(d_logits.dtype.element_ty), mask=inside[:, None] & real[None, :])
