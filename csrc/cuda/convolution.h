// A 3x3 convolution of R rows of 16 pixels by one warp: sums of matrix products over shifted pixels.
//
//     sums[r][j]  rows r of the unit, output channels 8j .. 8j + 7: [16 pixels, 8] as multiply_f16 leaves
//     them input       pixels at `base`, `pitch` of them a row; output (row, column) reads input rows row ..
//     row + 2,
//                 columns column .. column + 2
//
// Each shifted row of pixels is loaded once and multiplied with up to three rows of the kernel.
#pragma once

#include "geometry.h"

namespace semeda_fast::gpu {

template <int R, int NT>
struct Sums {
    Lanes<float> at[R][NT][4];
};

template <int R, int NT>
DEVICE void set_zero(Warp warp, Sums<R, NT>& sums) {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) for_lanes(warp, [&](int lane) { sums.at[r][j][i][lane] = 0; });
}

struct Input {
    int base, pitch, rows;  // bytes, pixels, rows that exist
    int zero;               // address of a piece of zeros
};

// Packed weights in shared memory, or, where `global`, in device memory.
struct Weights {
    int shared;
    const std::uint32_t* global;
};

template <class M, int NT, bool GLOBAL>
DEVICE void load_weights(Warp warp, typename M::Right& b, const Weights& weights, int step, int j, int all) {
    for_lanes(warp, [&](int lane) {
        const int at = (step * all + j) * LANES + lane;  // of pairs of words
        uint2 pair;
        if (GLOBAL)
            pair = load_constant(reinterpret_cast<const uint2*>(weights.global) + at);
        else
            pair = warp.load<uint2>(weights.shared + at * 8);
        b.r[0][lane] = pair.x;
        b.r[1][lane] = pair.y;
    });
    M::prepare(warp, b);
}

// `first` and `all`: which tiles of 8 output channels, of how many the weights have.
template <class M, int PIECES, int NT, int R, bool GLOBAL>
DEVICE void convolve(Warp warp, Sums<R, NT>& sums, const Input& input, const Weights& weights, int row,
                     int column, int first = 0, int all = NT) {
    constexpr int PRODUCTS = row_products(PIECES);
    constexpr bool HALF_LEFT = PIECES % 2 == 1;  // the last product's second piece is none
#pragma unroll 1
    for (int q = 0; q < PRODUCTS; ++q) {
        Lanes<int> in_row;  // where a lane's piece lies in each row
        for_lanes(warp, [&](int lane) {
            const int piece = 2 * q + lane / MATRIX_ROWS;  // of the kernel's row
            in_row[lane] = piece_address<PIECES>(input.base, 0, column + lane % MATRIX_ROWS + piece / PIECES,
                                                 piece % PIECES);
        });
        typename M::Left a[R + 2];
#pragma unroll
        for (int i = 0; i < R + 2; ++i) {
            Lanes<int> address;
            for_lanes(warp, [&](int lane) {
                // Rows beyond the region feed sums that nobody uses.
                const int y = row + i < input.rows ? row + i : input.rows - 1;
                const bool nothing = HALF_LEFT && 2 * q + lane / MATRIX_ROWS == 3 * PIECES;
                address[lane] = nothing ? input.zero : in_row[lane] + y * input.pitch * PIECES * PIECE;
            });
            load_matrices(warp, a[i].r, address);
            M::prepare(warp, a[i]);
        }
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) {
#pragma unroll
            for (int j = 0; j < NT; ++j) {
                typename M::Right b;
                load_weights<M, NT, GLOBAL>(warp, b, weights, dy * PRODUCTS + q, first + j, all);
#pragma unroll
                for (int r = 0; r < R; ++r) M::multiply(warp, sums.at[r][j], a[r + dy], b);
            }
        }
    }
}

// The pixel (of 16) and the channel (of 8) of sums[..][..][i] in a lane.
DEVICE int sum_pixel(int lane, int i) { return lane / 4 + 8 * (i / 2); }
DEVICE int sum_channel(int lane, int i) { return lane % 4 * 2 + i % 2; }

}  // namespace semeda_fast::gpu
