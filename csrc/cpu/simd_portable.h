// Plain loops over four lanes, which compilers turn into SSE2 on x86-64. No include guard: see simd.h.

constexpr int VL = 4;
#if defined(__aarch64__) || defined(_M_ARM64)
constexpr int MAX_MB = 8;  // 32 registers
#else
constexpr int MAX_MB = 4;
#endif
constexpr bool FOUR_AT_A_TIME = false;
constexpr int MAX_MB_2D = MAX_MB;
constexpr int MAX_NV = 3;

#if defined(__GNUC__)
typedef float Lanes __attribute__((vector_size(16)));
#else
struct Lanes {
    float a[VL];
    float& operator[](int i) { return a[i]; }
    float operator[](int i) const { return a[i]; }
};
#endif
struct F {
    Lanes v;
};
struct M {
    unsigned m;  // one bit a lane
};
template <class Op>
inline F each(Op op) {
    F r;
    for (int i = 0; i < VL; ++i) r.v[i] = op(i);
    return r;
}
inline F load(const float* p) {
    F r;
    std::memcpy(&r.v, p, sizeof(r.v));
    return r;
}
inline void store(float* p, F a) { std::memcpy(p, &a.v, sizeof(a.v)); }
inline F set1(float x) {
    return each([&](int) { return x; });
}
#if defined(__GNUC__)
inline F operator+(F a, F b) { return {a.v + b.v}; }
inline F operator-(F a, F b) { return {a.v - b.v}; }
inline F operator*(F a, F b) { return {a.v * b.v}; }
inline F operator/(F a, F b) { return {a.v / b.v}; }
inline F fma(F a, F b, F c) { return {a.v * b.v + c.v}; }
#else
inline F operator+(F a, F b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline F operator-(F a, F b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline F operator*(F a, F b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline F operator/(F a, F b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline F fma(F a, F b, F c) { return a * b + c; }
#endif
inline F pick(const float* p, const std::int32_t* lane) {
    return each([&](int i) { return p[lane[i]]; });
}
inline F vmax(F a, F b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F vmin(F a, F b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F vabs(F a) {
    return each([&](int i) { return std::fabs(static_cast<float>(a.v[i])); });
}
inline F vround(F a) {
    return each([&](int i) { return std::nearbyint(static_cast<float>(a.v[i])); });
}
inline F times_exp2(F a, F n) {
    return each([&](int i) {
        const float e = n.v[i];  // NaN and anything else that is no exponent leaves `a`, which is NaN then
        const std::uint32_t power =
            e > -127.0f && e < 128.0f ? static_cast<std::uint32_t>(static_cast<int>(e) + 127) : 127u;
        const std::uint32_t pattern = power << 23;
        float scale;
        std::memcpy(&scale, &pattern, sizeof(scale));
        return a.v[i] * scale;
    });
}
inline M greater(F a, F b) {
    M r{0};
    for (int i = 0; i < VL; ++i) r.m |= static_cast<unsigned>(a.v[i] > b.v[i]) << i;
    return r;
}
inline M equal(F a, F b) {
    M r{0};
    for (int i = 0; i < VL; ++i) r.m |= static_cast<unsigned>(a.v[i] == b.v[i]) << i;
    return r;
}
inline F select(M m, F a, F b) {
    return each([&](int i) { return m.m >> i & 1 ? a.v[i] : b.v[i]; });
}
inline unsigned bits(M m) { return m.m; }
inline M from_bits(unsigned b) { return {b & 15u}; }
inline void split(F x, F& mantissa, F& exponent) {
    for (int i = 0; i < VL; ++i) {
        const float value = x.v[i];
        std::uint32_t pattern;
        std::memcpy(&pattern, &value, sizeof(pattern));
        exponent.v[i] = static_cast<float>(static_cast<int>(pattern >> 23 & 255) - 127);
        pattern = (pattern & 0x007fffffu) | 0x3f800000u;
        float m;
        std::memcpy(&m, &pattern, sizeof(m));
        mantissa.v[i] = m;
    }
}
inline float sum_lanes(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline F shift_up(F a, F b) {
    return each([&](int i) { return i ? b.v[i ? i - 1 : 0] : a.v[VL - 1]; });
}
inline F shift_down(F a, F b) {
    return each([&](int i) { return i + 1 < VL ? a.v[i + 1 < VL ? i + 1 : 0] : b.v[0]; });
}
inline void deinterleave(F a, F b, F& even, F& odd) {
    for (int i = 0; i < VL; ++i) {
        even.v[i] = 2 * i < VL ? a.v[2 * i] : b.v[2 * i - VL];
        odd.v[i] = 2 * i < VL ? a.v[2 * i + 1] : b.v[2 * i + 1 - VL];
    }
}
inline void interleave(F even, F odd, F& a, F& b) {
    for (int i = 0; i < VL; ++i) {
        a.v[i] = i % 2 ? odd.v[i / 2] : even.v[i / 2];
        b.v[i] = i % 2 ? odd.v[(VL + i) / 2] : even.v[(VL + i) / 2];
    }
}
