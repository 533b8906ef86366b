// Runs the CPU kernels over odd shapes for the address and undefined-behaviour sanitizers; `make sanitize`
// builds and starts it. Every tensor is a heap block of its exact size, filled with 0xFF (NaN as a float)
// before.
//
// It also judges the results, so that it can fail without a sanitizer: each case runs with 1 and 3 threads,
// on memory poisoned in two ways, and must give the same bits; what comes out is finite; and every
// instruction set agrees with the first one to TOLERANCE. Gradients are compared on the first one's codes,
// since the sign of a difference at rounding level may differ, and the codes themselves by the share of bits.
//
// Prints one line a finding and a summary; the exit status is 1 after a finding. An argument names the cases
// to run, by a part of their description.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../cpu/api.h"
#include "../cpu/plan.h"
#include "tensors.h"

namespace {

using namespace semeda_fast;

struct Shape {
    int n, classes, h, w;
};
struct LayerShape {
    int out, ksize;
};
struct Case {
    Shape shape = {2, 5, 13, 17};
    std::vector<LayerShape> proxy = {{16, 3}, {32, 3}, {2, 3}};
    Tap tap = Tap::pre;
    Distance distance = Distance::l1;
    DType dtype = DType::f32;
    Layout layout = Layout::nchw;
    DType labels = DType::i64;
    bool valid = false, soft = false, binary = false, weights = false, maps = false, bad_labels = false;
    int soft_channels = 0;
    float smoothing = 0;
    int logits_h = 0, logits_w = 0;  // of logits that are scaled up; else 0
    int rows() const { return logits_h ? logits_h : shape.h; }
    int columns() const { return logits_w ? logits_w : shape.w; }
};

std::string describe(const Case& c) {
    static const char* const taps[] = {"pre", "post"};
    static const char* const distances[] = {"l1", "l2", "smooth_l1"};
    static const char* const dtypes[] = {"f32", "bf16", "f16", "u8", "i8", "i16", "i32", "i64", "u16"};
    static const char* const layouts[] = {"nchw", "channels_last", "transposed", "spaced", "expanded"};
    char text[256];
    std::snprintf(text, sizeof text, "[%d,%d,%d,%d] %s %s %s %s", c.shape.n, c.shape.classes, c.shape.h,
                  c.shape.w, taps[static_cast<int>(c.tap)], distances[static_cast<int>(c.distance)],
                  dtypes[static_cast<int>(c.dtype)], layouts[static_cast<int>(c.layout)]);
    std::string all = text;
    for (const LayerShape& layer : c.proxy) {
        all += " " + std::to_string(layer.out) + "k" + std::to_string(layer.ksize);
    }
    all += c.soft ? " soft" : std::string(" ") + dtypes[static_cast<int>(c.labels)];
    for (const auto& [on, name] : {std::pair<bool, const char*>{c.valid, " valid"},
                                   {c.binary, " binary"},
                                   {c.weights, " weights"},
                                   {c.maps, " maps"},
                                   {c.bad_labels, " bad_labels"},
                                   {c.smoothing > 0, " smoothing"}}) {
        if (on) all += name;
    }
    if (c.logits_h) all += " from " + std::to_string(c.logits_h) + "x" + std::to_string(c.logits_w);
    return all;
}

// The inputs of one case, and the parameters that point to them.
struct Problem {
    const Case& c;
    Tensor logits, target, valid;
    std::vector<Block> parameters;
    Block class_weight;
    LossParams p;

    static std::int64_t ignore_index(DType labels) {
        return labels == DType::u8 ? 255 : labels == DType::i8 ? -1 : labels == DType::u16 ? 65535 : -100;
    }

    explicit Problem(const Case& the_case)
        : c(the_case),
          logits(c.shape.n, c.binary ? 1 : c.shape.classes, c.rows(), c.columns(), c.dtype, c.layout),
          target(c.shape.n, c.soft ? c.soft_channels : 1, c.shape.h, c.shape.w, c.soft ? c.dtype : c.labels,
                 c.soft ? c.layout : Layout::nchw),
          valid(c.shape.n, 1, c.shape.h, c.shape.w, DType::u8, Layout::spaced),
          class_weight(c.weights ? sizeof(float) * static_cast<std::size_t>(c.shape.classes) : 0) {
        Random random(7);
        const std::int64_t h = c.shape.h, w = c.shape.w;
        std::vector<int> label(static_cast<std::size_t>(c.shape.n * h * w));  // C: void, C + 1: bad
        const int blocks = 1 + random.below(9);
        std::vector<int> of_block(64);
        for (int& b : of_block) b = random.below(c.shape.classes);
        for (std::size_t i = 0; i < label.size(); ++i) {
            const std::size_t y = i / static_cast<std::size_t>(w), x = i % static_cast<std::size_t>(w);
            label[i] = of_block[(y / 7 * 3 + x * static_cast<std::size_t>(blocks) / 40) % 64];
            if (random.below(20) == 0) label[i] = c.shape.classes;
            if (c.bad_labels && random.below(5) == 0) label[i] = c.shape.classes + 1;
        }
        const auto label_at = [&](std::int64_t n, std::int64_t y, std::int64_t x) {
            return label[static_cast<std::size_t>((n * h + y) * w + x)];
        };
        const std::int64_t ignored = ignore_index(c.labels);
        const double bad = c.labels == DType::i8    ? 127
                           : c.labels == DType::u8  ? 254
                           : c.labels == DType::u16 ? 40000
                                                    : -32000;
        target.fill([&](std::int64_t n, std::int64_t, std::int64_t y, std::int64_t x) {
            if (c.soft) return random.below(9) / 8.0;
            const int known = label_at(n, y, x);
            return known > c.shape.classes   ? bad
                   : known < c.shape.classes ? static_cast<double>(known)
                                             : static_cast<double>(ignored);
        });
        valid.fill([&](std::int64_t n, std::int64_t, std::int64_t y, std::int64_t x) {
            return label_at(n, y, x) == c.shape.classes ? 0.0 : 1.0;
        });
        // Void logits are NaN: they must reach nothing. Expanded logits share memory with other images, and
        // those that are scaled up with other pixels.
        const bool poison = c.layout != Layout::expanded && (!c.soft || c.valid) && !c.logits_h;
        logits.fill([&](std::int64_t n, std::int64_t, std::int64_t y, std::int64_t x) {
            return poison && label_at(n, y, x) == c.shape.classes ? std::nan("") : random.eighth();
        });
        for (int i = 0; c.weights && i < c.shape.classes; ++i) {
            class_weight.as<float>()[i] = 0.5f + random.weight(0.4);
        }
        set_parameters(random);
    }

    void set_parameters(Random& random) {
        p.n = c.shape.n;
        p.h = c.shape.h;
        p.w = c.shape.w;
        p.logits_h = c.logits_h;
        p.logits_w = c.logits_w;
        p.classes = c.shape.classes;
        p.binary = c.binary;
        p.logits = logits.view;
        p.target = target.view;
        if (c.valid) p.valid = valid.view;
        p.soft = c.soft;
        p.soft_channels = c.soft_channels;
        p.class_weight = class_weight.buffer<const float>();
        p.ignore_index = ignore_index(c.labels);
        p.label_smoothing = c.smoothing;
        p.tap = c.tap;
        p.distance = c.distance;
        parameters.reserve(2 * c.proxy.size());
        int in = c.shape.classes;
        for (const LayerShape& shape : c.proxy) {
            const std::size_t count = static_cast<std::size_t>(shape.out) * static_cast<std::size_t>(in) *
                                      static_cast<std::size_t>(shape.ksize * shape.ksize);
            const double scale = 1.7 * std::sqrt(static_cast<double>(shape.out) / static_cast<double>(count));
            Block& weight = parameters.emplace_back(count * sizeof(float));
            for (std::size_t i = 0; i < count; ++i) weight.as<float>()[i] = random.weight(scale);
            Block& bias = parameters.emplace_back(static_cast<std::size_t>(shape.out) * sizeof(float));
            for (int i = 0; i < shape.out; ++i) bias.as<float>()[i] = random.weight(0.1);
            Layer& layer = p.layer[p.layers++];
            layer.in = in;
            layer.out = in = shape.out;
            layer.ksize = shape.ksize;
            layer.weight = weight.buffer<const float>();
            layer.bias = bias.buffer<const float>();
            layer.inverse = 1.0f / static_cast<float>(shape.out);
            layer.coefficient = 0.5f * layer.inverse;
        }
    }
};

// What one forward call writes.
struct Forward {
    Block terms, counts, ce_map, semeda_map, codes, saved_d;
    Forward(const Problem& problem, int threads, int poison)
        : terms(sizeof(float) * static_cast<std::size_t>(3 + problem.p.layers), poison),
          counts(2 * sizeof(std::int64_t), poison),
          ce_map(problem.c.maps ? sizeof(float) * pixels(problem) : 0, poison),
          semeda_map(problem.c.maps ? sizeof(float) * pixels(problem) : 0, poison),
          codes(rows(problem) * static_cast<std::size_t>(code_bytes_per_row(problem.p)), poison),
          saved_d(rows(problem) * static_cast<std::size_t>(saved_floats_per_row(problem.p)) * sizeof(float),
                  poison) {
        LossParams p = problem.p;
        p.threads = threads;
        p.terms = terms.buffer<float>();
        p.counts = counts.buffer<std::int64_t>();
        p.ce_map = ce_map.buffer<float>();
        p.semeda_map = semeda_map.buffer<float>();
        forward_without_codes(p);
        p.codes = codes.buffer<std::uint8_t>();
        p.saved_d = saved_d.buffer<float>();
        forward(p);
    }
    static void forward_without_codes(LossParams p) {
        p.codes = {};
        p.saved_d = {};
        forward(p);
    }
    static std::size_t rows(const Problem& problem) {
        return static_cast<std::size_t>(problem.p.n * problem.p.h);
    }
    static std::size_t pixels(const Problem& problem) {
        return rows(problem) * static_cast<std::size_t>(problem.p.w);
    }
    bool same(const Forward& o) const {
        return terms.same(o.terms) && counts.same(o.counts) && ce_map.same(o.ce_map) &&
               semeda_map.same(o.semeda_map) && codes.same(o.codes) && saved_d.same(o.saved_d);
    }
};

Tensor backward_of(const Problem& problem, const Forward& saved, int threads, int poison) {
    const Case& c = problem.c;
    const bool dense = c.layout != Layout::expanded && c.layout != Layout::spaced;
    Tensor d_logits(c.shape.n, c.binary ? 1 : c.shape.classes, c.rows(), c.columns(), c.dtype,
                    dense ? c.layout : Layout::nchw, poison);
    const std::int64_t n = c.maps ? c.shape.n : 1, h = c.maps ? c.shape.h : 1, w = c.maps ? c.shape.w : 1;
    Tensor d_ce(n, 1, h, w, DType::f32, c.maps ? Layout::transposed : Layout::nchw);
    Tensor d_semeda(n, 1, h, w, DType::f32, c.maps ? Layout::spaced : Layout::nchw);
    Random random(11);
    for (Tensor* t : {&d_ce, &d_semeda}) {
        t->fill([&](auto...) { return 0.5 + random.below(8) / 8.0; });
        if (!c.maps) std::memset(t->view.stride, 0, sizeof t->view.stride);
    }
    LossParams p = problem.p;
    p.threads = threads;
    p.codes = saved.codes.buffer<std::uint8_t>();
    p.saved_d = saved.saved_d.buffer<float>();
    p.d_ce = d_ce.view;
    p.d_semeda = d_semeda.view;
    p.d_semeda_is_map = c.maps;
    p.d_logits = d_logits.view;
    backward(p);
    return d_logits;
}

// Behind closed ReLUs a difference is zero but for what Winograd's rounding leaves of it, and has any sign
// there.
constexpr double CODE_SHARE = 1e-2;
constexpr double TOLERANCE = 1e-4;  // relative L2 between two instruction sets, in fp32

struct Judge {
    std::string where;
    int* findings;
    void expect(bool holds, const char* what, double value = 0) const {
        if (holds) return;
        ++*findings;
        std::printf("FINDING %s: %s (%g)\n", where.c_str(), what, value);
    }
    void close(const Block& a, const Block& b, DType dtype, bool finite, const char* what,
               bool jumps = false) const {
        const std::size_t count = a.bytes() / size_of(dtype);
        std::size_t jumped = 0;
        double error = 0, norm = 0;
        std::size_t broken = 0;
        for (std::size_t i = 0; i < count; ++i) {
            const double x = element(a, dtype, i), y = element(b, dtype, i);
            if (!std::isfinite(x) || !std::isfinite(y)) {
                broken += finite || std::isfinite(x) != std::isfinite(y);
                continue;
            }
            if (jumps && std::fabs(x - y) > 1e-3 * (1 + std::fabs(y))) {
                ++jumped;
                continue;
            }
            error += (x - y) * (x - y);
            norm += y * y;
        }
        expect(broken == 0, what, static_cast<double>(broken));
        expect(static_cast<double>(jumped) <= 2 + TOLERANCE * static_cast<double>(count), what,
               static_cast<double>(jumped));
        const double rounding = dtype == DType::f32 ? 0 : dtype == DType::bf16 ? 4e-3 : 1e-3;
        const double relative = std::sqrt(error / (norm + 1e-30));
        expect(relative <= TOLERANCE + rounding, what, relative);
    }
    void same_codes(const Block& a, const Block& b) const {
        std::size_t differing = 0;
        for (std::size_t i = 0; i < a.bytes(); ++i) {
            for (unsigned x = static_cast<unsigned>(a.as<std::uint8_t>()[i] ^ b.as<std::uint8_t>()[i]); x;
                 x &= x - 1) {
                ++differing;
            }
        }
        const auto bits = static_cast<double>(a.bytes()) * 8;
        expect(static_cast<double>(differing) <= 8 + CODE_SHARE * bits, "codes of two instruction sets",
               static_cast<double>(differing) / bits);
    }
};

}  // namespace

#include "sanitize_eager.h"

namespace {

struct Coverage {
    int runs = 0, strips = 0, chunks = 0, both = 0, findings = 0;
};

std::vector<std::string> usable_sets() {
    std::vector<std::string> names;
    for (const char* const* name = built_instruction_sets(); *name; ++name) {
        if (use_instruction_set(*name)) names.insert(names.begin(), *name);  // portable first
    }
    return names;
}

void run(const Case& c, Coverage& seen) {
    const Problem problem(c);
    Judge judge{describe(c), &seen.findings};
    PlanMemory memory;
    const Plan plan = make_plan(problem.p, false, *portable_kernels(), memory);
    seen.strips += plan.strips > 1;
    seen.chunks += plan.chunks > 1;
    seen.both += plan.strips > 1 && plan.chunks > 1;
    if (!c.soft) {
        const bool bad = has_bad_label(problem.p);
        judge.expect(!bad || c.bad_labels, "labels taken for bad");
        judge.expect(bad || !c.bad_labels, "bad labels not found");
    }
    std::unique_ptr<Forward> first;
    std::unique_ptr<Tensor> first_gradient;
    for (const std::string& name : usable_sets()) {
        use_instruction_set(name.c_str());
        judge.where = name + " " + describe(c);
        auto result = std::make_unique<Forward>(problem, 1, 0xFF);
        judge.expect(result->same(Forward(problem, 3, 0x00)),
                     "forward depends on threads or on what memory held");
        if (first) {
            judge.close(result->terms, first->terms, DType::f32, !c.bad_labels, "terms");
            judge.close(result->ce_map, first->ce_map, DType::f32, !c.bad_labels, "map of cross-entropy");
            judge.close(result->semeda_map, first->semeda_map, DType::f32, true, "map of SEMEDA");
            judge.close(result->saved_d, first->saved_d, DType::f32, true, "saved differences",
                        c.tap == Tap::post);  // zero or not, as the ReLU is open or not
            judge.same_codes(result->codes, first->codes);
            judge.expect(result->counts.same(first->counts), "counts");
        }
        run_eager(problem, *result, judge);
        const Forward& saved = first ? *first : *result;
        auto gradient = std::make_unique<Tensor>(backward_of(problem, saved, 1, 0xFF));
        judge.expect(gradient->block.same(backward_of(problem, saved, 3, 0x00).block),
                     "backward depends on threads or on what memory held");
        const Tensor& other = first_gradient ? *first_gradient : *gradient;
        judge.close(gradient->block, other.block, c.dtype, !c.bad_labels, "gradient");
        if (!first) {
            first = std::move(result);
            first_gradient = std::move(gradient);
        }
        ++seen.runs;
    }
}

std::vector<Case> cases() {
    const std::vector<Shape> shapes = {
        {1, 1, 1, 1},   {1, 2, 1, 1},  {2, 3, 1, 33},  {1, 3, 9, 1},   {1, 5, 3, 2},   {2, 4, 7, 15},
        {1, 3, 5, 16},  {1, 3, 6, 17}, {1, 7, 13, 31}, {1, 2, 4, 33},  {1, 3, 11, 49}, {1, 3, 3, 97},
        {1, 2, 2, 113}, {3, 2, 17, 5}, {1, 3, 67, 3},  {1, 6, 37, 41}, {1, 255, 3, 3}};
    const std::vector<std::vector<LayerShape>> proxies = {
        {{16, 3}, {32, 3}, {2, 3}}, {{1, 1}, {1, 1}},
        {{3, 5}, {2, 3}},           {{17, 3}, {3, 7}, {2, 1}},
        {{5, 7}, {2, 5}},           {{4, 1}, {4, 3}, {5, 5}, {6, 3}, {7, 1}, {8, 3}, {9, 5}, {2, 3}}};
    const Tap taps[] = {Tap::pre, Tap::post};
    const Distance distances[] = {Distance::l1, Distance::l2, Distance::smooth_l1};
    const DType floats[] = {DType::f32, DType::bf16, DType::f16};
    const Layout layouts[] = {Layout::nchw, Layout::channels_last, Layout::transposed, Layout::spaced,
                              Layout::expanded};
    const DType labels[] = {DType::u8, DType::i8, DType::i16, DType::i32, DType::i64, DType::u16};

    std::vector<Case> all;
    unsigned i = 0;  // strides of different primes meet many combinations of the options
    const auto vary = [&](Case c) {
        c.tap = taps[i % 2];
        c.distance = distances[i / 2 % 3];
        c.dtype = floats[i % 5 % 3];
        c.layout = layouts[i / 3 % 5];
        c.labels = c.shape.classes > 127 ? DType::i16 : labels[i / 7 % 6];
        c.valid = i % 3 == 1;
        c.weights = i % 4 == 2;
        c.maps = i / 2 % 2 == 1;
        c.smoothing = i % 5 == 3 ? 0.1f : 0.0f;
        c.soft = i % 7 == 4;
        c.soft_channels = c.soft ? c.shape.classes : 0;
        ++i;
        all.push_back(c);
    };
    for (const Shape& shape : shapes) {
        for (const auto& proxy : proxies) {
            Case c;
            c.shape = shape;
            c.proxy = proxy;
            vary(c);
        }
    }
    for (const Tap tap : taps) {
        for (const Distance distance : distances) {
            for (const DType dtype : floats) {
                for (const Layout layout : layouts) {
                    Case c;
                    c.shape = {2, 3, 7, 18};
                    c.proxy = {{5, 3}, {2, 3}};
                    c.tap = tap;
                    c.distance = distance;
                    c.dtype = dtype;
                    c.layout = layout;
                    all.push_back(c);
                }
            }
        }
    }
    for (const DType label : labels) {
        for (const bool valid : {false, true}) {
            Case c;
            c.labels = label;
            c.valid = valid;
            c.bad_labels = true;
            all.push_back(c);
            c.bad_labels = false;
            c.binary = true;
            c.shape.classes = 2;
            all.push_back(c);
            c.soft = true;
            c.soft_channels = valid ? 2 : 1;
            all.push_back(c);
        }
    }
    // Several strips with several chunks of rows, with wide layers and with many classes.
    const std::vector<std::pair<Shape, std::vector<LayerShape>>> large = {
        {{1, 2, 37, 2100}, {{1, 3}, {2, 3}}},  {{1, 300, 35, 40}, {{4, 3}, {2, 5}}},
        {{1, 1024, 2, 420}, {{2, 3}, {1, 1}}}, {{1, 3, 5, 33}, {{64, 3}, {64, 5}, {2, 3}}},
        {{1, 2, 33, 2049}, {{2, 1}, {1, 5}}},  {{1, 21, 3, 35}, {{32, 3}, {64, 3}, {64, 3}}}};
    for (const auto& [shape, proxy] : large) {
        for (int repeat = 0; repeat < 2; ++repeat) {
            Case c;
            c.shape = shape;
            c.proxy = proxy;
            vary(c);
        }
    }
    // Logits of a fraction of the labels' size, among them shapes of several strips and chunks.
    const std::vector<std::pair<Shape, std::pair<int, int>>> small = {
        {{1, 1, 1, 1}, {1, 1}},       {{2, 3, 1, 33}, {1, 9}},     {{1, 3, 9, 1}, {2, 1}},
        {{1, 5, 13, 31}, {4, 8}},     {{2, 4, 16, 64}, {4, 16}},   {{1, 3, 17, 50}, {16, 49}},
        {{1, 2, 33, 2049}, {9, 300}}, {{1, 300, 35, 40}, {9, 10}}, {{2, 21, 67, 35}, {17, 9}}};
    for (const auto& [shape, size] : small) {
        for (int repeat = 0; repeat < 4; ++repeat) {
            Case c;
            c.shape = shape;
            c.proxy = {{5, 3}, {2, 3}};
            c.logits_h = size.first;
            c.logits_w = size.second;
            c.binary = shape.classes == 2 && repeat % 2 == 1;
            vary(c);
            if (all.back().binary) all.back().soft = false;
        }
    }
    return all;
}

}  // namespace

// Weights that are packed already must not be taken for known after their memory was given back.
int check_plan_memory() {
    PlanMemory memory;
    const std::vector<char> key = {1, 2, 3};
    memory.floats(64);
    memory.remember(key);
    const bool kept = memory.floats(32) && memory.key() == key;
    const bool forgotten = memory.floats(4096) && memory.key() != key;
    if (!kept || !forgotten) std::printf("FINDING the memory of a plan and what it holds part ways\n");
    return !kept + !forgotten;
}

int main(int argc, char** argv) {
    Coverage seen;
    seen.findings += check_plan_memory();
    for (const Case& c : cases()) {
        if (argc > 1 && describe(c).find(argv[1]) == std::string::npos) continue;
        run(c, seen);
        std::fflush(stdout);
    }
    std::string sets;
    for (const std::string& name : usable_sets()) sets += " " + name;
    std::printf("%d runs on%s; cases with several strips %d, chunks %d, both %d; findings %d\n", seen.runs,
                sets.c_str(), seen.strips, seen.chunks, seen.both, seen.findings);
    const bool covered = argc > 1 || (seen.strips > 0 && seen.chunks > 0 && seen.both > 0);
    if (!covered) std::printf("FINDING the cases do not reach several strips and chunks: make some larger\n");
    return seen.findings == 0 && seen.runs > 0 && covered ? 0 : 1;
}
