// The machine that the kernels are written for: warps of 32 lanes that share memory and multiply matrices
// together.
//
// Two implementations of the same names: hardware_gpu.h is the GPU, csrc/tests/cuda_hardware.h a lane-exact
// emulation in C++. A kernel is a sequence of phases with a barrier behind each:
//
//     block.phase([&](Warp warp) { ... });
//
// A phase is written for a warp. `Lanes<T>` is a register of each lane; `for_lanes(warp, [&](int lane)
// {...})` is what lanes do on their own; products, matrix loads and shuffles stand between such parts and
// take the whole warp.
//
//   Shared memory goes by byte offsets: warp.load<T>(offset), warp.store<T>(offset, value), inside for_lanes;
//   outside it warp.load_uniform<T>(offset), and block.load<T>(offset) between phases, the same for all
//   threads. load_matrices(warp, r, address)   ldmatrix.x4: four matrices of 8 rows x 16 bytes; lane i names
//   row i % 8 of matrix
//                                     i / 8; lane (g, t) = (i / 4, i % 4) gets word t of row g of matrix m in
//                                     r[m]
//   multiply_f16(c, a, b)             mma.m16n8k16, fp16 in, fp32 sums; a[4], b[2], c[4] as in the PTX
//   manual:
//                                     a: rows (g, g + 8) x words (t, t + 4) of k; b: words (t, t + 4) of k,
//                                     column g; c: rows (g, g, g + 8, g + 8), columns (2t, 2t + 1, 2t, 2t +
//                                     1)
//   multiply_tf32(c, a, b)            mma.m16n8k8, the same with one tf32 number a word
//   shuffle_xor(warp, register, mask) the register of lane ^ mask
#pragma once

#include <cstdint>

#include "layout.h"

#if defined(__CUDACC__)
    #include "hardware_gpu.h"
#else
    #include "../tests/cuda_hardware.h"
#endif

namespace semeda_fast::gpu {

// The sum over all lanes, the same in each, in an order that never changes.
template <class T>
DEVICE Lanes<T> warp_sum(Warp warp, Lanes<T> value) {
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) {
        const Lanes<T> other = shuffle_xor(warp, value, mask);
        for_lanes(warp, [&](int lane) { value[lane] += other[lane]; });
    }
    return value;
}

DEVICE Lanes<int> warp_min(Warp warp, Lanes<int> value) {
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) {
        const Lanes<int> other = shuffle_xor(warp, value, mask);
        for_lanes(warp,
                  [&](int lane) { value[lane] = other[lane] < value[lane] ? other[lane] : value[lane]; });
    }
    return value;
}

DEVICE Lanes<int> warp_max(Warp warp, Lanes<int> value) {
    for_lanes(warp, [&](int lane) { value[lane] = -value[lane]; });
    value = warp_min(warp, value);
    for_lanes(warp, [&](int lane) { value[lane] = -value[lane]; });
    return value;
}

}  // namespace semeda_fast::gpu
