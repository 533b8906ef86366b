#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(_MSC_VER)
    #include <malloc.h>
#endif

namespace semeda_fast {

namespace {

constexpr std::size_t LINE = 64;

std::int64_t round_up(std::int64_t x, std::int64_t to) { return (x + to - 1) / to * to; }

// G of F(4,3) with the points 0, 1, -1, 2, -2, infinity (Lavin and Gray, arXiv 1509.09308).
void winograd_weights(const float* column, std::ptrdiff_t stride, double* g) {
    const double a = column[0], b = column[stride], c = column[2 * stride];
    g[0] = a / 4;
    g[1] = -(a + b + c) / 6;
    g[2] = -(a - b + c) / 6;
    g[3] = a / 24 + b / 12 + c / 6;
    g[4] = a / 24 - b / 12 + c / 6;
    g[5] = c;
}

Conv make_conv(int in, int out, int ksize, int max_block) {
    Conv c;
    c.in = in;
    c.out = out;
    c.ksize = ksize;
    c.pad = ksize / 2;
    c.winograd = ksize == 3;
    c.groups = c.winograd ? WINOGRAD_J : 1;
    c.depth = c.winograd ? in : in * ksize;
    c.blocks = (out + max_block - 1) / max_block;
    return c;
}

std::size_t packed_floats(const Conv& c) {
    return static_cast<std::size_t>(c.groups) * c.depth * c.ksize * c.out;
}

// weight is [K_l, K_{l-1}, k, k]; turned: channels exchanged and both axes reversed, for the gradient.
void pack(const Conv& c, const float* weight, bool turned, float* packed) {
    const int k = c.ksize;
    const int layer_in = turned ? c.out : c.in;
    for (int block = 0; block < c.blocks; ++block) {
        const int begin = block_begin(c, block), end = block_begin(c, block + 1);
        for (int o = begin; o < end; ++o) {
            for (int i = 0; i < c.in; ++i) {
                const float* kernel = weight + (turned ? static_cast<std::ptrdiff_t>(i) * layer_in + o
                                                       : static_cast<std::ptrdiff_t>(o) * layer_in + i) *
                                                   k * k;
                for (int kx = 0; kx < k; ++kx) {
                    const int x = turned ? k - 1 - kx : kx;
                    double g[WINOGRAD_J];
                    if (c.winograd) {
                        turned ? winograd_weights(kernel + 2 * k + x, -k, g)
                               : winograd_weights(kernel + x, k, g);
                    }
                    for (int part = 0; part < (c.winograd ? WINOGRAD_J : k); ++part) {
                        const int group = c.winograd ? part : 0;
                        const int depth = c.winograd ? i : part * c.in + i;
                        const float value = c.winograd ? static_cast<float>(g[part])
                                                       : kernel[(turned ? k - 1 - part : part) * k + x];
                        const std::ptrdiff_t group_base =
                            static_cast<std::ptrdiff_t>(group) * c.depth * k * c.out +
                            static_cast<std::ptrdiff_t>(begin) * c.depth * k;
                        packed[group_base + (static_cast<std::ptrdiff_t>(depth) * k + kx) * (end - begin) +
                               o - begin] = value;
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
constexpr std::int64_t RING_BYTES = 2 << 20;
constexpr std::int64_t MIN_STRIP = 128, MAX_STRIP = 2048;
constexpr std::int64_t TASKS_WANTED = 16;
constexpr std::int64_t MIN_CHUNK = 16, MAX_CHUNK = 64;

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

void lay_out_codes(const LossParams& p, Plan& plan) {
    const bool l1 = p.distance == Distance::l1;
    for (int l = 0; l < p.layers; ++l) {
        const bool last = l + 1 == p.layers;
        plan.plane[l] = plan.planes;
        // l1, tap pre: sign (2 bits) and ReLU; tap post: off, or on with a sign, 2 bits; last layer: the
        // sign.
        plan.planes_per_feature[l] = l1 ? (last ? 2 : p.tap == Tap::pre ? 3 : 2) : (last ? 0 : 1);
        plan.planes += plan.planes_per_feature[l] * p.layer[l].out;
        plan.saved_plane[l] = plan.saved_planes;
        plan.saved_planes += l1 ? 0 : p.layer[l].out;
    }
    plan.plane_bytes = (p.w + UNIT - 1) / UNIT * 2;
    plan.saved_pitch = round_up(p.w, UNIT);
}

}  // namespace

PlanMemory::~PlanMemory() {
#if defined(_MSC_VER)
    _aligned_free(data_);
#else
    std::free(data_);
#endif
}

float* PlanMemory::floats(std::size_t count) {
    const std::size_t bytes = (count * sizeof(float) + LINE - 1) / LINE * LINE;
    if (bytes > size_) {
        this->~PlanMemory();
        data_ = nullptr;
        size_ = 0;
#if defined(_MSC_VER)
        data_ = static_cast<float*>(_aligned_malloc(bytes, LINE));
#else
        data_ = static_cast<float*>(std::aligned_alloc(LINE, bytes));
#endif
        if (!data_) throw std::bad_alloc();
        size_ = bytes;
    }
    return data_;
}

Plan make_plan(const LossParams& p, bool backward, int max_block, PlanMemory& memory) {
    Plan plan;
    plan.params = &p;
    for (int l = p.layers; l-- > 0;) plan.halo[l] = plan.halo[l + 1] + p.layer[l].ksize / 2;
    for (int l = 0; l < p.layers; ++l) plan.reach[l + 1] = plan.reach[l] + p.layer[l].ksize / 2;
    plan.strip_halo = static_cast<int>(round_up(plan.halo[0], UNIT));
    cut(p, plan);
    lay_out_codes(p, plan);

    int widest_pad = 0, depth = 0, outs = 0;
    Arena count;
    float* packed[MAX_LAYERS];
    std::size_t offset[MAX_LAYERS];
    for (int l = 0; l < p.layers; ++l) {
        const Layer& layer = p.layer[l];
        Conv& conv = backward ? plan.bwd[l] : plan.fwd[l];
        conv = backward ? make_conv(layer.out, layer.in, layer.ksize, max_block)
                        : make_conv(layer.in, layer.out, layer.ksize, max_block);
        offset[l] = count.used;
        count.take<float>(packed_floats(conv));
        widest_pad = std::max(widest_pad, conv.pad);
        depth = std::max(depth, conv.groups * conv.depth);
        outs = std::max(outs, conv.groups * conv.out);
    }
    plan.target_layers = p.tap == Tap::post ? p.layers : p.layers - 1;
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
    for (int l = 0; l < p.layers; ++l) {
        packed[l] = reinterpret_cast<float*>(base + offset[l]);
        Conv& conv = backward ? plan.bwd[l] : plan.fwd[l];
        pack(conv, p.layer[l].weight, backward, packed[l]);
        conv.packed = packed[l];
    }
    if (tables) {
        float* columns = reinterpret_cast<float*>(base + columns_at);
        fill_columns(p.layer[0], p.classes, plan.columns_width, columns);
        plan.columns = columns;
        for (int l = 0; l < plan.target_layers; ++l) {
            float* table = reinterpret_cast<float*>(base + table_at[l]);
            fill_table(p.layer[l], p.classes, l ? plan.table[l - 1] : nullptr, table);
            plan.table[l] = table;
        }
    }

    plan.margin = static_cast<int>(round_up(widest_pad, UNIT));
    // The right margin is read by the last unaligned vector, too. An odd number of cache lines keeps channels
    // apart.
    plan.pitch =
        plan.margin + static_cast<std::ptrdiff_t>(plan.units) * UNIT + round_up(widest_pad, UNIT) + UNIT;
    if (plan.pitch / UNIT % 2 == 0) plan.pitch += UNIT;
    // Transformed tiles should stay in the second-level cache beside the rings' current rows.
    plan.tile_units = (depth + outs) * 6 * UNIT * 4 > (160 << 10) ? 3 : 6;
    plan.tile_pitch = plan.tile_units * UNIT + round_up(2 * widest_pad, UNIT) + UNIT;
    return plan;
}

const char* why_unsupported(const LossParams& p) {
    if (p.layers < 2 || p.layers > MAX_LAYERS) return "a proxy has 2 to 8 layers here";
    if (p.classes < 1 || p.classes > MAX_CLASSES) return "there are more than 1024 classes";
    for (int l = 0; l < p.layers; ++l) {
        if (p.layer[l].ksize % 2 == 0) return "a kernel has an even size";
    }
    return nullptr;
}

std::int64_t code_bytes_per_row(const LossParams& p) {
    Plan plan;
    lay_out_codes(p, plan);
    return plan.plane_bytes * plan.planes;
}

std::int64_t saved_floats_per_row(const LossParams& p) {
    Plan plan;
    lay_out_codes(p, plan);
    return plan.saved_pitch * plan.saved_planes;
}

}  // namespace semeda_fast
