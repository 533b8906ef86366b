// The proxies that kernels are compiled for. Others run on Triton.
#pragma once

#include "geometry.h"

namespace semeda_fast::gpu {

// K_1 .. K_L: hidden layers of 16, 32 or 64 channels, the last of 2, 16, 32 or 64.
template <int BLOCKS, int... K>
struct Proxy {
    static constexpr int LAYERS = sizeof...(K);
    static constexpr int CHANNELS[LAYERS] = {K...};
    // Blocks that share a multiprocessor: with two, registers stay under 128 and one computes where the other
    // waits.
    template <class M>
    static constexpr int min_blocks() {
        return M::CHANNELS == Half::CHANNELS ? BLOCKS : 1;
    }
    template <class M>
    static constexpr int sums() {
        return unit_sums(min_blocks<M>(), M::CHANNELS == HALF_CHANNELS);
    }
    static constexpr int channels(int layer) { return CHANNELS[layer]; }
};

using DefaultProxy = Proxy<2, 16, 32, 2>;
using FourLayerProxy = Proxy<2, 16, 32, 32, 2>;
using WideProxy = Proxy<1, 32, 64, 64>;
using DeepProxy = Proxy<1, 16, 32, 32, 32, 32, 32, 16>;

// Calls f(type with CLASSES) for the smallest of 8, 16 and 24 that holds all classes.
template <int N>
struct Count {
    static constexpr int VALUE = N;
};

template <class F>
DEVICE void with_classes(int classes, F f) {
    if (classes <= 8)
        f(Count<8>());
    else if (classes <= 16)
        f(Count<16>());
    else
        f(Count<24>());
}

// Layers with the same shape (channels in and out, whether it is the last) share code: that of the first of
// them.
template <class P>
constexpr int same_shape(int layer) {
    for (int before = 1; before < layer; ++before)
        if (P::channels(before) == P::channels(layer) && P::channels(before - 1) == P::channels(layer - 1) &&
            layer != P::LAYERS - 1)
            return before;
    return layer;
}

template <class P>
constexpr int shape_end(int layer) {
    int end = layer + 1;
    while (end < P::LAYERS && same_shape<P>(end) == layer) ++end;
    return end;
}

// Calls f(Count<the layer whose code it shares>) for a layer behind the first.
template <class P, int LAYER = 1, class F>
DEVICE void with_layer(int layer, F f) {
    if constexpr (LAYER < P::LAYERS) {
        constexpr int SHAPE = same_shape<P>(LAYER);
        if constexpr (SHAPE == LAYER) {
            // Shapes repeat in a row only, so a range stands for all of them.
            constexpr int END = shape_end<P>(LAYER);
            if (layer >= LAYER && layer < END) f(Count<LAYER>());
        }
        with_layer<P, LAYER + 1>(layer, f);
    }
}

}  // namespace semeda_fast::gpu
