// Rows of the caller's tensors, of any dtype and strides, to and from planar float rows.
// No include guard: see simd.h.

inline float half_to_float(std::uint16_t h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16, exponent = h >> 10 & 31u;
    std::uint32_t mantissa = h & 0x3ffu, pattern;
    if (exponent == 31) {
        pattern = sign | 0x7f800000u | mantissa << 13;
    } else if (exponent) {
        pattern = sign | (exponent + 112) << 23 | mantissa << 13;
    } else {  // zero and subnormal: mantissa * 2^-24, exact in float
        const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
        std::memcpy(&pattern, &value, sizeof(pattern));
        pattern |= sign;
    }
    float x;
    std::memcpy(&x, &pattern, sizeof(x));
    return x;
}

// Rounds to nearest, ties to even, as the hardware does.
inline std::uint16_t float_to_half(float x) {
    std::uint32_t pattern;
    std::memcpy(&pattern, &x, sizeof(pattern));
    const std::uint32_t sign = pattern >> 16 & 0x8000u;
    pattern &= 0x7fffffffu;
    if (pattern > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
    if (pattern >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to infinity
    if (pattern < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded mantissa in the lowest bits
        float value;
        std::memcpy(&value, &pattern, sizeof(value));
        value += 0.5f;
        std::memcpy(&pattern, &value, sizeof(pattern));
        return static_cast<std::uint16_t>(sign | (pattern - 0x3f000000u));
    }
    pattern += 0xfffu + (pattern >> 13 & 1u) - 0x38000000u;
    return static_cast<std::uint16_t>(sign | pattern >> 13);
}

inline float bf16_to_float(std::uint16_t h) {
    const std::uint32_t pattern = static_cast<std::uint32_t>(h) << 16;
    float x;
    std::memcpy(&x, &pattern, sizeof(x));
    return x;
}

inline std::uint16_t float_to_bf16(float x) {
    std::uint32_t pattern;
    std::memcpy(&pattern, &x, sizeof(pattern));
    if ((pattern & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(pattern >> 16 | 0x40u);
    return static_cast<std::uint16_t>((pattern + 0x7fffu + (pattern >> 16 & 1u)) >> 16);
}

// A dtype in memory; with VECTORS also VL values at a time.
struct AsF32 {
    using Type = float;
    static constexpr bool VECTORS = true;
    static float get(float x) { return x; }
    static float put(float x) { return x; }
    static F get_vector(const float* p) { return load(p); }
    static void put_vector(float* p, F a) { store(p, a); }
};
struct AsBf16 {
    using Type = std::uint16_t;
    static float get(std::uint16_t x) { return bf16_to_float(x); }
    static std::uint16_t put(float x) { return float_to_bf16(x); }
#if defined(SEMEDA_AVX512)
    static constexpr bool VECTORS = true;
    static F get_vector(const std::uint16_t* p) {
        const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16))};
    }
    static void put_vector(std::uint16_t* p, F a) {  // as float_to_bf16
        const __m512i pattern = _mm512_castps_si512(a.v), high = _mm512_srli_epi32(pattern, 16);
        const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
        const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(pattern, half), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
        const __m512i all = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(all));
    }
#elif defined(SEMEDA_NEON)
    static constexpr bool VECTORS = true;
    static F get_vector(const std::uint16_t* p) {
        return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))};
    }
    static void put_vector(std::uint16_t* p, F a) {  // as float_to_bf16
        const uint32x4_t pattern = vreinterpretq_u32_f32(a.v), high = vshrq_n_u32(pattern, 16);
        const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
        const uint32x4_t half = vaddq_u32(odd, vdupq_n_u32(0x7fff));
        const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(pattern, half), 16);
        const uint32x4_t nan = vorrq_u32(high, vdupq_n_u32(0x40));
        vst1_u16(p, vmovn_u32(vbslq_u32(vceqq_f32(a.v, a.v), rounded, nan)));
    }
#else
    static constexpr bool VECTORS = false;
#endif
};
struct AsF16 {
    using Type = std::uint16_t;
#if defined(SEMEDA_AVX512)
    static constexpr bool VECTORS = true;
    static F get_vector(const std::uint16_t* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static void put_vector(std::uint16_t* p, F a) {
        constexpr int ROUNDING = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, ROUNDING));
    }
#elif defined(SEMEDA_NEON)
    static constexpr bool VECTORS = true;
    static F get_vector(const std::uint16_t* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))}; }
    static void put_vector(std::uint16_t* p, F a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a.v))); }
#else
    static constexpr bool VECTORS = false;
#endif
#if defined(SEMEDA_AVX512) || defined(SEMEDA_AVX2)
    // By vectors: MSVC has no _cvtsh_ss and no _cvtss_sh.
    static float get(std::uint16_t x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }
    static std::uint16_t put(float x) {
        constexpr int ROUNDING = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return static_cast<std::uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), ROUNDING), 0));
    }
#elif defined(SEMEDA_NEON)
    static float get(std::uint16_t x) {
        __fp16 half;
        std::memcpy(&half, &x, sizeof(half));
        return static_cast<float>(half);
    }
    static std::uint16_t put(float x) {
        const __fp16 half = static_cast<__fp16>(x);
        std::uint16_t pattern;
        std::memcpy(&pattern, &half, sizeof(pattern));
        return pattern;
    }
#else
    static float get(std::uint16_t x) { return half_to_float(x); }
    static std::uint16_t put(float x) { return float_to_half(x); }
#endif
};

// Whether rows of pixels whose channels lie together are turned in registers, VL channels of VL pixels at a
// time.
template <class As>
constexpr bool turned(std::int64_t stride_c, int channels, int pixels) {
    return As::VECTORS && stride_c == 1 && channels >= VL && pixels == UNIT;
}

// The block of VL channels after the one at c: the last one ends with the last channel, and may hold some
// again.
inline int next_block(int c, int channels) {
    if (c + VL == channels) return channels;
    return c + 2 * VL < channels ? c + VL : channels - VL;
}

template <class As>
inline void read_turned(const typename As::Type* from, std::int64_t stride_w, int channels, float* to,
                        std::ptrdiff_t pitch) {
    for (int x = 0; x < UNIT; x += VL) {
        for (int c = 0; c < channels; c = next_block(c, channels)) {
            F rows[VL];
            for (int i = 0; i < VL; ++i) rows[i] = As::get_vector(from + (x + i) * stride_w + c);
            transpose(rows);
            for (int k = 0; k < VL; ++k) store(to + (c + k) * pitch + x, rows[k]);
        }
    }
}

template <class As>
inline void write_turned(typename As::Type* to, std::int64_t stride_w, int channels, const float* from,
                         std::ptrdiff_t pitch) {
    for (int x = 0; x < UNIT; x += VL) {
        for (int c = 0; c < channels; c = next_block(c, channels)) {
            F rows[VL];
            for (int k = 0; k < VL; ++k) rows[k] = load(from + (c + k) * pitch + x);
            transpose(rows);
            for (int i = 0; i < VL; ++i) As::put_vector(to + (x + i) * stride_w + c, rows[i]);
        }
    }
}

// 16 pixels at a time keep what is read and written of both layouts in the first-level cache.
template <class As>
inline void read_planar(const void* base, std::int64_t offset, std::int64_t stride_c, std::int64_t stride_w,
                        int channels, int width, float* to, std::ptrdiff_t pitch) {
    const auto* from = static_cast<const typename As::Type*>(base) + offset;
    if (stride_w == 1) {
        for (int c = 0; c < channels; ++c) {
            const auto* row = from + c * stride_c;
            float* out = to + c * pitch;
            for (int x = 0; x < width; ++x) out[x] = As::get(row[x]);
        }
        return;
    }
    for (int x0 = 0; x0 < width; x0 += UNIT) {
        const int end = width - x0 < UNIT ? width : x0 + UNIT;
        if constexpr (As::VECTORS) {
            if (turned<As>(stride_c, channels, end - x0)) {
                read_turned<As>(from + x0 * stride_w, stride_w, channels, to + x0, pitch);
                continue;
            }
        }
        for (int c = 0; c < channels; ++c) {
            const auto* row = from + c * stride_c;
            float* out = to + c * pitch;
            for (int x = x0; x < end; ++x) out[x] = As::get(row[x * stride_w]);
        }
    }
}

template <class As>
inline void write_planar(void* base, std::int64_t offset, std::int64_t stride_c, std::int64_t stride_w,
                         int channels, int width, const float* from, std::ptrdiff_t pitch) {
    auto* to = static_cast<typename As::Type*>(base) + offset;
    if (stride_w == 1) {
        for (int c = 0; c < channels; ++c) {
            auto* row = to + c * stride_c;
            const float* in = from + c * pitch;
            for (int x = 0; x < width; ++x) row[x] = As::put(in[x]);
        }
        return;
    }
    for (int x0 = 0; x0 < width; x0 += UNIT) {
        const int end = width - x0 < UNIT ? width : x0 + UNIT;
        if constexpr (As::VECTORS) {
            if (turned<As>(stride_c, channels, end - x0)) {
                write_turned<As>(to + x0 * stride_w, stride_w, channels, from + x0, pitch);
                continue;
            }
        }
        for (int c = 0; c < channels; ++c) {
            auto* row = to + c * stride_c;
            const float* in = from + c * pitch;
            for (int x = x0; x < end; ++x) row[x * stride_w] = As::put(in[x]);
        }
    }
}

inline void read_floats(const View& view, std::int64_t n, std::int64_t y, std::int64_t x, int channels,
                        int width, float* to, std::ptrdiff_t pitch) {
    const std::int64_t offset = offset_of(view, n, y, x);
    switch (view.dtype) {
        case DType::bf16:
            return read_planar<AsBf16>(view.data, offset, view.stride[1], view.stride[3], channels, width, to,
                                       pitch);
        case DType::f16:
            return read_planar<AsF16>(view.data, offset, view.stride[1], view.stride[3], channels, width, to,
                                      pitch);
        default:
            return read_planar<AsF32>(view.data, offset, view.stride[1], view.stride[3], channels, width, to,
                                      pitch);
    }
}

inline void write_floats(const View& view, std::int64_t n, std::int64_t y, std::int64_t x, int channels,
                         int width, const float* from, std::ptrdiff_t pitch) {
    const std::int64_t offset = offset_of(view, n, y, x);
    switch (view.dtype) {
        case DType::bf16:
            return write_planar<AsBf16>(view.data, offset, view.stride[1], view.stride[3], channels, width,
                                        from, pitch);
        case DType::f16:
            return write_planar<AsF16>(view.data, offset, view.stride[1], view.stride[3], channels, width,
                                       from, pitch);
        default:
            return write_planar<AsF32>(view.data, offset, view.stride[1], view.stride[3], channels, width,
                                       from, pitch);
    }
}

// Labels as int16: a class, or `classes` for void. `bad` gets 1 where a valid pixel's label is no class (it
// then counts as class 0, so that nothing is read out of bounds), else 0. Returns whether there was one.
template <bool DENSE, class T>
inline bool read_label_row(const T* from, std::int64_t stride, int width, int classes,
                           std::int64_t ignore_index, std::int16_t* labels, std::uint8_t* bad) {
    std::uint8_t any = 0;
    for (int x = 0; x < width; ++x) {
        const std::int64_t label = static_cast<std::int64_t>(from[DENSE ? x : x * stride]);
        const bool is_void = label == ignore_index;
        const bool is_class = static_cast<std::uint64_t>(label) < static_cast<std::uint64_t>(classes);
        const std::uint8_t is_bad = !is_void & !is_class;
        labels[x] = static_cast<std::int16_t>(is_void ? classes : is_class ? label : 0);
        bad[x] = is_bad;
        any |= is_bad;
    }
    return any != 0;
}

inline bool read_labels(const View& view, std::int64_t n, std::int64_t y, std::int64_t x, int width,
                        int classes, std::int64_t ignore_index, std::int16_t* labels, std::uint8_t* bad) {
    const std::int64_t offset = offset_of(view, n, y, x), stride = view.stride[3];
    const auto row = [&](auto* base) {
        return stride == 1
                   ? read_label_row<true>(base + offset, stride, width, classes, ignore_index, labels, bad)
                   : read_label_row<false>(base + offset, stride, width, classes, ignore_index, labels, bad);
    };
    switch (view.dtype) {
        case DType::u8:
            return row(static_cast<const std::uint8_t*>(view.data));
        case DType::i8:
            return row(static_cast<const std::int8_t*>(view.data));
        case DType::i16:
            return row(static_cast<const std::int16_t*>(view.data));
        case DType::u16:
            return row(static_cast<const std::uint16_t*>(view.data));
        case DType::i32:
            return row(static_cast<const std::int32_t*>(view.data));
        default:
            return row(static_cast<const std::int64_t*>(view.data));
    }
}
