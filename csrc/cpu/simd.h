// One vector type for every instruction set. Included once per kernels_<isa>.cpp, inside that file's own
// namespace: nothing here may have external linkage, or the linker could hand AVX-512 code to a processor
// without it.
//
//   F    VL floats in one register             M    a lane mask
//   F16  16 floats, the unit of all pointwise work (16 pixels of one channel), in 16 / VL registers
//
// vmax and vmin return their SECOND argument where one is NaN, so vmax(zero, x) is a ReLU that keeps NaN.
// No include guard: each instruction set compiles its own copy.

#if defined(SEMEDA_AVX512)

constexpr int VL = 16;
constexpr int MAX_MB = 8;  // output channels x vectors held in registers: 8 x 3 accumulators of 32
constexpr bool FOUR_AT_A_TIME = true;  // registers hold all four columns of F(2,3) at a time ...
constexpr int MAX_MB_2D = 7;           // ... of so many channels
constexpr int MAX_NV = 3;
struct F {
    __m512 v;
};
struct M {
    __mmask16 m;
};
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline F set1(float x) { return {_mm512_set1_ps(x)}; }
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F vmax(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F vmin(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F vabs(F a) { return {_mm512_abs_ps(a.v)}; }
inline F vround(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F times_exp2(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline M greater(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline M equal(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline F select(M m, F a, F b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
inline unsigned bits(M m) { return m.m; }
inline M from_bits(unsigned b) { return {static_cast<__mmask16>(b)}; }
inline void split(F x, F& mantissa, F& exponent) {
    mantissa.v = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    exponent.v = _mm512_getexp_ps(x.v);
}
inline float sum_lanes(F a) { return _mm512_reduce_add_ps(a.v); }
// Lane i gets lane i - 1 of b, the first one the last lane of a.
inline F shift_up(F a, F b) {
    return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(b.v), _mm512_castps_si512(a.v), 15))};
}
// Lane i gets lane i + 1 of a, the last one the first lane of b.
inline F shift_down(F a, F b) {
    return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(b.v), _mm512_castps_si512(a.v), 1))};
}
// Lane i gets p[lane[i]], each of them below VL.
inline F pick(const float* p, const std::int32_t* lane) {
    return {_mm512_maskz_permutexvar_ps(0xffff, _mm512_loadu_si512(lane), _mm512_loadu_ps(p))};
}
inline void deinterleave(F a, F b, F& even, F& odd) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even.v = _mm512_permutex2var_ps(a.v, evens, b.v);
    odd.v = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), b.v);
}
inline void interleave(F even, F odd, F& a, F& b) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    a.v = _mm512_permutex2var_ps(even.v, low, odd.v);
    b.v = _mm512_permutex2var_ps(even.v, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd.v);
}

#elif defined(SEMEDA_AVX2)

constexpr int VL = 8;
constexpr int MAX_MB = 4;  // 4 x 3 accumulators of 16
constexpr bool FOUR_AT_A_TIME = false;
constexpr int MAX_MB_2D = MAX_MB;
constexpr int MAX_NV = 3;
struct F {
    __m256 v;
};
struct M {
    __m256 m;
};
inline F load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a.v); }
inline F set1(float x) { return {_mm256_set1_ps(x)}; }
inline F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F vmax(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F vmin(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F vabs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline F vround(F a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F times_exp2(F a, F n) {
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)))};
}
inline M greater(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline M equal(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline F select(M m, F a, F b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }
inline unsigned bits(M m) { return static_cast<unsigned>(_mm256_movemask_ps(m.m)); }
inline M from_bits(unsigned b) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i hit = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(b)), lane);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(hit, lane))};
}
inline void split(F x, F& mantissa, F& exponent) {
    const __m256i i = _mm256_castps_si256(x.v);
    exponent.v = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(i, 23), _mm256_set1_epi32(127)));
    const __m256i m = _mm256_and_si256(i, _mm256_set1_epi32(0x007fffff));
    mantissa.v = _mm256_castsi256_ps(_mm256_or_si256(m, _mm256_set1_epi32(0x3f800000)));
}
inline float sum_lanes(F a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline F shift_up(F a, F b) {
    const __m256i turn = _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6);
    return {_mm256_blend_ps(_mm256_permutevar8x32_ps(b.v, turn), _mm256_permutevar8x32_ps(a.v, turn), 1)};
}
inline F shift_down(F a, F b) {
    const __m256i turn = _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 0);
    return {_mm256_blend_ps(_mm256_permutevar8x32_ps(a.v, turn), _mm256_permutevar8x32_ps(b.v, turn), 128)};
}
inline F pick(const float* p, const std::int32_t* lane) {
    const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane));
    return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(p), lanes)};
}
inline __m256 quarters_0213(__m256 a) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(a), _MM_SHUFFLE(3, 1, 2, 0)));
}
inline void deinterleave(F a, F b, F& even, F& odd) {
    even.v = quarters_0213(_mm256_shuffle_ps(a.v, b.v, _MM_SHUFFLE(2, 0, 2, 0)));
    odd.v = quarters_0213(_mm256_shuffle_ps(a.v, b.v, _MM_SHUFFLE(3, 1, 3, 1)));
}
inline void interleave(F even, F odd, F& a, F& b) {
    const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
    a.v = _mm256_permute2f128_ps(low, high, 0x20);
    b.v = _mm256_permute2f128_ps(low, high, 0x31);
}

#else  // portable: plain loops over four lanes, which compilers turn into SSE2 or NEON

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
inline F16 relu(F16 a) { return vmax(splat(0.0f), a); }
inline M16 greater(F16 a, F16 b) {
    M16 r;
    for (int i = 0; i < PARTS; ++i) r.p[i] = greater(a.p[i], b.p[i]);
    return r;
}
inline F16 select(M16 m, F16 a, F16 b) {
    return map16([&](int i) { return select(m.p[i], a.p[i], b.p[i]); });
}
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
