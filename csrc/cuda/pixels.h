// Reads labels and logits of one pixel, in any dtype and layout.
#pragma once

#include "geometry.h"

namespace semeda_fast::gpu {

DEVICE std::int64_t pixel_offset(const View& view, std::int64_t n, int y, int x) {
    return n * view.stride[0] + y * view.stride[2] + x * view.stride[3];
}

DEVICE std::int64_t read_integer(const View& view, std::int64_t at) {
    switch (view.dtype) {
        case DType::u8:
            return load_constant(static_cast<const std::uint8_t*>(view.data) + at);
        case DType::i8:
            return load_constant(static_cast<const signed char*>(view.data) + at);
        case DType::i16:
            return load_constant(static_cast<const short*>(view.data) + at);
        case DType::u16:
            return load_constant(static_cast<const unsigned short*>(view.data) + at);
        case DType::i32:
            return load_constant(static_cast<const int*>(view.data) + at);
        default:
            return load_constant(static_cast<const long long*>(view.data) + at);
    }
}

struct Label {
    int value;  // the class, C where the pixel is void, C + 1 outside the image
    bool bad;   // is no class; value is then 0
};

DEVICE Label read_label(const Problem& p, std::int64_t n, int y, int x) {
    if (!is_inside(p, y, x)) return {p.classes + 1, false};
    if (p.valid.data != nullptr && read_integer(p.valid, pixel_offset(p.valid, n, y, x)) == 0)
        return {p.classes, false};
    const std::int64_t label = read_integer(p.target, pixel_offset(p.target, n, y, x));
    if (label == p.ignore_index) return {p.classes, false};
    if (label < 0 || label >= p.classes) return {0, true};
    return {static_cast<int>(label), false};
}

DEVICE bool is_bfloat(const View& view) { return view.dtype == DType::bf16; }

template <class M>
DEVICE const typename M::Raw* raw_at(const View& view, std::int64_t at) {
    return static_cast<const typename M::Raw*>(view.data) + at;
}

// z of class c of the pixel whose first logit is at `at`; in binary mode softmax([0, z]) = [1 - sigma(z),
// sigma(z)]. CLASSES: how many there are at most; with more than 8 nobody asks for the mode.
template <class M, int CLASSES>
DEVICE float read_logit(const Problem& p, std::int64_t at, int c) {
    const bool binary = CLASSES <= 8 && p.binary;
    if (binary && c == 0) return 0;
    return M::from_raw(is_bfloat(p.logits),
                       load_constant(raw_at<M>(p.logits, binary ? at : at + c * p.logits.stride[1])));
}

// All logits of a pixel: asked for at once, so that memory is waited for once, and turned into numbers later.
template <class M, int CLASSES>
struct Logits {
    typename M::Raw raw[CLASSES];

    DEVICE void load(const Problem& p, std::int64_t at, bool inside) {
        const bool binary = CLASSES <= 8 && p.binary;
        const typename M::Raw* from = raw_at<M>(p.logits, at);
        const std::int64_t step = binary ? 0 : p.logits.stride[1];  // its one channel is read twice
#pragma unroll
        for (int c = 0; c < CLASSES; ++c, from += step)
            raw[c] = load_constant_if(inside && c < p.classes, from);
    }
    // Minus infinity beyond the last class.
    DEVICE float operator()(const Problem& p, int c) const {
        if (c >= p.classes) return -INFINITY;
        return CLASSES <= 8 && p.binary && c == 0 ? 0.f : M::from_raw(is_bfloat(p.logits), raw[c]);
    }
};

// Of one class: 1 without class weights.
DEVICE float class_weight(const Problem& p, int c) {
    return p.class_weight == nullptr ? 1.f : load_constant(p.class_weight + c);
}

// Cross-entropy of a valid pixel from log softmax: its own class's, and sum_c u_c log s_c where labels are
// smoothed.
DEVICE float cross_entropy(const Problem& p, float weight, float own, float all) {
    const float hard = -(1.f - p.smoothing) * weight * own;
    return p.smoothing > 0 ? hard - p.smoothing / static_cast<float>(p.classes) * all : hard;
}

}  // namespace semeda_fast::gpu
