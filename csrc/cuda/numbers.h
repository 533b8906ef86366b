// Two ways to multiply: fp16 for half-precision logits, three tf32 products for fp32. Both sum in fp32.
//
// A pixel's channels lie in pieces of 16 bytes: 8 channels in fp16, 4 in fp32. A product takes two pieces of
// k.
#pragma once

#include "hardware.h"
#include "problem.h"

namespace semeda_fast::gpu {

struct Half {
    static constexpr int CHANNELS = HALF_CHANNELS;  // of a piece
    struct Left {
        Lanes<std::uint32_t> r[4];
    };
    struct Right {
        Lanes<std::uint32_t> r[2];
    };
    static DEVICE void prepare(Warp, Left&) {}
    static DEVICE void prepare(Warp, Right&) {}
    static DEVICE void multiply(Lanes<float> (&c)[4], const Left& a, const Right& b) {
        multiply_f16(c, a.r, b.r);
    }

    // Two neighbouring channels of a pixel, `channel` even, whose pieces lie where piece_address says; zeros
    // unless `keep`. Saturated, since one infinity would make the whole loss one.
    template <class Address>
    static DEVICE void store_pair(Warp warp, Address piece_address, int channel, bool keep, float x,
                                  float y) {
        const std::uint32_t both = clamp_half2(to_half2(x, y));
        warp.store<std::uint32_t>(piece_address(channel / 8) + 2 * (channel % 8), keep ? both : 0u);
    }
    template <class Address>
    static DEVICE void store_one(Warp warp, Address piece_address, int channel, float x) {
        warp.store<std::uint16_t>(piece_address(channel / 8) + 2 * (channel % 8), to_half(x));
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
    static DEVICE float exp(float x) { return quick_exponential(x); }
};

struct Tf32x3 {
    static constexpr int CHANNELS = TF32_CHANNELS;
    struct Left {
        Lanes<std::uint32_t> r[4], low[4];
    };
    struct Right {
        Lanes<std::uint32_t> r[2], low[2];
    };
    static DEVICE void prepare(Warp warp, Left& a) { split<4>(warp, a.r, a.low); }
    static DEVICE void prepare(Warp warp, Right& b) { split<2>(warp, b.r, b.low); }
    static DEVICE void multiply(Lanes<float> (&c)[4], const Left& a, const Right& b) {
        multiply_tf32(c, a.low, b.r);
        multiply_tf32(c, a.r, b.low);
        multiply_tf32(c, a.r, b.r);
    }
    template <class Address>
    static DEVICE void store_pair(Warp warp, Address piece_address, int channel, bool keep, float x,
                                  float y) {
        warp.store<float2>(piece_address(channel / 4) + 4 * (channel % 4),
                           keep ? float2{x, y} : float2{0, 0});
    }
    template <class Address>
    static DEVICE void store_one(Warp warp, Address piece_address, int channel, float x) {
        warp.store<float>(piece_address(channel / 4) + 4 * (channel % 4), x);
    }
    template <class F>
    static DEVICE std::uint32_t pack_word(int t, F channel_value) {
        return float_bits(channel_value(t));
    }
    template <class F>
    static DEVICE uint4 pack_piece(F channel_value) {
        return uint4{float_bits(channel_value(0)), float_bits(channel_value(1)), float_bits(channel_value(2)),
                     float_bits(channel_value(3))};
    }
    static DEVICE float exp(float x) { return exponential(x); }

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
