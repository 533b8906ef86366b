// The Python module semeda_fast._C: plain C++ behind pybind11, no torch headers.
//
// Tensors arrive as addresses, sizes and strides, so one build serves every torch version.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
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

using semeda_fast::buffer_at;
using semeda_fast::need;
using semeda_fast::Place;
using semeda_fast::Span;

// Forward, with its terms put where torch has its tensors: `to` is where ce, semeda, per_layer, ce_weight and
// valid_count go; none for a map, which the kernels write themselves. Returns how many labels are no class.
std::int64_t cpu_forward(const semeda_fast::LossParams& given, const std::array<std::optional<Span>, 5>& to) {
    float terms[3 + semeda_fast::MAX_LAYERS] = {};
    std::int64_t counts[2] = {};
    semeda_fast::LossParams p = given;
    p.terms = {terms, sizeof terms};
    p.counts = {counts, sizeof counts};
    const auto place = [&](std::size_t i) {
        return to[i] ? buffer_at<float>(*to[i]) : semeda_fast::Buffer<float>();
    };
    const auto ce = place(0), semeda = place(1), per_layer = place(2), ce_weight = place(3);
    const auto valid_count = to[4] ? buffer_at<std::int64_t>(*to[4]) : semeda_fast::Buffer<std::int64_t>();
    if (ce.is_given()) need("ce", ce, 4);
    if (semeda.is_given()) need("semeda", semeda, 4);
    need("per_layer", per_layer, 4 * std::int64_t{p.layers});
    need("ce_weight", ce_weight, 4);
    need("valid_count", valid_count, 8);
    semeda_fast::forward(p);
    if (ce.is_given()) *ce = terms[0];
    if (semeda.is_given()) *semeda = terms[1];
    std::copy_n(terms + 3, p.layers, per_layer.data);
    *ce_weight = terms[2];
    *valid_count = counts[0];
    return counts[1];
}

using semeda_fast::EagerLoss;
using semeda_fast::EagerResult;
using Places = std::array<std::optional<Place>, 5>;  // of logits, target, valid, class_weight, kept

semeda_fast::EagerTensors tensors_at(const EagerLoss& loss, const Places& at, int threads) {
    using semeda_fast::DType;
    const auto memory = [&](std::size_t i, DType dtype) -> semeda_fast::Memory {
        if (!at[i]) return {};
        semeda_fast::TensorView view;
        view.dtype = dtype;
        semeda_fast::put(view, *at[i]);
        return {view.data, view.before, view.after};
    };
    return {memory(0, loss.params().logits.dtype),
            memory(1, loss.params().target.dtype),
            memory(2, DType::u8),
            memory(3, DType::f32),
            memory(4, DType::u8),
            threads};
}

EagerResult eager_forward(const EagerLoss& loss, const Places& at, float lambda_ce, float lambda_semeda,
                          const Span& loss_at, int threads) {
    const auto to = buffer_at<float>(loss_at);
    need("the loss", to, 4);
    const EagerResult result = loss.forward(tensors_at(loss, at, threads), lambda_ce, lambda_semeda);
    *to = result.loss;
    return result;
}

std::int64_t eager_backward(const EagerLoss& loss, const Places& at, const EagerResult& result,
                            const Span& d_loss_at, const Place& d_logits_at,
                            const std::array<std::int64_t, 4>& d_logits_strides, int threads) {
    const auto d_loss = buffer_at<const float>(d_loss_at);
    need("the gradient of the loss", d_loss, 4);
    semeda_fast::TensorView d_logits;
    d_logits.dtype = loss.params().logits.dtype;
    std::copy_n(d_logits_strides.begin(), 4, d_logits.stride);
    semeda_fast::put(d_logits, d_logits_at);
    return loss.backward(tensors_at(loss, at, threads), result, *d_loss, d_logits);
}

void define_eager(py::module_& module) {
    using semeda_fast::Reduction;
    const py::call_guard<py::gil_scoped_release> unlocked;
    py::class_<EagerResult>(module, "EagerResult", py::module_local(), "What backward needs of forward.")
        .def_readonly("bad_labels", &EagerResult::bad_labels);
    py::class_<EagerLoss>(module, "EagerLoss", py::module_local(),
                          "The loss with its reduction, without addresses; see csrc/cpu/eager.h.")
        .def(py::init([](const semeda_fast::LossParams& params, const std::vector<Span>& proxy, bool mean,
                         bool weighted, bool nan_if_empty) {
                 std::vector<semeda_fast::Buffer<const float>> tensors;
                 for (const Span& span : proxy) tensors.push_back(buffer_at<const float>(span));
                 return EagerLoss(params, tensors, Reduction{mean, weighted, nan_if_empty});
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
    using semeda_fast::LossParams;
    const auto checked = [](std::int64_t (*count)(const LossParams&)) {
        return [count](const LossParams& params) {
            semeda_fast::check_sizes(params, semeda_fast::MAX_CLASSES);
            return count(params);
        };
    };
    semeda_fast::define_params(module)
        .def("code_bytes_per_row", checked(&semeda_fast::code_bytes_per_row))
        .def("saved_floats_per_row", checked(&semeda_fast::saved_floats_per_row));

    const py::call_guard<py::gil_scoped_release> unlocked;
    module.def("cpu_forward", &cpu_forward, unlocked, "Cross-entropy, distances and codes.");
    module.def("cpu_backward", &semeda_fast::backward, unlocked,
               "The gradient of the logits; how many valid pixels hold a label that is no class.");
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
    module.doc() = "Native part of semeda_fast; use it through semeda_fast.backends.native.";
    module.def("build_info", &build_info,
               "How this module was built: compiler, C++ standard, OpenMP, instruction sets with kernels.");
    module.def("cpu_features", &cpu_features, "Which vector extensions the processor and the system offer.");
    define_cpu(module);
    define_eager(module);
}
