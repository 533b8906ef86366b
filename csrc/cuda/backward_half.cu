// Backward for fp16 and bf16 logits: products in fp16.
#include "backward.h"
#include "entry.h"

namespace semeda_fast::gpu {

namespace {

template <class P>
__global__ void __launch_bounds__(THREADS, P::template min_blocks<Half>())
    backward_kernel(const __grid_constant__ Problem problem) {
    Block block;
    backward_block<P, Half>(block, problem);
}

template <class P>
cudaError_t run(const Launch& launch, cudaStream_t stream) {
    return run_kernel<Problem>(backward_kernel<P>, launch.problem, launch.blocks, launch.problem.shared.bytes,
                               launch.carveout, stream);
}

}  // namespace

cudaError_t launch_backward_half(const Launch& launch, cudaStream_t stream) {
    switch (launch.proxy) {
        case ProxyKind::standard:
            return run<DefaultProxy>(launch, stream);
#ifndef SEMEDA_FAST_CUDA_DEFAULT_PROXY_ONLY  // a quick look at what the compiler makes of it
        case ProxyKind::four_layer:
            return run<FourLayerProxy>(launch, stream);
        case ProxyKind::wide:
            return run<WideProxy>(launch, stream);
        case ProxyKind::deep:
            return run<DeepProxy>(launch, stream);
#endif
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace semeda_fast::gpu
