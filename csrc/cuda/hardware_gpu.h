// hardware.h on a GPU. Needs sm_80 or later.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__

namespace semeda_fast::gpu {

template <class T>
struct Lanes {
    T value;
    DEVICE T& operator[](int) { return value; }
    DEVICE const T& operator[](int) const { return value; }
};

DEVICE unsigned char* shared_memory() {
    extern __shared__ uint4 memory[];
    return reinterpret_cast<unsigned char*>(memory);
}

struct Warp {
    int index;  // in the block

    template <class T>
    DEVICE T load(int offset) const {
        return *reinterpret_cast<const T*>(shared_memory() + offset);
    }
    // The same for all lanes.
    template <class T>
    DEVICE T load_uniform(int offset) const {
        return load<T>(offset);
    }
    template <class T>
    DEVICE void store(int offset, T value) const {
        *reinterpret_cast<T*>(shared_memory() + offset) = value;
    }
};

template <class F>
DEVICE void for_lanes(Warp, F f) {
    f(static_cast<int>(threadIdx.x) & 31);
}

struct Block {
    DEVICE int index() const { return static_cast<int>(blockIdx.x); }
    DEVICE int count() const { return static_cast<int>(gridDim.x); }

    template <class F>
    DEVICE void phase(F f) {
        // From lane 0, so that the compiler knows that the whole warp has the same.
        f(Warp{__shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0)});
        __syncthreads();
    }
    // What an earlier phase left, for all threads alike.
    template <class T>
    DEVICE T load(int offset) const {
        return *reinterpret_cast<const T*>(shared_memory() + offset);
    }
};

DEVICE void load_matrices(Warp, Lanes<std::uint32_t> (&r)[4], const Lanes<int>& address) {
    const auto at = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared_memory())) + address.value;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0].value), "=r"(r[1].value), "=r"(r[2].value), "=r"(r[3].value)
                 : "r"(at)
                 : "memory");
}

DEVICE void multiply_f16(Lanes<float> (&c)[4], const Lanes<std::uint32_t> (&a)[4],
                         const Lanes<std::uint32_t> (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0].value), "+f"(c[1].value), "+f"(c[2].value), "+f"(c[3].value)
        : "r"(a[0].value), "r"(a[1].value), "r"(a[2].value), "r"(a[3].value), "r"(b[0].value),
          "r"(b[1].value));
}

DEVICE void multiply_tf32(Lanes<float> (&c)[4], const Lanes<std::uint32_t> (&a)[4],
                          const Lanes<std::uint32_t> (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0].value), "+f"(c[1].value), "+f"(c[2].value), "+f"(c[3].value)
        : "r"(a[0].value), "r"(a[1].value), "r"(a[2].value), "r"(a[3].value), "r"(b[0].value),
          "r"(b[1].value));
}

template <class T>
DEVICE Lanes<T> shuffle_xor(Warp, const Lanes<T>& value, int mask) {
    return {__shfl_xor_sync(0xffffffffu, value.value, mask)};
}

// fp32 rounded to tf32's 10 bits of mantissa, ties away from zero.
DEVICE float to_tf32(float value) {
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return __uint_as_float(bits);
}

DEVICE std::uint32_t float_bits(float value) { return __float_as_uint(value); }
DEVICE float bits_float(std::uint32_t bits) { return __uint_as_float(bits); }

// Two numbers as fp16 in a word, the first in the lower half.
DEVICE std::uint32_t to_half2(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&both);
}
// The same, with the largest number where that would be infinity.
DEVICE std::uint32_t to_finite_half2(float low, float high) {
    std::uint32_t both;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
DEVICE std::uint16_t to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
DEVICE float from_half(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
DEVICE std::uint16_t to_bfloat(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

DEVICE float magnitude(float x) { return fabsf(x); }
DEVICE float larger(float x, float y) { return fmaxf(x, y); }
DEVICE float smaller(float x, float y) { return fminf(x, y); }
// `word` with the sign of x behind its lowest bit.
DEVICE std::uint32_t shift_in_sign(std::uint32_t word, float x) {
    return __funnelshift_l(__float_as_uint(x), word, 1);
}

DEVICE float exponential(float x) { return expf(x); }
// 2^x to about 1e-7 of it, and 0 below the normal numbers.
DEVICE float quick_power_of_2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
DEVICE float logarithm(float x) { return logf(x); }
DEVICE float not_a_number() { return __uint_as_float(0x7fc00000u); }

// Of device memory: what no kernel writes while this one runs.
template <class T>
DEVICE T load_constant(const T* at) {
    return __ldg(at);
}

// The same of a number in device memory, or 0: without a branch, so that several are under way at once.
DEVICE unsigned short load_constant_if(bool wanted, const unsigned short* at) {
    unsigned short value;
    asm("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\tmov.b16 %0, 0;\n\t@p ld.global.nc.b16 %0, [%1];\n\t}"
        : "=h"(value)
        : "l"(at), "r"(static_cast<int>(wanted)));
    return value;
}
DEVICE float load_constant_if(bool wanted, const float* at) {
    float value;
    asm("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\tmov.b32 %0, 0;\n\t@p ld.global.nc.b32 %0, [%1];\n\t}"
        : "=f"(value)
        : "l"(at), "r"(static_cast<int>(wanted)));
    return value;
}

}  // namespace semeda_fast::gpu
