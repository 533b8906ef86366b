// What the CUDA kernels offer to Python. Implemented twice: launch.cu for a GPU, and
// csrc/tests/cuda_emulation.cpp, which runs the same kernel bodies lane by lane on a CPU.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "layout.h"

namespace semeda_fast::gpu {

// Why no kernel can run on this machine (no driver, no GPU), or "".
std::string why_unavailable();

// Why this loss cannot run on a device: the proxy is not in the whitelist, too little shared memory, too many
// classes, a distance or a target that the kernels do not know. "" where it can. Reads no data.
std::string why_unsupported(const LossParams& params, int device);

// Bytes that forward writes to `codes` for backward, in all.
std::int64_t code_bytes(const LossParams& params);

// Bytes of device memory that forward, or backward, needs while it runs; contents need not be set.
std::int64_t workspace_bytes(const LossParams& params, int device);

// Addresses are on the device; everything is queued on the stream (a cudaStream_t), nothing waits. Memory
// that is too small for the sizes is a std::invalid_argument before anything is queued (../check.h); an error
// of a launch is a std::runtime_error.
void forward(const LossParams& params, const Buffer<char>& workspace, int device, std::uintptr_t stream);
void backward(const LossParams& params, const Buffer<char>& workspace, int device, std::uintptr_t stream);

// How a loss would be cut into tiles on a device: rows, columns, tiles, shared (bytes a block), resident
// (weights stay in shared memory), blocks (of the grid), workspace. For measurements and tests.
std::map<std::string, std::int64_t> plan(const LossParams& params, int device, bool backward);

// A tile of so many rows, and hidden rows of so many pixels, in place of the best; 0, 0 for the best. For
// measurements: forward and backward of one loss may use different ones.
void force_tile(int tile_h, int width);

// Architectures that this build holds code for, such as 80; a negative number is PTX for it and all later
// ones.
std::vector<int> architectures();

}  // namespace semeda_fast::gpu
