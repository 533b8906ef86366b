// Backward: codes, labels and logits -> the gradient of the logits, written once, in their dtype and layout.
//
// The chain (7) to (9) of kernels/README.md from the last layer to the first, then (10) to (12). Softmax is
// computed again from the logits, so nothing but codes was kept. Under l1 the seed of a feature is
// +-coefficient by its code.
//
// Rings: d_t_l [BLOCK_ROWS + 2 pad_l][K_l], the gradient at layer l before its ReLU.
// Phases of a step: 1. d_t_L from codes  2. per layer downwards: d_t_{l-1} = seed + mask * dgrad_l(d_t_l)
// 3. d_p = dgrad_1(d_t_1), softmax backward, cross-entropy's gradient, store.
// No include guard: see simd.h.

struct BackwardScratch {
    Ring d_t[MAX_LAYERS], d_p;
    LabelRow labels{};
    float* z[BLOCK_ROWS] = {};
    float *q = nullptr, *g = nullptr, *zeros = nullptr, *nowhere = nullptr;
    float* upstream[BLOCK_ROWS] = {};  // rows of d_semeda where it is a map
    Upsampler upsampler;
    Downsampler downsampler;
    ConvScratch conv{};
    RowRef* rows = nullptr;

    BackwardScratch(const Plan& plan, Arena& arena) {
        const LossParams& p = *plan.params;
        int widest = 0;
        ConvNeeds needs;
        for (int l = 0; l < p.layers; ++l) {
            const Conv& conv = plan.bwd[l];
            d_t[l] = take_ring(arena, plan, BLOCK_ROWS + 2 * conv.pad, conv.in);
            widest = widest > conv.out ? widest : conv.out;
            needs.cover(conv);
        }
        d_p = take_ring(arena, plan, BLOCK_ROWS, p.classes);
        for (float*& row : z) row = take_ring(arena, plan, 1, p.classes).base;
        if (p.soft) q = take_row(arena, plan, p.classes);
        const std::size_t columns = static_cast<std::size_t>(plan.units) * UNIT;
        labels.label = arena.take<std::int16_t>(columns);
        labels.valid = arena.take<float>(columns);
        labels.bad = arena.take<std::uint8_t>(columns);
        g = take_row(arena, plan);
        zeros = take_row(arena, plan);
        for (float*& row : upstream) row = take_row(arena, plan);
        nowhere = take_ring(arena, plan, 1, widest).base;
        if (p.logits_h > 0) {
            upsampler = Upsampler(plan, arena);
            downsampler = Downsampler(plan, arena);
        }
        conv = needs.take(arena);
        rows = arena.take<RowRef>(BLOCK_ROWS + needs.tallest);
    }
};

inline unsigned get_bits(const std::uint8_t* from) {
    std::uint16_t word;
    std::memcpy(&word, from, sizeof(word));
    return word;
}

// What a layer's codes say: the derivative of the distance at each feature, and the mask of its ReLU.
template <bool L1, bool POST, bool LAST>
struct Seeds {
    float coefficient;
    Distance distance;
    std::ptrdiff_t plane_bytes;
    int channels;
    const std::uint8_t* code[BLOCK_ROWS];  // at the region's first unit, plane 0 of the layer
    const float* saved[BLOCK_ROWS];
    const float* upstream[BLOCK_ROWS];  // null: the scalar is multiplied in at the end

    F16 at(int k, int r, int unit, unsigned& on) const {
        const std::uint8_t* word = code[r] + unit * 2;
        F16 seed;
        on = 0xffffu;
        if (L1) {
            const int planes = LAST || POST ? 2 : 3;
            const unsigned first = get_bits(word + planes * k * plane_bytes);
            const unsigned second = get_bits(word + (planes * k + 1) * plane_bytes);
            unsigned above = first, below = second;
            if (!LAST && POST) {
                on = first | second;
                above = first & ~second;
                below = second & ~first;
            } else if (!LAST) {
                on = get_bits(word + (3 * k + 2) * plane_bytes);
            }
            seed = select(from_bits16(below), splat(-coefficient),
                          select(from_bits16(above), splat(coefficient), splat(0.0f)));
        } else {
            if (!LAST) on = get_bits(word + k * plane_bytes);
            const F16 d = load16(saved[r] + (unit * channels + k) * UNIT);
            seed = distance == Distance::l2 ? splat(2.0f * coefficient) * d
                                            : splat(coefficient) * vmax(splat(-1.0f), vmin(splat(1.0f), d));
        }
        if (!upstream[r]) return seed;
        // A seed of 0, as at void pixels, stays 0 even under an infinite gradient.
        const M16 some = greater(vabs(seed), splat(0.0f));
        return select(some, seed * load16(upstream[r] + unit * UNIT), seed);
    }
};

// Takes d_a_l and stores d_t_l, (8a) and (8b).
template <bool L1, bool POST>
struct ChainEpilogue {
    Seeds<L1, POST, false> seeds;
    std::ptrdiff_t pitch;
    float* to[BLOCK_ROWS];

    struct Pixels {
        const ChainEpilogue& all;
        int number;
        template <int ROWS>
        void put(int k, const F16* d_a) {
            SEMEDA_UNROLL
            for (int r = 0; r < ROWS; ++r) {
                unsigned on;
                const F16 seed = all.seeds.at(k, r, number, on);
                const M16 mask = from_bits16(on);
                const F16 d_t = POST ? select(mask, seed + d_a[r], splat(0.0f))
                                     : seed + select(mask, d_a[r], splat(0.0f));
                store16(all.to[r] + k * all.pitch + number * UNIT, d_t);
            }
        }
        void done() {}
    };

    Pixels unit(int number, bool) const { return {*this, number}; }
};

struct StoreEpilogue {
    std::ptrdiff_t pitch;
    float* to[BLOCK_ROWS];

    struct Pixels {
        const StoreEpilogue& all;
        int x;
        template <int ROWS>
        void put(int k, const F16* d) {
            for (int r = 0; r < ROWS; ++r) store16(all.to[r] + k * all.pitch + x, d[r]);
        }
        void done() {}
    };

    Pixels unit(int number, bool) const { return {*this, number * UNIT}; }
};

// The gradient at labels that are no class; how many there are.
inline int set_bad(const LabelRow& labels, int width, float* g) {
    int count = 0;
    for (int i = 0; i < width; ++i) {
        if (!labels.bad[i]) continue;
        g[i] = std::numeric_limits<float>::quiet_NaN();
        ++count;
    }
    return count;
}

class BackwardTask {
  public:
    BackwardTask(const Plan& plan, std::int64_t task, void* scratch, bool zero, float* partial)
        : plan_(plan),
          p_(*plan.params),
          win_(plan, task),
          cw_(p_, win_.n),
          arena_{static_cast<char*>(scratch), zero, 0},
          s_(plan, arena_) {
        const auto* d_semeda = static_cast<const float*>(p_.d_semeda.data);
        scale_ = p_.d_semeda_is_map ? 1.0f : *d_semeda;
        s_.conv.ahead = &ahead_;
        if (p_.logits_h > 0) {
            s_.upsampler.set_window(win_, win_.own_begin * UNIT, win_.own_width);
            s_.downsampler.set_window(win_, partial);
        }
        for (int l = 0; l < p_.layers; ++l) products_ += products_of(plan.bwd[l], win_.units);
        forget(s_.d_p, win_.width);
        for (int l = 0; l < p_.layers; ++l) forget(s_.d_t[l], win_.width);
    }

    // How many of the task's labels are no class.
    std::int64_t run() {
        const int layers = p_.layers;
        // No gradient flows into the features: cross-entropy alone is left.
        const bool features = p_.d_semeda_is_map || scale_ != 0.0f;
        for (int l = 0; l <= layers; ++l) done_[l] = win_.y0 > plan_.reach[l] ? win_.y0 - plan_.reach[l] : 0;
        const std::int64_t lead =
            features ? (2 * plan_.reach[layers] + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS : 0;
        for (std::int64_t y = win_.y0 - lead; y < win_.y1; y += BLOCK_ROWS) {
            const std::int64_t last = y + BLOCK_ROWS < win_.y1 ? y + BLOCK_ROWS : win_.y1;
            look_ahead();
            for (int l = layers; l >= 0; --l) {
                const std::int64_t end = last + plan_.reach[l] < p_.h ? last + plan_.reach[l] : p_.h;
                while (done_[l] < end) {
                    const int rows =
                        static_cast<int>(end - done_[l] < BLOCK_ROWS ? end - done_[l] : BLOCK_ROWS);
                    if (l == 0) {
                        logits(done_[0], rows, features);
                    } else if (features) {
                        l == layers ? seeds(done_[l], rows) : chain(l, done_[l], rows);
                    }
                    done_[l] += rows;
                }
            }
        }
        if (p_.logits_h > 0) s_.downsampler.finish();
        return bad_;
    }

  private:
    // The rows of logits that come next, and where their gradient goes.
    void look_ahead() {
        const std::int64_t y = done_[0];
        const int rows = static_cast<int>(win_.y1 - y < BLOCK_ROWS ? win_.y1 - y : BLOCK_ROWS);
        const int x = win_.own_begin * UNIT;
        ahead_.clear();
        if (!p_.logits_h) {
            ahead_.add(p_.logits, win_.n, y, rows, win_.xa + x, win_.own_width, channels_of(p_));
            ahead_.add(p_.d_logits, win_.n, y, rows, win_.xa + x, win_.own_width, channels_of(p_));
        }
        ahead_.add(p_.target, win_.n, y, rows, win_.xa + x, win_.own_width, p_.soft ? p_.soft_channels : 1);
        for (int l = p_.layers; l > 0; --l) ahead_.add_saved(plan_, win_, l - 1, done_[l] + BLOCK_ROWS, p_.h);
        ahead_.spread(products_);
    }

    template <class S>
    void point(S& seeds, int l, std::int64_t y, int rows) {
        seeds.coefficient = p_.layer[l].coefficient;
        seeds.distance = p_.distance;
        seeds.plane_bytes = plan_.plane_bytes;
        seeds.channels = p_.layer[l].out;
        for (int r = 0; r < BLOCK_ROWS; ++r) {
            const std::int64_t in_batch = win_.n * p_.h + y + (r < rows ? r : 0);
            seeds.code[r] = p_.codes + in_batch * plan_.plane_bytes * plan_.planes +
                            plan_.plane[l] * plan_.plane_bytes + win_.xa / UNIT * 2;
            seeds.saved[r] = nullptr;
            if (p_.saved_d) {
                seeds.saved[r] = p_.saved_d + in_batch * plan_.saved_pitch * plan_.saved_planes +
                                 plan_.saved_plane[l] * plan_.saved_pitch + win_.xa * p_.layer[l].out;
            }
            seeds.upstream[r] = p_.d_semeda_is_map ? s_.upstream[r] : nullptr;
            if (p_.d_semeda_is_map && r < rows) {
                read_floats(p_.d_semeda, win_.n, y + r, win_.xa, 1, win_.width, s_.upstream[r], plan_.pitch);
            }
        }
    }

    void clean_tail(float* row, int channels) const {
        if (win_.width == win_.units * UNIT) return;
        for (int k = 0; k < channels; ++k) {
            for (int x = win_.width; x < win_.units * UNIT; ++x) row[k * plan_.pitch + x] = 0.0f;
        }
    }

    void seeds(std::int64_t y, int rows) {
        const int l = p_.layers - 1;
        const bool post = p_.tap == Tap::post;
        if (p_.distance == Distance::l1) {
            post ? seed_rows<true, true>(l, y, rows) : seed_rows<true, false>(l, y, rows);
        } else {
            post ? seed_rows<false, true>(l, y, rows) : seed_rows<false, false>(l, y, rows);
        }
    }

    template <bool L1, bool POST>
    void seed_rows(int l, std::int64_t y, int rows) {
        Seeds<L1, POST, true> seeds;
        point(seeds, l, y, rows);
        for (int r = 0; r < rows; ++r) {
            float* to = s_.d_t[l].row(y + r);
            for (int k = 0; k < p_.layer[l].out; ++k) {
                for (int unit = 0; unit < win_.units; ++unit) {
                    unsigned on;
                    store16(to + k * plan_.pitch + unit * UNIT, seeds.at(k, r, unit, on));
                }
            }
            clean_tail(to, p_.layer[l].out);
        }
    }

    // d_t of layer `l` (counted from 1) by way of the convolution behind it.
    void chain(int l, std::int64_t y, int rows) {
        const bool post = p_.tap == Tap::post;
        const int step = plan_.bwd[l].scheme != Scheme::plain ? BLOCK_ROWS : 1;
        for (int r = 0; r < rows; r += step) {
            const int count = rows - r < step ? rows - r : step;
            if (p_.distance == Distance::l1) {
                post ? chain_rows<true, true>(l, y + r, count) : chain_rows<true, false>(l, y + r, count);
            } else {
                post ? chain_rows<false, true>(l, y + r, count) : chain_rows<false, false>(l, y + r, count);
            }
        }
    }

    template <bool L1, bool POST>
    void chain_rows(int l, std::int64_t y, int rows) {
        const Conv& conv = plan_.bwd[l];
        input_rows(conv, s_.d_t[l], y, rows, p_.h, s_.zeros, s_.rows);
        ChainEpilogue<L1, POST> epilogue;
        point(epilogue.seeds, l - 1, y, rows);
        epilogue.pitch = plan_.pitch;
        for (int r = 0; r < BLOCK_ROWS; ++r)
            epilogue.to[r] = r < rows ? s_.d_t[l - 1].row(y + r) : s_.nowhere;
        convolve<false>(conv, s_.rows, 0, win_.units, s_.conv, epilogue);
        for (int r = 0; r < rows; ++r) clean_tail(epilogue.to[r], conv.out);
    }

    void logits(std::int64_t y, int rows, bool features) {
        const Conv& conv = plan_.bwd[0];
        const int step = conv.scheme != Scheme::plain ? BLOCK_ROWS : 1;
        for (int r = 0; r < rows; r += step) {
            const int count = rows - r < step ? rows - r : step;
            if (features) {
                input_rows(conv, s_.d_t[0], y + r, count, p_.h, s_.zeros, s_.rows);
                StoreEpilogue epilogue{plan_.pitch, {}};
                for (int i = 0; i < BLOCK_ROWS; ++i)
                    epilogue.to[i] = i < count ? s_.d_p.row(y + r + i) : s_.nowhere;
                convolve<false>(conv, s_.rows, win_.own_begin, win_.own_end, s_.conv, epilogue);
            }
            read_logits(p_, win_, s_.upsampler, y + r, count, win_.own_begin * UNIT, win_.own_width, s_.z,
                        plan_.pitch);
            for (int i = 0; i < count; ++i) row(y + r + i, s_.z[i], features);
        }
    }

    // From logits z to their gradient.
    void row(std::int64_t y, float* z, bool features) {
        const int x = win_.own_begin * UNIT, units = win_.own_end - win_.own_begin, width = win_.own_width;
        read_label_row(p_, win_, y, x, width, s_.labels);
        LabelRow labels = s_.labels;
        labels.label += x;
        labels.valid += x;
        labels.bad += x;
        const float* q = nullptr;
        if (p_.soft) {
            read_soft_target(p_, win_, y, x, width, s_.q, plan_.pitch, s_.labels);
            q = s_.q + x;
        }
        read_floats(p_.d_ce, win_.n, y, win_.xa + x, 1, width, s_.g + x, plan_.pitch);
        if (labels.any_bad) bad_ += set_bad(labels, width, s_.g + x);
        backward_row(p_, cw_, labels, units, width, z + x, plan_.pitch,
                     features ? s_.d_p.row(y) + x : nullptr, plan_.pitch, scale_, q, s_.g + x);
        const float* d_z = z + (p_.binary ? plan_.pitch : 0) + x;
        if (p_.logits_h > 0) {
            s_.downsampler.add(y, d_z);
        } else {
            write_floats(p_.d_logits, win_.n, y, win_.xa + x, channels_of(p_), width, d_z, plan_.pitch);
        }
    }

    const Plan& plan_;
    const LossParams& p_;
    const Window win_;
    const ClassWeights cw_;
    Arena arena_;
    BackwardScratch s_;
    Ahead ahead_;
    std::int64_t products_ = 0, bad_ = 0;
    float scale_;
    std::int64_t done_[MAX_LAYERS + 1];
};
