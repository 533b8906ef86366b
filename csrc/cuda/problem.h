// What a kernel receives: one computation, cut into tiles, with every address in device and in shared memory.
//
// A block takes a tile of tile_h x tile_w pixels through the whole network. Layer l = 1..L needs a halo of
// what the layer before computes, so its region is larger: rows tile_h + 2 (L - l), origin tile - (L - l).
// The network's input has halo L. Hidden regions share one row pitch, `width` = tile_w + 2 (L - 1) pixels, a
// multiple of 16, which is what a matrix product takes; the input's is width + 2. Backward has the same
// regions, read from the other end.
#pragma once

#include <cstdint>

#include "layout.h"

namespace semeda_fast::gpu {

struct Tiling {
    int tile_h, tile_w, width;
    int across, down;    // tiles of an image
    std::int64_t tiles;  // of the batch
};

// Byte offsets in shared memory. Regions that are never alive together share addresses.
struct SharedPlan {
    int zero;                 // a piece of zeros
    int sums;                 // [MAX_SUMS][WARPS] floats; backward: unused
    int labels;               // [rows + 2 L][width + 2] uint16: class, C for void, C + 1 outside the image
    int input;                // forward: e; backward: d_t of the last layer
    int log_sums;             // forward, more classes than a chunk: [rows + 2 L][width + 2] floats
    int partial;              // forward, more classes than a chunk: sums of the first layer, each lane's own
    int hidden[MAX_LAYERS];   // forward: relu(t(p)) - relu(t(q)) of layer l; backward: d_t of layer l
    int target[MAX_LAYERS];   // forward: relu(t(q)) of layer l, where a later layer needs it, else -1
    int weights[MAX_LAYERS];  // packed weights of layer l, -1: read from device memory
    int d_p;                  // backward: [strip pixels][d_p_pitch] floats
    int bytes;
};

struct LayerPlan {
    int in, out;            // channels
    const float* weight;    // [out, in, 3, 3] fp32
    const float* bias;      // [out]
    std::uint32_t* packed;  // fragments, see packing.h
    int packed_words;
    float* table;        // [C + 2, out] t(q) inside a region of one class (void: C), then the bias; or null
    float inverse;       // 1 / (K_l s_l)
    float seed;          // w_l / (K_l s_l) / unit
    std::int64_t codes;  // byte offset in `codes`
};

struct Problem {
    std::int64_t n, pixels;  // n h w
    int h, w;
    int classes;  // C; 2 in binary mode
    bool binary, post;
    bool resident;  // weights stay in shared memory from tile to tile
    View logits, target, valid, d_logits;
    const float* class_weight;
    std::int64_t ignore_index;
    float smoothing;
    int layers;
    LayerPlan layer[MAX_LAYERS];
    float* columns;                 // [9, C + 1, K_1] the first layer's weights by label, zeros for void
    std::uint8_t* codes;            // null: no backward will come
    float* partial;                 // [4 + L, tiles]
    float* terms;                   // [3 + L]
    std::int64_t* counts;           // [2]
    float coefficient[MAX_LAYERS];  // w_l / (K_l s_l)
    float unit;                     // what seeds are divided by, so that fp16 holds them
    View d_ce, d_semeda;            // [] fp32
    Tiling tiling;
    SharedPlan shared;
    int strip_rows;  // backward: rows of the tile that leave through d_p at a time
    int d_p_pitch;   // floats
};

// One layer's weights, packed for forward, or turned round for backward.
struct Packing {
    const float* weight;  // [out, in, 3, 3]
    int in, out;          // of the layer as it stands in the proxy
    int first;            // input channel that is the first of the packed: of a chunk of classes
    int pieces, tiles;    // of a pixel; of 8 output channels
    bool backward;
    std::uint32_t* packed;
    int words;
};

struct Preparation {
    Packing packing[MAX_LAYERS + divide_up(MAX_CLASSES, CLASS_CHUNK)];
    int packings;
    int pack_blocks;  // the blocks behind them make a row of the table each
};

}  // namespace semeda_fast::gpu
