// "Same" convolution of a block of rows, a tile of columns at a time, in one of three schemes (Conv::scheme):
//
//   winograd_2d   3x3, four rows: F(4,3) down the rows, F(2,3) along them: 24 products for 8 outputs, not 72
//   winograd_1d   3x3, four rows: F(4,3) down the rows alone: 18 products for 4 outputs, not 36
//   plain         any odd kernel, one row
//
//   input   RowRef [R + k - 1]: planar rows, channel c at p + c * pitch, column 0 first, zeros beside it
//   U       [group][depth][u_pitch]: the tile's input, transformed; lanes are columns from x - pad on
//           2d: [depth][group][4][u_pitch]; lanes are pairs of columns 2i, 2i + 1 from x on
//   M       [group][channels of a block][m_pitch]: products, before the output transform
//           2d: [group][2 or 4][channels of a block][m_pitch]: 2 where registers hold all 4 columns of F(2,3)
//           at a time, so that only even and odd columns are stored
//   Y       [channels of a block][rows][columns of two units]: 2d alone, back in the order of columns
//   packed  [block][group][depth][kernel columns][channels of the block]
//
// Phases:
//   1. transform the input tile
//   2. per block of output channels: multiply, in registers
//   3. transform back and hand each output to the epilogue
//
// Formulas: Lavin and Gray, arXiv 1509.09308. No include guard: see simd.h.

struct RowRef {
    const float* p;
    std::ptrdiff_t pitch;
};

template <bool RELU>
inline F load_input(const float* p) {
    const F x = load(p);
    return RELU ? relu(x) : x;
}

// F(4,3) with the points 0, +-a, +-b and infinity. a = 3/4 and b = 3/2 halve the largest rounding error of
// the usual 1 and 2 at the same cost, and every constant is exact in float; P = a^2, Q = b^2.
constexpr float WINOGRAD_P = WINOGRAD_A * WINOGRAD_A, WINOGRAD_Q = WINOGRAD_B * WINOGRAD_B;

// B^T.
inline void rows_to_winograd(const F* d, F* u) {
    const F a = set1(WINOGRAD_A), b = set1(WINOGRAD_B), p = set1(WINOGRAD_P), q = set1(WINOGRAD_Q);
    const F even_q = d[4] - q * d[2], odd_q = d[3] - q * d[1], even_p = d[4] - p * d[2],
            odd_p = d[3] - p * d[1];
    u[0] = fma(p, q * d[0] - d[2], even_q);
    u[1] = fma(a, odd_q, even_q);
    u[2] = even_q - a * odd_q;
    u[3] = fma(b, odd_p, even_p);
    u[4] = even_p - b * odd_p;
    u[5] = fma(p, q * d[1] - d[3], d[5] - q * d[3]);
}

// A^T.
inline void winograd_to_rows(const F* m, F* y) {
    const F a = set1(WINOGRAD_A), b = set1(WINOGRAD_B), p = set1(WINOGRAD_P), q = set1(WINOGRAD_Q);
    const F s = m[1] + m[2], d = a * (m[1] - m[2]), t = m[3] + m[4], e = b * (m[3] - m[4]);
    y[0] = m[0] + (s + t);
    y[1] = d + e;
    y[2] = fma(p, s, q * t);
    y[3] = fma(p, d, fma(q, e, m[5]));
}

template <bool RELU>
inline void transform_1d(const Conv& conv, const RowRef* rows, int x, int columns, float* u,
                         std::ptrdiff_t pitch) {
    const int vectors = (columns + 2 * conv.pad + VL - 1) / VL;
    const std::ptrdiff_t group = conv.depth * pitch;
    for (int c = 0; c < conv.in; ++c) {
        const float* r[WINOGRAD_J];
        for (int j = 0; j < WINOGRAD_J; ++j) r[j] = rows[j].p + c * rows[j].pitch + x - conv.pad;
        float* to = u + c * pitch;
        for (int v = 0; v < vectors; ++v, to += VL) {
            F d[WINOGRAD_J], t[WINOGRAD_J];
            SEMEDA_UNROLL
            for (int j = 0; j < WINOGRAD_J; ++j) d[j] = load_input<RELU>(r[j] + v * VL);
            rows_to_winograd(d, t);
            SEMEDA_UNROLL
            for (int j = 0; j < WINOGRAD_J; ++j) store(to + j * group, t[j]);
        }
    }
}

// The columns beside a tile of pairs, which its first and last pair need: column x - 1 in the last lane,
// column x_end in the first.
template <bool RELU>
inline void edges_to_winograd(const float* const* r, std::ptrdiff_t x_end, F* u) {
    const M first = from_bits(1);
    F d[WINOGRAD_J];
    SEMEDA_UNROLL
    for (int j = 0; j < WINOGRAD_J; ++j) {
        d[j] = select(first, load_input<RELU>(r[j] + x_end), load_input<RELU>(r[j] - VL));
    }
    rows_to_winograd(d, u);
}

// 2 VL columns from r[j] on: even ones and odd ones apart.
template <bool RELU>
inline void pairs_to_winograd(const float* const* r, std::ptrdiff_t x, F* even, F* odd) {
    F d[WINOGRAD_J], a[WINOGRAD_J], b[WINOGRAD_J];
    SEMEDA_UNROLL
    for (int j = 0; j < WINOGRAD_J; ++j) d[j] = load_input<RELU>(r[j] + x);
    rows_to_winograd(d, a);
    SEMEDA_UNROLL
    for (int j = 0; j < WINOGRAD_J; ++j) d[j] = load_input<RELU>(r[j] + x + VL);
    rows_to_winograd(d, b);
    SEMEDA_UNROLL
    for (int j = 0; j < WINOGRAD_J; ++j) deinterleave(a[j], b[j], even[j], odd[j]);
}

// B^T of F(2,3) along the columns: lane i sees columns 2i - 1, 2i, 2i + 1, 2i + 2 of the tile.
template <bool RELU>
inline void transform_2d(const Conv& conv, const RowRef* rows, int x, int columns, float* u,
                         std::ptrdiff_t pitch) {
    const int vectors = (columns / 2 + VL - 1) / VL;
    for (int c = 0; c < conv.in; ++c) {
        const float* r[WINOGRAD_J];
        for (int j = 0; j < WINOGRAD_J; ++j) r[j] = rows[j].p + c * rows[j].pitch + x;
        F edge[WINOGRAD_J], before[WINOGRAD_J], even[WINOGRAD_J], odd[WINOGRAD_J];
        edges_to_winograd<RELU>(r, 2 * vectors * VL, edge);
        pairs_to_winograd<RELU>(r, 0, even, odd);
        SEMEDA_UNROLL
        for (int j = 0; j < WINOGRAD_J; ++j) before[j] = edge[j];
        for (int v = 0; v < vectors; ++v) {
            const bool last = v + 1 == vectors;
            F next_even[WINOGRAD_J], next_odd[WINOGRAD_J];
            if (!last) pairs_to_winograd<RELU>(r, 2 * (v + 1) * VL, next_even, next_odd);
            float* to = u + c * (WINOGRAD_J * PAIR_COLUMNS) * pitch + v * VL;
            SEMEDA_UNROLL
            for (int j = 0; j < WINOGRAD_J; ++j, to += PAIR_COLUMNS * pitch) {
                store(to, shift_up(before[j], odd[j]) - odd[j]);
                store(to + pitch, even[j] + odd[j]);
                store(to + 2 * pitch, odd[j] - even[j]);
                store(to + 3 * pitch, even[j] - shift_down(even[j], last ? edge[j] : next_even[j]));
                before[j] = odd[j];
                if (last) continue;
                even[j] = next_even[j];
                odd[j] = next_odd[j];
            }
        }
    }
}

template <bool RELU>
inline void transform_plain(const Conv& conv, const RowRef* rows, int x, int columns, float* u,
                            std::ptrdiff_t pitch) {
    const int vectors = (columns + 2 * conv.pad + VL - 1) / VL;
    for (int ky = 0; ky < conv.ksize; ++ky) {
        for (int c = 0; c < conv.in; ++c) {
            const float* from = rows[ky].p + c * rows[ky].pitch + x - conv.pad;
            float* to = u + (ky * conv.in + c) * pitch;
            for (int v = 0; v < vectors; ++v) store(to + v * VL, load_input<RELU>(from + v * VL));
        }
    }
}

// MB output channels x NV vectors of lanes in registers; KX = 0: kernel width at run time. `skip` weights lie
// between those of two channels.
template <int MB, int NV, int KX>
inline void multiply(const float* u, std::ptrdiff_t u_pitch, int depth, int ksize, const float* w, int skip,
                     float* m, std::ptrdiff_t m_pitch) {
    const int width = KX ? KX : ksize;
    F acc[MB][NV];
    SEMEDA_UNROLL
    for (int b = 0; b < MB; ++b) {
        SEMEDA_UNROLL
        for (int v = 0; v < NV; ++v) acc[b][v] = set1(0.0f);
    }
    for (int d = 0; d < depth; ++d, u += u_pitch, w += skip) {
        for (int kx = 0; kx < width; ++kx, w += MB) {
            F x[NV];
            SEMEDA_UNROLL
            for (int v = 0; v < NV; ++v) x[v] = load(u + kx + v * VL);
            const Factors<MB> weights(w);
            SEMEDA_UNROLL
            for (int b = 0; b < MB; ++b) {
                const auto weight = weights[b];
                SEMEDA_UNROLL
                for (int v = 0; v < NV; ++v) acc[b][v] = fma(weight, x[v], acc[b][v]);
            }
        }
    }
    SEMEDA_UNROLL
    for (int b = 0; b < MB; ++b) {
        SEMEDA_UNROLL
        for (int v = 0; v < NV; ++v) store(m + b * m_pitch + v * VL, acc[b][v]);
    }
}

template <int MB, int KX>
inline void multiply_lanes(const float* u, std::ptrdiff_t u_pitch, int depth, int ksize, const float* w,
                           int skip, float* m, std::ptrdiff_t m_pitch, int vectors) {
    int v = 0;
    for (; v + MAX_NV <= vectors; v += MAX_NV) {
        multiply<MB, MAX_NV, KX>(u + v * VL, u_pitch, depth, ksize, w, skip, m + v * VL, m_pitch);
    }
    if (vectors - v == 2)
        multiply<MB, 2, KX>(u + v * VL, u_pitch, depth, ksize, w, skip, m + v * VL, m_pitch);
    if (vectors - v == 1)
        multiply<MB, 1, KX>(u + v * VL, u_pitch, depth, ksize, w, skip, m + v * VL, m_pitch);
}

// One group of winograd_1d or plain.
template <int MB, int KX>
inline void multiply_group(const Conv& conv, const float* u, std::ptrdiff_t u_pitch, const float* w, float* m,
                           std::ptrdiff_t m_pitch, int vectors) {
    multiply_lanes<MB, KX>(u, u_pitch, conv.depth, conv.columns, w, 0, m, m_pitch, vectors);
}

// Where registers hold all four columns at a time these are transformed back on the spot, and M has two.
constexpr int COLUMNS_OF_M = FOUR_AT_A_TIME ? 2 : PAIR_COLUMNS;

// A^T of F(2,3): even and odd column.
inline void winograd_to_pair(const F* m, F& even, F& odd) {
    even = m[0] + (m[1] + m[2]);
    odd = (m[1] - m[2]) - m[3];
}

// The same for one row of the domain of winograd_2d; u_pitch from one of its columns to the next, `deep` from
// one channel to the next, m_pitch likewise from channel to channel of a column.
template <int MB>
inline void multiply_pairs(const float* u, std::ptrdiff_t u_pitch, std::ptrdiff_t deep, int depth,
                           const float* w, float* m, std::ptrdiff_t m_pitch) {
    F acc[PAIR_COLUMNS][MB];
    SEMEDA_UNROLL
    for (int x = 0; x < PAIR_COLUMNS; ++x) {
        SEMEDA_UNROLL
        for (int b = 0; b < MB; ++b) acc[x][b] = set1(0.0f);
    }
    for (int d = 0; d < depth; ++d, u += deep, w += PAIR_COLUMNS * MB) {
        SEMEDA_UNROLL
        for (int x = 0; x < PAIR_COLUMNS; ++x) {
            const F input = load(u + x * u_pitch);
            const Factors<MB> weights(w + x * MB);
            SEMEDA_UNROLL
            for (int b = 0; b < MB; ++b) acc[x][b] = fma(weights[b], input, acc[x][b]);
        }
    }
    SEMEDA_UNROLL
    for (int b = 0; b < MB; ++b) {
        const F products[PAIR_COLUMNS] = {acc[0][b], acc[1][b], acc[2][b], acc[3][b]};
        F even, odd;
        winograd_to_pair(products, even, odd);
        store(m + b * m_pitch, even);
        store(m + (MB + b) * m_pitch, odd);
    }
}

// One group of winograd_2d.
template <int MB>
inline void multiply_group_2d(const Conv& conv, const float* u, std::ptrdiff_t u_pitch, const float* w,
                              float* m, std::ptrdiff_t m_pitch, int vectors) {
    const std::ptrdiff_t deep = WINOGRAD_J * PAIR_COLUMNS * u_pitch;
    if constexpr (FOUR_AT_A_TIME) {
        for (int v = 0; v < vectors; ++v) {
            multiply_pairs<MB>(u + v * VL, u_pitch, deep, conv.depth, w, m + v * VL, m_pitch);
        }
        return;
    }
    for (int x = 0; x < PAIR_COLUMNS; ++x) {
        multiply_lanes<MB, 1>(u + x * u_pitch, deep, conv.depth, 1, w + x * MB, (PAIR_COLUMNS - 1) * MB,
                              m + x * MB * m_pitch, m_pitch, vectors);
    }
}

using MultiplyFn = void (*)(const Conv&, const float*, std::ptrdiff_t, const float*, float*, std::ptrdiff_t,
                            int);

constexpr int at_most_block(int channels) { return channels < MAX_MB ? channels : MAX_MB; }

inline MultiplyFn multiply_for(const Conv& conv, int channels) {
#define SEMEDA_EACH_BLOCK(f)                                                             \
    {f(at_most_block(1)), f(at_most_block(2)), f(at_most_block(3)), f(at_most_block(4)), \
     f(at_most_block(5)), f(at_most_block(6)), f(at_most_block(7)), f(at_most_block(8))}
#define SEMEDA_PAIRS(n) multiply_group_2d<(n) < MAX_MB_2D ? (n) : MAX_MB_2D>
#define SEMEDA_OF_3(n) multiply_group<n, 3>
#define SEMEDA_OF_ANY(n) multiply_group<n, 0>
    static const MultiplyFn pairs[] = SEMEDA_EACH_BLOCK(SEMEDA_PAIRS),
                            of_3[] = SEMEDA_EACH_BLOCK(SEMEDA_OF_3),
                            of_any[] = SEMEDA_EACH_BLOCK(SEMEDA_OF_ANY);
    const MultiplyFn* by_channels = conv.scheme == Scheme::winograd_2d ? pairs
                                    : conv.columns == 3                ? of_3
                                                                       : of_any;
    return by_channels[channels - 1];
}

struct ConvScratch {
    float *u, *m, *y;
    Ahead* ahead;  // what to ask the memory for between products
};

// Products that convolve makes for a row of so many units.
inline std::int64_t products_of(const Conv& conv, int units) {
    return static_cast<std::int64_t>(conv.blocks) * conv.groups *
           ((units + conv.tile_units - 1) / conv.tile_units);
}

inline std::ptrdiff_t lane_pitch(const Conv& conv) {
    return conv.scheme == Scheme::winograd_2d
               ? TILE_2D_UNITS * UNIT / 2
               : conv.tile_units * UNIT + (2 * conv.pad + UNIT - 1) / UNIT * UNIT;
}

inline std::size_t floats_of_u(const Conv& conv) {
    const int columns = conv.scheme == Scheme::winograd_2d ? PAIR_COLUMNS : 1;
    return static_cast<std::size_t>(conv.groups) * conv.depth * columns * lane_pitch(conv);
}

inline std::size_t floats_of_m(const Conv& conv) {
    const std::size_t lanes = static_cast<std::size_t>(conv.groups) * MAX_MB * conv.tile_units * UNIT;
    return conv.scheme == Scheme::winograd_2d ? lanes * COLUMNS_OF_M / 2 : lanes;
}

constexpr std::size_t FLOATS_OF_Y = MAX_MB * BLOCK_ROWS * 2 * UNIT;

// The products of one block of channels, back in the order of pixels, to the epilogue. units: of this tile.
template <class Epilogue>
inline void transform_back(const Conv& conv, const ConvScratch& s, std::ptrdiff_t pitch, int first,
                           int channels, int begin, int units, Epilogue& epilogue) {
    const std::ptrdiff_t group = channels * pitch;
    if (conv.scheme == Scheme::winograd_2d) {
        for (int pair = 0; 2 * pair < units; ++pair) {
            for (int k = 0; k < channels; ++k) {
                float* to = s.y + k * BLOCK_ROWS * 2 * UNIT;
                for (int part = 0; part < UNIT; part += VL) {
                    const float* from = s.m + k * pitch + pair * UNIT + part;
                    F even[WINOGRAD_J], odd[WINOGRAD_J], y_even[BLOCK_ROWS], y_odd[BLOCK_ROWS];
                    SEMEDA_UNROLL
                    for (int j = 0; j < WINOGRAD_J; ++j, from += COLUMNS_OF_M * group) {
                        F m[COLUMNS_OF_M];
                        SEMEDA_UNROLL
                        for (int x = 0; x < COLUMNS_OF_M; ++x) m[x] = load(from + x * group);
                        even[j] = m[0], odd[j] = m[1];
                        if constexpr (!FOUR_AT_A_TIME) winograd_to_pair(m, even[j], odd[j]);
                    }
                    winograd_to_rows(even, y_even);
                    winograd_to_rows(odd, y_odd);
                    SEMEDA_UNROLL
                    for (int r = 0; r < BLOCK_ROWS; ++r) {
                        F low, high;
                        interleave(y_even[r], y_odd[r], low, high);
                        store(to + r * 2 * UNIT + 2 * part, low);
                        store(to + r * 2 * UNIT + 2 * part + VL, high);
                    }
                }
            }
            for (int half = 0; half < 2 && 2 * pair + half < units; ++half) {
                auto pixels = epilogue.unit(begin + 2 * pair + half, first == 0);
                for (int k = 0; k < channels; ++k) {
                    F16 y[BLOCK_ROWS];
                    for (int r = 0; r < BLOCK_ROWS; ++r) {
                        y[r] = load16(s.y + (k * BLOCK_ROWS + r) * 2 * UNIT + half * UNIT);
                    }
                    pixels.template put<BLOCK_ROWS>(first + k, y);
                }
                pixels.done();
            }
        }
        return;
    }
    for (int unit = 0; unit < units; ++unit) {
        auto pixels = epilogue.unit(begin + unit, first == 0);
        const float* from = s.m + unit * UNIT;
        for (int k = 0; k < channels; ++k, from += pitch) {
            if (conv.scheme == Scheme::winograd_1d) {
                F16 y[BLOCK_ROWS];
                for (int part = 0; part < PARTS; ++part) {
                    F m[WINOGRAD_J], rows[BLOCK_ROWS];
                    SEMEDA_UNROLL
                    for (int j = 0; j < WINOGRAD_J; ++j) m[j] = load(from + j * group + part * VL);
                    winograd_to_rows(m, rows);
                    SEMEDA_UNROLL
                    for (int r = 0; r < BLOCK_ROWS; ++r) y[r].p[part] = rows[r];
                }
                pixels.template put<BLOCK_ROWS>(first + k, y);
            } else {
                const F16 y[1] = {load16(from)};
                pixels.template put<1>(first + k, y);
            }
        }
        pixels.done();
    }
}

// The next tile when `left` units are left: all tiles of about one size, or the last would fill few
// registers.
inline int units_of_tile(int left, int most, bool pairs) {
    const int tiles = (left + most - 1) / most;
    int units = (left + tiles - 1) / tiles;
    if (pairs) units += units % 2;  // two units fill a vector of pairs
    return units < left ? units : left;
}

// Columns [unit_begin, unit_end) of the rows: `rows` are the k - 1 + R input rows from pad above the first
// output. For each block of channels and each unit: epilogue.unit(unit, whether the block is the first) gives
// an object for 16 pixels, whose put(k, values[R]) takes channel k there and whose done() ends it.
template <bool RELU, class Epilogue>
inline void convolve(const Conv& conv, const RowRef* rows, int unit_begin, int unit_end, const ConvScratch& s,
                     Epilogue& epilogue) {
    const bool pairs = conv.scheme == Scheme::winograd_2d;
    const std::ptrdiff_t u_pitch = lane_pitch(conv), m_pitch = conv.tile_units * UNIT / (pairs ? 2 : 1);
    // From one group to the next; groups of a channel of pairs lie together.
    const std::ptrdiff_t u_group = pairs ? PAIR_COLUMNS * u_pitch : conv.depth * u_pitch;
    const std::ptrdiff_t m_channel = pairs ? COLUMNS_OF_M * m_pitch : m_pitch;
    for (int begin = unit_begin, units = 0; begin < unit_end; begin += units) {
        units = units_of_tile(unit_end - begin, conv.tile_units, pairs);
        const int columns = units * UNIT, lanes = pairs ? columns / 2 : columns;
        if (pairs) {
            transform_2d<RELU>(conv, rows, begin * UNIT, columns, s.u, u_pitch);
        } else if (conv.scheme == Scheme::winograd_1d) {
            transform_1d<RELU>(conv, rows, begin * UNIT, columns, s.u, u_pitch);
        } else {
            transform_plain<RELU>(conv, rows, begin * UNIT, columns, s.u, u_pitch);
        }
        const float* w = conv.packed;
        for (int block = 0; block < conv.blocks; ++block) {
            const int first = block_begin(conv, block), channels = block_begin(conv, block + 1) - first;
            const MultiplyFn run = multiply_for(conv, channels);
            for (int g = 0; g < conv.groups; ++g) {
                run(conv, s.u + g * u_group, u_pitch, w, s.m + g * channels * m_channel, m_pitch,
                    (lanes + VL - 1) / VL);
                w += static_cast<std::ptrdiff_t>(conv.depth) * conv.columns * channels;
                s.ahead->some();
            }
            transform_back(conv, s, m_pitch, first, channels, begin, units, epilogue);
        }
    }
}
