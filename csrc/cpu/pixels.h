// The pointwise ends of the loss: softmax and cross-entropy of a row, and their gradient.
// Formulas (6), (10) to (12) of kernels/README.md. No include guard: see simd.h.

// The window of columns and rows that a task works on. Region columns start at image column xa, a multiple of
// UNIT; the task owns columns [own_begin, own_end) of it, in units, and rows [y0, y1) of the image.
struct Window {
    std::int64_t n, y0, y1, xa, strip;
    int width, units, own_begin, own_end, own_width;  // own_width: pixels owned, the last unit may be partial
    Window(const Plan& plan, std::int64_t task) {
        const LossParams& p = *plan.params;
        const std::int64_t chunk = task % plan.chunks;
        strip = task / plan.chunks % plan.strips;
        n = task / plan.chunks / plan.strips;
        y0 = chunk * plan.chunk_rows;
        y1 = y0 + plan.chunk_rows < p.h ? y0 + plan.chunk_rows : p.h;
        const std::int64_t x0 = strip * plan.strip_width;
        const std::int64_t x1 = x0 + plan.strip_width < p.w ? x0 + plan.strip_width : p.w;
        xa = x0 > plan.strip_halo ? x0 - plan.strip_halo : 0;
        const std::int64_t xb = x1 + plan.strip_halo < p.w ? x1 + plan.strip_halo : p.w;
        width = static_cast<int>(xb - xa);
        units = (width + UNIT - 1) / UNIT;
        own_begin = static_cast<int>((x0 - xa) / UNIT);
        own_width = static_cast<int>(x1 - x0);
        own_end = own_begin + (own_width + UNIT - 1) / UNIT;
    }
};

// Labels and validity of one row of a task's region. Entries outside the image are void.
struct LabelRow {
    std::int16_t* label;  // class, or C for void
    std::int32_t* start;  // first column of the run of equal labels that holds this column
    float* valid;         // 1 or 0
    std::uint8_t* bad;    // 1 where a valid pixel's label is no class, or its soft target no distribution
    bool any_void, any_bad;
};

inline void read_label_row(const LossParams& p, const Window& win, std::int64_t y, int x0, int width,
                           LabelRow& row) {
    const std::int64_t x = win.xa + x0;
    row.any_bad = false;
    if (p.soft) {
        for (int i = x0; i < x0 + width; ++i) {
            row.label[i] = 0;
            row.bad[i] = 0;
        }
    } else {
        row.any_bad = read_labels(p.target, win.n, y, x, width, p.classes, p.ignore_index, row.label + x0,
                                  row.bad + x0);
    }
    if (p.valid.data) {
        const auto* valid = static_cast<const std::uint8_t*>(p.valid.data) + offset_of(p.valid, win.n, y, x);
        for (int i = 0; i < width; ++i) {
            if (!valid[i * p.valid.stride[3]]) {
                row.label[x0 + i] = static_cast<std::int16_t>(p.classes);
                row.bad[x0 + i] = 0;
            }
        }
    }
    bool any_void = false;
    for (int i = x0; i < x0 + width; ++i) {
        const bool is_void = row.label[i] == p.classes;
        row.valid[i] = is_void ? 0.0f : 1.0f;
        any_void |= is_void;
    }
    row.any_void = any_void;
}

// Of the logits, and of their gradient.
inline int channels_of(const LossParams& p) { return p.binary ? 1 : p.classes; }

// Logits of up to four rows as C planar channels; binary logits get a first channel of zeros, so that softmax
// gives [1-s, s]. Channel by channel where a channel's rows are contiguous: the processor fetches ahead along
// them.
inline void read_logits(const LossParams& p, const Window& win, std::int64_t y, int rows, int x0, int width,
                        float* const* z, std::ptrdiff_t pitch) {
    const View& view = p.logits;
    const std::int64_t x = win.xa + x0;
    const bool planar = view.stride[3] == 1;
    const int channels = channels_of(p), first = p.binary ? 1 : 0;
    for (int c = 0; planar && c < channels; ++c) {
        View channel = view;
        channel.data =
            static_cast<char*>(view.data) + c * view.stride[1] * (view.dtype == DType::f32 ? 4 : 2);
        for (int r = 0; r < rows; ++r) {
            read_floats(channel, win.n, y + r, x, 1, width, z[r] + (first + c) * pitch + x0, pitch);
        }
    }
    for (int r = 0; r < rows; ++r) {
        if (!planar) read_floats(view, win.n, y + r, x, channels, width, z[r] + first * pitch + x0, pitch);
        if (p.binary) std::memset(z[r] + x0, 0, sizeof(float) * static_cast<std::size_t>(width));
    }
}

// A soft target's row as C planar channels, zero at void pixels.
inline void read_soft_target(const LossParams& p, const Window& win, std::int64_t y, int x0, int width,
                             float* q, std::ptrdiff_t pitch, const LabelRow& row) {
    const bool one_channel = p.soft_channels < p.classes;
    read_floats(p.target, win.n, y, win.xa + x0, p.soft_channels, width, q + (one_channel ? pitch : 0) + x0,
                pitch);
    for (int i = x0; i < x0 + width; ++i) {
        if (one_channel) q[i] = 1.0f - q[pitch + i];
        if (row.valid[i] == 0.0f) {
            for (int c = 0; c < p.classes; ++c) q[c * pitch + i] = 0.0f;
        }
    }
}

// z [C][16] at a unit -> exp(z - max), void pixels as if z were 0; their sum and the maximum come back.
inline void exp_unit(float* z, std::ptrdiff_t pitch, int classes, M16 valid, bool any_void, F16& maximum,
                     F16& sum) {
    if (any_void) {
        for (int c = 0; c < classes; ++c)
            store16(z + c * pitch, select(valid, load16(z + c * pitch), splat(0.0f)));
    }
    maximum = load16(z);
    for (int c = 1; c < classes; ++c) maximum = vmax(load16(z + c * pitch), maximum);
    sum = splat(0.0f);
    for (int c = 0; c < classes; ++c) {
        const F16 e = exp_nonpositive(load16(z + c * pitch) - maximum);
        store16(z + c * pitch, e);
        sum = sum + e;
    }
}

// What cross-entropy needs of the class weights of an image: u_c, their sum U, and the two smoothing factors.
struct ClassWeights {
    const float* u;  // null: all 1
    int classes;
    float own, spread;  // 1 - e and e / C
    float total;        // U
    ClassWeights(const LossParams& p, std::int64_t image)
        : u(p.class_weight ? p.class_weight + image % p.weight_rows * p.classes : nullptr),
          classes(p.classes),
          own(1.0f - p.label_smoothing),
          spread(p.label_smoothing / static_cast<float>(p.classes)),
          total(0.0f) {
        for (int c = 0; c < classes; ++c) total += of(c);
    }
    float of(int c) const { return u ? u[c] : 1.0f; }
};

constexpr float BELOW_ZERO = 1e-2f;  // so far a share of a soft target may lie below 0

// Marks the valid pixels of a unit at column x whose soft target is no distribution. No share below 0 and a
// sum of 1 leave none above 1; a NaN makes the sum one.
inline void mark_bad_distributions(LabelRow& row, int x, int end, M16 valid, F16 total, F16 lowest,
                                   float tolerance) {
    const M16 sums_up = greater(splat(tolerance), vabs(total - splat(1.0f)));
    const unsigned wrong = bits(valid) & ~(bits(sums_up) & bits(greater(lowest, splat(-BELOW_ZERO))));
    if (!(wrong & ((1u << end) - 1u))) return;
    row.any_bad = true;
    for (int i = 0; i < end; ++i) row.bad[x + i] = wrong >> i & 1u;
}

// One row forward: z (logits, in) becomes p - q (out). ce [width] gets the cross-entropy map. Of soft targets
// row.bad is found here, where they are read.
inline void forward_row(const LossParams& p, const ClassWeights& cw, LabelRow& row, int units, int width,
                        float* z, std::ptrdiff_t pitch, const float* q, float* ce) {
    const int classes = p.classes;
    for (int unit = 0; unit < units; ++unit) {
        const int x = unit * UNIT, end = width - x < UNIT ? width - x : UNIT;
        float* zu = z + x;
        const M16 valid = greater(load16(row.valid + x), splat(0.0f));
        float picked[UNIT] = {}, weight[UNIT] = {};
        F16 smooth = splat(0.0f), soft_weight = splat(0.0f);
        if (row.any_void) {
            for (int c = 0; c < classes; ++c) {
                store16(zu + c * pitch, select(valid, load16(zu + c * pitch), splat(0.0f)));
            }
        }
        if (!q) {
            for (int i = 0; i < end; ++i) {
                const int label = row.label[x + i] < classes ? row.label[x + i] : 0;
                picked[i] = zu[label * pitch + i];
                weight[i] = cw.of(label);
            }
        }
        F16 maximum = load16(zu);
        for (int c = 1; c < classes; ++c) maximum = vmax(load16(zu + c * pitch), maximum);
        if (q) {
            F16 total = splat(0.0f), lowest = splat(0.0f);
            for (int c = 0; c < classes; ++c) {
                const F16 share = load16(q + c * pitch + x);
                const F16 r = splat(cw.of(c)) * fma(splat(cw.own), share, splat(cw.spread));
                smooth = fma(r, maximum - load16(zu + c * pitch), smooth);
                soft_weight = soft_weight + r;
                total = total + share;
                lowest = vmin(share, lowest);
            }
            if (p.soft_tolerance > 0.0f) {
                mark_bad_distributions(row, x, end, valid, total, lowest, p.soft_tolerance);
            }
        } else if (cw.spread > 0.0f) {
            for (int c = 0; c < classes; ++c) {
                smooth = fma(splat(cw.of(c) * cw.spread), maximum - load16(zu + c * pitch), smooth);
            }
        }
        F16 sum = splat(0.0f);
        for (int c = 0; c < classes; ++c) {
            const F16 e = exp_nonpositive(load16(zu + c * pitch) - maximum);
            store16(zu + c * pitch, e);
            sum = sum + e;
        }
        const F16 log_sum = log_of_sum(sum);
        F16 loss;
        if (q) {
            loss = fma(soft_weight, log_sum, smooth);
        } else {
            const F16 own = splat(cw.own) * load16(weight);
            loss = own * ((maximum - load16(picked)) + log_sum);
            if (cw.spread > 0.0f) loss = loss + fma(splat(cw.spread * cw.total), log_sum, smooth);
        }
        store16(ce + x, select(valid, loss, splat(0.0f)));
        const F16 scale = reciprocal(sum);
        for (int c = 0; c < classes; ++c) {
            F16 e = select(valid, load16(zu + c * pitch) * scale, splat(0.0f));
            if (q) e = e - load16(q + c * pitch + x);
            store16(zu + c * pitch, e);
        }
        if (!q) {
            for (int i = 0; i < end; ++i) {
                if (row.label[x + i] < classes) zu[row.label[x + i] * pitch + i] -= 1.0f;
            }
        }
        for (int i = 0; row.any_bad && i < end; ++i) {
            if (row.bad[x + i]) ce[x + i] = std::numeric_limits<float>::quiet_NaN();
        }
    }
}

// One row backward: z (logits, in) becomes d_z (out). d_p [C] planar, or null: no gradient comes from the
// features. g [width] is the gradient of the cross-entropy map at each pixel; scale is what d_p is still to
// be multiplied by.
inline void backward_row(const LossParams& p, const ClassWeights& cw, const LabelRow& row, int units,
                         int width, float* z, std::ptrdiff_t pitch, const float* d_p, std::ptrdiff_t d_pitch,
                         float scale, const float* q, const float* g) {
    const int classes = p.classes;
    for (int unit = 0; unit < units; ++unit) {
        const int x = unit * UNIT, end = width - x < UNIT ? width - x : UNIT;
        float* zu = z + x;
        const M16 valid = greater(load16(row.valid + x), splat(0.0f));
        F16 maximum, sum;
        exp_unit(zu, pitch, classes, valid, row.any_void, maximum, sum);
        const F16 inverse = reciprocal(sum), g_ce = load16(g + x);
        float weight[UNIT] = {};
        F16 total = splat(0.0f);  // sum of r over the classes
        if (q) {
            for (int c = 0; c < classes; ++c) {
                total = fma(splat(cw.of(c)), fma(splat(cw.own), load16(q + c * pitch + x), splat(cw.spread)),
                            total);
            }
        } else {
            for (int i = 0; i < end; ++i)
                weight[i] = cw.of(row.label[x + i] < classes ? row.label[x + i] : 0);
            total = fma(splat(cw.own), load16(weight), splat(cw.spread * cw.total));
        }
        F16 dot = splat(0.0f);
        if (d_p) {
            for (int c = 0; c < classes; ++c) {
                dot = fma(load16(zu + c * pitch), load16(d_p + c * d_pitch + x), dot);
            }
            dot = dot * inverse;
        }
        const F16 factor = splat(scale), pull = g_ce * total;
        for (int c = 0; c < classes; ++c) {
            const F16 s = load16(zu + c * pitch) * inverse;
            F16 d = pull;
            if (d_p) d = fma(factor, load16(d_p + c * d_pitch + x) - dot, d);
            d = s * d;
            if (q) {
                const F16 r =
                    splat(cw.of(c)) * fma(splat(cw.own), load16(q + c * pitch + x), splat(cw.spread));
                d = d - g_ce * r;
            } else if (cw.spread > 0.0f) {
                d = d - g_ce * splat(cw.of(c) * cw.spread);
            }
            store16(zu + c * pitch, select(valid, d, splat(0.0f)));
        }
        if (!q) {
            for (int i = 0; i < end; ++i) {
                const int label = row.label[x + i];
                if (label < classes) zu[label * pitch + i] -= g[x + i] * cw.own * weight[i];
            }
        }
    }
}
