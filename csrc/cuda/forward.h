// Forward: softmax, cross-entropy, all layers and distances of a tile. (1') to (4) of kernels/README.md.
//
//     phases of a tile: labels and e = p - q | layer 1 | ... | layer L | sums
//     with more classes than a chunk: labels and log-sums | e of a chunk | layer 1, so far | next chunk ... |
//     layer 2 ...
//
// What travels is the difference of the branches, b_l = relu(t_l(p)) - relu(t_l(q)). t_l(q) of a unit of R x
// 16 pixels is a row of the class table where the unit's receptive field holds one class; else it is
// computed: layer 1 adds up columns of weights by label, later layers convolve relu(t(q)) with the same
// weights.
#pragma once

#include "codes.h"
#include "convolution.h"
#include "proxies.h"
#include "softmax.h"

namespace semeda_fast::gpu {

// A unit of work of a warp: R rows of 16 pixels, at (row, column) of a layer's region.
struct Unit {
    int row, column;
};

// The label map's region has halo L, layer i's has L - 1 - i: the pixel (row, column) of layer i is
// (row + i + 1, column + i + 1) of the map.
DEVICE int label_address(const Problem& p, int row, int column) {
    return p.shared.labels + 2 * (row * (p.tiling.width + 2) + column);
}

// The class that fills the receptive field of a unit in layer i, or -1.
template <int R>
DEVICE int unit_class(Warp warp, const Problem& p, int i, const Unit& unit) {
    const int rows = p.tiling.tile_h + 2 * p.layers, columns = p.tiling.width + 2;
    const int reach = 2 * (i + 1);
    const int bottom = unit.row + R + reach < rows ? unit.row + R + reach : rows;
    const int right =
        unit.column + MATRIX_ROWS + reach < columns ? unit.column + MATRIX_ROWS + reach : columns;
    Lanes<int> low, high;
    for_lanes(warp, [&](int lane) {
        low[lane] = 1 << 20;
        high[lane] = -1;
        // A lane a column: 16 pixels and 7 layers on each side are 30.
        for (int row = unit.row; unit.column + lane < right && row < bottom; ++row) {
            const int label = warp.load<std::uint16_t>(label_address(p, row, unit.column + lane));
            low[lane] = label < low[lane] ? label : low[lane];
            high[lane] = label > high[lane] ? label : high[lane];
        }
    });
    low = warp_min(warp, low);
    high = warp_max(warp, high);
    int found = -1;
    for_lanes(warp,
              [&](int lane) { found = low[lane] == high[lane] && high[lane] <= p.classes ? low[lane] : -1; });
    return found;
}

// Each sum becomes what its channel has in a row of a layer's table: features of a class, or the bias. The
// rows in use are few and stay in the first-level cache.
template <int OUT, int R, int NT>
DEVICE void fill_from_table(Warp warp, Sums<R, NT>& sums, const LayerPlan& layer, int row) {
    for_lanes(warp, [&](int lane) {
        const auto* from = reinterpret_cast<const float2*>(layer.table + row * OUT + sum_channel(lane, 0));
#pragma unroll
        for (int j = 0; j < NT; ++j) {
            const bool exists = OUT % 8 == 0 || sum_channel(lane, 0) < OUT;
            const float2 pair = exists ? load_constant(from + 4 * j) : float2{0, 0};
#pragma unroll
            for (int r = 0; r < R; ++r)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums.at[r][j][i][lane] = i % 2 == 0 ? pair.x : pair.y;
        }
    });
}

// t_1(q) without bias: the convolution over a one-hot map picks a column of weights for each of 9 labels.
template <int OUT, int R, int NT>
DEVICE void add_columns(Warp warp, Sums<R, NT>& sums, const Problem& p, const Unit& unit) {
    const int rows = p.tiling.tile_h + 2 * p.layers, columns = p.tiling.width + 2;
#pragma unroll 1
    for (int tap = 0; tap < 9; ++tap) {
        const float* weights = p.columns + static_cast<std::int64_t>(tap) * (p.classes + 1) * OUT;
        for_lanes(warp, [&](int lane) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    // Pixels beyond the map feed sums that nobody uses; row C of the columns is zero.
                    const int row = unit.row + r + tap / 3,
                              column = unit.column + sum_pixel(lane, 2 * half) + tap % 3;
                    const int label = warp.load<std::uint16_t>(label_address(
                        p, row < rows ? row : rows - 1, column < columns ? column : columns - 1));
                    const float* at =
                        weights + (label < p.classes ? label : p.classes) * OUT + sum_channel(lane, 0);
#pragma unroll
                    for (int j = 0; j < NT; ++j) {
                        const float2 pair = load_constant(reinterpret_cast<const float2*>(at + 8 * j));
                        sums.at[r][j][2 * half][lane] += pair.x;
                        sums.at[r][j][2 * half + 1][lane] += pair.y;
                    }
                }
            }
        });
    }
}

// What the end of a layer needs to know beside its sums.
struct Layer {
    int number;  // from 0
    Region region;
    bool with_target;
    bool mixed;  // the tile
};

// Where a lane's pixels of a unit are: that of row 0 and the lower half of sums; the upper half's is 8
// columns further.
struct LanePlace {
    Lanes<int> column;  // of the region
    Lanes<int> label;   // address in the label map
    Lanes<std::int64_t> pixel;
};

DEVICE LanePlace place_of(Warp warp, const Problem& p, const Tile& tile, const Layer& layer,
                          const Unit& unit) {
    LanePlace place;
    for_lanes(warp, [&](int lane) {
        const int column = unit.column + sum_pixel(lane, 0), up = layer.number + 1;
        place.column[lane] = column;
        place.label[lane] = label_address(p, unit.row + up, column + up);
        place.pixel[lane] = (tile.n * p.h + layer.region.y + unit.row) * p.w + layer.region.x + column;
    });
    return place;
}

// What a pixel's features leave for backward, of the channels that a lane has, and whether that is to be
// written.
struct LaneCodes {
    Lanes<std::uint32_t> above, below, on;
    Lanes<bool> due;
};

// To the planes of a layer, or the last layer's byte. `shift` is the pixel's distance from the place.
template <int OUT, bool LAST>
DEVICE void write_codes(Warp warp, const Problem& p, const LayerPlan& plan, const LanePlace& place, int shift,
                        LaneCodes& code) {
    if (OUT == 16) {  // two lanes share a byte
        Lanes<std::uint32_t> mine;
        for_lanes(warp, [&](int lane) {
            mine[lane] = code.above[lane] | code.below[lane] << 8 | code.on[lane] << 16;
        });
        const Lanes<std::uint32_t> other = shuffle_xor(warp, mine, 1);
        for_lanes(warp, [&](int lane) {
            const std::uint32_t both = mine[lane] | other[lane] << 4;
            code.above[lane] = both & 255u;
            code.below[lane] = both >> 8 & 255u;
            code.on[lane] = both >> 16 & 255u;
        });
    }
    std::uint8_t* const codes = p.codes + plan.codes;
    const std::int64_t plane = p.pixels * (OUT / 8);
    for_lanes(warp, [&](int lane) {
        if (!code.due[lane]) return;
        const std::int64_t pixel = place.pixel[lane] + shift;
        const int t = lane % 4;
        if constexpr (OUT < 8) {
            if (t == 0) codes[pixel] = static_cast<std::uint8_t>(code.above[lane] | code.below[lane] << 2);
        } else {
            if (!LAST) store_code<OUT>(codes, pixel, t, code.on[lane]);
            store_code<OUT>(codes + (LAST ? 0 : plane), pixel, t, code.above[lane]);
            store_code<OUT>(codes + (LAST ? 1 : 2) * plane, pixel, t, code.below[lane]);
        }
    });
}

// From d = t(p) - t(q) and t(q): features for the next layer, codes, and a lane's sum of |d|.
template <class M, int OUT, bool LAST, int R, int NT>
DEVICE void finish_unit(Warp warp, const Problem& p, const Tile& tile, const Layer& layer, const Unit& unit,
                        const Sums<R, NT>& d, const Sums<R, NT>& tq, Lanes<float>& total) {
    constexpr int PIECES = pieces_of(OUT, M::CHANNELS), PIXEL = PIECES * PIECE;
    const Region& region = layer.region;
    const LanePlace place = place_of(warp, p, tile, layer, unit);
    const int hidden = LAST ? 0 : p.shared.hidden[layer.number];
    const int target = LAST || !layer.mixed ? -1 : p.shared.target[layer.number];
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const int row = unit.row + r;
        if (row >= region.rows) continue;
        const bool owned_row = row >= region.halo && row < region.halo + p.tiling.tile_h;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            LaneCodes code;
            for_lanes(warp, [&](int lane) {
                const int column = place.column[lane] + 8 * half;
                const int label = column < region.columns
                                      ? warp.load<std::uint16_t>(place.label[lane] +
                                                                 2 * (r * (p.tiling.width + 2) + 8 * half))
                                      : p.classes + 1;
                const bool inside = label <= p.classes;
                const bool owned =
                    inside && owned_row && column >= region.halo && column < region.halo + p.tiling.tile_w;
                const bool counts = owned && label < p.classes;
                std::uint32_t above = 0, below = 0, on = 0;
                float sum = 0;
#pragma unroll
                for (int j = NT - 1; j >= 0; --j) {  // bits come in from below, the highest first
                    const int channel = 8 * j + sum_channel(lane, 0);
                    if (OUT % 8 != 0 && channel >= OUT) continue;
                    float b[2], aq[2];
#pragma unroll
                    for (int i = 1; i >= 0; --i) {
                        float distance = d.at[r][j][2 * half + i][lane];
                        if (!LAST || layer.with_target) {
                            const float q = tq.at[r][j][2 * half + i][lane];
                            aq[i] = larger(q, 0);
                            // relu(q + d) - relu(q), which is d itself where both are positive
                            b[i] = larger(distance, -q) + smaller(q, 0);
                            on = shift_in_sign(on, 0 - (q + distance));
                            if (p.post) distance = b[i];
                        }
                        sum += magnitude(distance);
                        // A sum that began with +0 is never -0, and 0 - 0 is +0.
                        above = shift_in_sign(above, 0 - distance);
                        below = shift_in_sign(below, distance);
                    }
                    if (!LAST) {  // each layer pads with zeros of its own
                        const int at = (row * p.tiling.width + column) * PIXEL +
                                       M::template channel_offset<PIECES>(column, channel);
                        M::store_pair(warp, hidden + at, inside, b[0], b[1]);
                        if (target >= 0) M::store_pair(warp, target + at, inside, aq[0], aq[1]);
                    }
                }
                total[lane] += counts ? sum : 0;
                const std::uint32_t seen = !counts ? 0u : p.post ? on : ~0u;
                code.above[lane] = above & seen;
                code.below[lane] = below & seen;
                code.on[lane] = on;
                code.due[lane] = owned;
            });
            if (p.codes != nullptr)
                write_codes<OUT, LAST>(warp, p, p.layer[layer.number], place, r * p.w + 8 * half, code);
        }
    }
}

DEVICE void store_layer_sum(Warp warp, const Problem& p, int number, const Lanes<float>& total) {
    const Lanes<float> sum = warp_sum(warp, total);
    for_lanes(warp, [&](int lane) {
        if (lane == 0) warp.store<float>(p.shared.sums + 4 * ((4 + number) * WARPS + warp.index), sum[lane]);
    });
}

// A chunk of the first layer's classes: which, and whether others come before or behind it.
struct Chunk {
    int number;
    bool first, last;
};

// The row of the table that a unit's t(q) starts from: its class's, which is all of it, or the bias behind
// the classes.
template <int R>
DEVICE int target_row(Warp warp, const Problem& p, const Layer& layer, const Unit& unit) {
    if (!layer.mixed) return warp.load_uniform<std::uint16_t>(p.shared.labels);
    const int one = unit_class<R>(warp, p, layer.number, unit);
    return one >= 0 ? one : p.classes + 1;
}

// Sums that wait in shared memory for the next chunk of classes, each lane's its own.
template <int R, int NT>
DEVICE void load_sums(Warp warp, Sums<R, NT>& sums, int address) {
    for_lanes(warp, [&](int lane) {
#pragma unroll
        for (int k = 0; k < R * NT * 4; ++k)
            sums.at[k / (NT * 4)][k / 4 % NT][k % 4][lane] =
                warp.load<float>(address + (k * LANES + lane) * 4);
    });
}

template <int R, int NT>
DEVICE void store_sums(Warp warp, const Sums<R, NT>& sums, int address) {
    for_lanes(warp, [&](int lane) {
#pragma unroll
        for (int k = 0; k < R * NT * 4; ++k)
            warp.store<float>(address + (k * LANES + lane) * 4,
                              sums.at[k / (NT * 4)][k / 4 % NT][k % 4][lane]);
    });
}

// The first layer; PIECES of input hold all classes or one chunk of them.
template <class P, class M, int PIECES, bool CHUNKS>
DEVICE void first_layer_phase(Warp warp, const Problem& p, const Tile& tile, bool mixed, Chunk chunk) {
    constexpr int OUT = P::channels(0), NT = OUT / 8, R = unit_rows(NT, P::template sums<M>());
    const Layer layer = {0, region_of(p.tiling, tile, p.layers - 1), true, mixed};
    const Input input = {p.shared.input, p.tiling.width + 2, layer.region.rows + 2, p.shared.zero};
    const Weights weights = {p.shared.weights[0],
                             p.layer[0].packed + chunk.number * packed_words(CLASS_CHUNK, OUT, M::CHANNELS)};
    const int across = p.tiling.width / MATRIX_ROWS, units = divide_up(layer.region.rows, R) * across;
    Lanes<float> total;
    for_lanes(warp, [&](int lane) { total[lane] = 0; });
#pragma unroll 1
    for (int u = warp.index; u < units; u += WARPS) {
        const Unit unit = {u / across * R, u % across * MATRIX_ROWS};
        Sums<R, NT> d;
        set_zero(warp, d);
        if (CHUNKS) {
            const int kept = p.shared.partial + u * (R * NT * 4) * LANES * 4;
            if (!chunk.first) load_sums(warp, d, kept);
            convolve<M, PIECES, NT, R, true>(warp, d, input, weights, unit.row, unit.column);
            if (!chunk.last) {
                store_sums(warp, d, kept);
                continue;
            }
        } else {
            convolve<M, PIECES, NT, R, false>(warp, d, input, weights, unit.row, unit.column);
        }
        Sums<R, NT> tq;
        const int one = target_row<R>(warp, p, layer, unit);
        fill_from_table<OUT>(warp, tq, p.layer[0], one);
        if (one > p.classes) add_columns<OUT>(warp, tq, p, unit);
        finish_unit<M, OUT, false>(warp, p, tile, layer, unit, d, tq, total);
    }
    if (!CHUNKS || chunk.last) store_layer_sum(warp, p, 0, total);
}

// Layer i > 0, of the shape of layer SHAPE.
template <class P, class M, int SHAPE>
DEVICE void layer_phase(Warp warp, const Problem& p, const Tile& tile, bool mixed, int i) {
    constexpr int IN = P::channels(SHAPE - 1), OUT = P::channels(SHAPE), NT = divide_up(OUT, 8);
    constexpr int R = unit_rows(NT, P::template sums<M>()), PIECES = pieces_of(IN, M::CHANNELS);
    constexpr bool LAST = SHAPE == P::LAYERS - 1;
    const Layer layer = {i, region_of(p.tiling, tile, p.layers - 1 - i), !LAST || p.post, mixed};
    const Input input = {p.shared.hidden[i - 1], p.tiling.width, layer.region.rows + 2, p.shared.zero};
    const Weights weights = {p.shared.weights[i], nullptr};
    const int across = p.tiling.width / MATRIX_ROWS, units = divide_up(layer.region.rows, R) * across;
    Lanes<float> total;
    for_lanes(warp, [&](int lane) { total[lane] = 0; });
#pragma unroll 1
    for (int u = warp.index; u < units; u += WARPS) {
        const Unit unit = {u / across * R, u % across * MATRIX_ROWS};
        Sums<R, NT> d, tq;
        set_zero(warp, d);
        convolve<M, PIECES, NT, R, false>(warp, d, input, weights, unit.row, unit.column);
        if (layer.with_target) {
            const int one = target_row<R>(warp, p, layer, unit);
            fill_from_table<OUT>(warp, tq, p.layer[i], one);
            if (one > p.classes) {
                const Input target = {p.shared.target[i - 1], input.pitch, input.rows, input.zero};
                convolve<M, PIECES, NT, R, false>(warp, tq, target, weights, unit.row, unit.column);
            }
        }
        finish_unit<M, OUT, LAST>(warp, p, tile, layer, unit, d, tq, total);
    }
    store_layer_sum(warp, p, i, total);
}

// Packed weights of layer i to shared memory, where the plan has a place for them.
DEVICE void copy_weights(Warp warp, const Problem& p, int i) {
    if (p.shared.weights[i] < 0) return;
    const auto* from = reinterpret_cast<const uint4*>(p.layer[i].packed);
    for (int start = warp.index * LANES; start < p.layer[i].packed_words / 4; start += THREADS)
        for_lanes(warp, [&](int lane) {
            const int at = start + lane;
            if (at < p.layer[i].packed_words / 4)
                warp.store<uint4>(p.shared.weights[i] + PIECE * at, from[at]);
        });
}

DEVICE void begin_block(Warp warp, const Problem& p) {
    for_lanes(warp, [&](int lane) {
        if (warp.index == 0 && lane == 0) warp.store<uint4>(p.shared.zero, uint4{0, 0, 0, 0});
    });
    if (!p.resident) return;
    for (int i = 0; i < p.layers; ++i) copy_weights(warp, p, i);
}

// Sums of the tile, in the order of the warps.
DEVICE void add_up(Warp warp, const Problem& p, std::int64_t tile) {
    if (warp.index != 0) return;
    for_lanes(warp, [&](int lane) {
        if (lane >= 4 + p.layers) return;
        float sum = 0;
        for (int i = 0; i < WARPS; ++i) sum += warp.load<float>(p.shared.sums + 4 * (lane * WARPS + i));
        p.partial[lane * p.tiling.tiles + tile] = sum;
    });
}

template <class P, class M>
DEVICE void forward_block(Block& block, const Problem& p) {
    block.phase([&](Warp warp) { begin_block(warp, p); });
    for (std::int64_t index = block.index(); index < p.tiling.tiles; index += block.count()) {
        const Tile tile = tile_of(p.tiling, index);
        const auto stage = [&](Warp warp, int i) {
            if (!p.resident) copy_weights(warp, p, i);
        };
        bool mixed = false;
        if (p.classes <= CLASS_CHUNK) {
            with_classes(p.classes, [&](auto classes) {
                constexpr int CLASSES = decltype(classes)::VALUE;
                block.phase([&](Warp warp) {
                    stage(warp, 0);
                    softmax_phase<M, CLASSES>(warp, p, tile);
                });
                mixed = is_mixed(block, p);
                block.phase([&](Warp warp) {
                    first_layer_phase<P, M, pieces_of(CLASSES, M::CHANNELS), false>(warp, p, tile, mixed,
                                                                                    {0, true, true});
                });
            });
        } else {
            block.phase([&](Warp warp) { log_sum_phase<M>(warp, p, tile); });
            mixed = is_mixed(block, p);
            const int chunks = divide_up(p.classes, CLASS_CHUNK);
            for (int i = 0; i < chunks; ++i) {
                block.phase([&](Warp warp) { chunk_phase<M>(warp, p, tile, i * CLASS_CHUNK); });
                block.phase([&](Warp warp) {
                    first_layer_phase<P, M, pieces_of(CLASS_CHUNK, M::CHANNELS), true>(
                        warp, p, tile, mixed, {i, i == 0, i == chunks - 1});
                });
            }
        }
        for (int i = 1; i < P::LAYERS; ++i) {
            if (!p.resident) block.phase([&](Warp warp) { copy_weights(warp, p, i); });
            with_layer<P>(i, [&](auto shape) {
                block.phase(
                    [&](Warp warp) { layer_phase<P, M, decltype(shape)::VALUE>(warp, p, tile, mixed, i); });
            });
        }
        block.phase([&](Warp warp) { add_up(warp, p, index); });
    }
}

}  // namespace semeda_fast::gpu
