// Registers of AVX2 with FMA: 8 floats. No include guard: see simd.h.

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
