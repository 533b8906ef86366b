// What forward keeps for backward: three bits of each hidden feature (t(p) > 0, d > 0, d < 0), two of each of
// the last.
//
//     hidden layer of K channels   planes on, above, below, each [pixels][K / 8] bytes
//     last layer, K >= 8           planes above, below
//     last layer, K = 2            [pixels] bytes: above in bits 0 and 1, below in bits 2 and 3
//
// Bits lie where a lane has them after a product: lane t of the four of a pixel has channels 8j + 2t + i,
// which are bits 2j + i of its K / 4; lanes follow one another from the lowest bit of the first byte. So K =
// 16 is four nibbles. Under tap "post" above and below hold only where t(p) > 0, so backward need not know
// the tap.
#pragma once

#include "geometry.h"

namespace semeda_fast::gpu {

// Bit of a channel in a plane of a pixel, counted from the lowest of the first byte.
DEVICE int code_bit(int channels, int channel) {
    return (channel % 8 / 2) * (channels / 4) + channel / 8 * 2 + channel % 2;
}

// Writes a lane's K / 4 bits of one plane of one pixel. `bits` of K = 16 must hold the neighbour's nibble,
// too.
template <int K>
DEVICE void store_code(std::uint8_t* plane, std::int64_t pixel, int t, std::uint32_t bits) {
    std::uint8_t* at = plane + pixel * (K / 8);
    if (K == 16) {
        if (t % 2 == 0) at[t / 2] = static_cast<std::uint8_t>(bits);
    } else if (K == 32) {
        at[t] = static_cast<std::uint8_t>(bits);
    } else {
        reinterpret_cast<std::uint16_t*>(at)[t] = static_cast<std::uint16_t>(bits);
    }
}

// The word of memory that holds the K / 4 bits of lane t ...
template <int K>
DEVICE std::uint32_t load_code_word(const std::uint8_t* plane, std::int64_t pixel, int t) {
    const std::uint8_t* at = plane + pixel * (K / 8);
    if (K == 16) return load_constant(at + t / 2);
    if (K == 32) return load_constant(at + t);
    return load_constant(reinterpret_cast<const unsigned short*>(at) + t);
}

// ... and those bits.
template <int K>
DEVICE std::uint32_t code_of_word(std::uint32_t word, int t) {
    return K == 16 ? word >> (4 * (t % 2)) & 15u : word;
}

template <int K>
DEVICE std::uint32_t load_code(const std::uint8_t* plane, std::int64_t pixel, int t) {
    return code_of_word<K>(load_code_word<K>(plane, pixel, t), t);
}

}  // namespace semeda_fast::gpu
