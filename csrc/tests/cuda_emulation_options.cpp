// What tests reach of the emulated hardware beside the module's own functions: by ctypes, on the same
// library.
#include <cstdint>
#include <cstring>
#include <string>

#include "cuda_hardware.h"

#if defined(_WIN32)
    #define EXPORT extern "C" __declspec(dllexport)
#else
    #define EXPORT extern "C" __attribute__((visibility("default")))
#endif

using namespace semeda_fast::gpu;

namespace {

std::int64_t* find_number(const char* name) {
    Emulation& e = emulation;
    const struct {
        const char* name;
        std::int64_t* number;
    } all[] = {
        {"multiprocessors", &e.multiprocessors},
        {"shared_per_block", &e.shared_per_block},
        {"shared_per_multiprocessor", &e.shared_per_multiprocessor},
        {"tile_rows", &e.tile_rows},
        {"tile_width", &e.tile_width},
        {"backwards", &e.backwards},
        {"drop_barrier", &e.drop_barrier},
        {"drop_kernel", &e.drop_kernel},
        {"swizzle_fault", &e.swizzle_fault},
        {"products", &e.products},
        {"barriers_0", &e.barriers[0]},
        {"barriers_1", &e.barriers[1]},
        {"barriers_2", &e.barriers[2]},
        {"barriers_3", &e.barriers[3]},
        {"barriers_4", &e.barriers[4]},
        {"rows", &e.rows},
        {"width", &e.width},
        {"strip_rows", &e.strip_rows},
        {"resident", &e.resident},
        {"blocks", &e.blocks},
        {"tiles", &e.tiles},
    };
    for (const auto& one : all)
        if (std::strcmp(one.name, name) == 0) return one.number;
    return nullptr;
}

std::string message;

template <int N>
void read(Lanes<std::uint32_t> (&to)[N], const std::uint32_t* from) {
    for (int r = 0; r < N; ++r)
        for (int lane = 0; lane < 32; ++lane) to[r][lane] = from[32 * r + lane];
}

template <class Multiply>
void multiply(float* c, const std::uint32_t* a, const std::uint32_t* b, Multiply product) {
    Lanes<float> sums[4];
    Lanes<std::uint32_t> left[4], right[2];
    read(left, a);
    read(right, b);
    for (int i = 0; i < 128; ++i) sums[i / 32][i % 32] = c[i];
    product(sums, left, right);
    for (int i = 0; i < 128; ++i) c[i] = sums[i / 32][i % 32];
}

}  // namespace

// 0, or -1 where there is no such number.
EXPORT int semeda_fast_emulation_set(const char* name, std::int64_t value) {
    std::int64_t* const number = find_number(name);
    if (number == nullptr) return -1;
    *number = value;
    return 0;
}

EXPORT int semeda_fast_emulation_get(const char* name, std::int64_t* value) {
    const std::int64_t* const number = find_number(name);
    if (number == nullptr) return -1;
    *value = *number;
    return 0;
}

// Device memory that may be read; all of it as long as nothing was named. Null forgets what was.
EXPORT void semeda_fast_emulation_allow(const void* begin, std::int64_t bytes) {
    if (begin == nullptr) {
        emulation.memory.clear();
        return;
    }
    const auto at = reinterpret_cast<std::uintptr_t>(begin);
    emulation.memory.emplace_back(at, at + static_cast<std::uintptr_t>(bytes));
}

// Registers are [number][32 lanes].
EXPORT void semeda_fast_emulated_multiply_f16(float* c, const std::uint32_t* a, const std::uint32_t* b) {
    multiply(c, a, b, [](auto& sums, auto& left, auto& right) { multiply_f16(sums, left, right); });
}

// 0, or -1 where an operand is no tf32.
EXPORT int semeda_fast_emulated_multiply_tf32(float* c, const std::uint32_t* a, const std::uint32_t* b) {
    try {
        multiply(c, a, b, [](auto& sums, auto& left, auto& right) { multiply_tf32(sums, left, right); });
    } catch (const std::exception&) {
        return -1;
    }
    return 0;
}

// address[32] in the `bytes` of shared memory; r[4][32].
EXPORT void semeda_fast_emulated_load_matrices(const std::uint32_t* memory, int bytes, const int* address,
                                               std::uint32_t* r) {
    SharedMemory shared(bytes);
    for (int i = 0; i < bytes / 4; ++i) shared.store<std::uint32_t>(4 * i, memory[i], 0);
    shared.barrier();
    shared_memory = &shared;
    Lanes<int> rows;
    for (int lane = 0; lane < 32; ++lane) rows[lane] = address[lane];
    Lanes<std::uint32_t> loaded[4];
    load_matrices(Warp{0}, loaded, rows);
    shared_memory = nullptr;
    for (int i = 0; i < 128; ++i) r[i] = loaded[i / 32][i % 32];
}

EXPORT void semeda_fast_emulated_shuffle_xor(const std::uint32_t* value, int mask, std::uint32_t* other) {
    Lanes<std::uint32_t> mine[1];
    read(mine, value);
    const Lanes<std::uint32_t> theirs = shuffle_xor(Warp{0}, mine[0], mask);
    for (int lane = 0; lane < 32; ++lane) other[lane] = theirs[lane];
}

EXPORT void semeda_fast_emulated_to_half(const float* from, std::uint16_t* to, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = to_half(from[i]);
}
EXPORT void semeda_fast_emulated_from_half(const std::uint16_t* from, float* to, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = from_half(from[i]);
}
EXPORT void semeda_fast_emulated_to_bfloat(const float* from, std::uint16_t* to, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = to_bfloat(from[i]);
}
EXPORT void semeda_fast_emulated_to_tf32(const float* from, float* to, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = to_tf32(from[i]);
}

// Accesses of 4 bytes to fresh shared memory: [count][3] of what (0 load, 1 store, 2 barrier), thread,
// offset. Returns the race that was found, or what else was wrong, or "".
EXPORT const char* semeda_fast_emulated_accesses(int bytes, const int* script, int count) {
    SharedMemory shared(bytes);
    emulation.race.clear();
    message.clear();
    try {
        for (int i = 0; i < count; ++i) {
            const int what = script[3 * i], thread = script[3 * i + 1], offset = script[3 * i + 2];
            if (what == 0)
                shared.load<std::uint32_t>(offset, thread);
            else if (what == 1)
                shared.store<std::uint32_t>(offset, 0u, thread);
            else
                shared.barrier();
        }
        message = emulation.race;
    } catch (const std::exception& error) {
        message = error.what();
    }
    emulation.race.clear();
    return message.c_str();
}

// Bits of a word of shared memory that nobody has written.
EXPORT std::uint32_t semeda_fast_emulated_poison(int bytes, int offset) {
    return SharedMemory(bytes).load<std::uint32_t>(offset, 0);
}
