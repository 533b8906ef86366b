// From a loss to launches: which compiled proxy, which tile, what lies where. Host code without CUDA.
#pragma once

#include <map>
#include <string>

#include "problem.h"

namespace semeda_fast::gpu {

struct DeviceFacts {
    int multiprocessors;
    int shared_per_block;  // bytes, with opt-in
    int shared_per_multiprocessor;
};

// In the order of proxies.h.
enum class ProxyKind { standard, four_layer, wide, deep, none };

struct Launch {
    ProxyKind proxy;
    bool half;
    Problem problem;
    Preparation preparation;
    int prepare_blocks;
    int blocks;              // of the main kernel
    int carveout;            // percent of a multiprocessor's memory that its blocks share
    std::int64_t workspace;  // bytes
};

// All of these check sizes (../check.h) and throw std::invalid_argument.

// "" or why not. Reads no addresses.
std::string why_not(const LossParams& params, const DeviceFacts& device);

// Sizes alone: no address of it means anything. std::runtime_error with the reason of why_not.
Launch plan_launch(const LossParams& params, const DeviceFacts& device, bool backward);

// What may run: all memory that the kernels will read and write is there.
Launch make_launch(const LossParams& params, const DeviceFacts& device, bool backward,
                   const Buffer<char>& workspace);

// What api.h's plan says.
std::map<std::string, std::int64_t> plan_facts(const Launch& launch);

}  // namespace semeda_fast::gpu
