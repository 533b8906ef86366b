// "Same" convolution of a block of rows, a tile of columns at a time, in one of three schemes (Conv::scheme):
//
//   winograd_2d   3x3, four rows: F(4,3) down the rows, F(2,3) along them: 24 products for 8 outputs, not 72
//   winograd_1d   3x3, four rows: F(4,3) down the rows alone: 18 products for 4 outputs, not 36
//   plain         any odd kernel, one row
//
//   input   RowRef [R + k - 1]: planar rows, channel c at p + c * pitch, column 0 first, zeros beside it
//   U       [group][depth][u_pitch]: the tile's input, transformed; lanes are columns from x - pad on
//           (2d: pairs of columns 2i, 2i + 1 from x on)
//   M       [group][channels of a block][m_pitch]: products, before the output transform
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
    return RELU ? vmax(set1(0.0f), x) : x;
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

// A^T; m + j * group is product j.
inline void winograd_to_rows(const float* m, std::ptrdiff_t group, F16* y) {
    const F16 a = splat(WINOGRAD_A), b = splat(WINOGRAD_B), p = splat(WINOGRAD_P), q = splat(WINOGRAD_Q);
    const F16 m1 = load16(m + group), m2 = load16(m + 2 * group);
    const F16 m3 = load16(m + 3 * group), m4 = load16(m + 4 * group);
    const F16 s = m1 + m2, d = a * (m1 - m2), t = m3 + m4, e = b * (m3 - m4);
    y[0] = load16(m) + (s + t);
    y[1] = d + e;
    y[2] = fma(p, s, q * t);
    y[3] = fma(p, d, fma(q, e, load16(m + 5 * group)));
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

// The same of one column, each value in all lanes: a tile's first and last pair need one column beside the
// tile.
template <bool RELU>
inline void column_to_winograd(const float* const* r, std::ptrdiff_t x, F* u) {
    F d[WINOGRAD_J];
    SEMEDA_UNROLL
    for (int j = 0; j < WINOGRAD_J; ++j) d[j] = RELU ? vmax(set1(0.0f), set1(r[j][x])) : set1(r[j][x]);
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
    const std::ptrdiff_t group = conv.depth * pitch;
    for (int c = 0; c < conv.in; ++c) {
        const float* r[WINOGRAD_J];
        for (int j = 0; j < WINOGRAD_J; ++j) r[j] = rows[j].p + c * rows[j].pitch + x;
        F before[WINOGRAD_J], even[WINOGRAD_J], odd[WINOGRAD_J];
        column_to_winograd<RELU>(r, -1, before);
        pairs_to_winograd<RELU>(r, 0, even, odd);
        for (int v = 0; v < vectors; ++v) {
            F next_even[WINOGRAD_J], next_odd[WINOGRAD_J];
            if (v + 1 < vectors) {
                pairs_to_winograd<RELU>(r, 2 * (v + 1) * VL, next_even, next_odd);
            } else {
                column_to_winograd<RELU>(r, 2 * vectors * VL, next_even);
            }
            float* to = u + c * pitch + v * VL;
            SEMEDA_UNROLL
            for (int j = 0; j < WINOGRAD_J; ++j, to += 4 * group) {
                store(to, shift_up(before[j], odd[j]) - odd[j]);
                store(to + group, even[j] + odd[j]);
                store(to + 2 * group, odd[j] - even[j]);
                store(to + 3 * group, even[j] - shift_down(even[j], next_even[j]));
                before[j] = odd[j];
                even[j] = next_even[j];
                if (v + 1 < vectors) odd[j] = next_odd[j];
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

// MB output channels x NV vectors of lanes in registers; KX = 0: kernel width at run time.
template <int MB, int NV, int KX>
inline void multiply(const float* u, std::ptrdiff_t u_pitch, int depth, int ksize, const float* w, float* m,
                     std::ptrdiff_t m_pitch) {
    const int width = KX ? KX : ksize;
    F acc[MB][NV];
    SEMEDA_UNROLL
    for (int b = 0; b < MB; ++b) {
        SEMEDA_UNROLL
        for (int v = 0; v < NV; ++v) acc[b][v] = set1(0.0f);
    }
    for (int d = 0; d < depth; ++d, u += u_pitch) {
        for (int kx = 0; kx < width; ++kx, w += MB) {
            F x[NV];
            SEMEDA_UNROLL
            for (int v = 0; v < NV; ++v) x[v] = load(u + kx + v * VL);
            SEMEDA_UNROLL
            for (int b = 0; b < MB; ++b) {
                const F weight = set1(w[b]);
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
                           float* m, std::ptrdiff_t m_pitch, int vectors) {
    int v = 0;
    for (; v + MAX_NV <= vectors; v += MAX_NV) {
        multiply<MB, MAX_NV, KX>(u + v * VL, u_pitch, depth, ksize, w, m + v * VL, m_pitch);
    }
    if (vectors - v == 2) multiply<MB, 2, KX>(u + v * VL, u_pitch, depth, ksize, w, m + v * VL, m_pitch);
    if (vectors - v == 1) multiply<MB, 1, KX>(u + v * VL, u_pitch, depth, ksize, w, m + v * VL, m_pitch);
}

using MultiplyFn = void (*)(const float*, std::ptrdiff_t, int, int, const float*, float*, std::ptrdiff_t,
                            int);

constexpr int at_most_block(int channels) { return channels < MAX_MB ? channels : MAX_MB; }

template <int KX>
inline MultiplyFn multiply_for(int channels) {
    static const MultiplyFn by_channels[] = {
        multiply_lanes<at_most_block(1), KX>, multiply_lanes<at_most_block(2), KX>,
        multiply_lanes<at_most_block(3), KX>, multiply_lanes<at_most_block(4), KX>,
        multiply_lanes<at_most_block(5), KX>, multiply_lanes<at_most_block(6), KX>,
        multiply_lanes<at_most_block(7), KX>, multiply_lanes<at_most_block(8), KX>};
    return by_channels[channels - 1];
}

struct ConvScratch {
    float *u, *m, *y;
};

inline std::ptrdiff_t lane_pitch(const Conv& conv) {
    return conv.scheme == Scheme::winograd_2d
               ? TILE_2D_UNITS * UNIT / 2
               : conv.tile_units * UNIT + (2 * conv.pad + UNIT - 1) / UNIT * UNIT;
}

inline std::size_t floats_of_u(const Conv& conv) {
    return static_cast<std::size_t>(conv.groups) * conv.depth * lane_pitch(conv);
}

inline std::size_t floats_of_m(const Conv& conv) {
    return static_cast<std::size_t>(conv.groups) * MAX_MB * conv.tile_units * UNIT;
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
                const float* from = s.m + k * pitch + pair * UNIT;
                F16 t[4][BLOCK_ROWS];
                for (int g = 0; g < 4; ++g) winograd_to_rows(from + g * group, 4 * group, t[g]);
                for (int r = 0; r < BLOCK_ROWS; ++r) {
                    float* to = s.y + (k * BLOCK_ROWS + r) * 2 * UNIT;
                    interleave16(t[0][r] + (t[1][r] + t[2][r]), (t[1][r] - t[2][r]) - t[3][r], to);
                }
            }
            for (int half = 0; half < 2 && 2 * pair + half < units; ++half) {
                epilogue.unit(begin + 2 * pair + half, first == 0);
                for (int k = 0; k < channels; ++k) {
                    F16 y[BLOCK_ROWS];
                    for (int r = 0; r < BLOCK_ROWS; ++r) {
                        y[r] = load16(s.y + (k * BLOCK_ROWS + r) * 2 * UNIT + half * UNIT);
                    }
                    epilogue.template put<BLOCK_ROWS>(first + k, y);
                }
                epilogue.done();
            }
        }
        return;
    }
    for (int unit = 0; unit < units; ++unit) {
        epilogue.unit(begin + unit, first == 0);
        const float* from = s.m + unit * UNIT;
        for (int k = 0; k < channels; ++k, from += pitch) {
            if (conv.scheme == Scheme::winograd_1d) {
                F16 y[BLOCK_ROWS];
                winograd_to_rows(from, group, y);
                epilogue.template put<BLOCK_ROWS>(first + k, y);
            } else {
                const F16 y[1] = {load16(from)};
                epilogue.template put<1>(first + k, y);
            }
        }
        epilogue.done();
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
// output. For each block of channels and each unit: epilogue.unit(unit, whether the block is the first)
// prepares 16 pixels, epilogue.put(k, values[R]) takes channel k there, epilogue.done() ends it.
template <bool RELU, class Epilogue>
inline void convolve(const Conv& conv, const RowRef* rows, int unit_begin, int unit_end, const ConvScratch& s,
                     Epilogue& epilogue) {
    const bool pairs = conv.scheme == Scheme::winograd_2d;
    const std::ptrdiff_t u_pitch = lane_pitch(conv), m_pitch = conv.tile_units * UNIT / (pairs ? 2 : 1);
    const int kernel_columns = pairs ? 1 : conv.ksize;
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
            const MultiplyFn run = pairs             ? multiply_for<1>(channels)
                                   : conv.ksize == 3 ? multiply_for<3>(channels)
                                                     : multiply_for<0>(channels);
            for (int g = 0; g < conv.groups; ++g) {
                run(s.u + g * conv.depth * u_pitch, u_pitch, conv.depth, kernel_columns, w,
                    s.m + g * channels * m_pitch, m_pitch, (lanes + VL - 1) / VL);
                w += static_cast<std::ptrdiff_t>(conv.depth) * kernel_columns * channels;
            }
            transform_back(conv, s, m_pitch, first, channels, begin, units, epilogue);
        }
    }
}
