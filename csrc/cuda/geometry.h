// Where things lie: pixels in shared memory, matrices of packed weights, tiles of an image.
#pragma once

#include "hardware.h"
#include "numbers.h"
#include "problem.h"

namespace semeda_fast::gpu {

// `row` is the number of the row's first pixel. A column beyond the row is one of the next: hidden rows are
// multiples of 16 pixels, where the exchange begins anew.
template <int PIECES>
DEVICE int piece_address(int base, int row, int column, int piece) {
    return base + ((row + column) * PIECES + swizzled<PIECES>(column, piece)) * PIECE;
}

struct Tile {
    std::int64_t n;
    int y, x;  // of the first owned pixel
};

DEVICE Tile tile_of(const Tiling& tiling, std::int64_t index) {
    const int per_image = tiling.across * tiling.down;
    Tile tile;
    tile.n = index / per_image;
    const int rest = static_cast<int>(index % per_image);
    tile.y = rest / tiling.across * tiling.tile_h;
    tile.x = rest % tiling.across * tiling.tile_w;
    return tile;
}

// A region of the tile with a halo, in pixels of the image.
struct Region {
    int y, x, rows, columns;
    int halo;
};

DEVICE Region region_of(const Tiling& tiling, const Tile& tile, int halo) {
    return {tile.y - halo, tile.x - halo, tiling.tile_h + 2 * halo, tiling.tile_w + 2 * halo, halo};
}

DEVICE bool is_inside(const Problem& p, int y, int x) { return y >= 0 && x >= 0 && y < p.h && x < p.w; }

// Whether (row, column) of a region is a pixel that this tile answers for.
DEVICE bool is_owned(const Problem& p, const Region& region, int row, int column) {
    const int r = row - region.halo, c = column - region.halo;
    return r >= 0 && r < p.tiling.tile_h && c >= 0 && c < p.tiling.tile_w &&
           is_inside(p, region.y + row, region.x + column);
}

}  // namespace semeda_fast::gpu
