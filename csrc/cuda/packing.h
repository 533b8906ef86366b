// What runs before and after the tiles: weights in the order of fragments, the class table, the sums of all
// tiles.
//
// Packed weights are fragments of the right side of a product, a pair of words for each lane (g, t):
//     [kernel row][product q of the row][8 output channels j][lane][2]
// word h of it holds the channels 2t, 2t + 1 (fp16) or t (tf32) of piece 2q + h of the row's 3 pixels, for
// output 8j + g.
#pragma once

#include "geometry.h"

namespace semeda_fast::gpu {

// W[n][c][dy][dx], or in backward W[c][n][2 - dy][2 - dx]; zero beyond the channels that there are.
DEVICE float packed_weight(const Packing& k, int dy, int dx, int c, int n) {
    c += k.first;
    if (c >= (k.backward ? k.out : k.in) || n >= (k.backward ? k.in : k.out)) return 0;
    const int at =
        k.backward ? ((c * k.in + n) * 3 + 2 - dy) * 3 + 2 - dx : ((n * k.in + c) * 3 + dy) * 3 + dx;
    return load_constant(k.weight + at);
}

template <class M>
DEVICE std::uint32_t packed_word(const Packing& k, int index) {
    const int products = (3 * k.pieces + 1) / 2;
    const int h = index % 2, lane = index / 2 % LANES, g = lane / 4, t = lane % 4;
    const int j = index / (2 * LANES) % k.tiles, step = index / (2 * LANES) / k.tiles;
    const int piece = 2 * (step % products) + h;  // of the 3 pixels' pieces
    if (piece >= 3 * k.pieces) return 0;
    return M::pack_word(t, [&](int channel) {
        return packed_weight(k, step / products, piece / k.pieces, piece % k.pieces * M::CHANNELS + channel,
                             8 * j + g);
    });
}

template <class M>
DEVICE void pack_phase(Warp warp, const Block& block, const Problem& p, const Preparation& all) {
    const int stride = all.pack_blocks * THREADS, start = block.index() * THREADS + warp.index * LANES;
    for (int i = 0; i < all.packings; ++i) {
        const Packing& k = all.packing[i];
        for (int at = start; at < k.words; at += stride)
            for_lanes(warp, [&](int lane) {
                if (at + lane < k.words) k.packed[at + lane] = packed_word<M>(k, at + lane);
            });
    }
    if (p.columns == nullptr) return;
    const LayerPlan& first = p.layer[0];
    const int columns = 9 * (p.classes + 1) * first.out;
    for (int at = start; at < columns; at += stride)
        for_lanes(warp, [&](int lane) {
            const int i = at + lane, k = i % first.out, c = i / first.out % (p.classes + 1);
            const int tap = i / first.out / (p.classes + 1);
            if (i >= columns) return;
            p.columns[i] = c < p.classes ? load_constant(first.weight + (k * first.in + c) * 9 + tap) : 0.f;
        });
}

DEVICE float sum_of_taps(const float* weight) {
    float sum = 0;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) sum += load_constant(weight + tap);
    return sum;
}

// A row of the tables: t_l(q) where all the receptive field holds class c, or is void (c = C). Shared memory:
// activations [2][64] and partial sums [THREADS], floats.
DEVICE void table_row(Block& block, const Problem& p, int c) {
    constexpr int MOST = MAX_CHANNELS;
    for (int i = 0; i < p.layers; ++i) {
        const LayerPlan& layer = p.layer[i];
        if (layer.table == nullptr) return;
        const int before = 4 * MOST * (i % 2), after = 4 * MOST - before, sums = 4 * 2 * MOST;
        const int parts = i == 0 ? 1 : THREADS / layer.out;
        block.phase([&](Warp warp) {
            for_lanes(warp, [&](int lane) {
                const int thread = warp.index * LANES + lane, k = thread % layer.out,
                          part = thread / layer.out;
                if (part >= parts) return;
                float sum = 0;
                if (i == 0) {
                    if (c < p.classes) sum = sum_of_taps(layer.weight + (k * layer.in + c) * 9);
                } else {
                    for (int j = part; j < layer.in; j += parts)
                        sum += sum_of_taps(layer.weight + (k * layer.in + j) * 9) *
                               warp.load<float>(before + 4 * j);
                }
                warp.store<float>(sums + 4 * thread, sum);
            });
        });
        block.phase([&](Warp warp) {
            for_lanes(warp, [&](int lane) {
                const int k = warp.index * LANES + lane;
                if (k >= layer.out) return;
                float t = load_constant(layer.bias + k);
                for (int part = 0; part < parts; ++part)
                    t += warp.load<float>(sums + 4 * (part * layer.out + k));
                layer.table[c * layer.out + k] = t;
                if (c == p.classes) layer.table[(c + 1) * layer.out + k] = load_constant(layer.bias + k);
                warp.store<float>(after + 4 * k, t > 0 ? t : 0.f);
            });
        });
    }
}

template <class M>
DEVICE void prepare_block(Block& block, const Problem& p, const Preparation& all) {
    if (block.index() < all.pack_blocks)
        block.phase([&](Warp warp) { pack_phase<M>(warp, block, p, all); });
    else
        table_row(block, p, block.index() - all.pack_blocks);
}

// One block: the sums of all tiles, in fp64, in an order that only their number decides.
// Shared memory: [MAX_SUMS][WARPS] doubles, then [MAX_SUMS].
DEVICE void finish_block(Block& block, const Problem& p) {
    const int count = 4 + p.layers, totals = 8 * MAX_SUMS * WARPS;
    block.phase([&](Warp warp) {
        for (int s = 0; s < count; ++s) {
            Lanes<double> sum;
            for_lanes(warp, [&](int lane) {
                sum[lane] = 0;
                for (std::int64_t i = warp.index * LANES + lane; i < p.tiling.tiles; i += THREADS)
                    sum[lane] += static_cast<double>(p.partial[s * p.tiling.tiles + i]);
            });
            sum = warp_sum(warp, sum);
            for_lanes(warp, [&](int lane) {
                if (lane == 0) warp.store<double>(8 * (s * WARPS + warp.index), sum[lane]);
            });
        }
    });
    block.phase([&](Warp warp) {
        for_lanes(warp, [&](int lane) {
            const int s = warp.index * LANES + lane;
            if (s >= count) return;
            double sum = 0;
            for (int i = 0; i < WARPS; ++i) sum += warp.load<double>(8 * (s * WARPS + i));
            warp.store<double>(totals + 8 * s, sum);
        });
    });
    block.phase([&](Warp warp) {
        for_lanes(warp, [&](int lane) {
            if (warp.index != 0 || lane != 0) return;
            const auto total = [&](int s) { return warp.load<double>(totals + 8 * s); };
            double semeda = 0;
            for (int i = 0; i < p.layers; ++i) {
                const double distance = total(4 + i);
                semeda += static_cast<double>(p.coefficient[i]) * distance;
                p.terms[3 + i] = static_cast<float>(static_cast<double>(p.layer[i].inverse) * distance);
            }
            const bool bad = total(3) > 0;  // a label that is no class must never pass for a result
            p.terms[0] = bad ? not_a_number() : static_cast<float>(total(0));
            p.terms[1] = bad ? not_a_number() : static_cast<float>(semeda);
            p.terms[2] = static_cast<float>(total(1));
            p.counts[0] = static_cast<std::int64_t>(total(2));
            p.counts[1] = static_cast<std::int64_t>(total(3));
        });
    });
}

}  // namespace semeda_fast::gpu
