// Prints what csrc/cuda/plan.cpp decides for losses and devices, for cuda_plan.py. Plain C++, no GPU.
//
// A line on stdin: multiprocessors, bytes of shared memory a block and a multiprocessor, N, C, H, W, 1 for
// fp16 logits (0: fp32), 1 for backward, L, K_1 .. K_L. A line of JSON on stdout for each.
#include <exception>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../cuda/plan.h"

namespace {

using namespace semeda_fast;

std::string quoted(const std::string& text) {
    std::string all = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') all += '\\';
        all += c;
    }
    return all + '"';
}

std::string answer(const std::string& line) {
    std::istringstream in(line);
    gpu::DeviceFacts device{};
    LossParams params;
    int half = 0, backward = 0;
    in >> device.multiprocessors >> device.shared_per_block >> device.shared_per_multiprocessor;
    in >> params.n >> params.classes >> params.h >> params.w >> half >> backward >> params.layers;
    if (!in || params.layers < 1 || params.layers > MAX_LAYERS)
        throw std::runtime_error("a bad line: " + line);
    params.logits.dtype = half ? DType::f16 : DType::f32;
    params.target.dtype = DType::i64;
    for (int i = 0; i < params.layers; ++i) {
        Layer& layer = params.layer[i];
        layer.in = i > 0 ? params.layer[i - 1].out : params.classes;
        in >> layer.out;
        layer.ksize = 3;
        layer.inverse = layer.coefficient = 1;
    }
    if (!in) throw std::runtime_error("a bad line: " + line);

    std::ostringstream out;
    const std::string reason = gpu::why_not(params, device);
    if (!reason.empty()) {
        out << "{\"refused\": " << quoted(reason) << "}";
        return out.str();
    }
    const gpu::Launch launch = gpu::plan_launch(params, device, backward != 0);
    const gpu::Problem& p = launch.problem;
    out << "{\"rows\": " << p.tiling.tile_h << ", \"columns\": " << p.tiling.tile_w
        << ", \"tiles\": " << p.tiling.tiles << ", \"shared\": " << p.shared.bytes
        << ", \"resident\": " << (p.resident ? "true" : "false") << ", \"blocks\": " << launch.blocks
        << ", \"warps\": " << gpu::WARPS << "}";
    return out.str();
}

}  // namespace

int main() {
    try {
        for (std::string line; std::getline(std::cin, line);) std::cout << answer(line) << '\n';
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
    return 0;
}
