// The Python module semeda_fast._C: plain C++ behind pybind11, no torch headers.
//
// Tensors arrive as addresses, sizes and strides, so one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "cpu/features.h"
#include "cpu/params.h"

#if defined(_OPENMP)
    #include <omp.h>
#endif

namespace py = pybind11;

namespace {

std::string compiler_name() {
#if defined(__clang__)
    return "clang " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__) + "." +
           std::to_string(__clang_patchlevel__);
#elif defined(__GNUC__)
    return "gcc " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__) + "." +
           std::to_string(__GNUC_PATCHLEVEL__);
#elif defined(_MSC_VER)
    return "msvc " + std::to_string(_MSC_VER / 100) + "." + std::to_string(_MSC_VER % 100);
#else
    return "unknown";
#endif
}

long cxx_standard() {
#if defined(_MSVC_LANG)
    return _MSVC_LANG;
#else
    return __cplusplus;
#endif
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = compiler_name();
    info["cxx_standard"] = cxx_standard();
#if defined(_OPENMP)
    info["openmp"] = true;
    info["openmp_version"] = _OPENMP;
    // Asked of the runtime that this process loaded, which is torch's when torch was imported first.
    info["openmp_threads"] = omp_get_max_threads();
#else
    info["openmp"] = false;
    info["openmp_version"] = 0;
    info["openmp_threads"] = 1;
#endif
    py::list sets;
    for (const char* const* name = semeda_fast::built_instruction_sets(); *name; ++name) sets.append(*name);
    info["instruction_sets"] = py::tuple(sets);
    return info;
}

py::dict cpu_features() {
    const semeda_fast::CpuFeatures found = semeda_fast::detect_cpu_features();
    py::dict flags;
    flags["avx2"] = found.avx2;
    flags["fma"] = found.fma;
    flags["f16c"] = found.f16c;
    flags["avx512f"] = found.avx512f;
    flags["avx512bw"] = found.avx512bw;
    flags["avx512vl"] = found.avx512vl;
    flags["avx512_bf16"] = found.avx512_bf16;
    flags["neon"] = found.neon;
    flags["neon_bf16"] = found.neon_bf16;
    flags["sve"] = found.sve;
    return flags;
}

using semeda_fast::LossParams;
using semeda_fast::View;

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

View make_view(std::uintptr_t address, int dtype, const std::array<std::int64_t, 4>& strides) {
    View view;
    view.data = pointer<void>(address);
    view.dtype = static_cast<semeda_fast::DType>(dtype);
    for (int i = 0; i < 4; ++i) view.stride[i] = strides[static_cast<std::size_t>(i)];
    return view;
}

// [out, in, k, k] weight and [out] bias, fp32 and contiguous, that outlive the parameters.
void add_layer(LossParams& p, std::uintptr_t weight, std::uintptr_t bias, int out, int in, int ksize,
               double inverse, double coefficient) {
    if (p.layers == semeda_fast::MAX_LAYERS) throw py::value_error("a proxy has at most 8 layers here");
    semeda_fast::Layer& layer = p.layer[p.layers++];
    layer.in = in;
    layer.out = out;
    layer.ksize = ksize;
    layer.weight = pointer<const float>(weight);
    layer.bias = pointer<const float>(bias);
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

void define_cpu(py::module_& module) {
    py::class_<View>(module, "View",
                     "A strided tensor: address, dtype code, strides (n, c, h, w) in elements.")
        .def(py::init(&make_view));
    py::class_<LossParams> params(module, "LossParams",
                                  "One computation of the loss; see csrc/cpu/params.h.");
    params.def(py::init<>())
        .def_readwrite("n", &LossParams::n)
        .def_readwrite("h", &LossParams::h)
        .def_readwrite("w", &LossParams::w)
        .def_readwrite("classes", &LossParams::classes)
        .def_readwrite("binary", &LossParams::binary)
        .def_readwrite("logits", &LossParams::logits)
        .def_readwrite("target", &LossParams::target)
        .def_readwrite("valid", &LossParams::valid)
        .def_readwrite("soft", &LossParams::soft)
        .def_readwrite("soft_channels", &LossParams::soft_channels)
        .def_readwrite("ignore_index", &LossParams::ignore_index)
        .def_readwrite("label_smoothing", &LossParams::label_smoothing)
        .def_readwrite("threads", &LossParams::threads)
        .def_readwrite("d_ce", &LossParams::d_ce)
        .def_readwrite("d_semeda", &LossParams::d_semeda)
        .def_readwrite("d_semeda_is_map", &LossParams::d_semeda_is_map)
        .def_readwrite("d_logits", &LossParams::d_logits)
        .def_property(
            "tap", [](const LossParams& p) { return static_cast<int>(p.tap); },
            [](LossParams& p, int tap) { p.tap = static_cast<semeda_fast::Tap>(tap); })
        .def_property(
            "distance", [](const LossParams& p) { return static_cast<int>(p.distance); },
            [](LossParams& p, int distance) { p.distance = static_cast<semeda_fast::Distance>(distance); })
        .def("add_layer", &add_layer)
        .def("code_bytes_per_row", &semeda_fast::code_bytes_per_row)
        .def("saved_floats_per_row", &semeda_fast::saved_floats_per_row);
    def_address(params, "class_weight", &LossParams::class_weight);
    def_address(params, "ce_map", &LossParams::ce_map);
    def_address(params, "semeda_map", &LossParams::semeda_map);
    def_address(params, "terms", &LossParams::terms);
    def_address(params, "counts", &LossParams::counts);
    def_address(params, "codes", &LossParams::codes);
    def_address(params, "saved_d", &LossParams::saved_d);

    const py::call_guard<py::gil_scoped_release> unlocked;
    module.def("cpu_forward", &semeda_fast::forward, unlocked, "Cross-entropy, distances and codes.");
    module.def("cpu_backward", &semeda_fast::backward, unlocked, "The gradient of the logits.");
    module.def("has_bad_label", &semeda_fast::has_bad_label, unlocked,
               "Whether a valid pixel's label is no class.");
    module.def("instruction_set", &semeda_fast::instruction_set,
               "The instruction set of the kernels in use.");
    module.def("use_instruction_set", &semeda_fast::use_instruction_set,
               "Take the kernels of this name from now on; False where this build or processor lacks them.");
    module.def("fma_peak", &semeda_fast::fma_peak, unlocked, py::arg("threads"),
               "FLOP/s of fused multiply-adds in registers, fp32, each counted as 2.");
    module.def("copy_bandwidth", &semeda_fast::copy_bandwidth, unlocked, py::arg("threads"),
               py::arg("num_bytes"), "Bytes/s of memcpy, read and written bytes both counted.");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Native part of semeda_fast; use it through semeda_fast.native.";
    module.def("build_info", &build_info,
               "How this module was built: compiler, C++ standard, OpenMP, instruction sets with kernels.");
    module.def("cpu_features", &cpu_features, "Which vector extensions the processor and the system offer.");
    define_cpu(module);
}
