// Two ways to multiply: fp16 for half-precision logits, three tf32 products for fp32. Both sum in fp32.
//
// A pixel's channels lie in pieces of 16 bytes: 8 channels in fp16, 4 in fp32. A product takes two pieces of
// k.
#pragma once

#include "hardware.h"
#include "problem.h"

namespace semeda_fast::gpu {

// Pixels lie in rows without gaps, PIECES pieces each. Eight neighbouring pixels, wherever they start, must
// hit eight different groups of four banks: odd PIECES do so by themselves, even ones after exchanging pieces
// by the column.
template <int PIECES>
DEVICE int swizzled(int column, int piece) {
    if (PIECES % 2 == 1) return piece;
    if (PIECES % 8 == 0) return piece ^ (column & 7);
    if (PIECES % 4 == 0) return piece ^ (column >> 1 & 3);
    return piece ^ (column >> 2 & 1);
}

struct Half {
    static constexpr int CHANNELS = HALF_CHANNELS;  // of a piece
    using Raw = unsigned short;                     // a logit as it lies in memory
    static DEVICE float from_raw(bool bfloat, Raw bits) {
        return bfloat ? bits_float(static_cast<std::uint32_t>(bits) << 16) : from_half(bits);
    }
    static DEVICE Raw to_raw(bool bfloat, float value) { return bfloat ? to_bfloat(value) : to_half(value); }
    struct Left {
        Lanes<std::uint32_t> r[4];
    };
    struct Right {
        Lanes<std::uint32_t> r[2];
    };
    static DEVICE void prepare(Warp, Left&) {}
    static DEVICE void prepare(Warp, Right&) {}
    static DEVICE void multiply(Warp, Lanes<float> (&c)[4], const Left& a, const Right& b) {
        multiply_f16(c, a.r, b.r);
    }

    // Where a channel of a pixel lies, from the pixel's first byte.
    template <int PIECES>
    static DEVICE int channel_offset(int column, int channel) {
        return swizzled<PIECES>(column, channel / CHANNELS) * PIECE + 2 * (channel % CHANNELS);
    }
    // Two neighbouring channels, zeros unless `keep`. Saturated, since one infinity would make the whole loss
    // one.
    static DEVICE void store_pair(Warp warp, int address, bool keep, float x, float y) {
        warp.store<std::uint32_t>(address, keep ? to_finite_half2(x, y) : 0u);
    }
    static DEVICE void store_one(Warp warp, int address, float x) {
        warp.store<std::uint16_t>(address, to_half(x));
    }
    // One word of a piece of packed weights holds channels 2t and 2t + 1.
    template <class F>
    static DEVICE std::uint32_t pack_word(int t, F channel_value) {
        return to_half2(channel_value(2 * t), channel_value(2 * t + 1));
    }
    // A whole piece from the values of its channels.
    template <class F>
    static DEVICE uint4 pack_piece(F channel_value) {
        return uint4{
            to_half2(channel_value(0), channel_value(1)), to_half2(channel_value(2), channel_value(3)),
            to_half2(channel_value(4), channel_value(5)), to_half2(channel_value(6), channel_value(7))};
    }
    // e^(x - shift). One rounding of the shift for all classes of a pixel, which softmax divides away.
    static DEVICE float exp(float x, float shift) {
        constexpr float LOG2_E = 1.44269504f;
        return quick_power_of_2(x * LOG2_E - shift * LOG2_E);
    }
};

struct Tf32x3 {
    static constexpr int CHANNELS = TF32_CHANNELS;
    using Raw = float;
    static DEVICE float from_raw(bool, Raw value) { return value; }
    static DEVICE Raw to_raw(bool, float value) { return value; }
    struct Left {
        Lanes<std::uint32_t> r[4], low[4];
    };
    struct Right {
        Lanes<std::uint32_t> r[2], low[2];
    };
    static DEVICE void prepare(Warp warp, Left& a) { split<4>(warp, a.r, a.low); }
    static DEVICE void prepare(Warp warp, Right& b) { split<2>(warp, b.r, b.low); }
    // A product's sum is cut off toward zero: over a layer's hundreds of products that would shrink every
    // sum, so each adds up from zero, and c rounds to nearest.
    static DEVICE void multiply(Warp warp, Lanes<float> (&c)[4], const Left& a, const Right& b) {
        Lanes<float> part[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) for_lanes(warp, [&](int lane) { part[i][lane] = 0; });
        multiply_tf32(part, a.low, b.r);
        multiply_tf32(part, a.r, b.low);
        multiply_tf32(part, a.r, b.r);
#pragma unroll
        for (int i = 0; i < 4; ++i) for_lanes(warp, [&](int lane) { c[i][lane] += part[i][lane]; });
    }
    template <int PIECES>
    static DEVICE int channel_offset(int column, int channel) {
        return swizzled<PIECES>(column, channel / CHANNELS) * PIECE + 4 * (channel % CHANNELS);
    }
    static DEVICE void store_pair(Warp warp, int address, bool keep, float x, float y) {
        warp.store<float2>(address, keep ? float2{x, y} : float2{0, 0});
    }
    static DEVICE void store_one(Warp warp, int address, float x) { warp.store<float>(address, x); }
    template <class F>
    static DEVICE std::uint32_t pack_word(int t, F channel_value) {
        return float_bits(channel_value(t));
    }
    template <class F>
    static DEVICE uint4 pack_piece(F channel_value) {
        return uint4{float_bits(channel_value(0)), float_bits(channel_value(1)), float_bits(channel_value(2)),
                     float_bits(channel_value(3))};
    }
    static DEVICE float exp(float x, float shift) { return exponential(x - shift); }

  private:
    // x = high + low, each with tf32's 10 bits: what is left out of the products is 2^-22 of them.
    template <int N>
    static DEVICE void split(Warp warp, Lanes<std::uint32_t> (&high)[N], Lanes<std::uint32_t> (&low)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            for_lanes(warp, [&](int lane) {
                const float x = bits_float(high[i][lane]);
                const float rounded = to_tf32(x);
                high[i][lane] = float_bits(rounded);
                low[i][lane] = float_bits(to_tf32(x - rounded));
            });
        }
    }
};

}  // namespace semeda_fast::gpu
