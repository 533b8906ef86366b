// csrc/params.h for Python; each native module has its own copy of these classes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "check.h"
#include "params.h"

namespace semeda_fast {

namespace py = pybind11;

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// How Python names memory. Contiguous: the address, and the bytes from it on.
using Span = std::pair<std::uintptr_t, std::int64_t>;
// A tensor's: the address, how many elements it lies behind its storage's begin, and the storage's bytes.
using Place = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;

template <class T>
Buffer<T> buffer_at(const Span& span) {
    return {pointer<T>(span.first), span.second > 0 ? span.second : 0};
}

inline void put(TensorView& view, const Place& place) {
    const auto& [address, offset, bytes] = place;
    check_range("the offset of a tensor in its storage", offset, 0, MAX_STRIDE);
    view.data = pointer<void>(address);
    view.before = offset * element_bytes(view.dtype);
    view.after = (bytes > 0 ? bytes : 0) - view.before;
}

inline TensorView make_view(std::uintptr_t address, int dtype, const std::array<std::int64_t, 4>& strides,
                            std::int64_t offset, std::int64_t bytes, std::int64_t fold, std::int64_t outer) {
    check_range("a dtype's code", dtype, 0, static_cast<int>(DType::u16));
    TensorView view;
    view.dtype = static_cast<DType>(dtype);
    for (int i = 0; i < 4; ++i) view.stride[i] = strides[static_cast<std::size_t>(i)];
    view.fold = fold;
    view.outer = outer;
    put(view, {address, offset, bytes});
    return view;
}

inline void add_layer(LossParams& p, int out, int in, int ksize, double inverse, double coefficient) {
    if (p.layers >= MAX_LAYERS) throw py::value_error("a proxy has at most 8 layers here");
    Layer layer;
    layer.in = in;
    layer.out = out;
    layer.ksize = ksize;
    layer.inverse = static_cast<float>(inverse);
    layer.coefficient = static_cast<float>(coefficient);
    check_layer(layer);
    p.layer[p.layers++] = layer;
}

// Python knows memory as a Span, or None where there is none.
template <class Class, class T>
void def_buffer(Class& c, const char* name, Buffer<T> LossParams::* field) {
    c.def_property(
        name,
        [field](const LossParams& p) -> std::optional<Span> {
            const Buffer<T>& buffer = p.*field;
            if (!buffer.is_given()) return std::nullopt;
            return Span(reinterpret_cast<std::uintptr_t>(buffer.data), buffer.bytes);
        },
        [field](LossParams& p, const std::optional<Span>& span) {
            p.*field = span ? buffer_at<T>(*span) : Buffer<T>{};
        });
}

inline py::class_<LossParams> define_params(py::module_& module) {
    py::class_<TensorView>(
        module, "View", py::module_local(),
        "A strided tensor: address, dtype code, strides (n, c, h, w) in elements, and of its "
        "storage: the elements in front of the address, the bytes in all; images in groups of `fold`, "
        "`outer` elements apart.")
        .def(py::init(&make_view), py::arg("address"), py::arg("dtype"), py::arg("strides"),
             py::arg("offset"), py::arg("bytes"), py::arg("fold") = 0, py::arg("outer") = 0);
    py::class_<LossParams> params(module, "LossParams", py::module_local(),
                                  "One computation of the loss; see csrc/params.h.");
    params.def(py::init<>())
        .def(py::init<const LossParams&>(), "A copy.")
        .def_readwrite("n", &LossParams::n)
        .def_readwrite("h", &LossParams::h)
        .def_readwrite("w", &LossParams::w)
        .def_readwrite("logits_h", &LossParams::logits_h)
        .def_readwrite("logits_w", &LossParams::logits_w)
        .def_readwrite("classes", &LossParams::classes)
        .def_readwrite("binary", &LossParams::binary)
        .def_readwrite("logits", &LossParams::logits)
        .def_readwrite("target", &LossParams::target)
        .def_readwrite("valid", &LossParams::valid)
        .def_readwrite("soft", &LossParams::soft)
        .def_readwrite("soft_channels", &LossParams::soft_channels)
        .def_readwrite("soft_tolerance", &LossParams::soft_tolerance)
        .def_readwrite("ignore_index", &LossParams::ignore_index)
        .def_readwrite("label_smoothing", &LossParams::label_smoothing)
        .def_readwrite("weight_rows", &LossParams::weight_rows)
        .def_readwrite("threads", &LossParams::threads)
        .def_readwrite("d_ce", &LossParams::d_ce)
        .def_readwrite("d_semeda", &LossParams::d_semeda)
        .def_readwrite("d_semeda_is_map", &LossParams::d_semeda_is_map)
        .def_readwrite("d_logits", &LossParams::d_logits)
        .def_property(
            "tap", [](const LossParams& p) { return static_cast<int>(p.tap); },
            [](LossParams& p, int tap) {
                check_range("tap", tap, 0, 1);
                p.tap = static_cast<Tap>(tap);
            })
        .def_property(
            "distance", [](const LossParams& p) { return static_cast<int>(p.distance); },
            [](LossParams& p, int distance) {
                check_range("distance", distance, 0, 2);
                p.distance = static_cast<Distance>(distance);
            })
        .def("add_layer", &add_layer)
        .def("set_proxy",
             [](LossParams& p, const Span& flat) { set_proxy(p, buffer_at<const float>(flat)); });
    def_buffer(params, "class_weight", &LossParams::class_weight);
    def_buffer(params, "ce_map", &LossParams::ce_map);
    def_buffer(params, "semeda_map", &LossParams::semeda_map);
    def_buffer(params, "terms", &LossParams::terms);
    def_buffer(params, "counts", &LossParams::counts);
    def_buffer(params, "codes", &LossParams::codes);
    def_buffer(params, "saved_d", &LossParams::saved_d);
    return params;
}

}  // namespace semeda_fast
