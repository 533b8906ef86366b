// csrc/cuda/api.h without a GPU: the kernels' bodies run on csrc/tests/cuda_hardware.h, block after block.
#include <algorithm>
#include <cstdlib>

#include "../cuda/api.h"
#include "../cuda/backward.h"
#include "../cuda/forward.h"
#include "../cuda/packing.h"
#include "../cuda/plan.h"

namespace semeda_fast::gpu {

Emulation emulation;
SharedMemory* shared_memory = nullptr;
int current_thread = 0;

std::uint16_t to_half(float value) {
    const std::uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves its bits, rounded, at the end
        return static_cast<std::uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
    }
    return static_cast<std::uint16_t>(sign | (magnitude + 0xc8000fffu + (magnitude >> 13 & 1)) >> 13);
}

namespace {

float half_value(std::uint32_t bits) {
    const float sign = bits & 0x8000u ? -1.f : 1.f;
    const int exponent = static_cast<int>(bits >> 10 & 31u), mantissa = static_cast<int>(bits & 1023u);
    if (exponent == 31) return mantissa != 0 ? not_a_number() : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
    return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

const std::vector<float>& half_values() {
    static const std::vector<float> values = [] {
        std::vector<float> made(65536);
        for (std::uint32_t i = 0; i < 65536; ++i) made[i] = half_value(i);
        return made;
    }();
    return values;
}

float toward_zero(double value) {
    const auto nearest = static_cast<float>(value);
    const bool above = std::fabs(static_cast<double>(nearest)) > std::fabs(value);
    return above ? bits_float(float_bits(nearest) - 1) : nearest;
}

// c[16, 8] += a[16, K] b[K, 8] on whole matrices. Tensor cores add up a product's terms without rounding
// each, and cut the fp32 sum off toward zero (Fasi, Higham, Mikaitis, Pranesh, 2021: "Numerical behavior of
// NVIDIA tensor cores"); here once a product, where the hardware may do so for every 4 to 16 terms.
template <int K>
void multiply(float (&c)[16][8], const float (&a)[16][K], const float (&b)[K][8]) {
    for (int m = 0; m < 16; ++m) {
        double sums[8];
        for (int n = 0; n < 8; ++n) sums[n] = c[m][n];
        for (int k = 0; k < K; ++k)
            for (int n = 0; n < 8; ++n) sums[n] += static_cast<double>(a[m][k]) * b[k][n];
        for (int n = 0; n < 8; ++n) c[m][n] = toward_zero(sums[n]);
    }
    ++emulation.products;
}

template <int K, class Elements>
void multiply_fragments(Lanes<float> (&c)[4], const Lanes<std::uint32_t> (&a)[4],
                        const Lanes<std::uint32_t> (&b)[2], Elements elements) {
    constexpr int N = K / 8;  // numbers of a word
    float left[16][K], right[K][8], sums[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < N; ++i) {
            for (int r = 0; r < 4; ++r)
                left[g + 8 * (r % 2)][N * t + i + K / 2 * (r / 2)] = elements(a[r][lane], i);
            for (int r = 0; r < 2; ++r) right[N * t + i + K / 2 * r][g] = elements(b[r][lane], i);
        }
        for (int r = 0; r < 4; ++r) sums[g + 8 * (r / 2)][2 * t + r % 2] = c[r][lane];
    }
    multiply<K>(sums, left, right);
    for (int lane = 0; lane < 32; ++lane)
        for (int r = 0; r < 4; ++r) c[r][lane] = sums[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2];
}

}  // namespace

float from_half(std::uint16_t bits) { return half_values()[bits]; }

void load_matrices(Warp warp, Lanes<std::uint32_t> (&r)[4], const Lanes<int>& address) {
    for (int lane = 0; lane < 32; ++lane) {
        current_thread = 32 * warp.index + lane;
        const int fault = lane % 2 == 1 ? static_cast<int>(emulation.swizzle_fault) : 0;
        const int at = address[lane] ^ fault;
        const uint4 row = warp.load<uint4>(at);
        const std::uint32_t words[4] = {row.x, row.y, row.z, row.w};
        for (int t = 0; t < 4; ++t) r[lane / 8][lane % 8 * 4 + t] = words[t];
    }
}

void multiply_f16(Lanes<float> (&c)[4], const Lanes<std::uint32_t> (&a)[4],
                  const Lanes<std::uint32_t> (&b)[2]) {
    const float* values = half_values().data();
    multiply_fragments<16>(c, a, b,
                           [&](std::uint32_t word, int i) { return values[word >> (16 * i) & 0xffffu]; });
}

void multiply_tf32(Lanes<float> (&c)[4], const Lanes<std::uint32_t> (&a)[4],
                   const Lanes<std::uint32_t> (&b)[2]) {
    multiply_fragments<8>(c, a, b, [](std::uint32_t word, int) {
        const float value = bits_float(word);
        if (value == value && (word & 0x1fffu) != 0)
            throw std::runtime_error("a number that tf32 does not hold");
        return value;
    });
}

void check_device_read(std::uintptr_t at, std::size_t size) {
    if (at % size != 0)
        throw std::runtime_error("device memory: a misaligned read of " + std::to_string(size) + " bytes");
    const auto& memory = emulation.memory;
    if (memory.empty()) return;
    const auto holds = [&](const std::pair<std::uintptr_t, std::uintptr_t>& range) {
        return at >= range.first && at + size <= range.second;
    };
    if (emulation.last_used < memory.size() && holds(memory[emulation.last_used])) return;
    const auto found = std::find_if(memory.begin(), memory.end(), holds);
    if (found == memory.end())
        throw std::runtime_error("device memory: a read of " + std::to_string(size) +
                                 " bytes beside what there is");
    emulation.last_used = static_cast<std::size_t>(found - memory.begin());
}

namespace {

DeviceFacts facts() {
    return {static_cast<int>(emulation.multiprocessors), static_cast<int>(emulation.shared_per_block),
            static_cast<int>(emulation.shared_per_multiprocessor)};
}

// What a test asks for by option; force_tile of the module stays as it is where none does.
void choose_tile() {
    static bool chosen = false;
    const bool wanted = emulation.tile_rows != 0 || emulation.tile_width != 0;
    if (wanted || chosen)
        force_tile(static_cast<int>(emulation.tile_rows), static_cast<int>(emulation.tile_width));
    chosen = wanted;
}

Launch planned(const LossParams& params, bool backward) {
    choose_tile();
    return plan_launch(params, facts(), backward);
}

Launch launch_of(const LossParams& params, bool backward, const Buffer<char>& workspace) {
    choose_tile();
    return make_launch(params, facts(), backward, workspace);
}

template <class F>
void run_blocks(int kernel, int count, int bytes, F f) {
    emulation.kernel = kernel;
    for (int i = 0; i < count; ++i) {
        SharedMemory memory(bytes);
        shared_memory = &memory;
        Block block(i, count, WARPS);
        f(block);
        shared_memory = nullptr;
    }
}

template <class P, class M>
void run_main(const Launch& launch, bool backward) {
    run_blocks(backward ? 4 : 1, launch.blocks, launch.problem.shared.bytes, [&](Block& block) {
        backward ? backward_block<P, M>(block, launch.problem) : forward_block<P, M>(block, launch.problem);
    });
}

template <class M>
void run_prepare(const Launch& launch, bool backward) {
    run_blocks(backward ? 3 : 0, launch.prepare_blocks, TABLE_BYTES,
               [&](Block& block) { prepare_block<M>(block, launch.problem, launch.preparation); });
}

void note(const Launch& launch) {
    const Problem& p = launch.problem;
    emulation.rows = p.tiling.tile_h;
    emulation.width = p.tiling.width;
    emulation.strip_rows = p.strip_rows;
    emulation.resident = p.resident;
    emulation.blocks = launch.blocks;
    emulation.tiles = p.tiling.tiles;
}

// Seeded faults are compiled one by one, and need no more than this to show.
#ifdef SEMEDA_FAST_EMULATE_DEFAULT_HALF
void run_prepare(const Launch& launch, bool backward) { run_prepare<Half>(launch, backward); }

void run_main(const Launch& launch, bool backward) {
    if (launch.proxy != ProxyKind::standard || !launch.half)
        throw std::runtime_error("this build has the default proxy in half precision alone");
    run_main<DefaultProxy, Half>(launch, backward);
}
#else
void run_prepare(const Launch& launch, bool backward) {
    launch.half ? run_prepare<Half>(launch, backward) : run_prepare<Tf32x3>(launch, backward);
}

void run_main(const Launch& launch, bool backward) {
    switch (launch.proxy) {
        case ProxyKind::standard:
            launch.half ? run_main<DefaultProxy, Half>(launch, backward)
                        : run_main<DefaultProxy, Tf32x3>(launch, backward);
            break;
        case ProxyKind::four_layer:
            launch.half ? run_main<FourLayerProxy, Half>(launch, backward)
                        : run_main<FourLayerProxy, Tf32x3>(launch, backward);
            break;
        case ProxyKind::wide:
            run_main<WideProxy, Half>(launch, backward);
            break;
        default:
            run_main<DeepProxy, Half>(launch, backward);
    }
}
#endif

void run(const Launch& launch, bool backward) {
    emulation.race.clear();
    note(launch);
    run_prepare(launch, backward);
    run_main(launch, backward);
    if (!backward) run_blocks(2, 1, FINISH_BYTES, [&](Block& block) { finish_block(block, launch.problem); });
    if (!emulation.race.empty()) throw std::runtime_error("a race: " + emulation.race);
}

}  // namespace

std::string why_unavailable() { return ""; }

std::string why_unsupported(const LossParams& params, int) {
    choose_tile();
    return why_not(params, facts());
}

std::int64_t workspace_bytes(const LossParams& params, int) {
    return std::max(planned(params, false).workspace, planned(params, true).workspace);
}

std::map<std::string, std::int64_t> plan(const LossParams& params, int, bool backward) {
    return plan_facts(planned(params, backward));
}

void forward(const LossParams& params, const Buffer<char>& workspace, int, std::uintptr_t) {
    run(launch_of(params, false, workspace), false);
}

void backward(const LossParams& params, const Buffer<char>& workspace, int, std::uintptr_t) {
    run(launch_of(params, true, workspace), true);
}

std::vector<int> architectures() { return {}; }

}  // namespace semeda_fast::gpu
