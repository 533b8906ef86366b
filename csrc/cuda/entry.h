// How a body becomes a kernel and a kernel a launch.
#pragma once

#include "kernels.h"

namespace semeda_fast::gpu {

// More than 48 KiB of shared memory a block has to be asked for, on each device. `carveout` is the share of a
// multiprocessor's memory, in percent, that its blocks take together, so that the driver leaves room for all
// of them.
template <class Argument>
cudaError_t run_kernel(void (*kernel)(Argument), const Argument& argument, int blocks, int bytes,
                       int carveout, cudaStream_t stream) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout);
    if (error != cudaSuccess) return error;
    kernel<<<blocks, THREADS, bytes, stream>>>(argument);
    return cudaGetLastError();
}

}  // namespace semeda_fast::gpu
