// Backward for fp32 logits: products of three tf32 ones.
#include "backward.h"
#include "entry.h"

namespace semeda_fast::gpu {

namespace {

template <class P>
__global__ void __launch_bounds__(THREADS, P::template min_blocks<Tf32x3>())
    backward_kernel(const __grid_constant__ Problem problem) {
    Block block;
    backward_block<P, Tf32x3>(block, problem);
}

template <class P>
cudaError_t run(const Launch& launch, cudaStream_t stream) {
    return run_kernel<Problem>(backward_kernel<P>, launch.problem, launch.blocks, launch.problem.shared.bytes,
                               launch.carveout, stream);
}

}  // namespace

cudaError_t launch_backward_tf32(const Launch& launch, cudaStream_t stream) {
    switch (launch.proxy) {
        case ProxyKind::standard:
            return run<DefaultProxy>(launch, stream);
        case ProxyKind::four_layer:
            return run<FourLayerProxy>(launch, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace semeda_fast::gpu
