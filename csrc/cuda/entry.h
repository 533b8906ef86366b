// How a body becomes a kernel and a kernel a launch.
#pragma once

#include "kernels.h"

namespace semeda_fast::gpu {

// What a block may have on the current device, of which no kernel takes any for static variables.
inline cudaError_t most_shared_memory(int& bytes) {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    return error != cudaSuccess
               ? error
               : cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// More than 48 KiB of shared memory a block has to be asked for, on each device. Always the most, and not
// `bytes`: another thread may ask for a smaller tile between this and the launch. `carveout` is the share of
// a multiprocessor's memory, in percent, that its blocks take together, so that the driver leaves room for
// all of them.
template <class Argument>
cudaError_t run_kernel(void (*kernel)(Argument), const Argument& argument, int blocks, int bytes,
                       int carveout, cudaStream_t stream) {
    int most = 0;
    cudaError_t error = most_shared_memory(most);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, carveout);
    if (error != cudaSuccess) return error;
    kernel<<<blocks, THREADS, bytes, stream>>>(argument);
    return cudaGetLastError();
}

}  // namespace semeda_fast::gpu
