// "Same" convolution of four rows (3x3, Winograd F(4,3) along the columns) or one row (any odd kernel).
//
//   input   RowRef [R + k - 1]: planar rows, channel c of a row at p + c * pitch, column 0 first, zeros
//   beside it U       [group][depth][tile_pitch]: the tile's input, transformed; column 0 is image column x -
//   pad M       [group][out][tile_units * 16]: products, before the output transform packed
//   [group][block][depth][k][channels of the block]
//
// 1. transform the input tile  2. multiply, register-blocked  3. transform back and hand each output to the
// epilogue. Winograd along one axis only: the other axis stays a plain vector of pixels, so no transposition
// is ever needed, and 6 instead of 12 products a tile remain. Formula: Lavin and Gray, arXiv 1509.09308,
// points 0, +-1, +-2. No include guard: see simd.h.

struct RowRef {
    const float* p;
    std::ptrdiff_t pitch;
};

template <bool RELU>
inline F load_input(const float* p) {
    const F x = load(p);
    return RELU ? vmax(set1(0.0f), x) : x;
}

template <bool RELU>
inline void transform_winograd(const Conv& conv, const RowRef* rows, int x, int vectors, float* u,
                               std::ptrdiff_t u_pitch) {
    const F four = set1(4.0f), two = set1(2.0f);
    const std::ptrdiff_t group = conv.depth * u_pitch;
    for (int c = 0; c < conv.in; ++c) {
        const float* r[WINOGRAD_J];
        for (int j = 0; j < WINOGRAD_J; ++j) r[j] = rows[j].p + c * rows[j].pitch + x - conv.pad;
        float* to = u + c * u_pitch;
        for (int v = 0; v < vectors; ++v, to += VL) {
            const F d0 = load_input<RELU>(r[0] + v * VL), d1 = load_input<RELU>(r[1] + v * VL);
            const F d2 = load_input<RELU>(r[2] + v * VL), d3 = load_input<RELU>(r[3] + v * VL);
            const F d4 = load_input<RELU>(r[4] + v * VL), d5 = load_input<RELU>(r[5] + v * VL);
            const F a = d4 - four * d2, b = d3 - four * d1, e = d4 - d2, f = d3 - d1;
            store(to, fma(four, d0 - d2, e));
            store(to + group, a + b);
            store(to + 2 * group, a - b);
            store(to + 3 * group, fma(two, f, e));
            store(to + 4 * group, e - two * f);
            store(to + 5 * group, (d5 - d3) - four * f);
        }
    }
}

template <bool RELU>
inline void transform_rows(const Conv& conv, const RowRef* rows, int x, int vectors, float* u,
                           std::ptrdiff_t u_pitch) {
    for (int ky = 0; ky < conv.ksize; ++ky) {
        for (int c = 0; c < conv.in; ++c) {
            const float* from = rows[ky].p + c * rows[ky].pitch + x - conv.pad;
            float* to = u + (ky * conv.in + c) * u_pitch;
            for (int v = 0; v < vectors; ++v) store(to + v * VL, load_input<RELU>(from + v * VL));
        }
    }
}

// MB output channels x NV vectors of pixels in registers; KX = 0: kernel width at run time.
template <int MB, int NV, int KX>
inline void multiply(const float* u, std::ptrdiff_t u_pitch, int depth, int ksize, const float* w, float* m,
                     std::ptrdiff_t m_pitch) {
    const int width = KX ? KX : ksize;
    F acc[MB][NV];
    for (int b = 0; b < MB; ++b) {
        for (int v = 0; v < NV; ++v) acc[b][v] = set1(0.0f);
    }
    for (int d = 0; d < depth; ++d, u += u_pitch) {
        for (int kx = 0; kx < width; ++kx, w += MB) {
            F x[NV];
            for (int v = 0; v < NV; ++v) x[v] = load(u + kx + v * VL);
            for (int b = 0; b < MB; ++b) {
                const F weight = set1(w[b]);
                for (int v = 0; v < NV; ++v) acc[b][v] = fma(weight, x[v], acc[b][v]);
            }
        }
    }
    for (int b = 0; b < MB; ++b) {
        for (int v = 0; v < NV; ++v) store(m + b * m_pitch + v * VL, acc[b][v]);
    }
}

template <int MB, int KX>
inline void multiply_columns(const float* u, std::ptrdiff_t u_pitch, int depth, int ksize, const float* w,
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

template <int KX>
inline MultiplyFn multiply_for(int channels) {
    static_assert(MAX_MB == 4 || MAX_MB == 8, "one case per block size");
    switch (channels) {
        case 1:
            return multiply_columns<1, KX>;
        case 2:
            return multiply_columns<2, KX>;
        case 3:
            return multiply_columns<3, KX>;
        case 4:
            return multiply_columns<4, KX>;
        case 5:
            return multiply_columns < MAX_MB < 5 ? MAX_MB : 5, KX > ;
        case 6:
            return multiply_columns < MAX_MB < 6 ? MAX_MB : 6, KX > ;
        case 7:
            return multiply_columns < MAX_MB < 7 ? MAX_MB : 7, KX > ;
        default:
            return multiply_columns<MAX_MB, KX>;
    }
}

// Columns [unit_begin, unit_end) of the rows: `rows` are the k - 1 + R input rows from pad above the first
// output. epilogue.unit(unit) prepares 16 pixels, epilogue.put(k, values[R]) takes channel k there,
// epilogue.done() ends it.
template <bool RELU, class Epilogue>
inline void convolve(const Plan& plan, const Conv& conv, const RowRef* rows, int unit_begin, int unit_end,
                     float* u, float* m, Epilogue& epilogue) {
    const std::ptrdiff_t u_pitch = plan.tile_pitch, m_pitch = plan.tile_units * UNIT;
    for (int begin = unit_begin; begin < unit_end; begin += plan.tile_units) {
        const int units = unit_end - begin < plan.tile_units ? unit_end - begin : plan.tile_units;
        const int vectors = (units * UNIT + 2 * conv.pad + VL - 1) / VL;
        if (conv.winograd) {
            transform_winograd<RELU>(conv, rows, begin * UNIT, vectors, u, u_pitch);
        } else {
            transform_rows<RELU>(conv, rows, begin * UNIT, vectors, u, u_pitch);
        }
        for (int g = 0; g < conv.groups; ++g) {
            const float* w =
                conv.packed + static_cast<std::ptrdiff_t>(g) * conv.depth * conv.ksize * conv.out;
            for (int block = 0; block < conv.blocks; ++block) {
                const int first = block_begin(conv, block), channels = block_begin(conv, block + 1) - first;
                const MultiplyFn run =
                    conv.ksize == 3 ? multiply_for<3>(channels) : multiply_for<0>(channels);
                run(u + g * conv.depth * u_pitch, u_pitch, conv.depth, conv.ksize, w,
                    m + (static_cast<std::ptrdiff_t>(g) * conv.out + first) * m_pitch, m_pitch,
                    units * UNIT / VL);
                w += static_cast<std::ptrdiff_t>(conv.depth) * conv.ksize * channels;
            }
        }
        const std::ptrdiff_t group = conv.out * m_pitch;
        for (int unit = 0; unit < units; ++unit) {
            epilogue.unit(begin + unit);
            const float* from = m + unit * UNIT;
            if (conv.winograd) {
                const F16 two = splat(2.0f), four = splat(4.0f), eight = splat(8.0f);
                for (int k = 0; k < conv.out; ++k, from += m_pitch) {
                    const F16 m1 = load16(from + group), m2 = load16(from + 2 * group);
                    const F16 m3 = load16(from + 3 * group), m4 = load16(from + 4 * group);
                    const F16 s = m1 + m2, d = m1 - m2, t = m3 + m4, e = m3 - m4;
                    const F16 y[BLOCK_ROWS] = {load16(from) + (s + t), fma(two, e, d), fma(four, t, s),
                                               fma(eight, e, d) + load16(from + 5 * group)};
                    epilogue.template put<BLOCK_ROWS>(k, y);
                }
            } else {
                for (int k = 0; k < conv.out; ++k, from += m_pitch) {
                    const F16 y[1] = {load16(from)};
                    epilogue.template put<1>(k, y);
                }
            }
            epilogue.done();
        }
    }
}
