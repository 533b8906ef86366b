// csrc/params.h for Python; each native module has its own copy of these classes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "params.h"

namespace semeda_fast {

namespace py = pybind11;

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline View make_view(std::uintptr_t address, int dtype, const std::array<std::int64_t, 4>& strides) {
    View view;
    view.data = pointer<void>(address);
    view.dtype = static_cast<DType>(dtype);
    for (int i = 0; i < 4; ++i) view.stride[i] = strides[static_cast<std::size_t>(i)];
    return view;
}

inline void add_layer(LossParams& p, int out, int in, int ksize, double inverse, double coefficient) {
    if (p.layers == MAX_LAYERS) throw py::value_error("a proxy has at most 8 layers here");
    Layer& layer = p.layer[p.layers++];
    layer.in = in;
    layer.out = out;
    layer.ksize = ksize;
    layer.inverse = static_cast<float>(inverse);
    layer.coefficient = static_cast<float>(coefficient);
}

// Python knows tensors by address; a property of a pointer type is set from one.
template <class Class, class T>
void def_address(Class& c, const char* name, T* LossParams::* field) {
    c.def_property(
        name, [field](const LossParams& p) { return reinterpret_cast<std::uintptr_t>(p.*field); },
        [field](LossParams& p, std::uintptr_t address) { p.*field = pointer<T>(address); });
}

inline py::class_<LossParams> define_params(py::module_& module) {
    py::class_<View>(module, "View", py::module_local(),
                     "A strided tensor: address, dtype code, strides (n, c, h, w) in elements.")
        .def(py::init(&make_view));
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
        .def_readwrite("threads", &LossParams::threads)
        .def_readwrite("d_ce", &LossParams::d_ce)
        .def_readwrite("d_semeda", &LossParams::d_semeda)
        .def_readwrite("d_semeda_is_map", &LossParams::d_semeda_is_map)
        .def_readwrite("d_logits", &LossParams::d_logits)
        .def_property(
            "tap", [](const LossParams& p) { return static_cast<int>(p.tap); },
            [](LossParams& p, int tap) { p.tap = static_cast<Tap>(tap); })
        .def_property(
            "distance", [](const LossParams& p) { return static_cast<int>(p.distance); },
            [](LossParams& p, int distance) { p.distance = static_cast<Distance>(distance); })
        .def("add_layer", &add_layer)
        .def("set_proxy",
             [](LossParams& p, std::uintptr_t address) { set_proxy(p, pointer<const float>(address)); });
    def_address(params, "class_weight", &LossParams::class_weight);
    def_address(params, "ce_map", &LossParams::ce_map);
    def_address(params, "semeda_map", &LossParams::semeda_map);
    def_address(params, "terms", &LossParams::terms);
    def_address(params, "counts", &LossParams::counts);
    def_address(params, "codes", &LossParams::codes);
    def_address(params, "saved_d", &LossParams::saved_d);
    return params;
}

}  // namespace semeda_fast
