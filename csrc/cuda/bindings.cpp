// The Python module semeda_fast._C_cuda: the CUDA kernels behind pybind11, no torch headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../bind_params.h"
#include "api.h"

namespace py = pybind11;
namespace gpu = semeda_fast::gpu;
using semeda_fast::LossParams;

// Another name where the same code is built around an emulation of the hardware.
#ifndef SEMEDA_FAST_CUDA_MODULE
    #define SEMEDA_FAST_CUDA_MODULE _C_cuda
#endif

namespace {

using semeda_fast::Buffer;
using semeda_fast::Span;

template <void (*RUN)(const LossParams&, const Buffer<char>&, int, std::uintptr_t)>
void run(const LossParams& params, const Span& workspace, int device, std::uintptr_t stream) {
    RUN(params, semeda_fast::buffer_at<char>(workspace), device, stream);
}

}  // namespace

PYBIND11_MODULE(SEMEDA_FAST_CUDA_MODULE, module) {
    module.doc() = "CUDA part of semeda_fast; use it through semeda_fast.backends.cuda.";
    semeda_fast::define_params(module);
    const py::call_guard<py::gil_scoped_release> unlocked;
    module.attr("MAX_CLASSES") = gpu::MAX_CLASSES;
    module.def("why_unavailable", &gpu::why_unavailable, unlocked, "Why no kernel can run here, or ''.");
    module.def("why_unsupported", &gpu::why_unsupported, "Why this loss cannot run on a device, or ''.");
    module.def("code_bytes", &gpu::code_bytes, "Bytes of codes that forward keeps for backward.");
    module.def("workspace_bytes", &gpu::workspace_bytes,
               "Bytes of scratch on the device, for either direction.");
    module.def("cuda_forward", &run<gpu::forward>, unlocked, "Queue cross-entropy, distances and codes.");
    module.def("cuda_backward", &run<gpu::backward>, unlocked, "Queue the gradient of the logits.");
    module.def("plan", &gpu::plan, "How a loss is cut into tiles on a device.");
    module.def("force_tile", &gpu::force_tile,
               "Rows and width of tiles for measurements; 0, 0 for the best.");
    module.def("architectures", &gpu::architectures, "Built for: 80 is sm_80, -90 is PTX for 9.0 and later.");
}
