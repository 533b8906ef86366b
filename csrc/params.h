// The loss computation as plain data: what Python fills in and the kernels read. No tensor class, no
// ownership.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace semeda_fast {

constexpr int MAX_LAYERS = 8;

enum class DType : int { f32, bf16, f16, u8, i8, i16, i32, i64, u16 };
enum class Distance : int { l1, l2, smooth_l1 };
enum class Tap : int { pre, post };

// Python can make an object without its constructor, by __new__ alone. Then it is zeros, which check.h
// refuses.
struct Zeroed {
    static void* operator new(std::size_t bytes) {
        if (void* data = std::calloc(1, bytes)) return data;
        throw std::bad_alloc();
    }
    static void* operator new(std::size_t, void* at) { return at; }
    static void operator delete(void* data) { std::free(data); }
};

// A strided view; strides count elements, may be 0 or negative, and data is null where there is no tensor.
struct View {
    void* data = nullptr;
    DType dtype = DType::f32;
    std::int64_t stride[4] = {0, 0, 0, 0};  // n, c, h, w; c is unused where the tensor has no channels
    // Images that no single stride leads through, such as slices of several volumes: image n is number n %
    // fold of group n / fold, which lie `outer` elements apart. 0: there are no groups.
    std::int64_t fold = 0, outer = 0;
};

// In elements, of a pixel of the first channel; for the CPU.
inline std::int64_t offset_of(const View& view, std::int64_t n, std::int64_t y, std::int64_t x) {
    const std::int64_t image =
        view.fold > 0 ? n / view.fold * view.outer + n % view.fold * view.stride[0] : n * view.stride[0];
    return image + y * view.stride[2] + x * view.stride[3];
}

// What a caller hands over is held against these sizes by check.h before a kernel sees it as a View or a
// pointer.

// A strided view and the memory that it lies in: bytes of it in front of data, and from data on.
struct TensorView : View, Zeroed {
    std::int64_t before = -1, after = 0;           // before: -1 where there is no tensor
    bool is_given() const { return before >= 0; }  // it may have lost its memory all the same
};

// Contiguous memory and how much of it there is.
template <class T>
struct Buffer {
    T* data = nullptr;
    std::int64_t bytes = -1;  // -1 where there is none
    bool is_given() const { return bytes >= 0; }
    operator T*() const { return data; }
};

struct Layer {
    int in = 0;                  // K_{l-1}; C for the first layer
    int out = 0;                 // K_l
    int ksize = 0;               // odd
    Buffer<const float> weight;  // [out, in, ksize, ksize]
    Buffer<const float> bias;    // [out]
    float inverse = 0;           // 1 / (K_l s_l)
    float coefficient = 0;       // w_l / (K_l s_l)
};

struct LossParams : Zeroed {
    std::int64_t n = 0, h = 0, w = 0;
    int classes = 0;      // C, the channels of p; 2 in binary mode
    bool binary = false;  // logits have one channel, p = [1 - sigmoid, sigmoid]
    // Of logits that are smaller than the labels' h x w and to be scaled up bilinearly (the CPU kernels do);
    // else 0.
    std::int64_t logits_h = 0, logits_w = 0;
    TensorView logits;  // [N,C,H,W] f32 / bf16 / f16
    TensorView target;  // [N,H,W] integers, or [N,C,H,W] floats where soft
    TensorView valid;   // [N,H,W] u8, or none: all pixels count that are not ignore_index
    bool soft = false;
    int soft_channels = 0;             // channels of a soft target: C, or 1 in binary mode
    float soft_tolerance = 0;          // of a soft target's sums; 0: it is not looked at
    Buffer<const float> class_weight;  // [rows, C] or none: image i has row i % rows
    std::int64_t weight_rows = 1;
    std::int64_t ignore_index = -100;
    float label_smoothing = 0;
    Tap tap = Tap::pre;
    Distance distance = Distance::l1;
    int layers = 0;
    Layer layer[MAX_LAYERS];
    int threads = 1;

    // Forward writes; backward reads codes and saved_d.
    Buffer<float> ce_map;         // [N,H,W] or none: only the sums are wanted
    Buffer<float> semeda_map;     // [N,H,W], none together with ce_map
    Buffer<float> terms;          // [3 + L]: ce, semeda, ce_weight, per_layer...
    Buffer<std::int64_t> counts;  // [2]: valid pixels, those with no class or distribution
    Buffer<std::uint8_t> codes;   // [N,H,code_bytes(...)], or none: no backward will come
    Buffer<float> saved_d;  // [N,H,saved_floats(...)]: l2 and smooth_l1 need d itself; order: cpu/plan.h

    // Backward.
    TensorView d_ce;      // f32, [] as strides 0, or [N,H,W]
    TensorView d_semeda;  // likewise
    bool d_semeda_is_map = false;
    TensorView d_logits;  // same dtype and size as the logits; every element is written
};

inline std::int64_t weights_of(const Layer& layer) {
    return static_cast<std::int64_t>(layer.out) * layer.in * layer.ksize * layer.ksize;
}

// The next `count` floats of a buffer, as many of them as there are; the buffer goes on behind them.
inline Buffer<const float> take_floats(Buffer<const float>& from, std::int64_t count) {
    const std::int64_t bytes = from.bytes < 4 * count ? from.bytes : 4 * count;
    const Buffer<const float> taken{from.data, bytes};
    if (from.data && bytes > 0) from.data += bytes / 4;
    if (bytes > 0) from.bytes -= bytes;
    return taken;
}

// The proxy's memory: all weights [out, in, k, k], then all biases [out], fp32, which outlives the
// parameters.
inline void set_proxy(LossParams& p, Buffer<const float> flat) {
    for (int l = 0; l < p.layers; ++l) p.layer[l].weight = take_floats(flat, weights_of(p.layer[l]));
    for (int l = 0; l < p.layers; ++l) p.layer[l].bias = take_floats(flat, p.layer[l].out);
}

}  // namespace semeda_fast
