// Forward: logits and labels -> cross-entropy, the layers' distances, and the codes that backward needs.
//
// The difference of the two branches travels through the network instead of the prediction itself:
//
//     e = p - q              d_1 = conv_1(e)             t_l(p) = t_l(q) + d_l
//     b_l = relu(t_l(p)) - relu(t_l(q))                  d_{l+1} = conv_{l+1}(b_l)
//
// which is (1') of kernels/README.md. It needs t_l(q) of the hidden layers alone (of all with tap "post");
// inside a region of one class that is a row of plan.table, so only the surroundings of label edges are
// computed.
//
// Rings (rings.h; rows of the region, planar, `pitch` floats a channel):
//   e [BLOCK_ROWS + 2 pad_1][C]             b_l [BLOCK_ROWS + 2 pad_{l+1}][K_l]
//   labels [BLOCK_ROWS + 2 reach_L]         tq_l like b_l, values before the ReLU
// The last tq_l is filled only where more than one class is in reach; elsewhere `only` names the table's row.
//
// Phases of a step:
//   1. rows of e and labels
//   2. per layer: rows of tq_l
//   3. per layer: rows of d_l, distance, codes, b_l
//
// No include guard: see simd.h.

struct ForwardScratch {
    Ring e, q, b[MAX_LAYERS], tq[MAX_LAYERS];
    int label_rows = 0;
    std::ptrdiff_t label_pitch = 0;
    LabelRow* labels = nullptr;
    std::int16_t* no_labels = nullptr;    // a row of void
    std::int16_t* only[BLOCK_ROWS] = {};  // of each unit of four rows: the class alone in reach, or -1
    float *zeros = nullptr, *ce = nullptr;
    Upsampler upsampler;
    ConvScratch conv{};
    float* sums[BLOCK_ROWS] = {};                       // the distance of each pixel of four rows
    float *nowhere = nullptr, *code_nowhere = nullptr;  // take rows, codes and differences that nobody wants
    RowRef* rows = nullptr;

    ForwardScratch(const Plan& plan, Arena& arena) {
        const LossParams& p = *plan.params;
        const int first_pad = p.layer[0].ksize / 2;
        e = take_ring(arena, plan, BLOCK_ROWS + 2 * first_pad, p.classes);
        if (p.soft) q = take_ring(arena, plan, BLOCK_ROWS + 2 * first_pad, p.classes);
        int widest = 0;
        ConvNeeds needs;
        for (int l = 0; l < p.layers; ++l) {
            const int rows_kept = BLOCK_ROWS + 2 * next_pad(p, l);
            if (l + 1 < p.layers) b[l] = take_ring(arena, plan, rows_kept, p.layer[l].out);
            if (l < plan.target_layers) tq[l] = take_ring(arena, plan, rows_kept, p.layer[l].out);
            widest = widest > p.layer[l].out ? widest : p.layer[l].out;
            needs.cover(plan.fwd[l]);
            needs.cover(plan.target[l]);
        }
        label_rows = BLOCK_ROWS + 2 * plan.reach[p.layers];
        const std::size_t side = (plan.reach[p.layers] + UNIT - 1) / UNIT * UNIT;
        label_pitch = static_cast<std::ptrdiff_t>(2 * side + static_cast<std::size_t>(plan.units) * UNIT);
        labels = arena.take<LabelRow>(label_rows);
        std::int16_t* label = arena.take<std::int16_t>((label_rows + 1) * label_pitch);
        std::int32_t* start = arena.take<std::int32_t>(label_rows * label_pitch);
        std::uint8_t* bad = arena.take<std::uint8_t>(label_rows * label_pitch);
        float* valid = arena.take<float>(label_rows * label_pitch);
        for (std::int16_t*& row : only) row = arena.take<std::int16_t>(plan.units);
        zeros = take_row(arena, plan);
        ce = take_row(arena, plan);
        for (float*& row : sums) row = take_row(arena, plan);
        nowhere = take_ring(arena, plan, 1, widest).base;
        // As far apart as real codes and differences of a unit are.
        const std::size_t of_codes = static_cast<std::size_t>(3 * widest) * plan.plane_bytes / sizeof(float);
        const std::size_t of_saved = static_cast<std::size_t>(widest) * UNIT;
        code_nowhere = arena.take_raw<float>(of_codes > of_saved ? of_codes : of_saved);
        if (p.logits_h > 0) upsampler = Upsampler(plan, arena);
        conv = needs.take(arena);
        rows = arena.take<RowRef>(BLOCK_ROWS + needs.tallest);
        if (!arena.base) return;
        for (std::ptrdiff_t i = 0; i < (label_rows + 1) * label_pitch; ++i) {
            label[i] = static_cast<std::int16_t>(p.classes);
        }
        for (int i = 0; i < label_rows; ++i) {
            const std::ptrdiff_t at = i * label_pitch + static_cast<std::ptrdiff_t>(side);
            labels[i] = {label + at, start + at, valid + at, bad + at, false, false};
        }
        no_labels = label + label_rows * label_pitch + side;
    }
};

class ForwardTask {
  public:
    ForwardTask(const Plan& plan, std::int64_t task, void* scratch, bool zero, double* sums)
        : plan_(plan),
          p_(*plan.params),
          win_(plan, task),
          cw_(p_, win_.n),
          arena_{static_cast<char*>(scratch), zero, 0},
          s_(plan, arena_),
          sums_(sums) {
        s_.conv.ahead = &ahead_;
        if (p_.logits_h > 0) s_.upsampler.set_window(win_, 0, win_.width);
        for (int l = 0; l < p_.layers; ++l) products_ += products_of(plan.fwd[l], win_.units);
        for (const Ring& ring : {s_.e, s_.q}) forget(ring, win_.width);
        for (int l = 0; l < p_.layers; ++l) {
            for (const Ring& ring : {s_.b[l], s_.tq[l]}) forget(ring, win_.width);
        }
    }

    void run() {
        for (int l = 0; l <= p_.layers; ++l) done_[l] = win_.y0 > plan_.halo[l] ? win_.y0 - plan_.halo[l] : 0;
        const std::int64_t lead = (2 * plan_.halo[0] + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
        for (std::int64_t y = win_.y0 - lead; y < win_.y1; y += BLOCK_ROWS) {
            const std::int64_t last = y + BLOCK_ROWS < win_.y1 ? y + BLOCK_ROWS : win_.y1;
            for (int l = 0; l <= p_.layers; ++l) {
                const std::int64_t end = last + plan_.halo[l] < p_.h ? last + plan_.halo[l] : p_.h;
                while (done_[l] < end) {
                    const int rows =
                        static_cast<int>(end - done_[l] < BLOCK_ROWS ? end - done_[l] : BLOCK_ROWS);
                    if (l == 0) {
                        float* e[BLOCK_ROWS];
                        for (int r = 0; r < rows; ++r) e[r] = s_.e.row(done_[0] + r);
                        read_logits(p_, win_, s_.upsampler, done_[0], rows, 0, win_.width, e, plan_.pitch);
                        for (int r = 0; r < rows; ++r) pixels(done_[0] + r);
                    } else {
                        if (l <= plan_.target_layers) target(l - 1, done_[l], rows);
                        prediction(l - 1, done_[l], rows);
                    }
                    done_[l] += rows;
                }
                if (l == 0) look_ahead();
            }
        }
    }

  private:
    // The rows that the next step begins with.
    void look_ahead() {
        const std::int64_t y = done_[0],
                           end = win_.y1 + plan_.halo[0] < p_.h ? win_.y1 + plan_.halo[0] : p_.h;
        const int rows = static_cast<int>(end - y < BLOCK_ROWS ? end - y : BLOCK_ROWS);
        ahead_.clear();
        if (!p_.logits_h) ahead_.add(p_.logits, win_.n, y, rows, win_.xa, win_.width, channels_of(p_));
        ahead_.add(p_.target, win_.n, y, rows, win_.xa, win_.width, p_.soft ? p_.soft_channels : 1);
        for (int l = 0; l < p_.layers; ++l) {
            const std::int64_t next = done_[l + 1] + BLOCK_ROWS;
            if (next >= win_.y0) ahead_.add_saved(plan_, win_, l, next, win_.y1);
        }
        ahead_.spread(products_);
    }

    double* sums_of(std::int64_t y) const {
        return sums_ + ((win_.n * p_.h + y) * plan_.strips + win_.strip) * (SUM_LAYERS + p_.layers);
    }
    bool owned(std::int64_t y) const { return y >= win_.y0 && y < win_.y1; }
    const LabelRow& labels(std::int64_t y) const { return s_.labels[y % s_.label_rows]; }

    // From logits, already in the ring, to e.
    void pixels(std::int64_t y) {
        LabelRow& row = s_.labels[y % s_.label_rows];
        read_label_row(p_, win_, y, 0, win_.width, row);
        row.start[0] = 0;
        for (int x = 1; x < win_.width; ++x)
            row.start[x] = row.label[x] == row.label[x - 1] ? row.start[x - 1] : x;
        float* e = s_.e.row(y);
        float* q = p_.soft ? s_.q.row(y) : nullptr;
        if (q) read_soft_target(p_, win_, y, 0, win_.width, q, plan_.pitch, row);
        forward_row(p_, cw_, row, win_.units, win_.width, e, plan_.pitch, q, s_.ce);
        if (!owned(y)) return;
        const int begin = win_.own_begin * UNIT, end = begin + win_.own_width;
        const double valid = add_row(row.valid);
        double weight = valid, bad = 0;
        if (p_.class_weight && !p_.soft) {
            weight = 0;
            for (int x = begin; x < end; ++x) weight += row.valid[x] > 0.0f ? cw_.of(row.label[x]) : 0.0f;
        }
        for (int x = begin; row.any_bad && x < end; ++x) bad += row.bad[x];
        double* to = sums_of(y);
        to[SUM_CE] = add_row(s_.ce);
        to[SUM_CE_WEIGHT] = weight;
        to[SUM_VALID] = valid;
        to[SUM_BAD] = bad;
        if (p_.ce_map) {
            float* map = p_.ce_map + (win_.n * p_.h + y) * p_.w + win_.xa;
            for (int x = begin; x < end; ++x) map[x] = s_.ce[x];
        }
    }

    // Beside the image every feature is zero, so a partial last unit is cleaned after it was written as a
    // whole.
    void clean_tail(float* row, int channels) const {
        if (win_.width == win_.units * UNIT) return;
        for (int k = 0; k < channels; ++k) {
            for (int x = win_.width; x < win_.units * UNIT; ++x) row[k * plan_.pitch + x] = 0.0f;
        }
    }

    // The class that fills columns [16 unit - reach, 16 unit + 15 + reach] of a row, or -1.
    int only_class(std::int64_t y, int unit, int reach) const {
        const int from = unit * UNIT - reach, to = unit * UNIT + UNIT - 1 + reach;
        if (from < 0 || to >= win_.width) return -1;
        const LabelRow& row = labels(y);
        return row.start[to] <= from ? row.label[from] : -1;
    }

    // The same of rows [y - reach, y + rows + reach); at the image's border zero padding changes the
    // features.
    int only_class_of_block(std::int64_t y, int rows, int unit, int reach) const {
        if (y < reach || y + rows + reach > p_.h) return -1;
        const int first = only_class(y - reach, unit, reach);
        for (std::int64_t i = y - reach + 1; first >= 0 && i < y + rows + reach; ++i) {
            if (only_class(i, unit, reach) != first) return -1;
        }
        return first;
    }

    void fill(int l, float* to, int unit, int label) const {
        const float* value = plan_.table[l] + static_cast<std::ptrdiff_t>(label) * p_.layer[l].out;
        for (int k = 0; k < p_.layer[l].out; ++k)
            store16(to + k * plan_.pitch + unit * UNIT, splat(value[k]));
    }

    // t_1(q) of 16 pixels: a sum of weight columns picked by the labels around each.
    void gather(std::int64_t y, int unit, float* to) const {
        const Layer& layer = p_.layer[0];
        const int pad = layer.ksize / 2, width = plan_.columns_width;
        const std::ptrdiff_t tap = static_cast<std::ptrdiff_t>(p_.classes + 1) * width;
        for (int first = 0; first < layer.out; first += UNIT) {
            F16 rows[UNIT];
            for (int i = 0; i < UNIT; ++i) {
                const float* column = plan_.columns + first;
                F16 sum = splat(0.0f);
                for (std::int64_t row = y - pad; row <= y + pad; ++row) {
                    const bool inside = row >= 0 && row < p_.h;
                    const std::int16_t* label =
                        (inside ? labels(row).label : s_.no_labels) + unit * UNIT + i - pad;
                    for (int dx = 0; dx < layer.ksize; ++dx, column += tap) {
                        sum = sum + load16(column + static_cast<std::ptrdiff_t>(label[dx]) * width);
                    }
                }
                rows[i] = sum;
            }
            transpose16(rows);
            const int end = layer.out - first < UNIT ? layer.out - first : UNIT;
            for (int k = 0; k < end; ++k) {
                store16(to + (first + k) * plan_.pitch + unit * UNIT, rows[k] + splat(layer.bias[first + k]));
            }
        }
    }

    // Whether no other layer of the target reads t_l(q), so that a class alone in reach needs no copies of
    // its row.
    bool is_end_of_target(int l) const { return l + 1 == plan_.target_layers; }

    void target(int l, std::int64_t y, int rows) {
        if (l == 0 && !p_.soft) {
            for (int r = 0; r < rows; ++r) {
                float* to = s_.tq[0].row(y + r);
                for (int unit = 0; unit < win_.units; ++unit) {
                    const int label = only_class_of_block(y + r, 1, unit, plan_.reach[1]);
                    s_.only[r][unit] = static_cast<std::int16_t>(label);
                    if (label < 0) gather(y + r, unit, to);
                    if (label >= 0 && !is_end_of_target(0)) fill(0, to, unit, label);
                }
            }
        } else {
            const Conv& conv = plan_.target[l];
            const int step = conv.scheme != Scheme::plain ? BLOCK_ROWS : 1;
            for (int r = 0; r < rows; r += step) target_rows(l, y, r, rows - r < step ? rows - r : step);
        }
        for (int r = 0; r < rows; ++r) clean_tail(s_.tq[l].row(y + r), p_.layer[l].out);
    }

    // Rows [y + first, y + first + rows) of the block that begins with row y.
    void target_rows(int l, std::int64_t y, int first, int rows) {
        y += first;
        const Conv& conv = plan_.target[l];
        input_rows(conv, l ? s_.tq[l - 1] : s_.q, y, rows, p_.h, s_.zeros, s_.rows);
        TargetEpilogue epilogue{p_.layer[l].bias, plan_.pitch, {}};
        for (int r = 0; r < BLOCK_ROWS; ++r) epilogue.to[r] = r < rows ? s_.tq[l].row(y + r) : s_.nowhere;
        int begin = 0;  // of the units that are not elided and not yet computed
        for (int unit = 0; unit <= win_.units; ++unit) {
            int label = -1;
            if (unit < win_.units) {
                if (!p_.soft) label = only_class_of_block(y, rows, unit, plan_.reach[l + 1]);
                for (int r = 0; r < rows; ++r) {
                    s_.only[first + r][unit] = static_cast<std::int16_t>(label);
                    if (label >= 0 && !is_end_of_target(l)) fill(l, epilogue.to[r], unit, label);
                }
                if (label < 0) continue;
            }
            if (begin < unit) convolve_relu(l > 0, conv, s_.rows, begin, unit, s_.conv, epilogue);
            begin = unit + 1;
        }
    }

    void prediction(int l, std::int64_t y, int rows) {
        const bool last = l + 1 == p_.layers, post = p_.tap == Tap::post, l1 = p_.distance == Distance::l1;
        const int step = plan_.fwd[l].scheme != Scheme::plain ? BLOCK_ROWS : 1;
        for (int r = 0; r < rows; r += step) {
            const int count = rows - r < step ? rows - r : step;
            if (last) {
                post ? choose<true, true>(l1, l, y, r, count) : choose<true, false>(l1, l, y, r, count);
            } else {
                post ? choose<false, true>(l1, l, y, r, count) : choose<false, false>(l1, l, y, r, count);
            }
        }
    }

    template <bool LAST, bool POST>
    void choose(bool l1, int l, std::int64_t y, int first, int rows) {
        const bool save = p_.codes != nullptr;
        if (l1) {
            save ? prediction_rows<LAST, POST, true, true>(l, y, first, rows)
                 : prediction_rows<LAST, POST, true, false>(l, y, first, rows);
        } else {
            save ? prediction_rows<LAST, POST, false, true>(l, y, first, rows)
                 : prediction_rows<LAST, POST, false, false>(l, y, first, rows);
        }
    }

    template <bool LAST, bool POST, bool L1, bool SAVE>
    void prediction_rows(int l, std::int64_t y, int first, int rows) {
        y += first;
        const Conv& conv = plan_.fwd[l];
        const Layer& layer = p_.layer[l];
        input_rows(conv, l ? s_.b[l - 1] : s_.e, y, rows, p_.h, s_.zeros, s_.rows);
        DistanceEpilogue<LAST, POST, L1, SAVE> epilogue;
        epilogue.distance = p_.distance;
        epilogue.pitch = plan_.pitch;
        epilogue.plane_bytes = plan_.plane_bytes;
        epilogue.channels = layer.out;
        epilogue.table = plan_.table[l];
        epilogue.own_begin = win_.own_begin;
        epilogue.own_end = win_.own_end;
        epilogue.nowhere = s_.code_nowhere;
        const std::int64_t first_unit = win_.xa / UNIT + win_.own_begin;
        for (int r = 0; r < BLOCK_ROWS; ++r) {
            const std::int64_t row = y + r, in_batch = win_.n * p_.h + row;
            const bool wanted = r < rows, own = wanted && owned(row);
            epilogue.valid[r] = wanted ? labels(row).valid : s_.zeros;
            epilogue.tq[r] = (!LAST || POST) ? (wanted ? s_.tq[l].row(row) : s_.tq[l].row(y)) : nullptr;
            epilogue.only[r] = wanted && is_end_of_target(l) ? s_.only[first + r] : nullptr;
            epilogue.b[r] = LAST ? nullptr : wanted ? s_.b[l].row(row) : s_.nowhere;
            epilogue.sum[r] = s_.sums[r];
            epilogue.code[r] = nullptr;
            epilogue.saved[r] = nullptr;
            if (SAVE && own) {
                epilogue.code[r] = p_.codes + in_batch * plan_.plane_bytes * plan_.planes +
                                   plan_.plane[l] * plan_.plane_bytes + first_unit * 2;
                if (!L1) {
                    epilogue.saved[r] = p_.saved_d + in_batch * plan_.saved_pitch * plan_.saved_planes +
                                        plan_.saved_plane[l] * plan_.saved_pitch +
                                        first_unit * layer.out * UNIT;
                }
            }
        }
        convolve<false>(conv, s_.rows, 0, win_.units, s_.conv, epilogue);
        for (int r = 0; r < rows; ++r) {
            if (!LAST) clean_tail(s_.b[l].row(y + r), layer.out);
            if (owned(y + r)) add_up(l, y + r, s_.sums[r]);
        }
    }

    // The sum of a row's owned pixels; whatever lies behind them in the last unit is 0.
    double add_row(const float* row) const {
        F16 total = splat(0.0f);
        for (int unit = win_.own_begin; unit < win_.own_end; ++unit)
            total = total + load16(row + unit * UNIT);
        return sum_lanes(total);
    }

    void add_up(int l, std::int64_t y, const float* sum) {
        F16 total = splat(0.0f);
        for (int unit = win_.own_begin; unit < win_.own_end; ++unit)
            total = total + load16(sum + unit * UNIT);
        sums_of(y)[SUM_LAYERS + l] = static_cast<double>(sum_lanes(total)) * p_.layer[l].inverse;
        if (!p_.semeda_map) return;
        const int begin = win_.own_begin * UNIT, end = begin + win_.own_width;
        float* map = p_.semeda_map + (win_.n * p_.h + y) * p_.w + win_.xa;
        for (int x = begin; x < end; ++x) {
            const float term = sum[x] * p_.layer[l].coefficient;
            map[x] = l == 0 ? term : map[x] + term;
        }
        for (int x = begin; labels(y).any_bad && x < end; ++x) {
            if (labels(y).bad[x]) map[x] = std::numeric_limits<float>::quiet_NaN();
        }
    }

    const Plan& plan_;
    const LossParams& p_;
    const Window win_;
    const ClassWeights cw_;
    Arena arena_;
    ForwardScratch s_;
    Ahead ahead_;
    std::int64_t products_ = 0;
    double* sums_;
    std::int64_t done_[MAX_LAYERS + 1];
};
