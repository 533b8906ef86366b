// The Python module semeda_fast._C: plain C++ behind pybind11, no torch headers.
//
// Tensors arrive as addresses, sizes and strides, so one build serves every torch version.
#include <pybind11/pybind11.h>

#include <string>

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
    info["instruction_sets"] = py::tuple();  // no kernel is compiled in yet
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

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Native part of semeda_fast; use it through semeda_fast.native.";
    module.def("build_info", &build_info,
               "How this module was built: compiler, C++ standard, OpenMP, instruction sets with kernels.");
    module.def("cpu_features", &cpu_features, "Which vector extensions the processor and the system offer.");
}
