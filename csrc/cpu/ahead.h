// Asks the memory for what the next step reads and writes while this one computes. Without it each step
// begins with a burst of cache misses, one row of each class after the other, while the memory idles the rest
// of the time. Hints alone: no value depends on them. No include guard: see simd.h.

inline std::int64_t bytes_of(DType dtype) {
    switch (dtype) {
        case DType::u8:
        case DType::i8:
            return 1;
        case DType::bf16:
        case DType::f16:
        case DType::i16:
        case DType::u16:
            return 2;
        case DType::i64:
            return 8;
        default:
            return 4;
    }
}

inline void ask_for_line(const char* p) {
#if defined(SEMEDA_AVX512) || defined(SEMEDA_AVX2)
    _mm_prefetch(p, _MM_HINT_T1);
#elif defined(__GNUC__)
    __builtin_prefetch(p, 0, 2);
#else
    static_cast<void>(p);
#endif
}

class Ahead {
  public:
    static constexpr std::int64_t LINE = 64;

    // Forget what was not asked for yet.
    void clear() { parts_ = at_ = 0, lines_ = 0, i_ = j_ = byte_ = 0; }

    // Columns [x, x + width) of rows [y, y + rows) of all channels, where these are dense in one direction.
    void add(const View& view, std::int64_t n, std::int64_t y, int rows, std::int64_t x, int width,
             int channels) {
        if (rows <= 0 || parts_ == MAX_PARTS || !view.data) return;
        const std::int64_t size = bytes_of(view.dtype);
        const bool planar = view.stride[3] == 1, pixels = view.stride[1] == 1 && view.stride[3] == channels;
        if (!planar && !pixels) return;
        Part& part = part_[parts_++];
        part.base = static_cast<const char*>(view.data) + size * offset_of(view, n, y, x);
        part.outer = planar ? channels : 1;
        part.outer_step = size * view.stride[1];
        part.rows = rows;
        part.row_step = size * view.stride[2];
        part.bytes = size * width * (planar ? 1 : channels);
        lines_ += part.outer * rows * ((part.bytes + LINE - 1) / LINE);
    }

    // The differences that are kept of layer l (counted from 0) in rows [y, y_end), at most four.
    void add_saved(const Plan& plan, const Window& win, int l, std::int64_t y, std::int64_t y_end) {
        const LossParams& p = *plan.params;
        const std::int64_t rows = y_end - y < BLOCK_ROWS ? y_end - y : BLOCK_ROWS, in_batch = win.n * p.h + y;
        const int channels = p.layer[l].out;
        const std::int64_t row_floats = plan.saved_pitch * plan.saved_planes;
        if (rows <= 0 || !p.saved_d || parts_ == MAX_PARTS) return;
        Part& part = part_[parts_++];
        part.base = reinterpret_cast<const char*>(p.saved_d + in_batch * row_floats +
                                                  plan.saved_plane[l] * plan.saved_pitch + win.xa * channels);
        part.outer = 1;
        part.rows = rows;
        part.row_step = row_floats * 4;
        part.bytes = static_cast<std::int64_t>(win.units) * UNIT * channels * 4;
        lines_ += rows * (part.bytes / LINE);
    }

    // All of it in so many calls of some().
    void spread(std::int64_t calls) { quota_ = calls > 0 ? (lines_ + calls - 1) / calls : 0; }

    void some() {
        for (std::int64_t left = quota_; left > 0 && at_ < parts_; --left) {
            const Part& part = part_[at_];
            ask_for_line(part.base + i_ * part.outer_step + j_ * part.row_step + byte_);
            byte_ += LINE;
            if (byte_ < part.bytes) continue;
            byte_ = 0;
            if (++j_ < part.rows) continue;
            j_ = 0;
            if (++i_ < part.outer) continue;
            i_ = 0;
            ++at_;
        }
    }

  private:
    static constexpr int MAX_PARTS = 3 + MAX_LAYERS;
    struct Part {
        const char* base;
        std::int64_t outer, outer_step, rows, row_step, bytes;
    };
    Part part_[MAX_PARTS] = {};
    int parts_ = 0, at_ = 0;
    std::int64_t lines_ = 0, quota_ = 0, i_ = 0, j_ = 0, byte_ = 0;
};
