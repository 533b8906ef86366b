// Registers of AVX-512: 16 floats. No include guard: see simd.h.

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
