// Logits at a fraction of the labels' size: rows are scaled up as they are read, and gradients scaled down as
// they are made, so neither exists at full size. The rule is that of
// torch.nn.functional.interpolate(size=..., mode="bilinear", align_corners=False): output i lies at max((i +
// 1/2) in / out - 1/2, 0), and
//
//     z[y, x] = sum_a sum_b v_a h_b low[i + a, j + b]          d_low[i, j] = sum over the (y, x) that read it
//
// A task sums the rows and columns of d_low that its own pixels read, in `partial`; then each row of d_low is
// the sum of what the tasks around it have, in a fixed order. No include guard: see simd.h.

struct Source {
    std::int64_t first;  // of two neighbours
    float next;          // the weight of the second one; 0 at the end, where there is none
};

inline Source source_of(std::int64_t i, std::int64_t in, std::int64_t out) {
    const double at =
        (static_cast<double>(i) + 0.5) * static_cast<double>(in) / static_cast<double>(out) - 0.5;
    if (at <= 0) return {0, 0.0f};
    const auto first = static_cast<std::int64_t>(at);
    if (first >= in - 1) return {in - 1, 0.0f};
    return {first, static_cast<float>(at - static_cast<double>(first))};
}

// Rows or columns that a range of outputs reads.
struct Range {
    std::int64_t begin, end;
    Range(std::int64_t from, std::int64_t to, std::int64_t in, std::int64_t out) {
        begin = source_of(from, in, out).first;
        const Source last = source_of(to - 1, in, out);
        end = last.first + (last.next > 0.0f ? 2 : 1);
    }
};

// Where the columns of a window come from.
struct Columns {
    float *own = nullptr, *next = nullptr;  // weights of the two sources of each column; 0 beside the window
    std::int32_t* lane = nullptr;  // the first source, counted from that of the vector's first column
    std::int32_t* from = nullptr;  // that one, of each vector, counted from `begin`
    std::int64_t begin = 0;
    int count = 0, width = 0;

    Columns() = default;
    Columns(const Plan& plan, Arena& arena) {
        const std::size_t columns = static_cast<std::size_t>(plan.units) * UNIT;
        own = arena.take<float>(columns);
        next = arena.take<float>(columns);
        lane = arena.take<std::int32_t>(columns);
        from = arena.take<std::int32_t>(columns / VL);
    }

    void set(const LossParams& p, std::int64_t x0, int pixels) {
        const Range range(x0, x0 + pixels, p.logits_w, p.w);
        begin = range.begin;
        count = static_cast<int>(range.end - range.begin);
        width = pixels;
        for (int x = 0; x < (pixels + UNIT - 1) / UNIT * UNIT; ++x) {
            const bool inside = x < pixels;
            const Source source = source_of(x0 + (inside ? x : pixels - 1), p.logits_w, p.w);
            const auto first = static_cast<std::int32_t>(source.first - begin);
            if (x % VL == 0) from[x / VL] = first;
            lane[x] = first - from[x / VL];
            own[x] = inside ? 1.0f - source.next : 0.0f;
            next[x] = inside ? source.next : 0.0f;
        }
    }
};

// Makes rows of logits of the labels' size.
class Upsampler {
  public:
    Upsampler() = default;
    Upsampler(const Plan& plan, Arena& arena) : plan_(&plan), columns_(plan, arena) {
        const LossParams& p = *plan.params;
        // The last vector reads beyond the last column.
        pitch_ = (p.logits_w + 2 * UNIT) / UNIT * UNIT + UNIT;
        for (float*& row : low_) row = arena.take<float>(static_cast<std::size_t>(channels_of(p) * pitch_));
        blend_ = arena.take<float>(static_cast<std::size_t>(channels_of(p) * pitch_));
    }

    // Columns [x0, x0 + width) of the window; x0 is a multiple of UNIT.
    void set_window(const Window& win, int x0, int width) {
        n_ = win.n;
        columns_.set(*plan_->params, win.xa + x0, width);
    }

    // Row y as planar channels, whole units of it.
    void read(std::int64_t y, float* z, std::ptrdiff_t pitch) {
        const LossParams& p = *plan_->params;
        const Source source = source_of(y, p.logits_h, p.h);
        const float* low = row(source.first);
        const int channels = channels_of(p);
        if (source.next > 0.0f) {
            const float* second = row(source.first + 1);
            const F own = set1(1.0f - source.next), next = set1(source.next);
            for (int c = 0; c < channels; ++c) {
                for (std::ptrdiff_t j = c * pitch_; j < c * pitch_ + columns_.count; j += VL) {
                    store(blend_ + j, fma(next, load(second + j), own * load(low + j)));
                }
            }
            low = blend_;
        }
        const int vectors = (columns_.width + UNIT - 1) / UNIT * PARTS;
        for (int c = 0; c < channels; ++c) {
            for (int i = 0; i < vectors; ++i) {
                const float* from = low + c * pitch_ + columns_.from[i];
                const std::int32_t* lane = columns_.lane + i * VL;
                const F first = pick(from, lane), second = pick(from + 1, lane);
                store(z + c * pitch + i * VL,
                      fma(load(columns_.next + i * VL), second, load(columns_.own + i * VL) * first));
            }
            for (int x = columns_.width; x < vectors * VL; ++x) z[c * pitch + x] = 0.0f;  // were 0 * NaN
        }
    }

  private:
    // The last two rows are kept: four or so rows in a row read the same.
    const float* row(std::int64_t i) {
        float* to = low_[i % 2];
        if (held_[i % 2] != i) {
            const LossParams& p = *plan_->params;
            held_[i % 2] = i;
            read_floats(p.logits, n_, i, columns_.begin, channels_of(p), columns_.count, to, pitch_);
        }
        return to;
    }

    const Plan* plan_ = nullptr;
    Columns columns_;
    std::int64_t n_ = 0, held_[2] = {-1, -1};
    std::ptrdiff_t pitch_ = 0;
    float *low_[2] = {}, *blend_ = nullptr;
};

// Logits of up to four rows as C planar channels, whatever their size.
inline void read_logits(const LossParams& p, const Window& win, Upsampler& upsampler, std::int64_t y,
                        int rows, int x0, int width, float* const* z, std::ptrdiff_t pitch) {
    if (!p.logits_h) return read_logits(p, win, y, rows, x0, width, z, pitch);
    for (int r = 0; r < rows; ++r) {
        upsampler.read(y + r, z[r] + (p.binary ? pitch : 0) + x0, pitch);
        if (p.binary) std::memset(z[r] + x0, 0, sizeof(float) * static_cast<std::size_t>(width));
    }
}

// Sums the gradient of full-size rows into a task's part of `partial`, [rows][channels][plan.partial_pitch].
class Downsampler {
  public:
    Downsampler() = default;
    Downsampler(const Plan& plan, Arena& arena) : plan_(&plan), columns_(plan, arena) {
        for (float*& row : sum_) row = take_row(arena, plan, channels_of(*plan.params));
    }

    void set_window(const Window& win, float* partial) {
        const LossParams& p = *plan_->params;
        const int x0 = win.own_begin * UNIT;
        columns_.set(p, win.xa + x0, win.own_width);
        first_row_ = source_of(win.y0, p.logits_h, p.h).first;
        to_ = partial;
    }

    // Rows come in their order, each once.
    void add(std::int64_t y, const float* d_z) {
        const Source source = source_of(y, plan_->params->logits_h, plan_->params->h);
        for (std::int64_t i = source.first - 2; i < source.first; ++i) flush(i);
        add_to(source.first, d_z, 1.0f - source.next);
        if (source.next > 0.0f) add_to(source.first + 1, d_z, source.next);
    }

    void finish() {
        const std::int64_t last = held_[0] > held_[1] ? held_[0] : held_[1];
        flush(last - 1);
        flush(last);
    }

  private:
    void add_to(std::int64_t i, const float* d_z, float weight) {
        float* sum = sum_[i % 2];
        const bool fresh = held_[i % 2] != i;
        held_[i % 2] = i;
        const F16 factor = splat(weight);
        for (int c = 0; c < channels_of(*plan_->params); ++c) {
            for (std::ptrdiff_t x = c * plan_->pitch; x < c * plan_->pitch + columns_.width; x += UNIT) {
                const F16 product = factor * load16(d_z + x);
                store16(sum + x, fresh ? product : load16(sum + x) + product);
            }
        }
    }

    void flush(std::int64_t i) {
        if (i < 0 || held_[i % 2] != i) return;
        held_[i % 2] = -1;
        const int channels = channels_of(*plan_->params);
        float* to = to_ + (i - first_row_) * channels * plan_->partial_pitch;
        for (int c = 0; c < channels; ++c, to += plan_->partial_pitch) {
            const float* sum = sum_[i % 2] + c * plan_->pitch;
            float carried = 0.0f;
            for (int x = 0, j = 0; j < columns_.count; ++j) {
                float own = 0.0f, next = 0.0f;
                for (; x < columns_.width && columns_.from[x / VL] + columns_.lane[x] == j; ++x) {
                    own += columns_.own[x] * sum[x];
                    next += columns_.next[x] * sum[x];
                }
                to[j] = carried + own;
                carried = next;
            }
        }
    }

    const Plan* plan_ = nullptr;
    Columns columns_;
    std::int64_t first_row_ = 0, held_[2] = {-1, -1};
    float *sum_[2] = {}, *to_ = nullptr;
};

// One row of the gradient of small logits, from the parts of all tasks that have some of it.
struct GatherScratch {
    float* row = nullptr;
    std::ptrdiff_t pitch = 0;
    GatherScratch(const Plan& plan, Arena& arena) {
        const LossParams& p = *plan.params;
        pitch = (p.logits_w + UNIT - 1) / UNIT * UNIT;
        row = arena.take<float>(static_cast<std::size_t>(channels_of(p) * pitch));
    }
};

inline void gather_partial(const Plan& plan, std::int64_t number, void* scratch, const float* partial) {
    const LossParams& p = *plan.params;
    Arena arena{static_cast<char*>(scratch), true, 0};
    const GatherScratch s(plan, arena);
    const std::int64_t n = number / p.logits_h, i = number % p.logits_h;
    const int channels = channels_of(p);
    for (std::int64_t strip = 0; strip < plan.strips; ++strip) {
        for (std::int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
            const std::int64_t task = (n * plan.strips + strip) * plan.chunks + chunk;
            const Window win(plan, task);
            const std::int64_t x = win.xa + win.own_begin * UNIT;
            const Range rows(win.y0, win.y1, p.logits_h, p.h), columns(x, x + win.own_width, p.logits_w, p.w);
            if (i < rows.begin || i >= rows.end) continue;
            const float* from =
                partial + task * plan.partial_floats + (i - rows.begin) * channels * plan.partial_pitch;
            for (int c = 0; c < channels; ++c, from += plan.partial_pitch) {
                float* to = s.row + c * s.pitch + columns.begin;
                for (std::int64_t j = 0; j < columns.end - columns.begin; ++j) to[j] += from[j];
            }
        }
    }
    write_floats(p.d_logits, n, i, 0, channels, static_cast<int>(p.logits_w), s.row, s.pitch);
}
