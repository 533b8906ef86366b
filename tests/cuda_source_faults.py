"""Faults for tests/test_cuda_faults.py: file of csrc/cuda -> name -> a text that it holds once, what replaces it."""

from __future__ import annotations

SOURCE_FAULTS: dict[str, dict[str, tuple[str, str]]] = {
    "geometry.h": {
        "swizzle by the row": (
            "swizzled<PIECES>(column, piece)) * PIECE",
            "swizzled<PIECES>(row + column, piece)) * PIECE",
        ),
        "tile of the first image": ("tile.n = index / per_image;", "tile.n = 0;"),
        "tile rows": ("tile.y = rest / tiling.across * tiling.tile_h;", "tile.y = rest % tiling.down * tiling.tile_h;"),
        "halo one short": ("tiling.tile_h + 2 * halo,", "tiling.tile_h + 2 * halo - 1,"),
        "ownership off by one": ("r >= 0 && r < p.tiling.tile_h", "r >= 0 && r <= p.tiling.tile_h"),
        "ownership of a column": ("c >= 0 && c < p.tiling.tile_w", "c > 0 && c < p.tiling.tile_w"),
        "beside the image": ("y < p.h && x < p.w; }", "y < p.h && x <= p.w; }"),
    },
    "layout.h": {
        "a product short": ("return divide_up(3 * pieces, 2); }", "return 3 * pieces / 2; }"),
    },
    "pixels.h": {
        "padded classes": ("if (c >= p.classes) return -INFINITY;", "if (c >= p.classes) return 0;"),
        "void is a class": ("if (label == p.ignore_index) return {p.classes, false};", ""),
        "mask is not read": ("p.valid.data != nullptr &&", "p.valid.data == nullptr &&"),
        "label outside the image": ("return {p.classes + 1, false};", "return {p.classes, false};"),
        "bfloat16 as fp16": ("return view.dtype == DType::bf16; }", "return view.dtype != DType::bf16; }"),
        "smoothing": ("p.smoothing / static_cast<float>(p.classes) * all", "p.smoothing * all"),
        "columns for rows": (
            "y * view.stride[2] + x * view.stride[3]",
            "x * view.stride[2] + y * view.stride[3]",
        ),
    },
    "softmax.h": {
        "void is not masked": (
            "keep_if(valid, M::pack_piece([&](int k) { return z[piece * M::CHANNELS + k]; }))",
            "keep_if(true, M::pack_piece([&](int k) { return z[piece * M::CHANNELS + k]; }))",
        ),
        "p instead of p - q": ("own = M::exp(own, highest) * inverse - 1.f;", "own = M::exp(own, highest) * inverse;"),
        "every tile is uniform": ("return low != high;", "return false;"),
        "only border tiles are mixed": ("return low != high;", "return high > p.classes;"),
        "sums of one warp": ("if (lane != 0) return;", "if (lane != 0 || warp.index == 5) return;"),
        "sums of a neighbour's pixels": (
            "if (!owned || label.value >= p.classes) return;",
            "if (label.value >= p.classes) return;",
        ),
        "chunk offset": (
            "const int c = first + piece * M::CHANNELS + k;",
            "const int c = first + piece * M::CHANNELS + k + 1;",
        ),
        "reads beyond the last class": (
            "valid && first + piece * M::CHANNELS + k < p.classes, from);",
            "valid, from);",
        ),
        "log-sums": ("float2{highest, total});", "float2{total, highest});"),
    },
    "convolution.h": {
        "wrong tap": ("a[r + dy], b);", "a[r + 2 - dy], b);"),
        "missing zero piece": ("address[lane] = nothing ? input.zero : ", "address[lane] = "),
        "row beyond the region": (
            "row + i < input.rows ? row + i : input.rows - 1;",
            "row + i < input.rows - 1 ? row + i : input.rows - 2;",
        ),
        "wrong half of a fragment": ("lane / 4 + 8 * (i / 2); }", "lane / 4 + 8 * (i % 2); }"),
        "pairs of channels": ("return lane % 4 * 2 + i % 2; }", "return lane % 4 + 4 * (i % 2); }"),
    },
    "codes.h": {
        "swapped nibbles": ("if (t % 2 == 0) at[t / 2]", "if (t % 2 == 0) at[1 - t / 2]"),
        "nibble read": ("word >> (4 * (t % 2)) & 15u", "word >> (4 * (1 - t % 2)) & 15u"),
    },
    "forward.h": {
        "border is not zeroed": ("hidden + at, inside, b[0], b[1]);", "hidden + at, true, b[0], b[1]);"),
        "target's border is not zeroed": ("target + at, inside, aq[0], aq[1]);", "target + at, true, aq[0], aq[1]);"),
        "last row of a unit": ("if (row >= region.rows) continue;", "if (row >= region.rows - 1) continue;"),
        "unit's class one column short": (
            "unit.column + MATRIX_ROWS + reach : columns;",
            "unit.column + MATRIX_ROWS + reach - 1 : columns;",
        ),
        "unit's class one row short": (
            "unit.row + R + reach < rows ? unit.row + R + reach : rows;",
            "unit.row + R + reach < rows ? unit.row + R + reach - 1 : rows;",
        ),
        "table row of another class": ("layer.table + row * OUT", "layer.table + (row > 0 ? row - 1 : row) * OUT"),
        "columns of the wrong tap": (
            "column = unit.column + sum_pixel(lane, 2 * half) + tap % 3;",
            "column = unit.column + sum_pixel(lane, 2 * half) + 2 - tap % 3;",
        ),
        "no bias": (
            "if (one > p.classes) add_columns<OUT>(warp, tq, p, unit);",
            "if (one > p.classes) set_zero(warp, tq), add_columns<OUT>(warp, tq, p, unit);",
        ),
        "swapped planes": (
            "store_code<OUT>(codes + (LAST ? 0 : plane)",
            "store_code<OUT>(codes + (LAST ? 0 : 2 * plane)",
        ),
        "swapped codes of the last layer": (
            "(code.above[lane] | code.below[lane] << 2);",
            "(code.below[lane] | code.above[lane] << 2);",
        ),
        "no neighbour's nibble": ("mine[lane] | other[lane] << 4;", "mine[lane] | other[lane] << 3;"),
        "void distances": ("const bool counts = owned && label < p.classes;", "const bool counts = owned;"),
        "distance before the ReLU": ("if (p.post) distance = b[i];", ""),
        "codes before the ReLU": (": p.post ? on : ~0u;", ": ~0u;"),
        "no ReLU": ("b[i] = larger(distance, -q) + smaller(q, 0);", "b[i] = distance;"),
        "label of another pixel": ("up = layer.number + 1;", "up = layer.number;"),
        "a layer's sums in another's place": (
            "4 * ((4 + number) * WARPS + warp.index)",
            "4 * (4 * WARPS + warp.index)",
        ),
        "sums of one warp lost": ("i < WARPS; ++i) sum += warp.load", "i < WARPS - 1; ++i) sum += warp.load"),
        "sums so far of a chunk": ("if (!chunk.first)", "if (chunk.last)"),
        "weights of a chunk": (
            "p.layer[0].packed + chunk.number * packed_words",
            "p.layer[0].packed + 0 * packed_words",
        ),
        "a barrier is missing": (
            "block.phase([&](Warp warp) { log_sum_phase<M>(warp, p, tile); });",
            "for (int i = 0; i < WARPS; ++i) log_sum_phase<M>(Warp{i}, p, tile);",
        ),
        "a tile is left out": (
            "index < p.tiling.tiles; index += block.count()",
            "index < p.tiling.tiles - (p.tiling.tiles > 1); index += block.count()",
        ),
    },
    "backward.h": {
        "seeds scaled wrongly": ("const float seed = p.layer[i - 1].seed;", "const float seed = p.layer[i].seed;"),
        "sign of a seed": ("(bits.below & bit) != 0 ? -seed", "(bits.below & bit) != 0 ? seed"),
        "codes read beside the image": ("at = inside ? pixel : 0;", "at = pixel;"),
        "codes of the last layer": ("below = bits >> 2 & 3u;", "below = bits >> 1 & 3u;"),
        "no ReLU backward": ("d_t[k] = (bits.on & bit) != 0 ? seeded + sum : seeded;", "d_t[k] = seeded + sum;"),
        "swapped planes read": (
            "below = load_code_word<K>(codes + 2 * plane, at, t);",
            "below = load_code_word<K>(codes, at, t);",
        ),
        "region one short": ("region_of(p.tiling, tile, i);", "region_of(p.tiling, tile, i - 1);"),
        "last rows of a strip": ("if (unit.row + r >= rows) continue;", "if (unit.row + r >= rows - 1) continue;"),
        "classes of another group": ("const int c = 8 * (group * NT + j) + sum", "const int c = 8 * j + sum"),
        "strip offset": ("const int y = tile.y + strip + row, x", "const int y = tile.y + row, x"),
        "no softmax backward": ("g.smoothed * weights - g.slope * dot;", "g.smoothed * weights;"),
        "unit of the seeds": ("(p.d_semeda.data)) * p.unit;", "(p.d_semeda.data));"),
        "no zeros at void pixels": (
            "valid ? d_z : 0.f);\n                if (c < p.classes && !(binary",
            "d_z);\n                if (c < p.classes && !(binary",
        ),
    },
    "packing.h": {
        "weights are not turned": ("((c * k.in + n) * 3 + 2 - dy) * 3 + 2 - dx", "((c * k.in + n) * 3 + dy) * 3 + dx"),
        "weights are transposed": ("((n * k.in + c) * 3 + dy) * 3 + dx;", "((n * k.in + c) * 3 + dx) * 3 + dy;"),
        "words swapped": (
            "const int piece = 2 * (step % products) + h;",
            "const int piece = 2 * (step % products) + 1 - h;",
        ),
        "table of one tap less": (
            "for (int tap = 0; tap < 9; ++tap) sum +=",
            "for (int tap = 0; tap < 8; ++tap) sum +=",
        ),
        "table without ReLU": (
            "warp.store<float>(after + 4 * k, t > 0 ? t : 0.f);",
            "warp.store<float>(after + 4 * k, t);",
        ),
        "void row of the table": ("if (c < p.classes) sum = sum_of_taps", "if (c <= p.classes) sum = sum_of_taps"),
        "last tile's sums": ("i < p.tiling.tiles; i += THREADS)", "i < p.tiling.tiles - 1; i += THREADS)"),
        "layer weights": ("(p.coefficient[i]) * distance;", "(p.layer[i].inverse) * distance;"),
        "bad labels": ("const bool bad = total(3) > 0;", "const bool bad = total(2) > 0;"),
    },
    "numbers.h": {
        "wrong swizzle": ("return piece ^ (column >> 1 & 3);", "return piece ^ (column >> 1 & 4);"),
        "swizzle of the writer": (
            "swizzled<PIECES>(column, channel / CHANNELS) * PIECE + 2 *",
            "swizzled<PIECES>(column ^ 4, channel / CHANNELS) * PIECE + 2 *",
        ),
        "pairs swapped": ("keep ? to_finite_half2(x, y) : 0u", "keep ? to_finite_half2(y, x) : 0u"),
        "infinity in fp16": ("keep ? to_finite_half2(x, y) : 0u", "keep ? to_half2(x, y) : 0u"),
    },
    "plan.cpp": {
        "areas overlap": (
            "const int begin[2] = {at, at + areas.size[0]};\n        m.input",
            "const int begin[2] = {at, at + areas.size[0] / 2};\n        m.input",
        ),
        "d_p overlaps": ("m.d_p = begin[other];", "m.d_p = begin[1 - other];"),
        "classes of a chunk": ("k.first = part * CLASS_CHUNK;", "k.first = part * (CLASS_CHUNK - 1);"),
        "workspace too small": ("take(4 * 9 * static_cast", "take(4 * 8 * static_cast"),
        "codes of two layers overlap": (
            "codes += p.pixels * code_bytes_per_pixel(to.out, i == s.layers - 1);",
            "codes += p.pixels * code_bytes_per_pixel(to.out, true);",
        ),
        "too few sums": ("m.sums = take(4 * (MAX_SUMS + 2) * WARPS);", "m.sums = take(4 * MAX_SUMS * WARPS);"),
        "pixels behind the last": ("(rows * t.width + 2) * s.pixel_bytes", "(rows * t.width) * s.pixel_bytes"),
    },
}
