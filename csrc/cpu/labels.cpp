// Are all labels classes? One pass over them at their own width, before anything is computed.
#include <limits>

#include "../check.h"
#include "api.h"

namespace semeda_fast {

namespace {

template <class T>
bool row_is_bad(const T* label, std::int64_t stride, const std::uint8_t* valid, std::int64_t valid_stride,
                std::int64_t width, std::int64_t classes, std::int64_t ignore_index) {
    bool bad = false;
    for (std::int64_t x = 0; x < width; ++x) {
        const std::int64_t y = static_cast<std::int64_t>(label[x * stride]);
        const bool outside = static_cast<std::uint64_t>(y) >= static_cast<std::uint64_t>(classes);
        bad |= outside && y != ignore_index && (!valid || valid[x * valid_stride]);
    }
    return bad;
}

template <class T>
bool is_bad(const LossParams& p, std::int64_t n, std::int64_t y) {
    const View& t = p.target;
    const T* label = static_cast<const T*>(t.data) + offset_of(t, n, y, 0);
    const auto* valid = static_cast<const std::uint8_t*>(p.valid.data);
    if (valid) valid += offset_of(p.valid, n, y, 0);
    return row_is_bad(label, t.stride[3], valid, p.valid.stride[3], p.w, p.classes, p.ignore_index);
}

}  // namespace

bool has_bad_label(const LossParams& p) {
    check_image(p);
    check_range("the number of classes", p.classes, 0, std::numeric_limits<int>::max());
    if (p.soft) refuse("a soft target holds no labels");
    check_labels(p);
    if (p.w == 0) return false;
    for (std::int64_t row = 0; row < p.n * p.h; ++row) {
        const std::int64_t n = row / p.h, y = row % p.h;
        bool bad = false;
        switch (p.target.dtype) {
            case DType::u8:
                bad = is_bad<std::uint8_t>(p, n, y);
                break;
            case DType::i8:
                bad = is_bad<std::int8_t>(p, n, y);
                break;
            case DType::i16:
                bad = is_bad<std::int16_t>(p, n, y);
                break;
            case DType::u16:
                bad = is_bad<std::uint16_t>(p, n, y);
                break;
            case DType::i32:
                bad = is_bad<std::int32_t>(p, n, y);
                break;
            default:
                bad = is_bad<std::int64_t>(p, n, y);
                break;
        }
        if (bad) return true;
    }
    return false;
}

}  // namespace semeda_fast
