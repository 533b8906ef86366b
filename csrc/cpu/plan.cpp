#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#if defined(_MSC_VER)
    #include <malloc.h>
#endif

namespace semeda_fast {

namespace {

constexpr std::size_t LINE = 64;

std::int64_t round_up(std::int64_t x, std::int64_t to) { return (x + to - 1) / to * to; }

// G of F(4,3), points 0, +-A, +-B, infinity, and of F(2,3), points 0, 1, -1, infinity (Lavin and Gray, arXiv
// 1509.09308).
void weights_4_3(double w0, double w1, double w2, double* g) {
    const double a = WINOGRAD_A, b = WINOGRAD_B, p = a * a, q = b * b;
    g[0] = w0 / (p * q);
    g[1] = (w0 + a * w1 + p * w2) / (2 * p * (p - q));
    g[2] = (w0 - a * w1 + p * w2) / (2 * p * (p - q));
    g[3] = (w0 + b * w1 + q * w2) / (2 * q * (q - p));
    g[4] = (w0 - b * w1 + q * w2) / (2 * q * (q - p));
    g[5] = w2;
}

void weights_2_3(double a, double b, double c, double* g) {
    g[0] = a;
    g[1] = (a + b + c) / 2;
    g[2] = (a - b + c) / 2;
    g[3] = c;
}

Conv make_conv(int in, int out, int ksize, const Kernels& kernels, bool columns_too) {
    Conv c;
    c.in = in;
    c.out = out;
    c.ksize = ksize;
    c.pad = ksize / 2;
    c.scheme = ksize != 3 ? Scheme::plain : columns_too ? Scheme::winograd_2d : Scheme::winograd_1d;
    c.groups = c.scheme == Scheme::plain ? 1 : WINOGRAD_J;
    c.columns = c.scheme == Scheme::winograd_2d ? PAIR_COLUMNS : ksize;
    c.depth = c.scheme == Scheme::plain ? in * ksize : in;
    const int max_block = c.scheme == Scheme::winograd_2d ? kernels.max_block_2d : kernels.max_block;
    c.blocks = (out + max_block - 1) / max_block;
    // A transformed tile should stay in the second-level cache.
    c.tile_units = c.scheme == Scheme::winograd_2d || c.groups * c.depth <= 6 * 64 ? TILE_2D_UNITS : 3;
    return c;
}

std::size_t packed_floats(const Conv& c) {
    return static_cast<std::size_t>(c.groups) * c.depth * c.columns * c.out;
}

// One kernel [k, k] in the order [group][row where plain][kernel column]; `turned` reverses both axes.
void transform_kernel(const Conv& c, const float* kernel, bool turned, std::vector<double>& out) {
    const int k = c.ksize;
    const auto at = [&](int y, int x) -> double {
        return turned ? kernel[(k - 1 - y) * k + k - 1 - x] : kernel[y * k + x];
    };
    if (c.scheme == Scheme::plain) {
        for (int y = 0; y < k; ++y) {
            for (int x = 0; x < k; ++x) out[static_cast<std::size_t>(y * k + x)] = at(y, x);
        }
        return;
    }
    double g[3][WINOGRAD_J];
    for (int x = 0; x < 3; ++x) weights_4_3(at(0, x), at(1, x), at(2, x), g[x]);
    for (int j = 0; j < WINOGRAD_J; ++j) {
        if (c.scheme == Scheme::winograd_2d) {
            weights_2_3(g[0][j], g[1][j], g[2][j], &out[static_cast<std::size_t>(PAIR_COLUMNS * j)]);
        } else {
            for (int x = 0; x < 3; ++x) out[static_cast<std::size_t>(3 * j + x)] = g[x][j];
        }
    }
}

// weight is [K_l, K_{l-1}, k, k]; turned: channels exchanged and the kernel turned by 180 degrees, for the
// gradient.
void pack(const Conv& c, const float* weight, bool turned, float* packed) {
    const int columns = c.columns, taps = c.ksize * c.ksize;
    const bool plain = c.scheme == Scheme::plain;
    std::vector<double> kernel(static_cast<std::size_t>(std::max(taps, c.groups * columns)));
    for (int block = 0; block < c.blocks; ++block) {
        const int begin = block_begin(c, block), channels = block_begin(c, block + 1) - begin;
        float* to_block = packed + static_cast<std::ptrdiff_t>(begin) * c.groups * c.depth * columns;
        for (int b = 0; b < channels; ++b) {
            for (int i = 0; i < c.in; ++i) {
                const std::ptrdiff_t number = turned ? static_cast<std::ptrdiff_t>(i) * c.out + begin + b
                                                     : static_cast<std::ptrdiff_t>(begin + b) * c.in + i;
                transform_kernel(c, weight + number * taps, turned, kernel);
                // A row of the kernel is a group where it was transformed, and a part of the depth where it
                // is plain.
                for (int part = 0; part < (plain ? c.ksize : c.groups); ++part) {
                    const int depth = plain ? part * c.in + i : i, group = plain ? 0 : part;
                    float* to =
                        to_block +
                        ((static_cast<std::ptrdiff_t>(group) * c.depth + depth) * columns) * channels + b;
                    for (int x = 0; x < columns; ++x) {
                        to[x * channels] =
                            static_cast<float>(kernel[static_cast<std::size_t>(part * columns + x)]);
                    }
                }
            }
        }
    }
}

// Columns of layer 1, [taps, C + 1, width]: the target branch is a sum of these, picked by labels.
void fill_columns(const Layer& layer, int classes, int width, float* columns) {
    const int taps = layer.ksize * layer.ksize;
    std::memset(columns, 0, sizeof(float) * taps * (classes + 1) * width);
    for (int tap = 0; tap < taps; ++tap) {
        for (int c = 0; c < classes; ++c) {
            float* column = columns + (static_cast<std::ptrdiff_t>(tap) * (classes + 1) + c) * width;
            for (int k = 0; k < layer.out; ++k) {
                column[k] = layer.weight[(static_cast<std::ptrdiff_t>(k) * layer.in + c) * taps + tap];
            }
        }
    }
}

// t_l where the whole receptive field holds one class; class C stands for void, the zero vector.
void fill_table(const Layer& layer, int classes, const float* before, float* table) {
    const int taps = layer.ksize * layer.ksize;
    for (int k = 0; k < layer.out; ++k) {
        for (int c = 0; c <= classes; ++c)
            table[static_cast<std::ptrdiff_t>(c) * layer.out + k] = layer.bias[k];
        for (int i = 0; i < layer.in; ++i) {
            const float* kernel = layer.weight + (static_cast<std::ptrdiff_t>(k) * layer.in + i) * taps;
            float sum = 0;
            for (int tap = 0; tap < taps; ++tap) sum += kernel[tap];
            if (!before) {
                table[static_cast<std::ptrdiff_t>(i) * layer.out + k] += sum;
                continue;
            }
            for (int c = 0; c <= classes; ++c) {
                const float a = before[static_cast<std::ptrdiff_t>(c) * layer.in + i];
                if (a > 0) table[static_cast<std::ptrdiff_t>(c) * layer.out + k] += sum * a;
            }
        }
    }
}

// Columns of a task are chosen so that its rings fit a cache of this size; measured in
// docs/performance-log.md.
constexpr std::int64_t RING_BYTES = 8 << 20;
// Winograd along the columns, too, pays where both sides of a layer have this many channels.
constexpr int WINOGRAD_2D_FROM = 8;
constexpr std::int64_t MIN_STRIP = 128, MAX_STRIP = 2048;
constexpr std::int64_t TASKS_WANTED = 16;
constexpr std::int64_t MIN_CHUNK = 32, MAX_CHUNK = 64;

void cut(const LossParams& p, Plan& plan) {
    std::int64_t floats = static_cast<std::int64_t>(p.classes) * (BLOCK_ROWS + 2 * (p.layer[0].ksize / 2));
    for (int l = 1; l <= p.layers; ++l) {
        const int pad = l < p.layers ? p.layer[l].ksize / 2 : 0;
        floats += 2 * static_cast<std::int64_t>(p.layer[l - 1].out) * (BLOCK_ROWS + 2 * pad);
    }
    std::int64_t limit = RING_BYTES / (floats * static_cast<std::int64_t>(sizeof(float)));
    limit = std::min(std::max(limit / UNIT * UNIT, MIN_STRIP), MAX_STRIP);
    plan.strips = std::max<std::int64_t>(1, (p.w + limit - 1) / limit);
    plan.strip_width = round_up((p.w + plan.strips - 1) / plan.strips, UNIT);
    plan.strips = std::max<std::int64_t>(1, (p.w + plan.strip_width - 1) / plan.strip_width);

    const std::int64_t rows = p.n * p.h * plan.strips / TASKS_WANTED;
    plan.chunk_rows = std::min(std::max(round_up(rows, BLOCK_ROWS), MIN_CHUNK), MAX_CHUNK);
    plan.chunks = (p.h + plan.chunk_rows - 1) / plan.chunk_rows;
    plan.tasks = p.n * plan.strips * plan.chunks;

    const std::int64_t halo = plan.strips > 1 ? plan.strip_halo : 0;
    plan.units = static_cast<int>((plan.strip_width + 2 * halo) / UNIT);
}

// Planes of codes of one feature. l1, tap pre: sign (2 bits) and ReLU; tap post: off, or on with a sign, 2
// bits; last layer: the sign.
int planes_of_feature(const LossParams& p, int layer) {
    const bool last = layer + 1 == p.layers;
    if (p.distance != Distance::l1) return last ? 0 : 1;
    return last ? 2 : p.tap == Tap::pre ? 3 : 2;
}

std::int64_t plane_bytes_of(const LossParams& p) { return (p.w + UNIT - 1) / UNIT * 2; }

std::int64_t saved_pitch_of(const LossParams& p) { return round_up(p.w, UNIT); }

void lay_out_codes(const LossParams& p, Plan& plan) {
    for (int l = 0; l < p.layers; ++l) {
        plan.plane[l] = plan.planes;
        plan.planes_per_feature[l] = planes_of_feature(p, l);
        plan.planes += plan.planes_per_feature[l] * p.layer[l].out;
        plan.saved_plane[l] = plan.saved_planes;
        plan.saved_planes += p.distance == Distance::l1 ? 0 : p.layer[l].out;
    }
    plan.plane_bytes = plane_bytes_of(p);
    plan.saved_pitch = saved_pitch_of(p);
}

}  // namespace

namespace {

// Not std::aligned_alloc, which neither Windows nor macOS before 10.15 has.
void* allocate_aligned(std::size_t bytes) {
#if defined(_WIN32)
    return _aligned_malloc(bytes, LINE);
#else
    void* data = nullptr;
    return posix_memalign(&data, LINE, bytes) == 0 ? data : nullptr;
#endif
}

void free_aligned(void* data) {
#if defined(_WIN32)
    _aligned_free(data);
#else
    std::free(data);
#endif
}

}  // namespace

PlanMemory::~PlanMemory() { free_aligned(data_); }

float* PlanMemory::floats(std::size_t count) {
    const std::size_t bytes = (count * sizeof(float) + LINE - 1) / LINE * LINE;
    if (bytes > size_) {
        free_aligned(data_);
        data_ = nullptr;
        size_ = 0;
        key_.clear();
        data_ = static_cast<float*>(allocate_aligned(bytes));
        if (!data_) throw std::bad_alloc();
        size_ = bytes;
    }
    return data_;
}

namespace {

// All that packed weights and tables depend on: every weight, not its address, which may be another proxy's
// by now. each(data, bytes) takes it piece by piece.
template <class Each>
void each_piece_of_key(const LossParams& p, const Kernels& kernels, const Each& each) {
    const int head[] = {kernels.max_block, kernels.max_block_2d,    p.layers,
                        p.classes,         static_cast<int>(p.tap), static_cast<int>(p.soft)};
    each(head, sizeof(head));
    for (int l = 0; l < p.layers; ++l) {
        const Layer& layer = p.layer[l];
        const int shape[] = {layer.in, layer.out, layer.ksize};
        each(shape, sizeof(shape));
        each(layer.weight, sizeof(float) * static_cast<std::size_t>(weights_of(layer)));
        each(layer.bias, sizeof(float) * static_cast<std::size_t>(layer.out));
    }
}

// Compared where it lies: a copy in each call would cost more than the comparison.
bool is_known(const LossParams& p, const Kernels& kernels, const std::vector<char>& key) {
    std::size_t at = 0;
    bool same = true;
    each_piece_of_key(p, kernels, [&](const void* data, std::size_t bytes) {
        same = same && at + bytes <= key.size() && !std::memcmp(key.data() + at, data, bytes);
        at += bytes;
    });
    return same && at == key.size();
}

std::vector<char> key_of(const LossParams& p, const Kernels& kernels) {
    std::vector<char> key;
    each_piece_of_key(p, kernels, [&](const void* data, std::size_t bytes) {
        const char* from = static_cast<const char*>(data);
        key.insert(key.end(), from, from + bytes);
    });
    return key;
}

}  // namespace

Plan make_plan(const LossParams& p, bool backward, const Kernels& kernels, PlanMemory& memory) {
    Plan plan;
    plan.params = &p;
    for (int l = p.layers; l-- > 0;) plan.halo[l] = plan.halo[l + 1] + p.layer[l].ksize / 2;
    for (int l = 0; l < p.layers; ++l) plan.reach[l + 1] = plan.reach[l] + p.layer[l].ksize / 2;
    plan.strip_halo = static_cast<int>(round_up(plan.halo[0], UNIT));
    cut(p, plan);
    lay_out_codes(p, plan);
    if (p.logits_h > 0) {  // two neighbours at most more than so many outputs lie apart
        const std::int64_t rows = plan.chunk_rows * p.logits_h / p.h + 3;
        plan.partial_pitch = round_up(plan.strip_width * p.logits_w / p.w + 3, UNIT);
        plan.partial_floats = rows * (p.binary ? 1 : p.classes) * plan.partial_pitch;
    }

    plan.target_layers = p.tap == Tap::post ? p.layers : p.layers - 1;
    int widest_pad = 0;
    std::size_t floats = 0;
    for (int l = 0; l < p.layers; ++l) {
        const Layer& layer = p.layer[l];
        widest_pad = std::max(widest_pad, layer.ksize / 2);
        const bool columns_too = std::min(layer.in, layer.out) >= WINOGRAD_2D_FROM;
        if (backward) {
            plan.bwd[l] = make_conv(layer.out, layer.in, layer.ksize, kernels, columns_too);
            floats += packed_floats(plan.bwd[l]);
        } else {
            plan.fwd[l] = make_conv(layer.in, layer.out, layer.ksize, kernels, columns_too);
            // Computed in runs of single units, where pairs of columns would waste half a vector.
            plan.target[l] = make_conv(layer.in, layer.out, layer.ksize, kernels, false);
            floats += packed_floats(plan.fwd[l]) + packed_floats(plan.target[l]);
        }
    }
    Arena count;
    count.take<float>(floats);
    const bool tables = !backward && !p.soft;
    const std::size_t columns_at = count.used;
    std::size_t table_at[MAX_LAYERS] = {};
    plan.columns_width = static_cast<int>(round_up(p.layer[0].out, UNIT));
    if (tables) {
        const std::size_t taps = static_cast<std::size_t>(p.layer[0].ksize) * p.layer[0].ksize;
        count.take<float>(taps * (p.classes + 1) * plan.columns_width);
        for (int l = 0; l < plan.target_layers; ++l) {
            table_at[l] = count.used;
            count.take<float>(static_cast<std::size_t>(p.classes + 1) * p.layer[l].out);
        }
    }
    char* base = reinterpret_cast<char*>(memory.floats(count.used / sizeof(float) + LINE));
    float* packed = reinterpret_cast<float*>(base);
    const bool known = is_known(p, kernels, memory.key());
    if (!known) memory.remember({});
    const auto pack_next = [&](Conv& conv, int l) {
        if (!known) pack(conv, p.layer[l].weight, backward, packed);
        conv.packed = packed;
        packed += packed_floats(conv);
    };
    for (int l = 0; l < p.layers; ++l) {
        if (backward) {
            pack_next(plan.bwd[l], l);
            continue;
        }
        pack_next(plan.fwd[l], l);
        if (plan.fwd[l].scheme == plan.target[l].scheme) {
            plan.target[l].packed = plan.fwd[l].packed;
        } else {
            pack_next(plan.target[l], l);
        }
    }
    if (tables) {
        float* columns = reinterpret_cast<float*>(base + columns_at);
        if (!known) fill_columns(p.layer[0], p.classes, plan.columns_width, columns);
        plan.columns = columns;
        for (int l = 0; l < plan.target_layers; ++l) {
            float* table = reinterpret_cast<float*>(base + table_at[l]);
            if (!known) fill_table(p.layer[l], p.classes, l ? plan.table[l - 1] : nullptr, table);
            plan.table[l] = table;
        }
    }

    if (!known) memory.remember(key_of(p, kernels));

    plan.margin = static_cast<int>(round_up(widest_pad, UNIT));
    // The right margin is read by the last unaligned vector, too. An odd number of cache lines keeps channels
    // apart.
    plan.pitch =
        plan.margin + static_cast<std::ptrdiff_t>(plan.units) * UNIT + round_up(widest_pad, UNIT) + UNIT;
    if (plan.pitch / UNIT % 2 == 0) plan.pitch += UNIT;
    return plan;
}

std::int64_t code_bytes_per_row(const LossParams& p) {
    std::int64_t planes = 0;
    for (int l = 0; l < p.layers; ++l) planes += planes_of_feature(p, l) * p.layer[l].out;
    return plane_bytes_of(p) * planes;
}

std::int64_t saved_floats_per_row(const LossParams& p) {
    if (p.distance == Distance::l1) return 0;
    std::int64_t features = 0;
    for (int l = 0; l < p.layers; ++l) features += p.layer[l].out;
    return saved_pitch_of(p) * features;
}

}  // namespace semeda_fast
