// api.h on a GPU: what the device has, the small kernels around the main one, and the order of launches.
#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>

#include "api.h"
#include "entry.h"
#include "packing.h"

namespace semeda_fast::gpu {

namespace {

constexpr int SMALL = cudaSharedmemCarveoutDefault;

template <class M>
__global__ void __launch_bounds__(THREADS) prepare_kernel(const __grid_constant__ Launch launch) {
    Block block;
    prepare_block<M>(block, launch.problem, launch.preparation);
}

__global__ void __launch_bounds__(THREADS) finish_kernel(const __grid_constant__ Problem problem) {
    Block block;
    finish_block(block, problem);
}

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next launch of anybody would report it
    throw std::runtime_error(std::string("semeda_fast: ") + what + ": " + cudaGetErrorString(error));
}

DeviceFacts ask_device(int device) {
    const auto ask = [&](cudaDeviceAttr attribute) {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, attribute, device), "asking the device");
        return value;
    };
    return {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

DeviceFacts device_facts(int device) {
    static std::mutex mutex;
    static std::map<int, DeviceFacts> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(device);
    return found != known.end() ? found->second : known.emplace(device, ask_device(device)).first->second;
}

// Makes a device current for as long as it lives; callers may have set another.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "asking for the device");
        if (before_ != device) check(cudaSetDevice(device), "choosing the device");
        changed_ = before_ != device;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

void prepare(const Launch& launch, cudaStream_t stream) {
    check(run_kernel<Launch>(launch.half ? prepare_kernel<Half> : prepare_kernel<Tf32x3>, launch,
                             launch.prepare_blocks, TABLE_BYTES, SMALL, stream),
          "launching prepare_kernel");
}

}  // namespace

std::string why_unavailable() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return std::string("the CUDA driver says: ") + cudaGetErrorString(error);
    }
    return count > 0 ? "" : "the CUDA driver finds no GPU";
}

std::string why_unsupported(const LossParams& params, int device) {
    return why_not(params, device_facts(device));
}

std::int64_t workspace_bytes(const LossParams& params, int device) {
    const DeviceFacts facts = device_facts(device);
    return std::max(plan_launch(params, facts, false).workspace, plan_launch(params, facts, true).workspace);
}

std::map<std::string, std::int64_t> plan(const LossParams& params, int device, bool backward) {
    return plan_facts(plan_launch(params, device_facts(device), backward));
}

void forward(const LossParams& params, const Buffer<char>& workspace, int device, std::uintptr_t stream) {
    const OnDevice guard(device);
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    const Launch launch = make_launch(params, device_facts(device), false, workspace);
    prepare(launch, queue);
    check(launch.half ? launch_forward_half(launch, queue) : launch_forward_tf32(launch, queue),
          "launching forward_kernel");
    check(run_kernel<Problem>(finish_kernel, launch.problem, 1, FINISH_BYTES, SMALL, queue),
          "launching finish_kernel");
}

void backward(const LossParams& params, const Buffer<char>& workspace, int device, std::uintptr_t stream) {
    const OnDevice guard(device);
    const auto queue = reinterpret_cast<cudaStream_t>(stream);
    const Launch launch = make_launch(params, device_facts(device), true, workspace);
    prepare(launch, queue);
    check(launch.half ? launch_backward_half(launch, queue) : launch_backward_tf32(launch, queue),
          "launching backward_kernel");
}

std::vector<int> architectures() { return {SEMEDA_FAST_CUDA_ARCHITECTURES}; }

}  // namespace semeda_fast::gpu
