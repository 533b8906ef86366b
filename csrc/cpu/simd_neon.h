// Registers of arm64's Advanced SIMD ("NEON"): 4 floats. No include guard: see simd.h.

constexpr int VL = 4;
constexpr int MAX_MB = 8;  // 8 x 3 accumulators of 32
// Four columns of 7 channels would fit, too, but take a tenth more instructions: 7 divides neither 16 nor 32.
constexpr bool FOUR_AT_A_TIME = false;
constexpr int MAX_MB_2D = MAX_MB;
constexpr int MAX_NV = 3;
struct F {
    float32x4_t v;
};
struct M {
    uint32x4_t m;
};
inline F load(const float* p) { return {vld1q_f32(p)}; }
inline void store(float* p, F a) { vst1q_f32(p, a.v); }
inline F set1(float x) { return {vdupq_n_f32(x)}; }
inline F operator+(F a, F b) { return {vaddq_f32(a.v, b.v)}; }
inline F operator-(F a, F b) { return {vsubq_f32(a.v, b.v)}; }
inline F operator*(F a, F b) { return {vmulq_f32(a.v, b.v)}; }
inline F operator/(F a, F b) { return {vdivq_f32(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline M greater(F a, F b) { return {vcgtq_f32(a.v, b.v)}; }
inline M equal(F a, F b) { return {vceqq_f32(a.v, b.v)}; }
inline F select(M m, F a, F b) { return {vbslq_f32(m.m, a.v, b.v)}; }
// Not FMAX, which keeps a NaN of the first argument, too.
inline F vmax(F a, F b) { return select(greater(a, b), a, b); }
inline F vmin(F a, F b) { return select(greater(b, a), a, b); }
inline F relu(F a) { return {vmaxq_f32(vdupq_n_f32(0.0f), a.v)}; }
inline F vabs(F a) { return {vabsq_f32(a.v)}; }
inline F vround(F a) { return {vrndnq_f32(a.v)}; }
inline F times_exp2(F a, F n) {
    const int32x4_t e = vaddq_s32(vcvtnq_s32_f32(n.v), vdupq_n_s32(127));
    return {vmulq_f32(a.v, vreinterpretq_f32_s32(vshlq_n_s32(e, 23)))};
}
// Bit i in lane i, of the bits from `first` on.
inline uint32x4_t lane_bits(unsigned first) {
    static const std::uint32_t each[4] = {1, 2, 4, 8};
    return vshlq_u32(vld1q_u32(each), vdupq_n_s32(static_cast<int>(first)));
}
inline unsigned bits(M m) { return vaddvq_u32(vandq_u32(m.m, lane_bits(0))); }
inline M from_bits(unsigned b) { return {vtstq_u32(vdupq_n_u32(b), lane_bits(0))}; }
inline void split(F x, F& mantissa, F& exponent) {
    const uint32x4_t i = vreinterpretq_u32_f32(x.v);
    const int32x4_t e = vsubq_s32(vreinterpretq_s32_u32(vshrq_n_u32(i, 23)), vdupq_n_s32(127));
    exponent.v = vcvtq_f32_s32(e);
    const uint32x4_t m = vandq_u32(i, vdupq_n_u32(0x007fffffu));
    mantissa.v = vreinterpretq_f32_u32(vorrq_u32(m, vdupq_n_u32(0x3f800000u)));
}
inline float sum_lanes(F a) { return vaddvq_f32(a.v); }
inline F shift_up(F a, F b) { return {vextq_f32(a.v, b.v, 3)}; }
inline F shift_down(F a, F b) { return {vextq_f32(a.v, b.v, 1)}; }
inline F pick(const float* p, const std::int32_t* lane) {  // bytes 4i to 4i + 3 of the table are lane i
    const uint32x4_t lanes = vreinterpretq_u32_s32(vld1q_s32(lane));
    const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100u), lanes, 0x04040404u);
    const uint8x16_t table = vreinterpretq_u8_f32(vld1q_f32(p));
    return {vreinterpretq_f32_u8(vqtbl1q_u8(table, vreinterpretq_u8_u32(bytes)))};
}
inline void deinterleave(F a, F b, F& even, F& odd) {
    even.v = vuzp1q_f32(a.v, b.v);
    odd.v = vuzp2q_f32(a.v, b.v);
}
inline void interleave(F even, F odd, F& a, F& b) {
    a.v = vzip1q_f32(even.v, odd.v);
    b.v = vzip2q_f32(even.v, odd.v);
}

// One lane of a register as a factor, which costs no register of its own.
struct Lane {
    float32x4_t v;
    int number;
};
inline F fma(Lane a, F b, F c) {  // the number is known to the compiler
    switch (a.number) {
        case 0:
            return {vfmaq_laneq_f32(c.v, b.v, a.v, 0)};
        case 1:
            return {vfmaq_laneq_f32(c.v, b.v, a.v, 1)};
        case 2:
            return {vfmaq_laneq_f32(c.v, b.v, a.v, 2)};
        default:
            return {vfmaq_laneq_f32(c.v, b.v, a.v, 3)};
    }
}
// COUNT factors from memory; the last register overlaps the one before it.
template <int COUNT>
struct Factors {
    static constexpr int QUADS = (COUNT + 3) / 4;
    float32x4_t v[QUADS];
    explicit Factors(const float* p) {
        if constexpr (COUNT == 1) {
            v[0] = vld1q_dup_f32(p);
        } else if constexpr (COUNT < 4) {
            v[0] = vcombine_f32(vld1_f32(p), vld1_f32(p + COUNT - 2));
        } else {
            SEMEDA_UNROLL
            for (int i = 0; i < QUADS; ++i) v[i] = vld1q_f32(p + begin(i));
        }
    }
    static constexpr int begin(int quad) { return 4 * quad + 4 <= COUNT ? 4 * quad : COUNT - 4; }
    Lane operator[](int i) const {
        if constexpr (COUNT == 3) return {v[0], i < 2 ? i : 3};
        if constexpr (COUNT < 4) return {v[0], i};
        return {v[i / 4], i - begin(i / 4)};
    }
};
