"""One layer of the proxy, forward and backward: (1'), (3), (4), (7), (8) and (9) of README.md.

    x, b      [P, IN], [P, OUT]      e or relu(t(p)) - relu(t(q)) of the layer before; the same of this layer
    xq, aq    [P, IN], [P, OUT]      relu(t(q)), written on tiles near label edges alone
    packed    [KSIZE * KSIZE, IN, OUT]
    codes     [planes, WORDS, P]     1 bit a channel, in words of 8, 16 or 32 bits; bits of padded channels mean
                                     nothing, since their weights are zero. L1, tap "pre": d > 0, d < 0, and t(p) > 0 of
                                     hidden layers; L1, tap "post": 'on and not d < 0', 'on and not d > 0'; other
                                     distances: t(p) > 0 of hidden layers
    saved     [P, K]                 d, of other distances than L1
    d_t       [P, OUT]               gradient of this layer's t(p), in units of the seeds

P = N H W pixels, channels last, padded with zeros to IN and OUT. A program takes a tile of BLOCK_H x BLOCK_W pixels and
all output channels; the convolution is a sum of KSIZE^2 matrix products [pixels, BLOCK_K] x [BLOCK_K, OUT] over
shifted pixels. Target features come from the table where the tile's surroundings hold one class.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import tile_pixels, to_storage

L1 = tl.constexpr(0)
L2 = tl.constexpr(1)


@triton.jit
def shifted_inside(y, x, dy, dx, H, W):
    """Whether each pixel (y + dy, x + dx) lies in the image."""
    return (y >= -dy) & (y < H - dy) & (x >= -dx) & (x < W - dx)


@triton.jit
def pack_bits(bit, OUT: tl.constexpr, word: tl.constexpr):
    """Of [pixels, OUT] of 0 or 1: one word of min(OUT, 32) bits a pixel."""
    k = tl.arange(0, OUT)
    mine = (k // 32 == word)[None, :]
    return tl.sum(tl.where(mine, bit.to(tl.int32) << (k % 32)[None, :], 0), axis=1)


@triton.jit
def store_bits(codes, plane, bit, row, P, inside, OUT: tl.constexpr):
    """One plane of codes."""
    WORDS: tl.constexpr = (OUT + 31) // 32
    for word in tl.static_range(WORDS):
        at = codes + (plane * WORDS + word) * P.to(tl.int64) + row
        tl.store(at, pack_bits(bit, OUT, word).to(codes.dtype.element_ty), mask=inside)


@triton.jit
def load_bits(codes, plane, row, P, inside, OUT: tl.constexpr):
    """[pixels, OUT] of 0 or 1: one plane of codes, 0 outside."""
    WORDS: tl.constexpr = (OUT + 31) // 32
    k = tl.arange(0, OUT)
    at = codes + plane * WORDS * P.to(tl.int64) + row
    words = tl.load(at, mask=inside, other=0).to(tl.int32)[:, None]
    if WORDS == 2:
        second = tl.load(at + P, mask=inside, other=0).to(tl.int32)[:, None]
        words = tl.where((k < 32)[None, :], words, second)
    return (words >> (k % 32)[None, :]) & 1


@triton.jit
def load_seed(
    codes,
    saved,
    upstream,
    row,
    P,
    inside,
    coefficient,
    K: tl.constexpr,
    OUT: tl.constexpr,
    DISTANCE: tl.constexpr,
):
    """(7) without its constant factor: coefficient * rho'(d) [pixels, OUT], times the upstream map if there is one."""
    if DISTANCE == L1:
        above = load_bits(codes, 0, row, P, inside, OUT)
        below = load_bits(codes, 1, row, P, inside, OUT)
        slope = (above - below).to(tl.float32)
    else:
        k = tl.arange(0, OUT)
        mask = inside[:, None] & (k < K)[None, :]
        d = tl.load(saved + row[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
        slope = 2.0 * d if DISTANCE == L2 else tl.minimum(tl.maximum(d, -1.0), 1.0)
    seed = coefficient * slope
    if upstream is not None:
        # A seed of 0, as at void pixels, stays 0 even under an infinite gradient.
        seed = tl.where(seed == 0.0, seed, seed * tl.load(upstream + row, mask=inside, other=0.0)[:, None])
    return seed


@triton.jit
def target_products(
    total,  # [pixels, OUT] fp32 zeros
    xq,
    aq,
    labels,
    prev_classes,
    prev_activated,
    packed,
    bias,
    n,
    y,
    x,
    H,
    W,
    tiles_x,
    tiles_per_image,
    C: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    KSIZE: tl.constexpr,
    FROM_LABELS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """t(q) = conv(a(q)) + bias, of the one-hot map, which is made from labels, or of features and the table before.

    relu of it goes to aq, where a later layer reads it.
    """
    CHUNKS: tl.constexpr = IN // BLOCK_K
    k = tl.arange(0, BLOCK_K)
    here = n.to(tl.int64) * H * W + y * W + x
    o = tl.arange(0, OUT)
    weights = packed + k[:, None] * OUT + o[None, :]
    total += tl.load(bias + o)[None, :]
    for i in range(KSIZE * KSIZE * CHUNKS):
        tap = i // CHUNKS
        dy = tap // KSIZE - KSIZE // 2
        dx = tap % KSIZE - KSIZE // 2
        channel = (i % CHUNKS) * BLOCK_K + k
        inside = shifted_inside(y, x, dy, dx, H, W)
        weight = tl.load(weights + i * BLOCK_K * OUT)
        if FROM_LABELS:
            label = tl.load(labels + here + (dy * W + dx), mask=inside, other=C).to(tl.int32)
            a = (label[:, None] == channel[None, :]).to(weight.dtype)  # column C has no weights
        else:
            near = inside
            if prev_classes is not None:
                tile = n * tiles_per_image + ((y + dy) // BLOCK_H) * tiles_x + (x + dx) // BLOCK_W
                known = tl.load(prev_classes + tile, mask=inside, other=-1).to(tl.int32)
                near = inside & (known < 0)
            at = xq + (here + (dy * W + dx))[:, None] * IN + channel[None, :]
            a = tl.load(at, mask=near[:, None], other=0.0)
            if prev_classes is not None:
                away = prev_activated + known[:, None] * IN + channel[None, :]
                a += tl.load(away, mask=(known >= 0)[:, None], other=0.0)  # one of them is zero
        total = tl.dot(a, weight, total, input_precision=PRECISION)
    if aq is not None:
        in_image = (y < H) & (x < W)
        stored = to_storage(tl.maximum(total, 0.0), DTYPE)
        tl.store(aq + here[:, None] * OUT + o[None, :], stored, mask=in_image[:, None])
    return total


@triton.jit(
    do_not_specialize=["H", "W", "P", "tiles_x", "tiles_per_image", "inverse", "coefficient"],
    # Rows of larger tensors: how they are aligned depends on the number of tiles.
    do_not_specialize_on_alignment=["prev_classes", "classes", "partial"],
)
def layer_fwd_kernel(
    x_in,  # [P, IN]
    xq,  # [P, IN], or None where labels are read
    labels,  # [P] class, C where void
    prev_classes,  # [tiles] of the layer before, or None
    classes,  # [tiles] of this layer, or None: every tile is computed
    prev_activated,  # [C + 1, IN], or None
    table,  # [C + 1, OUT] fp32, or None
    packed,  # [KSIZE * KSIZE, IN, OUT]
    bias,  # [OUT] fp32
    b,  # [P, OUT], or None in the last layer
    aq,  # [P, OUT], or None where no later layer reads it
    codes,
    saved,
    partial,  # [tiles] fp32: sum of rho over the tile, times inverse
    semeda_map,  # [P] fp32, or None
    H,
    W,
    P,
    tiles_x,
    tiles_per_image,
    inverse,  # 1 / (K_l s_l)
    coefficient,  # w_l / (K_l s_l)
    C: tl.constexpr,
    K: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    KSIZE: tl.constexpr,
    FROM_LABELS: tl.constexpr,
    LAST: tl.constexpr,
    POST: tl.constexpr,
    DISTANCE: tl.constexpr,
    SAVE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHUNKS: tl.constexpr = IN // BLOCK_K
    tile = tl.program_id(0)
    n, y, x = tile_pixels(tile, tiles_x, tiles_per_image, BLOCK_H, BLOCK_W)
    in_image = (y < H) & (x < W)
    here = n.to(tl.int64) * H * W + y * W + x
    k = tl.arange(0, BLOCK_K)
    o = tl.arange(0, OUT)

    # 1. d = conv(x), the difference of the branches before the ReLU
    d = tl.zeros([BLOCK_H * BLOCK_W, OUT], tl.float32)
    pixels = x_in + here[:, None] * IN + k[None, :]
    weights = packed + k[:, None] * OUT + o[None, :]
    for i in range(KSIZE * KSIZE * CHUNKS):
        tap = i // CHUNKS
        dy = tap // KSIZE - KSIZE // 2
        dx = tap % KSIZE - KSIZE // 2
        inside = shifted_inside(y, x, dy, dx, H, W)
        shift = (dy * W + dx) * IN + (i % CHUNKS) * BLOCK_K
        a = tl.load(pixels + shift, mask=inside[:, None], other=0.0)
        d = tl.dot(a, tl.load(weights + i * BLOCK_K * OUT), d, input_precision=PRECISION)

    # 2. t(q), and b = relu(t(q) + d) - relu(t(q))
    seen = d
    on = d > 0
    if POST or not LAST:
        target = tl.zeros([BLOCK_H * BLOCK_W, OUT], tl.float32)
        if classes is None:
            target = target_products(
                target, xq, aq, labels, prev_classes, prev_activated, packed, bias, n, y, x, H, W, tiles_x,
                tiles_per_image, C, IN, OUT, BLOCK_K, BLOCK_H, BLOCK_W, KSIZE, FROM_LABELS, DTYPE, PRECISION,
            )  # fmt: skip
        else:
            known = tl.load(classes + tile).to(tl.int32)
            if known >= 0:
                target += tl.load(table + known * OUT + o)[None, :]
            else:
                target = target_products(
                    target, xq, aq, labels, prev_classes, prev_activated, packed, bias, n, y, x, H, W, tiles_x,
                    tiles_per_image, C, IN, OUT, BLOCK_K, BLOCK_H, BLOCK_W, KSIZE, FROM_LABELS, DTYPE, PRECISION,
                )  # fmt: skip
        prediction = target + d
        difference = tl.maximum(prediction, 0.0) - tl.maximum(target, 0.0)
        on = prediction > 0
        if not LAST:
            tl.store(b + here[:, None] * OUT + o[None, :], to_storage(difference, DTYPE), mask=in_image[:, None])
        if POST:
            seen = difference

    # 3. distance
    v = tl.load(labels + here, mask=in_image, other=C).to(tl.int32) != C
    seen = tl.where(v[:, None], seen, 0.0)
    size = tl.abs(seen)
    if DISTANCE == L1:
        rho = size
    elif DISTANCE == L2:
        rho = seen * seen
    else:
        rho = tl.where(size < 1.0, 0.5 * seen * seen, size - 0.5)
    of_pixel = tl.sum(rho, axis=1)
    tl.store(partial + tile, tl.sum(of_pixel) * inverse)
    if semeda_map is not None:
        before = tl.load(semeda_map + here, mask=in_image, other=0.0)
        tl.store(semeda_map + here, before + of_pixel * coefficient, mask=in_image)

    # 4. what backward needs
    if SAVE:
        if DISTANCE == L1:
            above = seen > 0
            below = seen < 0
            if POST:
                store_bits(codes, 0, on & (below == 0), here, P, in_image, OUT)
                store_bits(codes, 1, on & (above == 0), here, P, in_image, OUT)
            else:
                store_bits(codes, 0, above, here, P, in_image, OUT)
                store_bits(codes, 1, below, here, P, in_image, OUT)
                if not LAST:
                    store_bits(codes, 2, on, here, P, in_image, OUT)
        else:
            kept = seen
            if POST:
                kept = tl.where(on, seen, 0.0)
            mask = in_image[:, None] & (o < K)[None, :]
            tl.store(saved + here[:, None] * K + o[None, :], to_storage(kept, DTYPE), mask=mask)
            if not LAST:
                store_bits(codes, 0, on, here, P, in_image, OUT)


@triton.jit
def gradient_products(
    d_t,  # [P, OUT], or None: the seed of this layer is the gradient
    codes,
    saved,
    upstream,
    packed,
    n,
    y,
    x,
    H,
    W,
    P,
    seed_coefficient,
    K: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    KSIZE: tl.constexpr,
    DISTANCE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(9): gradient of this layer's input [pixels, COLUMNS], COLUMNS >= IN a power of 2."""
    here = n.to(tl.int64) * H * W + y * W + x
    o = tl.arange(0, OUT)
    j = tl.arange(0, COLUMNS)
    turned = packed + j[None, :] * OUT + o[:, None]
    total = tl.zeros([BLOCK_H * BLOCK_W, COLUMNS], tl.float32)
    for tap in range(KSIZE * KSIZE):
        dy = KSIZE // 2 - tap // KSIZE
        dx = KSIZE // 2 - tap % KSIZE
        inside = shifted_inside(y, x, dy, dx, H, W)
        row = here + (dy * W + dx)
        if d_t is None:
            seed = load_seed(codes, saved, upstream, row, P, inside, seed_coefficient, K, OUT, DISTANCE)
            a = to_storage(seed, DTYPE)
        else:
            a = tl.load(d_t + row[:, None] * OUT + o[None, :], mask=inside[:, None], other=0.0)
        if COLUMNS == IN:
            weight = tl.load(turned + tap * IN * OUT)
        else:
            weight = tl.load(turned + tap * IN * OUT, mask=(j < IN)[None, :], other=0.0)
        total = tl.dot(a, weight, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["H", "W", "P", "tiles_x", "tiles_per_image", "seed_coefficient", "prev_coefficient"])
def layer_bwd_kernel(
    d_t,  # [P, OUT], or None in the last layer
    codes,
    saved,
    prev_codes,
    prev_saved,
    upstream,  # [P] fp32 factor of each pixel's seeds, or None
    packed,  # [KSIZE * KSIZE, IN, OUT]
    d_prev,  # [P, IN] gradient of t(p) of the layer before
    H,
    W,
    P,
    tiles_x,
    tiles_per_image,
    seed_coefficient,
    prev_coefficient,
    K: tl.constexpr,
    PREV_K: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    KSIZE: tl.constexpr,
    POST: tl.constexpr,
    DISTANCE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    n, y, x = tile_pixels(tile, tiles_x, tiles_per_image, BLOCK_H, BLOCK_W)
    in_image = (y < H) & (x < W)
    here = n.to(tl.int64) * H * W + y * W + x
    j = tl.arange(0, IN)
    d_a = gradient_products(
        d_t, codes, saved, upstream, packed, n, y, x, H, W, P, seed_coefficient,
        K, IN, OUT, IN, BLOCK_H, BLOCK_W, KSIZE, DISTANCE, DTYPE, PRECISION,
    )  # fmt: skip
    seed = load_seed(prev_codes, prev_saved, upstream, here, P, in_image, prev_coefficient, PREV_K, IN, DISTANCE)
    if DISTANCE == L1:
        if POST:
            on = load_bits(prev_codes, 0, here, P, in_image, IN) | load_bits(prev_codes, 1, here, P, in_image, IN)
        else:
            on = load_bits(prev_codes, 2, here, P, in_image, IN)
    else:
        on = load_bits(prev_codes, 0, here, P, in_image, IN)
    # (8a), (8b): under tap "post" the seeds of features that are off are zero already
    d_prev_t = seed + tl.where(on != 0, d_a, 0.0)
    tl.store(d_prev + here[:, None] * IN + j[None, :], to_storage(d_prev_t, DTYPE), mask=in_image[:, None])
