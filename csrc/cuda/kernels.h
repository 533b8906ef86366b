// The kernels as one call each, implemented in forward_*.cu and backward_*.cu, a file for each kind of
// numbers, so that they compile side by side.
#pragma once

#include <cuda_runtime_api.h>

#include "plan.h"

namespace semeda_fast::gpu {

cudaError_t launch_forward_half(const Launch& launch, cudaStream_t stream);
cudaError_t launch_forward_tf32(const Launch& launch, cudaStream_t stream);
cudaError_t launch_backward_half(const Launch& launch, cudaStream_t stream);
cudaError_t launch_backward_tf32(const Launch& launch, cudaStream_t stream);

}  // namespace semeda_fast::gpu
