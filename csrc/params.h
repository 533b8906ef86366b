// The loss computation as plain data: what Python fills in and the kernels read. No tensor class, no
// ownership.
#pragma once

#include <cstdint>

namespace semeda_fast {

constexpr int MAX_LAYERS = 8;

enum class DType : int { f32, bf16, f16, u8, i8, i16, i32, i64 };
enum class Distance : int { l1, l2, smooth_l1 };
enum class Tap : int { pre, post };

// A strided view; strides count elements, may be 0 or negative, and data is null where there is no tensor.
struct View {
    void* data = nullptr;
    DType dtype = DType::f32;
    std::int64_t stride[4] = {0, 0, 0, 0};  // n, c, h, w; c is unused where the tensor has no channels
};

struct Layer {
    int in = 0;                     // K_{l-1}; C for the first layer
    int out = 0;                    // K_l
    int ksize = 0;                  // odd
    const float* weight = nullptr;  // [out, in, ksize, ksize], contiguous
    const float* bias = nullptr;    // [out]
    float inverse = 0;              // 1 / (K_l s_l)
    float coefficient = 0;          // w_l / (K_l s_l)
};

struct LossParams {
    std::int64_t n = 0, h = 0, w = 0;
    int classes = 0;      // C, the channels of p; 2 in binary mode
    bool binary = false;  // logits have one channel, p = [1 - sigmoid, sigmoid]
    // Of logits that are smaller than the labels' h x w and to be scaled up bilinearly (the CPU kernels do);
    // else 0.
    std::int64_t logits_h = 0, logits_w = 0;
    View logits;  // [N,C,H,W] f32 / bf16 / f16
    View target;  // [N,H,W] integers, or [N,C,H,W] floats where soft
    View valid;   // [N,H,W] u8, or no data: all pixels count that are not ignore_index
    bool soft = false;
    int soft_channels = 0;                // channels of a soft target: C, or 1 in binary mode
    float soft_tolerance = 0;             // of a soft target's sums; 0: it is not looked at
    const float* class_weight = nullptr;  // [C] or null
    std::int64_t ignore_index = -100;
    float label_smoothing = 0;
    Tap tap = Tap::pre;
    Distance distance = Distance::l1;
    int layers = 0;
    Layer layer[MAX_LAYERS];
    int threads = 1;

    // Forward writes; backward reads codes and saved_d.
    float* ce_map = nullptr;         // [N,H,W] or null: only the sums are wanted
    float* semeda_map = nullptr;     // [N,H,W], null together with ce_map
    float* terms = nullptr;          // [3 + L]: ce, semeda, ce_weight, per_layer...
    std::int64_t* counts = nullptr;  // [2]: valid pixels, those with no class or distribution
    std::uint8_t* codes = nullptr;   // [N,H,code_bytes(...)], or null: no backward will come
    float* saved_d = nullptr;  // [N,H,saved_floats(...)]: l2 and smooth_l1 need d itself; order: cpu/plan.h

    // Backward.
    View d_ce;      // f32, [] as strides 0, or [N,H,W]
    View d_semeda;  // likewise
    bool d_semeda_is_map = false;
    View d_logits;  // same dtype and size as the logits; every element is written
};

inline std::int64_t weights_of(const Layer& layer) {
    return static_cast<std::int64_t>(layer.out) * layer.in * layer.ksize * layer.ksize;
}

// The proxy's memory: all weights [out, in, k, k], then all biases [out], fp32, which outlives the
// parameters.
inline void set_proxy(LossParams& p, const float* next) {
    for (int l = 0; l < p.layers; next += weights_of(p.layer[l++])) p.layer[l].weight = next;
    for (int l = 0; l < p.layers; next += p.layer[l++].out) p.layer[l].bias = next;
}

}  // namespace semeda_fast
