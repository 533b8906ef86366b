// How a body becomes a kernel and a kernel a launch.
#pragma once

#include "kernels.h"

namespace semeda_fast::gpu {

// More than 48 KiB of shared memory a block has to be asked for, on each device; and first-level cache is
// given up for it, or the driver might leave room for fewer blocks than the plan counts on.
template <class Argument>
cudaError_t run_kernel(void (*kernel)(Argument), const Argument& argument, int blocks, int bytes,
                       cudaStream_t stream) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
    kernel<<<blocks, THREADS, bytes, stream>>>(argument);
    return cudaGetLastError();
}

}  // namespace semeda_fast::gpu
