// What the sanitizers' cases are made of: memory of its exact size, strided tensors in it, reproducible
// numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>

#include "../cpu/api.h"

namespace {

using namespace semeda_fast;

enum class Layout { nchw, channels_last, transposed, spaced, expanded };

// A heap block of exactly `bytes`, none where 0, filled with `poison`.
class Block {
  public:
    explicit Block(std::size_t bytes, int poison = 0xFF)
        : bytes_(bytes), data_(bytes ? std::malloc(bytes) : nullptr) {
        if (bytes) std::memset(data_, poison, bytes);
    }
    Block(Block&& other) noexcept : bytes_(other.bytes_), data_(other.data_) { other.data_ = nullptr; }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    ~Block() { std::free(data_); }
    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }
    template <class T>
    Buffer<T> buffer() const {  // none where there are no bytes
        if (!bytes_) return {};
        return {static_cast<T*>(data_), static_cast<std::int64_t>(bytes_)};
    }
    std::size_t bytes() const { return bytes_; }
    bool same(const Block& other) const {
        return bytes_ == other.bytes_ && (!bytes_ || !std::memcmp(data_, other.data_, bytes_));
    }

  private:
    std::size_t bytes_;
    void* data_;
};

std::size_t size_of(DType dtype) {
    static const std::size_t sizes[] = {4, 2, 2, 1, 1, 2, 4, 8, 2};
    return sizes[static_cast<int>(dtype)];
}

// A tensor of sizes [n, c, h, w] in one of the layouts, its block as small as its strides allow.
struct Tensor {
    std::int64_t size[4];
    TensorView view;
    Block block;

    Tensor(std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w, DType dtype, Layout layout,
           int poison = 0xFF)
        : size{n, c, h, w}, view(make_view(dtype, layout)), block(span() * size_of(dtype), poison) {
        view.data = block.as<void>();
        view.before = 0;
        view.after = static_cast<std::int64_t>(block.bytes());
    }
    TensorView make_view(DType dtype, Layout layout) const {
        const std::int64_t c = size[1], h = size[2], w = size[3];
        TensorView v;
        v.dtype = dtype;
        const std::int64_t strides[5][4] = {{c * h * w, h * w, w, 1},
                                            {c * h * w, 1, w * c, c},
                                            {c * h * w, h * w, 1, h},
                                            {c * h * w * 2, h * w * 2, w * 2, 2},
                                            {0, h * w, w, 1}};
        std::memcpy(v.stride, strides[static_cast<int>(layout)], sizeof v.stride);
        return v;
    }
    std::size_t span() const {
        std::int64_t elements = 1;
        for (int i = 0; i < 4; ++i) elements += (size[i] - 1) * view.stride[i];
        return static_cast<std::size_t>(elements);
    }
    template <class Set>
    void fill(const Set& value) {
        for (std::int64_t n = 0; n < size[0]; ++n)
            for (std::int64_t c = 0; c < size[1]; ++c)
                for (std::int64_t y = 0; y < size[2]; ++y)
                    for (std::int64_t x = 0; x < size[3]; ++x)
                        put(n * view.stride[0] + c * view.stride[1] + y * view.stride[2] + x * view.stride[3],
                            value(n, c, y, x));
    }
    // Floats must be exact in the dtype: they are cut, not rounded.
    void put(std::int64_t at, double value) {
        const float f = static_cast<float>(value);
        std::uint32_t bits;
        std::memcpy(&bits, &f, 4);
        const std::uint32_t exponent = bits >> 23 & 255u;
        switch (view.dtype) {
            case DType::f32:
                block.as<float>()[at] = f;
                break;
            case DType::bf16:
                block.as<std::uint16_t>()[at] = static_cast<std::uint16_t>(bits >> 16);
                break;
            case DType::f16:
                block.as<std::uint16_t>()[at] = static_cast<std::uint16_t>(
                    exponent == 255 ? 0x7e00u
                    : exponent < 113
                        ? 0u
                        : (bits >> 16 & 0x8000u) | (exponent - 112) << 10 | (bits >> 13 & 0x3ffu));
                break;
            case DType::u8:
                block.as<std::uint8_t>()[at] = static_cast<std::uint8_t>(value);
                break;
            case DType::i8:
                block.as<std::int8_t>()[at] = static_cast<std::int8_t>(value);
                break;
            case DType::i16:
                block.as<std::int16_t>()[at] = static_cast<std::int16_t>(value);
                break;
            case DType::u16:
                block.as<std::uint16_t>()[at] = static_cast<std::uint16_t>(value);
                break;
            case DType::i32:
                block.as<std::int32_t>()[at] = static_cast<std::int32_t>(value);
                break;
            case DType::i64:
                block.as<std::int64_t>()[at] = static_cast<std::int64_t>(value);
                break;
        }
    }
};

double element(const Block& block, DType dtype, std::size_t at) {
    if (dtype == DType::f32) return block.as<float>()[at];
    const unsigned bits = block.as<std::uint16_t>()[at];
    if (dtype == DType::bf16) {
        const std::uint32_t wide = bits << 16;
        float f;
        std::memcpy(&f, &wide, 4);
        return f;
    }
    const int exponent = static_cast<int>(bits >> 10 & 31u);
    const double sign = bits >> 15 ? -1.0 : 1.0, mantissa = bits & 1023u;
    if (exponent == 31) return std::nan("");
    return sign * (exponent ? std::ldexp(1024.0 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

class Random {
  public:
    explicit Random(unsigned seed) : engine_(seed) {}
    int below(int end) { return static_cast<int>(engine_() % static_cast<unsigned>(end)); }
    double eighth() { return (below(65) - 32) / 8.0; }  // exact in every dtype
    float weight(double scale) { return static_cast<float>((below(2001) - 1000) / 1000.0 * scale); }

  private:
    std::mt19937 engine_;
};

}  // namespace
