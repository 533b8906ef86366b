// Backward: codes, the layers turned round, the softmax's gradient and cross-entropy's. (7) to (12) of
// kernels/README.md.
//
//     phases of a tile: d_t of the last layer from codes | layer L | ... | layer 2 | strips of: layer 1 ->
//     d_p | d_logits
//
// Seeds are in units of `unit`, the largest coefficient, which comes back in fp32 at the end. d_t of layer i
// (from 0) covers the tile with halo i + 1, d_p the tile itself, a strip of rows at a time.
#pragma once

#include <type_traits>

#include "codes.h"
#include "convolution.h"
#include "forward.h"
#include "pixels.h"
#include "proxies.h"

namespace semeda_fast::gpu {

// sign(d) * seed of one channel from the bits of a pixel.
DEVICE float seed_of(std::uint64_t above, std::uint64_t below, int bit, float seed) {
    return static_cast<float>(static_cast<int>(above >> bit & 1) - static_cast<int>(below >> bit & 1)) * seed;
}

// d_t of the last layer, K channels, padded with zeros to 8.
template <class M, int K>
DEVICE void seed_phase(Warp warp, const Problem& p, const Tile& tile) {
    constexpr int PIECES = pieces_of(K, M::CHANNELS);
    const int last = p.layers - 1;
    const float seed = p.layer[last].seed;
    const std::uint8_t* const codes = p.codes + p.layer[last].codes;
    for_pixels(warp, p, region_of(p.tiling, tile, p.layers), [&](int, int i, int, int column, int y, int x) {
        std::uint64_t above = 0, below = 0;
        if (is_inside(p, y, x)) {
            const std::int64_t pixel = (tile.n * p.h + y) * p.w + x;
            if constexpr (K < 8) {
                const std::uint32_t bits = load_constant(codes + pixel);
                above = bits & 3u;
                below = bits >> 2 & 3u;
            } else {
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    above |= static_cast<std::uint64_t>(load_code<K>(codes, pixel, t)) << (t * (K / 4));
                    below |= static_cast<std::uint64_t>(load_code<K>(codes + p.pixels * (K / 8), pixel, t))
                             << (t * (K / 4));
                }
            }
        }
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece)
            warp.store<uint4>(piece_address<PIECES>(p.shared.input, i - column, column, piece),
                              M::pack_piece([&](int k) {
                                  const int channel = piece * M::CHANNELS + k;
                                  if (channel >= K) return 0.f;
                                  return seed_of(above, below, K < 8 ? channel : code_bit(K, channel), seed);
                              }));
    });
}

// K / 4 bits each of on, above and below, of the channels that a lane has: asked for before the products, put
// together behind them, so that nothing waits for memory in between.
template <int K>
struct LaneCode {
    std::uint32_t on, above, below;
    bool exists;

    DEVICE void load(const Problem& p, const std::uint8_t* codes, std::int64_t pixel, bool inside, int t) {
        const std::int64_t plane = p.pixels * (K / 8), at = inside ? pixel : 0;
        exists = inside;
        on = load_code_word<K>(codes, at, t);
        above = load_code_word<K>(codes + plane, at, t);
        below = load_code_word<K>(codes + 2 * plane, at, t);
    }
    // Outside the image no bit is set, which makes the zeros that the next layer needs there.
    DEVICE void unpack(int t) {
        on = exists ? code_of_word<K>(on, t) : 0;
        above = exists ? code_of_word<K>(above, t) : 0;
        below = exists ? code_of_word<K>(below, t) : 0;
    }
};

// d_t of layer i - 1 from that of layer i > 0, which has the shape of layer SHAPE; (8) and (9).
template <class P, class M, int SHAPE>
DEVICE void layer_backward_phase(Warp warp, const Problem& p, const Tile& tile, int i) {
    constexpr int IN = P::channels(SHAPE), OUT = P::channels(SHAPE - 1), NT = OUT / 8;
    constexpr int R = unit_rows(NT, P::template sums<M>()), PIECES = pieces_of(IN, M::CHANNELS);
    constexpr int OUT_PIECES = pieces_of(OUT, M::CHANNELS);
    const bool last = i == p.layers - 1;
    const Region region = region_of(p.tiling, tile, i);
    const Input input = {last ? p.shared.input : p.shared.hidden[i], p.tiling.width + (last ? 2 : 0),
                         region.rows + 2, p.shared.zero};
    const Weights weights = {p.shared.weights[i], nullptr};
    const std::uint8_t* const codes = p.codes + p.layer[i - 1].codes;
    const float seed = p.layer[i - 1].seed;
    const int across = p.tiling.width / MATRIX_ROWS, units = divide_up(region.rows, R) * across;
#pragma unroll 1
    for (int u = warp.index; u < units; u += WARPS) {
        const Unit unit = {u / across * R, u % across * MATRIX_ROWS};
        Lanes<LaneCode<OUT>> code[R][2];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                for_lanes(warp, [&](int lane) {
                    const int row = unit.row + r, column = unit.column + sum_pixel(lane, 2 * half);
                    const int y = region.y + row, x = region.x + column;
                    const bool inside = row < region.rows && column < region.columns && is_inside(p, y, x);
                    code[r][half][lane].load(p, codes, (tile.n * p.h + y) * p.w + x, inside, lane % 4);
                });
        Sums<R, NT> sums;
        set_zero(warp, sums);
        convolve<M, PIECES, NT, R, false>(warp, sums, input, weights, unit.row, unit.column);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const int row = unit.row + r;
            if (row >= region.rows) continue;
#pragma unroll
            for (int half = 0; half < 2; ++half)
                for_lanes(warp, [&](int lane) {
                    const int column = unit.column + sum_pixel(lane, 2 * half);
                    const int at =
                        p.shared.hidden[i - 1] + (row * p.tiling.width + column) * OUT_PIECES * PIECE;
                    LaneCode<OUT> bits = code[r][half][lane];
                    bits.unpack(lane % 4);
#pragma unroll
                    for (int j = 0; j < NT; ++j) {
                        float d_t[2];
#pragma unroll
                        for (int k = 0; k < 2; ++k) {
                            const std::uint32_t bit = 1u << (2 * j + k);
                            const float sum = sums.at[r][j][2 * half + k][lane];
                            const float seeded = (bits.above & bit) != 0   ? seed
                                                 : (bits.below & bit) != 0 ? -seed
                                                                           : 0.f;
                            d_t[k] = (bits.on & bit) != 0 ? seeded + sum : seeded;
                        }
                        const int channel = 8 * j + sum_channel(lane, 0);
                        M::store_pair(warp, at + M::template channel_offset<OUT_PIECES>(column, channel),
                                      true, d_t[0], d_t[1]);
                    }
                });
        }
    }
}

// d_p of a strip of the tile's rows, NT tiles of 8 classes at a time; (9) for the first layer.
template <class P, class M, int NT, bool GLOBAL>
DEVICE void d_p_phase(Warp warp, const Problem& p, int strip) {
    constexpr int PIECES = pieces_of(P::channels(0), M::CHANNELS), R = unit_rows(NT, P::template sums<M>());
    const Input input = {p.shared.hidden[0], p.tiling.width, p.tiling.tile_h + 2, p.shared.zero};
    const Weights weights = {p.shared.weights[0], p.layer[0].packed};
    const int groups = GLOBAL ? divide_up(p.classes, 8 * NT) : 1;
    const int rows = p.tiling.tile_h - strip < p.strip_rows ? p.tiling.tile_h - strip : p.strip_rows;
    const int across = p.tiling.width / MATRIX_ROWS, units = divide_up(rows, R) * across * groups;
#pragma unroll 1
    for (int u = warp.index; u < units; u += WARPS) {
        const int group = u % groups, place = u / groups;
        const Unit unit = {place / across * R, place % across * MATRIX_ROWS};
        Sums<R, NT> sums;
        set_zero(warp, sums);
        convolve<M, PIECES, NT, R, GLOBAL>(warp, sums, input, weights, strip + unit.row, unit.column,
                                           group * NT, groups * NT);
#pragma unroll
        for (int r = 0; r < R; ++r) {
            if (unit.row + r >= rows) continue;
            for_lanes(warp, [&](int lane) {
#pragma unroll
                for (int j = 0; j < NT; ++j)
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        const int at = (unit.row + r) * p.tiling.width + unit.column + sum_pixel(lane, k);
                        const int c = 8 * (group * NT + j) + sum_channel(lane, k);
                        if (c < p.classes)
                            warp.store<float>(p.shared.d_p + 4 * (at * p.d_p_pitch + c),
                                              sums.at[r][j][k][lane]);
                    }
            });
        }
    }
}

// Pixels of a strip: f(lane, address of d_p, y, x).
template <class F>
DEVICE void for_strip(Warp warp, const Problem& p, const Tile& tile, int strip, F f) {
    const int rows = p.tiling.tile_h - strip < p.strip_rows ? p.tiling.tile_h - strip : p.strip_rows;
    const int columns = p.tiling.tile_w, count = rows * columns;
    for (int start = warp.index * LANES; start < count; start += THREADS) {
        for_lanes(warp, [&](int lane) {
            const int i = start + lane;
            if (i >= count) return;
            const int row = i / columns, column = i % columns;
            const int y = tile.y + strip + row, x = tile.x + column;
            if (is_inside(p, y, x))
                f(lane, p.shared.d_p + 4 * (row * p.tiling.width + column) * p.d_p_pitch, y, x);
        });
    }
}

// What all classes of a pixel share in (10) to (12): d_z_c = s_c (slope d_p_c + offset) - d_ce r_c.
struct PixelGradient {
    float slope, offset;
    float own, smoothed;  // d_ce r of the label, and of a class with weight 1 where labels are smoothed
    int label;
};

// `dot` is sum_i s_i d_p_i, `weights` the sum of the class weights, needed where labels are smoothed.
DEVICE PixelGradient pixel_gradient(const Problem& p, int label, float dot, float weights) {
    const float d_ce = load_constant(static_cast<const float*>(p.d_ce.data));
    PixelGradient g;
    g.slope = load_constant(static_cast<const float*>(p.d_semeda.data)) * p.unit;
    g.own = d_ce * (1.f - p.smoothing) * class_weight(p, label);
    g.smoothed = d_ce * p.smoothing / static_cast<float>(p.classes);
    g.offset = g.own + g.smoothed * weights - g.slope * dot;
    g.label = label;
    return g;
}

template <bool SMOOTHED>
DEVICE float logit_gradient(const Problem& p, const PixelGradient& g, int c, float s, float d_p) {
    float d_z = s * (g.slope * d_p + g.offset);
    if (SMOOTHED) d_z -= g.smoothed * class_weight(p, c);
    return c == g.label ? d_z - g.own : d_z;
}

// Up to CLASSES = 8, 16 or 24 classes, in registers.
template <class M, int CLASSES>
DEVICE void d_logits_phase(Warp warp, const Problem& p, const Tile& tile, int strip) {
    for_strip(warp, p, tile, strip, [&](int, int d_p, int y, int x) {
        const std::int64_t to = pixel_offset(p.d_logits, tile.n, y, x);
        Logits<M, CLASSES> logits;
        logits.load(p, pixel_offset(p.logits, tile.n, y, x),
                    true);  // before it is known whether the pixel is void
        const Label label = read_label(p, tile.n, y, x);
        const bool valid = label.value < p.classes;
        float s[CLASSES];
        float highest = -INFINITY;
#pragma unroll
        for (int c = 0; c < CLASSES; ++c) {
            s[c] = logits(p, c);
            highest = larger(highest, s[c]);
        }
        float total = 0, dot = 0, weights = 0;
#pragma unroll
        for (int c = 0; c < CLASSES; ++c) {
            s[c] = M::exp(s[c], highest);
            total += s[c];
            dot += c < p.classes ? s[c] * warp.load<float>(d_p + 4 * c) : 0.f;
        }
        if (p.smoothing > 0)
            for (int c = 0; c < p.classes; ++c) weights += class_weight(p, c);
        const float inverse = label.bad ? not_a_number() : 1.f / total;  // such a label must not pass
        const PixelGradient g = pixel_gradient(p, valid ? label.value : 0, dot * inverse, weights);
        const auto write = [&](auto smoothed) {
            const bool binary = CLASSES <= 8 && p.binary;
            typename M::Raw* at = static_cast<typename M::Raw*>(p.d_logits.data) + to;
#pragma unroll
            for (int c = 0; c < CLASSES; ++c) {
                const int channel = c < p.classes ? c : 0;  // so that what follows needs no branch
                const float d_z = logit_gradient<decltype(smoothed)::value>(
                    p, g, channel, s[c] * inverse, warp.load<float>(d_p + 4 * channel));
                const typename M::Raw raw = M::to_raw(is_bfloat(p.d_logits), valid ? d_z : 0.f);
                if (c < p.classes && !(binary && c == 0)) {
                    *at = raw;
                    at += p.d_logits.stride[1];
                }
            }
        };
        if (p.smoothing > 0)
            write(std::true_type());
        else
            write(std::false_type());
    });
}

// More classes: logits are read three times, the second and third time from the cache.
template <class M>
DEVICE void d_logits_of_many_phase(Warp warp, const Problem& p, const Tile& tile, int strip) {
    for_strip(warp, p, tile, strip, [&](int, int d_p, int y, int x) {
        const std::int64_t to = pixel_offset(p.d_logits, tile.n, y, x);
        const Label label = read_label(p, tile.n, y, x);
        typename M::Raw* const at = static_cast<typename M::Raw*>(p.d_logits.data) + to;
        if (label.value >= p.classes) {
            for (int c = 0; c < p.classes; ++c) at[c * p.d_logits.stride[1]] = 0;
            return;
        }
        const std::int64_t from = pixel_offset(p.logits, tile.n, y, x);
        float highest = -INFINITY, total = 0, dot = 0, weights = 0;
#pragma unroll 8
        for (int c = 0; c < p.classes; ++c) {
            const float z = read_logit<M, MAX_CLASSES>(p, from, c);
            highest = larger(highest, z);
        }
#pragma unroll 8
        for (int c = 0; c < p.classes; ++c) {
            const float s = M::exp(read_logit<M, MAX_CLASSES>(p, from, c), highest);
            total += s;
            dot += s * warp.load<float>(d_p + 4 * c);
            if (p.smoothing > 0) weights += class_weight(p, c);
        }
        const float inverse = label.bad ? not_a_number() : 1.f / total;  // such a label must not pass
        const PixelGradient g = pixel_gradient(p, label.value, dot * inverse, weights);
#pragma unroll 8
        for (int c = 0; c < p.classes; ++c) {
            const float s = M::exp(read_logit<M, MAX_CLASSES>(p, from, c), highest) * inverse;
            const float d_z = logit_gradient<true>(p, g, c, s, warp.load<float>(d_p + 4 * c));
            at[c * p.d_logits.stride[1]] = M::to_raw(is_bfloat(p.d_logits), d_z);
        }
    });
}

template <class P, class M>
DEVICE void backward_block(Block& block, const Problem& p) {
    block.phase([&](Warp warp) { begin_block(warp, p); });
    for (std::int64_t index = block.index(); index < p.tiling.tiles; index += block.count()) {
        const Tile tile = tile_of(p.tiling, index);
        block.phase([&](Warp warp) {
            if (!p.resident) copy_weights(warp, p, p.layers - 1);
            seed_phase<M, P::channels(P::LAYERS - 1)>(warp, p, tile);
        });
        for (int i = P::LAYERS - 1; i > 0; --i) {
            with_layer<P>(i, [&](auto shape) {
                block.phase(
                    [&](Warp warp) { layer_backward_phase<P, M, decltype(shape)::VALUE>(warp, p, tile, i); });
            });
            if (!p.resident) block.phase([&](Warp warp) { copy_weights(warp, p, i - 1); });
        }
        for (int strip = 0; strip < p.tiling.tile_h; strip += p.strip_rows) {
            if (p.classes <= CLASS_CHUNK) {
                with_classes(p.classes, [&](auto classes) {
                    constexpr int CLASSES = decltype(classes)::VALUE;
                    block.phase([&](Warp warp) { d_p_phase<P, M, CLASSES / 8, false>(warp, p, strip); });
                    block.phase([&](Warp warp) { d_logits_phase<M, CLASSES>(warp, p, tile, strip); });
                });
            } else {
                block.phase([&](Warp warp) { d_p_phase<P, M, CLASS_CHUNK / 8, true>(warp, p, strip); });
                block.phase([&](Warp warp) { d_logits_of_many_phase<M>(warp, p, tile, strip); });
            }
        }
    }
}

}  // namespace semeda_fast::gpu
