// Rings of rows, the only form in which activations exist: a layer's last few rows, until the next layer has
// used them. A row's slot is its number modulo the ring's rows. No include guard: see simd.h.

struct Ring {
    float* base = nullptr;
    int rows = 1, channels = 0;
    std::ptrdiff_t pitch = 0;
    float* row(std::int64_t y) const { return base + (y % rows) * channels * pitch; }
};

// For sanitizers: of what an earlier task has left, nothing may be read.
inline void forget(const Ring& ring, int width) {
#if defined(SEMEDA_REDZONES)
    for (std::ptrdiff_t row = 0; ring.base && row < ring.rows * ring.channels; ++row) {
        for (int x = 0; x < width; ++x)
            ring.base[row * ring.pitch + x] = std::numeric_limits<float>::quiet_NaN();
    }
#else
    static_cast<void>(ring);
    static_cast<void>(width);
#endif
}

template <class Epilogue>
inline void convolve_relu(bool relu_first, const Conv& conv, const RowRef* rows, int begin, int end,
                          const ConvScratch& scratch, Epilogue& epilogue) {
    if (relu_first) {
        convolve<true>(conv, rows, begin, end, scratch, epilogue);
    } else {
        convolve<false>(conv, rows, begin, end, scratch, epilogue);
    }
}

// Room for the tiles of any of these convolutions.
struct ConvNeeds {
    std::size_t u = 0, m = 0;
    int tallest = 0;
    void cover(const Conv& conv) {
        u = u > floats_of_u(conv) ? u : floats_of_u(conv);
        m = m > floats_of_m(conv) ? m : floats_of_m(conv);
        tallest = tallest > conv.ksize ? tallest : conv.ksize;
    }
    ConvScratch take(Arena& arena) const {
        return {arena.take_raw<float>(u), arena.take_raw<float>(m), arena.take_raw<float>(FLOATS_OF_Y),
                nullptr};
    }
};

// The input rows of a block of `rows` outputs from row y on; rows outside the image are zero, and so are
// those that only the outputs beyond `rows` would read, since the ring holds other rows in their place.
inline void input_rows(const Conv& conv, const Ring& ring, std::int64_t y, int rows, std::int64_t height,
                       const float* zeros, RowRef* out) {
    y -= conv.pad;
    const int count = (conv.scheme != Scheme::plain ? BLOCK_ROWS : 1) + 2 * conv.pad,
              known = rows + 2 * conv.pad;
    for (int i = 0; i < count; ++i) {
        const bool inside = i < known && y + i >= 0 && y + i < height;
        out[i] = inside ? RowRef{ring.row(y + i), ring.pitch} : RowRef{zeros, 0};
    }
}

// Of what is not zero only the margins are made so, and the last unit, which may reach beyond the image: all
// else is written before it is read.
inline Ring take_ring(Arena& arena, const Plan& plan, int rows, int channels) {
    Ring ring{nullptr, rows, channels, plan.pitch};
    const std::ptrdiff_t lines = static_cast<std::ptrdiff_t>(rows) * channels;
    float* base = arena.take_raw<float>(static_cast<std::size_t>(lines * plan.pitch));
    if (!base) return ring;
    ring.base = base + plan.margin;
    if (arena.zero) return ring;
    const std::ptrdiff_t written = static_cast<std::ptrdiff_t>(plan.units - 1) * UNIT;
    const std::ptrdiff_t gap = plan.pitch - written;  // from there to the next line
    if (lines > 0) std::memset(base, 0, sizeof(float) * static_cast<std::size_t>(plan.margin));
    for (std::ptrdiff_t line = 0; line < lines; ++line) {
        const std::ptrdiff_t size = line + 1 < lines ? gap : gap - plan.margin;
        std::memset(ring.base + line * plan.pitch + written, 0,
                    sizeof(float) * static_cast<std::size_t>(size));
    }
    return ring;
}

// Rows of zeros.
inline float* take_row(Arena& arena, const Plan& plan, int channels = 1) {
    float* base = arena.take<float>(static_cast<std::size_t>(channels * plan.pitch));
    return base ? base + plan.margin : nullptr;
}

inline int next_pad(const LossParams& p, int layer) {
    return layer + 1 < p.layers ? p.layer[layer + 1].ksize / 2 : 0;
}
