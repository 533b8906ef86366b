// The Python module semeda_fast._C: plain C++ behind pybind11, no torch headers.
//
// Tensors arrive as addresses, sizes and strides, so one build serves every torch version.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bind_params.h"
#include "cpu/api.h"
#include "cpu/eager.h"
#include "cpu/features.h"

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

// Forward, with its terms put where torch has its tensors: `to` holds the addresses of ce, semeda, per_layer,
// ce_weight and valid_count; 0 for a map, which the kernels write themselves. Returns how many labels are no
// class.
std::int64_t cpu_forward(const semeda_fast::LossParams& given, const std::array<std::uintptr_t, 5>& to) {
    using semeda_fast::pointer;
    float terms[3 + semeda_fast::MAX_LAYERS] = {};
    std::int64_t counts[2] = {};
    semeda_fast::LossParams p = given;
    p.terms = terms;
    p.counts = counts;
    semeda_fast::forward(p);
    if (to[0]) *pointer<float>(to[0]) = terms[0];
    if (to[1]) *pointer<float>(to[1]) = terms[1];
    std::copy_n(terms + 3, p.layers, pointer<float>(to[2]));
    *pointer<float>(to[3]) = terms[2];
    *pointer<std::int64_t>(to[4]) = counts[0];
    return counts[1];
}

using semeda_fast::EagerLoss;
using semeda_fast::EagerResult;
using Addresses = std::array<std::uintptr_t, 5>;  // of logits, target, valid, class_weight, kept; 0: none

semeda_fast::EagerTensors tensors_at(const Addresses& at, int threads) {
    using semeda_fast::pointer;
    return {pointer<void>(at[0]),        pointer<void>(at[1]), pointer<void>(at[2]),
            pointer<const float>(at[3]), pointer<void>(at[4]), threads};
}

EagerResult eager_forward(const EagerLoss& loss, const Addresses& at, float lambda_ce, float lambda_semeda,
                          std::uintptr_t loss_at, int threads) {
    const EagerResult result = loss.forward(tensors_at(at, threads), lambda_ce, lambda_semeda);
    *semeda_fast::pointer<float>(loss_at) = result.loss;
    return result;
}

void eager_backward(const EagerLoss& loss, const Addresses& at, const EagerResult& result,
                    std::uintptr_t d_loss_at, std::uintptr_t d_logits_at, int dtype,
                    const std::array<std::int64_t, 4>& d_logits_strides, int threads) {
    loss.backward(tensors_at(at, threads), result, *semeda_fast::pointer<const float>(d_loss_at),
                  semeda_fast::make_view(d_logits_at, dtype, d_logits_strides));
}

void define_eager(py::module_& module) {
    using semeda_fast::Reduction;
    const py::call_guard<py::gil_scoped_release> unlocked;
    py::class_<EagerResult>(module, "EagerResult", py::module_local(), "What backward needs of forward.")
        .def_readonly("bad_labels", &EagerResult::bad_labels);
    py::class_<EagerLoss>(module, "EagerLoss", py::module_local(),
                          "The loss with its reduction, without addresses; see csrc/cpu/eager.h.")
        .def(py::init([](const semeda_fast::LossParams& params, const std::vector<std::uintptr_t>& addresses,
                         bool mean, bool weighted, bool nan_if_empty) {
                 std::vector<const float*> proxy;
                 for (const std::uintptr_t address : addresses) {
                     proxy.push_back(semeda_fast::pointer<const float>(address));
                 }
                 return EagerLoss(params, proxy, Reduction{mean, weighted, nan_if_empty});
             }),
             py::arg("params"), py::arg("proxy"), py::kw_only(), py::arg("mean"), py::arg("weighted"),
             py::arg("nan_if_empty"))
        .def_property_readonly("kept_bytes", &EagerLoss::kept_bytes)
        .def_property_readonly("saved_d_at", &EagerLoss::saved_d_at)
        .def_property_readonly("parameters_at", &EagerLoss::parameters_at)
        .def("forward", &eager_forward, unlocked)
        .def("backward", &eager_backward, unlocked)
        .def("seeds", [](const EagerLoss& loss, const EagerResult& result, float d_loss) {
            float d_ce, d_semeda;
            loss.seeds(result, d_loss, d_ce, d_semeda);
            return std::pair(d_ce, d_semeda);
        });
}

void define_cpu(py::module_& module) {
    semeda_fast::define_params(module)
        .def("code_bytes_per_row", &semeda_fast::code_bytes_per_row)
        .def("saved_floats_per_row", &semeda_fast::saved_floats_per_row);

    const py::call_guard<py::gil_scoped_release> unlocked;
    module.def("cpu_forward", &cpu_forward, unlocked, "Cross-entropy, distances and codes.");
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
    define_eager(module);
}
