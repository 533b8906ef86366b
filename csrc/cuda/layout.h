// Sizes that kernels and the plan of a launch agree on. Plain C++.
#pragma once

#include <cstdint>

#include "../params.h"

namespace semeda_fast::gpu {

constexpr int LANES = 32;
constexpr int WARPS = 8;  // of every block
constexpr int THREADS = LANES * WARPS;
constexpr int PIECE = 16;         // bytes that one lane gives to a matrix load
constexpr int MATRIX_ROWS = 16;   // pixels of a product
constexpr int CLASS_CHUNK = 24;   // more classes go through the first layer in chunks
constexpr int HALF_CHANNELS = 8;  // of a piece in fp16
constexpr int TF32_CHANNELS = 4;
constexpr int MAX_SUMS =
    4 + MAX_LAYERS;  // of a tile: cross-entropy, its divisor, valid, bad labels, each layer
constexpr int MAX_CLASSES = 256;
constexpr int MAX_CHANNELS = 64;  // of a layer
// Shared memory of the kernels before and after the tiles, see packing.h.
constexpr int TABLE_BYTES = 4 * (2 * MAX_CHANNELS + THREADS);
constexpr int FINISH_BYTES = 8 * MAX_SUMS * (WARPS + 1);

constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// The 3 pixels of a kernel's row have 3 * PIECES pieces one behind the other; a product takes two. With odd
// PIECES the last product of a row has one, and zeros.
constexpr int row_products(int pieces) { return divide_up(3 * pieces, 2); }

constexpr int pieces_of(int channels, int per_piece) { return divide_up(channels, 8) * (8 / per_piece); }

// Words of a layer's packed weights: fragments [3 rows][row_products][out / 8][lane][2].
constexpr int packed_words(int in, int out, int per_piece) {
    return 3 * row_products(pieces_of(in, per_piece)) * divide_up(out, 8) * LANES * 2;
}

// Sums of 16 pixels x 8 channels that a warp keeps in registers at once, and as many again for the target's
// branch. Two blocks on a multiprocessor leave 128 registers a thread, one leaves 255, of which products of
// fp32 take some for themselves.
constexpr int unit_sums(int min_blocks, bool half) { return !half ? 10 : min_blocks > 1 ? 8 : 12; }

// Rows of 16 pixels of a warp's unit of work, for so many tiles of 8 output channels: two at least, since
// each row of pixels is loaded for three rows of the kernel.
constexpr int unit_rows(int out_tiles, int sums) {
    return sums / out_tiles > 4 ? 4 : sums / out_tiles < 2 ? 2 : sums / out_tiles;
}

// What forward keeps for backward; codes.h.
constexpr std::int64_t code_bytes_per_pixel(int channels, bool last) {
    return last ? (channels < 8 ? 1 : channels / 4) : 3 * channels / 8;
}

}  // namespace semeda_fast::gpu
