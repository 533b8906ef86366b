#include "plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "../check.h"
#include "api.h"

namespace semeda_fast::gpu {

namespace {

struct KnownProxy {
    ProxyKind kind;
    int layers;
    int channels[MAX_LAYERS];
    bool tf32;       // fp32 logits, too: activations and weights of the others do not fit at 4 bytes
    int min_blocks;  // as in proxies.h
};

constexpr KnownProxy KNOWN[] = {
    {ProxyKind::standard, 3, {16, 32, 2}, true, 2},
    {ProxyKind::four_layer, 4, {16, 32, 32, 2}, true, 2},
    {ProxyKind::wide, 3, {32, 64, 64}, false, 1},
    {ProxyKind::deep, 7, {16, 32, 32, 32, 32, 32, 16}, false, 1},
};

constexpr int ANY_CLASSES = 1 << 16;  // more are refused with a reason, not as nonsense
constexpr int MAX_ROWS = 1 << 30;     // and columns, which kernels count in int

int forced_rows = 0, forced_width = 0;

// What does not depend on the tile.
struct Shape {
    const KnownProxy* proxy;
    bool half, backward, post;
    int layers, classes;
    std::int64_t n, h, w;

    int per_piece() const { return half ? HALF_CHANNELS : TF32_CHANNELS; }
    int channels(int i) const { return proxy->channels[i]; }
    int min_blocks() const { return half ? proxy->min_blocks : 1; }
    bool chunked() const { return classes > CLASS_CHUNK; }
    int chunks() const { return divide_up(classes, CLASS_CHUNK); }
    int padded_classes() const { return chunked() ? chunks() * CLASS_CHUNK : divide_up(classes, 8) * 8; }
    int pixel_bytes(int c) const { return pieces_of(c, per_piece()) * PIECE; }
    // Packed words of layer i in this direction; of all chunks.
    int words(int i) const {
        const int out = channels(i);
        if (backward) return packed_words(out, i == 0 ? padded_classes() : channels(i - 1), per_piece());
        if (i > 0) return packed_words(channels(i - 1), out, per_piece());
        return chunked() ? chunks() * packed_words(CLASS_CHUNK, out, per_piece())
                         : packed_words(padded_classes(), out, per_piece());
    }
};

int round_up(int bytes) { return divide_up(bytes, PIECE) * PIECE; }

int unit_rows_of(const Shape& s, int out_tiles) {
    return unit_rows(out_tiles, unit_sums(s.min_blocks(), s.half));
}

struct Candidate {
    Tiling tiling;
    SharedPlan shared;
    bool resident;
    int strip_rows, d_p_pitch;
    double seconds;  // of the whole launch, in no particular unit
    int blocks_per_multiprocessor;
};

void place_weights(const Shape& s, Candidate& c, int& at) {
    int most = 0;
    for (int i = 0; i < s.layers; ++i) {
        const bool here = i > 0 || !s.chunked();
        c.shared.weights[i] = here ? at : -1;
        const int bytes = here ? 4 * s.words(i) : 0;
        if (c.resident) at += bytes;
        most = std::max(most, bytes);
    }
    if (!c.resident) at += most;
}

// Two areas take turns: what layer i leaves lies where layer i - 2 had its own.
struct Areas {
    int size[2] = {0, 0};
    void need(int area, int bytes) { size[area] = std::max(size[area], bytes); }
};

void place_forward(const Shape& s, Candidate& c) {
    const Tiling& t = c.tiling;
    SharedPlan& m = c.shared;
    const int map = (t.tile_h + 2 * s.layers) * (t.width + 2);
    int at = 0;
    const auto take = [&](int bytes) {
        const int begin = at;
        at += round_up(bytes);
        return begin;
    };
    m.zero = take(PIECE);
    m.sums = take(4 * (MAX_SUMS + 2) * WARPS);
    m.labels = take(2 * map);
    m.log_sums = m.partial = m.d_p = -1;
    if (s.chunked()) {
        m.log_sums = take(8 * map);
        const int tiles = s.channels(0) / 8, rows = unit_rows_of(s, tiles);
        const int units = divide_up(t.tile_h + 2 * (s.layers - 1), rows) * (t.width / MATRIX_ROWS);
        m.partial = take(units * rows * tiles * 4 * LANES * 4);
    }
    place_weights(s, c, at);
    Areas areas;
    const int in = s.chunked() ? CLASS_CHUNK : s.padded_classes();
    areas.need(0, map * s.pixel_bytes(in));
    for (int pass = 0; pass < 2; ++pass) {
        const int begin[2] = {at, at + areas.size[0]};
        m.input = begin[0];
        for (int i = 0; i < s.layers - 1; ++i) {
            const int rows = t.tile_h + 2 * (s.layers - 1 - i), area = (i + 1) % 2;
            const int bytes = (rows * t.width + 2) * s.pixel_bytes(s.channels(i));
            const bool target = i < s.layers - 2 || s.post;
            areas.need(area, bytes * (target ? 2 : 1));
            m.hidden[i] = begin[area];
            m.target[i] = target ? begin[area] + bytes : -1;
        }
    }
    m.bytes = at + areas.size[0] + areas.size[1];
}

void place_backward(const Shape& s, Candidate& c) {
    const Tiling& t = c.tiling;
    SharedPlan& m = c.shared;
    int at = 0;
    m.zero = at;
    at += PIECE;
    m.sums = m.labels = m.log_sums = m.partial = -1;
    place_weights(s, c, at);
    Areas areas;
    areas.need(0, (t.tile_h + 2 * s.layers) * (t.width + 2) * s.pixel_bytes(s.channels(s.layers - 1)));
    const auto area_of = [&](int i) { return (s.layers - 1 - i) % 2; };
    const auto bytes_of = [&](int i) {
        return ((t.tile_h + 2 * (i + 1)) * t.width + 2) * s.pixel_bytes(s.channels(i));
    };
    for (int i = s.layers - 2; i >= 0; --i) areas.need(area_of(i), bytes_of(i));
    // As many rows at a time as fit where the other layers were, or into a little more.
    c.d_p_pitch = s.classes | 1;
    const int row = 4 * t.width * c.d_p_pitch, other = 1 - area_of(0);
    const int unit = unit_rows_of(s, s.chunked() ? CLASS_CHUNK / 8 : s.padded_classes() / 8);
    int rows = std::clamp(std::max(areas.size[other], 40 << 10) / row, 1, t.tile_h);
    if (rows < t.tile_h && rows > unit) rows -= rows % unit;
    c.strip_rows = rows;
    areas.need(other, rows * row);
    const int begin[2] = {at, at + areas.size[0]};
    m.input = begin[0];
    for (int i = 0; i < s.layers - 1; ++i) {
        m.hidden[i] = begin[area_of(i)];
        m.target[i] = -1;
    }
    m.d_p = begin[other];
    m.bytes = at + areas.size[0] + areas.size[1];
}

// A guess at what a tile costs a multiprocessor. It ranks tiles; no result depends on it.
struct Cycles {
    double busy = 0;  // while other blocks could not compute
    double idle = 0;  // waiting: for memory, for matrices, for the last warps of a phase

    // A phase of so many units of work, each a warp's, `cost` cycles of the whole multiprocessor; `latency`
    // is what a warp waits in each.
    void phase(double units, double cost, double latency) {
        constexpr double SCHEDULERS = 4;
        const double work = units * cost;
        const double longest =
            std::ceil(units / SCHEDULERS) * SCHEDULERS * cost + std::ceil(units / WARPS) * latency;
        busy += work;
        idle += longest - work + 50;  // and the barrier
    }
};

Cycles tile_cycles(const Shape& s, const Candidate& c) {
    // Products at the rate of sm_80; instructions as compiled: 20 a feature, 20 a class; latencies in round
    // numbers.
    const Tiling& t = c.tiling;
    const double product = s.half ? 2 : 6;
    const int across = t.width / MATRIX_ROWS;
    Cycles cycles;
    const auto layer = [&](int in, int out, int rows, int groups) {
        const int tiles = divide_up(out, 8), r = unit_rows_of(s, tiles);
        const int steps = row_products(pieces_of(in, s.per_piece()));
        const double instructions = 20.0 * 4 * r * tiles + 60.0 * r;
        cycles.phase(divide_up(rows, r) * across * groups,
                     3.0 * r * tiles * steps * product + instructions / 4, 40.0 * steps + 200);
    };
    const auto pixels = [&](double count, double instructions) {
        cycles.phase(std::ceil(count / LANES), instructions / 4, 800);
    };
    const double map = static_cast<double>((t.tile_h + 2 * s.layers) * (t.width + 2));
    const int first = s.chunked() ? CLASS_CHUNK : s.padded_classes();
    if (!s.backward) {
        pixels(map, 150 + 20.0 * s.classes);
        for (int i = 0; i < s.chunks(); ++i) {
            if (s.chunked()) pixels(map, 150 + 20.0 * CLASS_CHUNK);
            layer(first, s.channels(0), t.tile_h + 2 * (s.layers - 1), 1);
        }
    } else {
        pixels(map, 60 + 4.0 * s.channels(s.layers - 1));
        for (int strip = 0; strip < t.tile_h; strip += c.strip_rows) {
            const int rows = std::min(c.strip_rows, t.tile_h - strip);
            layer(s.channels(0), first, rows, s.chunks());
            pixels(static_cast<double>(rows) * t.tile_w, 150 + 30.0 * s.classes);
        }
    }
    for (int i = 1; i < s.layers; ++i)
        s.backward ? layer(s.channels(i), s.channels(i - 1), t.tile_h + 2 * i, 1)
                   : layer(s.channels(i - 1), s.channels(i), t.tile_h + 2 * (s.layers - 1 - i), 1);
    // Weights that do not stay come from the cache for each tile, 64 bytes a cycle.
    if (!c.resident)
        for (int i = 0; i < s.layers; ++i) cycles.phase(1, 4.0 * s.words(i) / 64, 600);
    return cycles;
}

Candidate candidate(const Shape& s, const DeviceFacts& device, int tile_h, int width, bool resident) {
    Candidate c{};
    Tiling& t = c.tiling;
    t.tile_h = tile_h;
    t.width = width;
    t.tile_w = width - 2 * (s.layers - 1);
    t.across = static_cast<int>((s.w + t.tile_w - 1) / t.tile_w);
    t.down = static_cast<int>((s.h + t.tile_h - 1) / t.tile_h);
    t.tiles = s.n * t.across * t.down;
    c.resident = resident;
    c.strip_rows = tile_h;
    s.backward ? place_backward(s, c) : place_forward(s, c);
    const int fit = device.shared_per_multiprocessor / (c.shared.bytes + 1024);
    c.blocks_per_multiprocessor = std::clamp(fit, 1, s.min_blocks());
    const std::int64_t at_once =
        static_cast<std::int64_t>(device.multiprocessors) * c.blocks_per_multiprocessor;
    // A second block computes while the first one waits, mostly.
    const Cycles cycles = tile_cycles(s, c);
    const double waited = cycles.idle * (c.blocks_per_multiprocessor > 1 ? 0.4 : 1);
    c.seconds = static_cast<double>((t.tiles + at_once - 1) / at_once) *
                (cycles.busy * c.blocks_per_multiprocessor + waited);
    return c;
}

// The best tile that fits, or one with no rows.
Candidate search_tile(const Shape& s, const DeviceFacts& device) {
    Candidate best{};
    for (const int width : {16, 32, 48, 64, 80}) {
        if (width - 2 * (s.layers - 1) < 8 || (forced_width != 0 && width != forced_width)) continue;
        for (const int tile_h : {2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32}) {
            if (forced_rows != 0 && tile_h != forced_rows) continue;
            for (const bool resident : {true, false}) {
                const Candidate c = candidate(s, device, tile_h, width, resident);
                if (c.shared.bytes > device.shared_per_block) continue;
                if (best.tiling.tile_h == 0 || c.seconds < best.seconds) best = c;
            }
        }
    }
    return best;
}

// A search takes tens of microseconds, so its results are kept, as many as a training with images of many
// sizes uses.
Candidate best_tile(const Shape& s, const DeviceFacts& device) {
    using Key = std::tuple<int, bool, bool, bool, int, std::int64_t, std::int64_t, std::int64_t, int, int,
                           int, int, int>;
    constexpr std::size_t MOST = 1024;
    static std::mutex mutex;
    static std::map<Key, Candidate> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const Key key(static_cast<int>(s.proxy->kind), s.half, s.backward, s.post, s.classes, s.n, s.h, s.w,
                  device.multiprocessors, device.shared_per_block, device.shared_per_multiprocessor,
                  forced_rows, forced_width);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    if (known.size() >= MOST) known.clear();
    return known.emplace(key, search_tile(s, device)).first->second;
}

const KnownProxy* find_proxy(const LossParams& params) {
    for (const KnownProxy& known : KNOWN) {
        bool same = known.layers == params.layers;
        for (int i = 0; same && i < params.layers; ++i)
            same = known.channels[i] == params.layer[i].out && params.layer[i].ksize == 3;
        if (same) return &known;
    }
    return nullptr;
}

Shape make_shape(const LossParams& params, const KnownProxy* known, bool backward) {
    return {known,         params.logits.dtype != DType::f32,
            backward,      params.tap == Tap::post,
            params.layers, params.classes,
            params.n,      params.h,
            params.w};
}

}  // namespace

std::int64_t code_bytes(const LossParams& params) {
    check_sizes(params, ANY_CLASSES);
    std::int64_t bytes = 0;
    for (int i = 0; i < params.layers; ++i)
        bytes += code_bytes_per_pixel(params.layer[i].out, i == params.layers - 1);
    return params.n * params.h * params.w * bytes;
}

void force_tile(int tile_h, int width) {
    forced_rows = tile_h;
    forced_width = width;
}

std::map<std::string, std::int64_t> plan_facts(const Launch& launch) {
    const Problem& p = launch.problem;
    return {{"rows", p.tiling.tile_h},    {"columns", p.tiling.tile_w}, {"width", p.tiling.width},
            {"tiles", p.tiling.tiles},    {"shared", p.shared.bytes},   {"resident", p.resident ? 1 : 0},
            {"strip_rows", p.strip_rows}, {"blocks", launch.blocks},    {"workspace", launch.workspace}};
}

namespace {

// What no device can do, or "".
std::string refusal(const LossParams& params) {
    if (params.distance != Distance::l1) return "the CUDA kernels know the distance \"l1\" alone";
    if (params.soft) return "the CUDA kernels take labels, not a distribution, as target";
    if (params.ce_map.is_given() || params.semeda_map.is_given() || params.d_semeda_is_map)
        return "the CUDA kernels know the reductions \"mean\" and \"sum\" alone";
    if (params.classes > MAX_CLASSES)
        return "the CUDA kernels take up to " + std::to_string(MAX_CLASSES) + " classes, the proxy has " +
               std::to_string(params.classes);
    const KnownProxy* known = find_proxy(params);
    if (known == nullptr)
        return "the CUDA kernels are compiled for 3x3 proxies of widths 16-32-2, 16-32-32-2, 32-64-64 and "
               "16-32-32-32-32-32-16; this one is another";
    if (params.logits.dtype == DType::f32 && !known->tf32)
        return "the CUDA kernels run this proxy on float16 and bfloat16 logits alone: in float32 it does not "
               "fit on chip";
    if (params.logits_h != 0) return "the CUDA kernels take logits of the labels' size";
    if (params.h > MAX_ROWS || params.w > MAX_ROWS)
        return "the CUDA kernels take images of up to " + std::to_string(MAX_ROWS) + " rows and columns";
    return "";
}

}  // namespace

std::string why_not(const LossParams& params, const DeviceFacts& device) {
    check_sizes(params, ANY_CLASSES);
    const std::string reason = refusal(params);
    if (!reason.empty()) return reason;
    const KnownProxy* known = find_proxy(params);
    for (const bool backward : {false, true}) {
        Shape shape = make_shape(params, known, backward);
        shape.n = shape.h = shape.w = 1;
        if (best_tile(shape, device).tiling.tile_h == 0)
            return "the CUDA kernels need more shared memory for this proxy than a block has here (" +
                   std::to_string(device.shared_per_block) + " bytes)";
    }
    return "";
}

namespace {

// Addresses inside `workspace` are set even where it is null; then only sizes mean something.
Launch lay_out(const LossParams& params, const DeviceFacts& device, bool backward, void* workspace) {
    check_sizes(params, ANY_CLASSES);
    const std::string reason = refusal(params);
    if (!reason.empty()) throw std::runtime_error(reason);
    const KnownProxy* known = find_proxy(params);
    const Shape s = make_shape(params, known, backward);
    const Candidate tile = best_tile(s, device);
    if (tile.tiling.tile_h == 0) throw std::runtime_error(why_not(params, device));
    check_range("the number of tiles of an image",
                static_cast<std::int64_t>(tile.tiling.across) * tile.tiling.down, 0,
                std::numeric_limits<int>::max());

    Launch launch{};
    launch.proxy = known->kind;
    launch.half = s.half;
    Problem& p = launch.problem;
    p.n = s.n;
    p.h = static_cast<int>(s.h);
    p.w = static_cast<int>(s.w);
    p.pixels = s.n * s.h * s.w;
    p.classes = s.classes;
    p.binary = params.binary;
    p.post = s.post;
    p.resident = tile.resident;
    p.logits = params.logits;
    p.target = params.target;
    p.valid = params.valid;
    p.d_logits = params.d_logits;
    p.class_weight = params.class_weight;
    p.ignore_index = params.ignore_index;
    p.smoothing = params.label_smoothing;
    p.layers = s.layers;
    p.codes = params.codes;
    p.terms = params.terms;
    p.counts = params.counts;
    p.d_ce = params.d_ce;
    p.d_semeda = params.d_semeda;
    p.tiling = tile.tiling;
    p.shared = tile.shared;
    p.strip_rows = tile.strip_rows;
    p.d_p_pitch = tile.d_p_pitch;

    std::int64_t used = 0;
    const auto take = [&](std::int64_t bytes) {
        char* at = static_cast<char*>(workspace) + used;
        used += (bytes + 255) / 256 * 256;
        return at;
    };
    for (int i = 0; i < s.layers; ++i) p.unit = std::max(p.unit, params.layer[i].coefficient);
    if (!(p.unit > 0)) p.unit = 1;
    Preparation& all = launch.preparation;
    std::int64_t codes = 0;
    int words = 0;
    for (int i = 0; i < s.layers; ++i) {
        const semeda_fast::Layer& from = params.layer[i];
        LayerPlan& to = p.layer[i];
        to.in = from.in;
        to.out = from.out;
        to.weight = from.weight;
        to.bias = from.bias;
        to.inverse = from.inverse;
        to.seed = from.coefficient / p.unit;
        to.codes = codes;
        p.coefficient[i] = from.coefficient;
        codes += p.pixels * code_bytes_per_pixel(to.out, i == s.layers - 1);
        to.packed_words = s.words(i);
        to.packed = reinterpret_cast<std::uint32_t*>(take(4 * static_cast<std::int64_t>(to.packed_words)));
        words += to.packed_words;
        const bool table = !backward && (i < s.layers - 1 || s.post);
        if (table)
            to.table = reinterpret_cast<float*>(take(4 * static_cast<std::int64_t>(s.classes + 2) * to.out));
        const int parts = i == 0 && !backward ? s.chunks() : 1;
        const int in = backward ? to.out : i > 0 ? to.in : s.chunked() ? CLASS_CHUNK : s.padded_classes();
        const int out = !backward ? to.out : i > 0 ? to.in : s.padded_classes();
        for (int part = 0; part < parts; ++part) {
            Packing& k = all.packing[all.packings++];
            k.weight = to.weight;
            k.in = to.in;
            k.out = to.out;
            k.first = part * CLASS_CHUNK;
            k.pieces = pieces_of(in, s.per_piece());
            k.tiles = divide_up(out, 8);
            k.backward = backward;
            k.words = to.packed_words / parts;
            k.packed = to.packed + part * k.words;
        }
    }
    if (!backward) {
        p.columns =
            reinterpret_cast<float*>(take(4 * 9 * static_cast<std::int64_t>(s.classes + 1) * p.layer[0].out));
        p.partial = reinterpret_cast<float*>(take(4 * (4 + s.layers) * p.tiling.tiles));
    }
    all.pack_blocks = std::clamp(words / (4 * THREADS), 1, 4 * device.multiprocessors);
    launch.prepare_blocks = all.pack_blocks + (backward ? 0 : s.classes + 1);
    const std::int64_t most =
        static_cast<std::int64_t>(device.multiprocessors) * tile.blocks_per_multiprocessor;
    launch.blocks = static_cast<int>(std::min(p.tiling.tiles, most));
    const double shared = static_cast<double>(p.shared.bytes + 1024) * tile.blocks_per_multiprocessor;
    launch.carveout =
        std::min(100, static_cast<int>(std::ceil(100 * shared / device.shared_per_multiprocessor)));
    launch.workspace = used;
    return launch;
}

}  // namespace

Launch plan_launch(const LossParams& params, const DeviceFacts& device, bool backward) {
    return lay_out(params, device, backward, nullptr);
}

Launch make_launch(const LossParams& params, const DeviceFacts& device, bool backward,
                   const Buffer<char>& workspace) {
    const Launch launch = lay_out(params, device, backward, workspace.data);
    check_memory(params, backward ? Direction::backward : Direction::forward, code_bytes(params), 0);
    need("workspace", workspace, launch.workspace);
    check_address("workspace", workspace.data, PIECE);
    for (const View* view : {&params.logits, &params.target, &params.valid, &params.d_logits})
        if (view->fold != 0) refuse("the CUDA kernels take no images in groups");
    if (params.codes.is_given()) check_address("codes", params.codes.data, 2);  // read two bytes at a time
    if (backward)
        for (const std::int64_t stride : params.d_ce.stride)
            if (stride != 0) refuse("d_ce must be one number");
    return launch;
}

}  // namespace semeda_fast::gpu
