// One vector type for every instruction set. Included once per kernels_<isa>.cpp, inside that file's own
// namespace: nothing here may have external linkage, or the linker could hand AVX-512 code to a processor
// without it.
//
//   F    VL floats in one register             M    a lane mask
//   F16  16 floats, the unit of all pointwise work (16 pixels of one channel), in 16 / VL registers
//   Factors<N>  N floats from memory, each a factor of whole registers: fma(factors[i], x, sum)
//
// vmax and vmin return their SECOND argument where one is NaN, so vmax(zero, x) is a ReLU that keeps NaN.
// No include guard: each instruction set compiles its own copy.

#if defined(SEMEDA_AVX512)
    #include "simd_avx512.h"
#elif defined(SEMEDA_AVX2)
    #include "simd_avx2.h"
#elif defined(SEMEDA_NEON)
    #include "simd_neon.h"
#else
    #include "simd_portable.h"
#endif

#if !defined(SEMEDA_NEON)
template <int COUNT>
struct Factors {
    const float* p;
    explicit Factors(const float* from) : p(from) {}
    F operator[](int i) const { return set1(p[i]); }
};
inline F relu(F a) { return vmax(set1(0.0f), a); }
#endif

// Lane i of row k becomes lane k of row i, VL rows: one perfect shuffle for each time that 2 divides VL.
inline void transpose(F* rows) {
    for (int left = VL; left > 1; left /= 2) {
        F mixed[VL];
        SEMEDA_UNROLL
        for (int i = 0; i < VL / 2; ++i) {
            interleave(rows[i], rows[i + VL / 2], mixed[2 * i], mixed[2 * i + 1]);
        }
        SEMEDA_UNROLL
        for (int i = 0; i < VL; ++i) rows[i] = mixed[i];
    }
}

constexpr int PARTS = 16 / VL;
struct F16 {
    F p[PARTS];
};
struct M16 {
    M p[PARTS];
};

template <class Op>
inline F16 map16(Op op) {
    F16 r;
    for (int i = 0; i < PARTS; ++i) r.p[i] = op(i);
    return r;
}
inline F16 load16(const float* p) {
    return map16([&](int i) { return load(p + i * VL); });
}
inline void store16(float* p, F16 a) {
    for (int i = 0; i < PARTS; ++i) store(p + i * VL, a.p[i]);
}
inline F16 splat(float x) {
    return map16([&](int) { return set1(x); });
}
// a: even[0], odd[0], even[1], ...; b: the rest.
inline void interleave16(F16 even, F16 odd, F16& a, F16& b) {
    F parts[2 * PARTS];
    for (int i = 0; i < PARTS; ++i) interleave(even.p[i], odd.p[i], parts[2 * i], parts[2 * i + 1]);
    for (int i = 0; i < PARTS; ++i) a.p[i] = parts[i], b.p[i] = parts[PARTS + i];
}
// Lane i of row k becomes lane k of row i: four perfect shuffles.
inline void transpose16(F16* rows) {
    for (int step = 0; step < 4; ++step) {
        F16 mixed[16];
        SEMEDA_UNROLL
        for (int i = 0; i < 8; ++i) interleave16(rows[i], rows[i + 8], mixed[2 * i], mixed[2 * i + 1]);
        for (int i = 0; i < 16; ++i) rows[i] = mixed[i];
    }
}
inline F16 operator+(F16 a, F16 b) {
    return map16([&](int i) { return a.p[i] + b.p[i]; });
}
inline F16 operator-(F16 a, F16 b) {
    return map16([&](int i) { return a.p[i] - b.p[i]; });
}
inline F16 operator*(F16 a, F16 b) {
    return map16([&](int i) { return a.p[i] * b.p[i]; });
}
inline F16 fma(F16 a, F16 b, F16 c) {
    return map16([&](int i) { return fma(a.p[i], b.p[i], c.p[i]); });
}
inline F16 vmax(F16 a, F16 b) {
    return map16([&](int i) { return vmax(a.p[i], b.p[i]); });
}
inline F16 vmin(F16 a, F16 b) {
    return map16([&](int i) { return vmin(a.p[i], b.p[i]); });
}
inline F16 vabs(F16 a) {
    return map16([&](int i) { return vabs(a.p[i]); });
}
inline F16 relu(F16 a) {
    return map16([&](int i) { return relu(a.p[i]); });
}
inline M16 greater(F16 a, F16 b) {
    M16 r;
    for (int i = 0; i < PARTS; ++i) r.p[i] = greater(a.p[i], b.p[i]);
    return r;
}
inline F16 select(M16 m, F16 a, F16 b) {
    return map16([&](int i) { return select(m.p[i], a.p[i], b.p[i]); });
}
#if defined(SEMEDA_NEON)
// Two bytes of masks at a time, where a lane has 32 bits.
inline unsigned bits(M16 m) {
    const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(m.p[0].m), vreinterpretq_u16_u32(m.p[1].m));
    const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(m.p[2].m), vreinterpretq_u16_u32(m.p[3].m));
    static const std::uint8_t each[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t all = vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
    const uint8x16_t hit = vandq_u8(all, vld1q_u8(each));
    return vaddv_u8(vget_low_u8(hit)) | static_cast<unsigned>(vaddv_u8(vget_high_u8(hit))) << 8;
}
inline M16 from_bits16(unsigned b) {
    const uint32x4_t word = vdupq_n_u32(b);
    M16 r;
    for (unsigned i = 0; i < PARTS; ++i) r.p[i].m = vtstq_u32(word, lane_bits(i * VL));
    return r;
}
#else
inline unsigned bits(M16 m) {
    unsigned r = 0;
    for (int i = 0; i < PARTS; ++i) r |= bits(m.p[i]) << (i * VL);
    return r;
}
inline M16 from_bits16(unsigned b) {
    M16 r;
    for (int i = 0; i < PARTS; ++i) r.p[i] = from_bits(b >> (i * VL) & ((1u << VL) - 1u));
    return r;
}
#endif

// e^x for x <= 0, about 1 ulp (polynomial of Cephes' expf); 0 below -87.3; NaN stays NaN.
inline F exp_nonpositive(F x) {
    const F low = set1(-87.3f);
    const F clamped = vmax(low, x);
    const F n = vround(clamped * set1(1.44269504088896341f));
    F r = fma(n, set1(-0.693359375f), clamped);
    r = fma(n, set1(2.12194440e-4f), r);
    F poly = set1(1.9875691500e-4f);
    poly = fma(poly, r, set1(1.3981999507e-3f));
    poly = fma(poly, r, set1(8.3334519073e-3f));
    poly = fma(poly, r, set1(4.1665795894e-2f));
    poly = fma(poly, r, set1(1.6666665459e-1f));
    poly = fma(poly, r, set1(5.0000001201e-1f));
    poly = fma(poly, r * r, r + set1(1.0f));
    return select(greater(low, x), set1(0.0f), times_exp2(poly, n));
}

// log x for normal x >= 1, about 1 ulp (polynomial of Cephes' logf); NaN stays NaN.
inline F log_of_sum(F x) {
    F m, e;
    split(x, m, e);
    const M high = greater(m, set1(1.41421356f));
    m = select(high, m * set1(0.5f), m);
    e = select(high, e + set1(1.0f), e);
    const F f = m - set1(1.0f);
    const F z = f * f;
    F y = set1(7.0376836292e-2f);
    y = fma(y, f, set1(-1.1514610310e-1f));
    y = fma(y, f, set1(1.1676998740e-1f));
    y = fma(y, f, set1(-1.2420140846e-1f));
    y = fma(y, f, set1(1.4249322787e-1f));
    y = fma(y, f, set1(-1.6668057665e-1f));
    y = fma(y, f, set1(2.0000714765e-1f));
    y = fma(y, f, set1(-2.4999993993e-1f));
    y = fma(y, f, set1(3.3333331174e-1f));
    y = y * f * z;
    y = fma(e, set1(-2.12194440e-4f), y);
    y = fma(z, set1(-0.5f), y);
    const F r = fma(e, set1(0.693359375f), f + y);
    return select(equal(x, x), r, x);
}
inline F16 exp_nonpositive(F16 x) {
    return map16([&](int i) { return exp_nonpositive(x.p[i]); });
}
inline F16 log_of_sum(F16 x) {
    return map16([&](int i) { return log_of_sum(x.p[i]); });
}
inline F16 reciprocal(F16 x) {
    return map16([&](int i) { return set1(1.0f) / x.p[i]; });
}
inline float sum_lanes(F16 a) {
    float s = sum_lanes(a.p[0]);
    for (int i = 1; i < PARTS; ++i) s += sum_lanes(a.p[i]);
    return s;
}
