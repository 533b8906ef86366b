// First phases of forward: labels, cross-entropy, and e = p - q, what the network is fed with. (1') of
// kernels/README.md.
#pragma once

#include "pixels.h"

namespace semeda_fast::gpu {

// What a lane adds up over its pixels; (6) of kernels/README.md.
struct PixelSums {
    Lanes<float> ce, weight, valid, bad;
    Lanes<int> low, high;  // labels seen
};

DEVICE void begin(Warp warp, PixelSums& sums) {
    for_lanes(warp, [&](int lane) {
        sums.ce[lane] = sums.weight[lane] = sums.valid[lane] = sums.bad[lane] = 0;
        sums.low[lane] = 1 << 20;
        sums.high[lane] = -1;
    });
}

DEVICE void count(const Problem& p, const Label& label, bool owned, float ce, int lane, PixelSums& sums) {
    sums.low[lane] = label.value < sums.low[lane] ? label.value : sums.low[lane];
    sums.high[lane] = label.value > sums.high[lane] ? label.value : sums.high[lane];
    if (!owned || label.value >= p.classes) return;
    sums.ce[lane] += ce;
    sums.weight[lane] += class_weight(p, label.value);
    sums.valid[lane] += 1;
    sums.bad[lane] += label.bad ? 1.f : 0.f;
}

// Sums of the warp, where `sums` of the plan has them: [MAX_SUMS][WARPS]; then lowest and highest label.
DEVICE void end(Warp warp, const Problem& p, const PixelSums& sums) {
    const Lanes<float> total[4] = {warp_sum(warp, sums.ce), warp_sum(warp, sums.weight),
                                   warp_sum(warp, sums.valid), warp_sum(warp, sums.bad)};
    const Lanes<int> low = warp_min(warp, sums.low), high = warp_max(warp, sums.high);
    for_lanes(warp, [&](int lane) {
        if (lane != 0) return;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            warp.store<float>(p.shared.sums + 4 * (i * WARPS + warp.index), total[i][lane]);
        warp.store<int>(p.shared.sums + 4 * (MAX_SUMS * WARPS + warp.index), low[lane]);
        warp.store<int>(p.shared.sums + 4 * ((MAX_SUMS + 1) * WARPS + warp.index), high[lane]);
    });
}

// Whether a tile and its halo hold more than one class, or a part of the outside, where zero padding changes
// features.
DEVICE bool is_mixed(const Block& block, const Problem& p) {
    int low = 1 << 20, high = -1;
    for (int i = 0; i < WARPS; ++i) {
        const int l = block.load<int>(p.shared.sums + 4 * (MAX_SUMS * WARPS + i));
        const int h = block.load<int>(p.shared.sums + 4 * ((MAX_SUMS + 1) * WARPS + i));
        low = l < low ? l : low;
        high = h > high ? h : high;
    }
    return low != high;  // the outside has a label of its own
}

// Of the input region, one pixel after the other: f(lane, pixel in the region, row, column, y, x).
template <class F>
DEVICE void for_pixels(Warp warp, const Problem& p, const Region& region, F f) {
    const int columns = p.tiling.width + 2, count = region.rows * columns;
    for (int start = warp.index * LANES; start < count; start += THREADS) {
        for_lanes(warp, [&](int lane) {
            const int i = start + lane;
            if (i < count)
                f(lane, i, i / columns, i % columns, region.y + i / columns, region.x + i % columns);
        });
    }
}

DEVICE uint4 keep_if(bool keep, uint4 piece) {
    return uint4{keep ? piece.x : 0u, keep ? piece.y : 0u, keep ? piece.z : 0u, keep ? piece.w : 0u};
}

// Up to CLASSES = 8, 16 or 24 classes: one pass, the logits of a pixel in registers.
template <class M, int CLASSES>
DEVICE void softmax_phase(Warp warp, const Problem& p, const Tile& tile) {
    constexpr int PIECES = pieces_of(CLASSES, M::CHANNELS);
    const Region region = region_of(p.tiling, tile, p.layers);
    PixelSums sums;
    begin(warp, sums);
    for_pixels(warp, p, region, [&](int lane, int i, int row, int column, int y, int x) {
        const std::int64_t at = pixel_offset(p.logits, tile.n, y, x);
        Logits<M, CLASSES> logits;
        logits.load(p, at, is_inside(p, y, x));  // before it is known whether the pixel is void
        const Label label = read_label(p, tile.n, y, x);
        const bool valid = label.value < p.classes;
        warp.store<std::uint16_t>(p.shared.labels + 2 * i, static_cast<std::uint16_t>(label.value));
        float z[CLASSES], ce = 0, own = 0;
        float highest = -INFINITY;  // drops a NaN, which the sum keeps
#pragma unroll
        for (int c = 0; c < CLASSES; ++c) {
            z[c] = logits(p, c);
            highest = larger(highest, z[c]);
        }
        float all = 0, weights = 0;
        if (p.smoothing > 0) {
#pragma unroll
            for (int c = 0; c < CLASSES; ++c) {
                if (c >= p.classes) continue;
                all += class_weight(p, c) * (z[c] - highest);
                weights += class_weight(p, c);
            }
        }
        float total = 0;
#pragma unroll
        for (int c = 0; c < CLASSES; ++c) {
            z[c] = M::exp(z[c], highest);
            total += z[c];
        }
        const float inverse = 1.f / total;
        if (valid) {
            own = read_logit<M, CLASSES>(p, at, label.value);
            const float log_total = logarithm(total);
            ce = cross_entropy(p, class_weight(p, label.value), own - highest - log_total,
                               all - weights * log_total);
            own = M::exp(own, highest) * inverse - 1.f;
        }
#pragma unroll
        for (int c = 0; c < CLASSES; ++c) z[c] *= inverse;
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece)
            warp.store<uint4>(
                piece_address<PIECES>(p.shared.input, i - column, column, piece),
                keep_if(valid, M::pack_piece([&](int k) { return z[piece * M::CHANNELS + k]; })));
        if (valid)  // p - q of the label, where q is 1
            M::store_one(
                warp,
                p.shared.input + i * PIECES * PIECE + M::template channel_offset<PIECES>(column, label.value),
                own);
        count(p, label, is_owned(p, region, row, column), ce, lane, sums);
    });
    end(warp, p, sums);
}

// More classes: first maximum and sum of each pixel, and cross-entropy ...
template <class M>
DEVICE void log_sum_phase(Warp warp, const Problem& p, const Tile& tile) {
    const Region region = region_of(p.tiling, tile, p.layers);
    PixelSums sums;
    begin(warp, sums);
    for_pixels(warp, p, region, [&](int lane, int i, int row, int column, int y, int x) {
        const Label label = read_label(p, tile.n, y, x);
        warp.store<std::uint16_t>(p.shared.labels + 2 * i, static_cast<std::uint16_t>(label.value));
        float highest = -INFINITY, total = 0, ce = 0;
        if (label.value < p.classes) {
            const std::int64_t at = pixel_offset(p.logits, tile.n, y, x);
#pragma unroll 8
            for (int c = 0; c < p.classes; ++c) {
                const float z = read_logit<M, MAX_CLASSES>(p, at, c);
                highest = larger(highest, z);
            }
            float own = 0, all = 0, weights = 0;
#pragma unroll 8
            for (int c = 0; c < p.classes; ++c) {
                const float shifted = read_logit<M, MAX_CLASSES>(p, at, c) - highest;
                own = c == label.value ? shifted : own;
                if (p.smoothing > 0) {
                    all += class_weight(p, c) * shifted;
                    weights += class_weight(p, c);
                }
                total += M::exp(shifted, 0);
            }
            const float log_total = logarithm(total);
            ce = cross_entropy(p, class_weight(p, label.value), own - log_total, all - weights * log_total);
        }
        warp.store<float2>(p.shared.log_sums + 8 * i, float2{highest, total});
        count(p, label, is_owned(p, region, row, column), ce, lane, sums);
    });
    end(warp, p, sums);
}

// ... then e of one chunk of classes after the other.
template <class M>
DEVICE void chunk_phase(Warp warp, const Problem& p, const Tile& tile, int first) {
    constexpr int PIECES = pieces_of(CLASS_CHUNK, M::CHANNELS);
    const Region region = region_of(p.tiling, tile, p.layers);
    for_pixels(warp, p, region, [&](int, int i, int, int column, int y, int x) {
        const int label = warp.load<std::uint16_t>(p.shared.labels + 2 * i);
        const float2 sums = warp.load<float2>(p.shared.log_sums + 8 * i);
        const bool valid = label < p.classes;
        const float inverse = 1.f / sums.y;
        const typename M::Raw* from =
            raw_at<M>(p.logits, pixel_offset(p.logits, tile.n, y, x) + first * p.logits.stride[1]);
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
            typename M::Raw raw[M::CHANNELS];
#pragma unroll
            for (int k = 0; k < M::CHANNELS; ++k, from += p.logits.stride[1])
                raw[k] = load_constant_if(valid && first + piece * M::CHANNELS + k < p.classes, from);
            warp.store<uint4>(
                piece_address<PIECES>(p.shared.input, i - column, column, piece), M::pack_piece([&](int k) {
                    const int c = first + piece * M::CHANNELS + k;
                    const float s = M::exp(M::from_raw(is_bfloat(p.logits), raw[k]), sums.x) * inverse;
                    return valid && c < p.classes ? s - (c == label ? 1.f : 0.f) : 0.f;
                }));
        }
    });
}

}  // namespace semeda_fast::gpu
