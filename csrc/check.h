// What a native entry asks before it reads or writes anything: whether sizes make sense, and whether each
// buffer has the bytes that these sizes take. What does not fit is a std::invalid_argument, ValueError in
// Python, that names the buffer and both numbers.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "params.h"

namespace semeda_fast {

enum class Direction { forward, backward };

// Beyond these no image is meant, and below them no byte count overflows.
constexpr std::int64_t MAX_SIDE = std::int64_t{1} << 40;
constexpr std::int64_t MAX_PIXELS = std::int64_t{1} << 48;
constexpr std::int64_t MAX_STRIDE = std::int64_t{1} << 52;  // elements, times the steps
constexpr int MAX_WIDTH = 64;                               // channels of a layer
constexpr int MAX_KSIZE = 1023;

[[noreturn]] inline void refuse(const std::string& why) {
    throw std::invalid_argument("semeda_fast: " + why);
}

inline void check_range(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
    if (value >= least && value <= most) return;
    refuse(std::string(name) + " is " + std::to_string(value) + ", and must lie in " + std::to_string(least) +
           " to " + std::to_string(most));
}

inline std::int64_t element_bytes(DType dtype) {
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

inline bool is_float(DType dtype) {
    return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16;
}

inline void check_address(const char* name, const void* data, std::int64_t element) {
    if (!data) refuse(std::string(name) + " has no memory: its address is 0");
    if (reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(element) != 0) {
        refuse(std::string(name) + " begins at an address that is no multiple of the " +
               std::to_string(element) + " bytes of an element; pass a copy (clone())");
    }
}

// Contiguous memory of so many bytes.
template <class T>
void need(const char* name, const Buffer<T>& buffer, std::int64_t bytes) {
    if (bytes <= 0) return;
    if (buffer.bytes < bytes) {
        const std::int64_t there = buffer.bytes > 0 ? buffer.bytes : 0;
        refuse(std::string(name) + " has " + std::to_string(there) + " bytes, and " + std::to_string(bytes) +
               " are needed");
    }
    check_address(name, buffer.data, sizeof(T));
}

struct Size4 {
    std::int64_t of[4];  // n, c, h, w
};

// All elements of a view of these sizes.
inline void need(const char* name, const TensorView& view, const Size4& size) {
    const std::int64_t element = element_bytes(view.dtype);
    std::int64_t first = 0, last = 0;  // bytes from data to the outermost elements
    bool empty = false;
    std::int64_t sizes[5] = {size.of[0], size.of[1], size.of[2], size.of[3], 1};
    if (view.fold < 0 || (view.fold > 0 && size.of[0] % view.fold != 0)) {
        refuse(std::string(name) + " has " + std::to_string(size.of[0]) + " images in groups of " +
               std::to_string(view.fold));
    }
    if (view.fold > 0) sizes[0] = view.fold, sizes[4] = size.of[0] / view.fold;
    for (int i = 0; i < 5; ++i) {
        const std::int64_t stride = i < 4 ? view.stride[i] : view.outer, steps = sizes[i] - 1;
        empty |= steps < 0;
        // Over a size of 1, too: kernels may multiply with such a stride though they never step by it.
        const std::int64_t most = MAX_STRIDE / (steps > 1 ? steps : 1);
        if (stride > most || stride < -most) {
            refuse(std::string(name) + " has a stride of " + std::to_string(stride) +
                   " elements over a size of " + std::to_string(sizes[i]));
        }
        if (steps > 0) (stride < 0 ? first : last) += steps * stride * element;
    }
    if (empty) return;
    last += element;
    if (-first > view.before || last > view.after) {
        const std::int64_t before = view.before > 0 ? view.before : 0;
        const std::int64_t after = view.after > 0 ? view.after : 0;
        refuse(std::string(name) + " reaches over " + std::to_string(-first) +
               " bytes in front of its address and " + std::to_string(last) +
               " behind it, and its memory has " + std::to_string(before) + " and " + std::to_string(after));
    }
    check_address(name, view.data, element);
}

inline void need_float(const char* name, const TensorView& view, const Size4& size) {
    if (!is_float(view.dtype)) refuse(std::string(name) + " must be float32, bfloat16 or float16");
    need(name, view, size);
}

inline void check_layer(const Layer& layer) {
    check_range("a layer's number of input channels", layer.in, 1, 1 << 16);
    check_range("a layer's number of output channels", layer.out, 1, MAX_WIDTH);
    check_range("a layer's kernel size", layer.ksize, 1, MAX_KSIZE);
    if (layer.ksize % 2 == 0) refuse("a layer's kernel size is even: " + std::to_string(layer.ksize));
}

inline void check_image(const LossParams& p) {
    check_range("n", p.n, 0, MAX_SIDE);
    check_range("h", p.h, 0, MAX_SIDE);
    check_range("w", p.w, 0, MAX_SIDE);
    const auto one = [](std::int64_t x) { return x > 0 ? x : 1; };
    if (one(p.n) > MAX_PIXELS / one(p.h) / one(p.w)) {
        refuse("n, h and w are " + std::to_string(p.n) + ", " + std::to_string(p.h) + " and " +
               std::to_string(p.w) + ", which are too many pixels");
    }
}

// Everything but memory.
inline void check_sizes(const LossParams& p, int max_classes) {
    check_image(p);
    check_range("the number of classes", p.classes, 1, max_classes);
    if (p.binary && p.classes != 2) {
        refuse("binary mode has 2 classes, not " + std::to_string(p.classes));
    }
    if (p.soft && p.soft_channels != p.classes && !(p.binary && p.soft_channels == 1)) {
        refuse("a soft target of " + std::to_string(p.soft_channels) + " channels for " +
               std::to_string(p.classes) + " classes");
    }
    if (p.logits_h != 0 || p.logits_w != 0) {
        check_range("the height of logits that are scaled up", p.logits_h, 1, p.h);
        check_range("the width of logits that are scaled up", p.logits_w, 1, p.w);
    }
    check_range("tap", static_cast<int>(p.tap), 0, 1);
    check_range("distance", static_cast<int>(p.distance), 0, 2);
    check_range("the number of layers", p.layers, 2, MAX_LAYERS);
    for (int l = 0, in = p.classes; l < p.layers; in = p.layer[l++].out) {
        check_layer(p.layer[l]);
        if (p.layer[l].in != in) {
            refuse("layer " + std::to_string(l) + " takes " + std::to_string(p.layer[l].in) +
                   " channels, and " + std::to_string(in) + " are there");
        }
    }
}

// target and valid, of sizes that were checked.
inline void check_labels(const LossParams& p) {
    if (p.soft) {
        need_float("target", p.target, {{p.n, p.soft_channels, p.h, p.w}});
    } else {
        if (is_float(p.target.dtype)) refuse("target must be integers where it holds labels");
        need("target", p.target, {{p.n, 1, p.h, p.w}});
    }
    if (p.valid.is_given()) {
        if (p.valid.dtype != DType::u8) refuse("valid must be bool or uint8");
        need("valid", p.valid, {{p.n, 1, p.h, p.w}});
    }
}

// All memory that one direction reads and writes, of sizes that were checked; codes and saved_d are the bytes
// that forward keeps of such a problem.
inline void check_memory(const LossParams& p, Direction direction, std::int64_t codes, std::int64_t saved_d) {
    const bool small = p.logits_h > 0;
    const Size4 of_logits = {
        {p.n, p.binary ? 1 : p.classes, small ? p.logits_h : p.h, small ? p.logits_w : p.w}};
    const Size4 map = {{p.n, 1, p.h, p.w}}, scalar = {{1, 1, 1, 1}};
    need_float("logits", p.logits, of_logits);
    check_labels(p);
    if (p.class_weight.is_given()) {
        check_range("the rows of class weights", p.weight_rows, 1, MAX_PIXELS);
        need("class_weight", p.class_weight, 4 * p.weight_rows * p.classes);
    }
    for (int l = 0; l < p.layers; ++l) {
        need("the proxy's weights", p.layer[l].weight, 4 * weights_of(p.layer[l]));
        need("the proxy's biases", p.layer[l].bias, 4 * std::int64_t{p.layer[l].out});
    }
    if (direction == Direction::forward) {
        const std::int64_t map_bytes = 4 * p.n * p.h * p.w;
        need("terms", p.terms, 4 * (3 + std::int64_t{p.layers}));
        need("counts", p.counts, 2 * 8);
        if (p.ce_map.is_given()) need("ce_map", p.ce_map, map_bytes);
        if (p.semeda_map.is_given()) need("semeda_map", p.semeda_map, map_bytes);
        if (p.codes.is_given()) {
            need("codes", p.codes, codes);
            need("saved_d", p.saved_d, saved_d);
        }
        return;
    }
    need("codes", p.codes, codes);
    need("saved_d", p.saved_d, saved_d);
    if (p.d_ce.dtype != DType::f32 || p.d_semeda.dtype != DType::f32) {
        refuse("d_ce and d_semeda must be float32");
    }
    need("d_ce", p.d_ce, map);
    need("d_semeda", p.d_semeda, p.d_semeda_is_map ? map : scalar);
    if (p.d_logits.dtype != p.logits.dtype) refuse("d_logits must be of the logits' dtype");
    need("d_logits", p.d_logits, of_logits);
}

}  // namespace semeda_fast
