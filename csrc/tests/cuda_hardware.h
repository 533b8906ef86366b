// csrc/cuda/hardware.h in C++: warps run one after the other, each lane by itself, and every access to shared
// memory is checked.
//
// A phase is an epoch. Within one, no thread may read what another wrote, nor write what another read or
// wrote; such an access is a race, whatever order the warps happened to run in. Shared memory starts as NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define DEVICE inline

namespace semeda_fast::gpu {

template <class T>
struct Lanes {
    T value[32];
    T& operator[](int lane) { return value[lane]; }
    const T& operator[](int lane) const { return value[lane]; }
};

struct uint4 {
    std::uint32_t x, y, z, w;
};
struct float2 {
    float x, y;
};
struct uint2 {
    std::uint32_t x, y;
};

// What a test may change of the machine, and what the machine found; cuda_emulation_options.cpp has the names
// of the numbers.
struct Emulation {
    using Number = std::int64_t;
    Number multiprocessors = 4, shared_per_block = 227 << 10, shared_per_multiprocessor = 228 << 10;
    Number tile_rows = 0, tile_width = 0;  // plan.h: force_tile
    Number backwards = 0;                  // warps from the last to the first
    Number drop_barrier = -1;  // the number of a barrier, counted from the start of a block, that does not
    Number drop_kernel = -1;   // happen; in blocks of this kernel alone, or of all
    Number swizzle_fault = 0;  // exclusive or with the shared address of odd rows of a matrix load
    Number products = 0;       // matrix products so far
    Number barriers[5] = {};   // of a block of each kernel, the most since they were last set
    Number rows = 0, width = 0, strip_rows = 0, resident = 0, blocks = 0, tiles = 0;  // of the last launch
    int kernel =
        0;  // that runs: 0 before the tiles of forward, 1 forward, 2 finish, 3 before backward, 4 backward
    std::string race;  // the first one, "" where there was none
    std::vector<std::pair<std::uintptr_t, std::uintptr_t>>
        memory;                 // device memory, begin and end; empty: all
    std::size_t last_used = 0;  // of `memory`
};
extern Emulation emulation;

class SharedMemory {
  public:
    explicit SharedMemory(int bytes)
        : bytes_(bytes), memory_(bytes / 4 + 4, 0xffffffffu), units_(bytes / 2 + 8) {}

    template <class T>
    T load(int offset, int thread) {
        check(offset, sizeof(T));
        for (unsigned i = 0; i < (sizeof(T) + 1) / 2; ++i) note_read(offset / 2 + i, thread);
        T value;
        std::memcpy(&value, reinterpret_cast<char*>(memory_.data()) + offset, sizeof(T));
        return value;
    }
    template <class T>
    void store(int offset, T value, int thread) {
        check(offset, sizeof(T));
        for (unsigned i = 0; i < (sizeof(T) + 1) / 2; ++i) note_write(offset / 2 + i, thread);
        std::memcpy(reinterpret_cast<char*>(memory_.data()) + offset, &value, sizeof(T));
    }
    void barrier() {
        const bool here = emulation.drop_kernel < 0 || emulation.drop_kernel == emulation.kernel;
        if (!here || emulation.drop_barrier != barriers_) ++epoch_;
        ++barriers_;
        if (emulation.barriers[emulation.kernel] < barriers_)
            emulation.barriers[emulation.kernel] = barriers_;
    }

  private:
    // Two bytes each: the smallest thing that a thread stores by itself.
    struct Unit {
        std::uint32_t written = 0, read = 0;  // epochs
        std::int32_t writer = -1, reader = -1;
    };
    static constexpr int SEVERAL = 1 << 20;

    void check(int offset, std::size_t size) const {
        if (offset < 0 || offset + static_cast<int>(size) > bytes_ || offset % size != 0)
            throw std::runtime_error("shared memory: " + std::to_string(size) + " bytes at " +
                                     std::to_string(offset) + " of " + std::to_string(bytes_));
    }
    void race(const char* what, int unit, int first, int second) {
        if (emulation.race.empty())
            emulation.race = std::string(what) + " at byte " + std::to_string(2 * unit) + ", threads " +
                             std::to_string(first) + " and " + std::to_string(second) + ", after barrier " +
                             std::to_string(barriers_);
    }
    void note_read(int unit, int thread) {
        Unit& u = units_[unit];
        if (u.written == epoch_ && u.writer != thread)
            race("read of what another thread writes", unit, u.writer, thread);
        u.reader = u.read == epoch_ && u.reader != thread ? SEVERAL : thread;
        u.read = epoch_;
    }
    void note_write(int unit, int thread) {
        Unit& u = units_[unit];
        if (u.written == epoch_ && u.writer != thread) race("two writes", unit, u.writer, thread);
        if (u.read == epoch_ && u.reader != thread)
            race("write of what another thread reads", unit, u.reader, thread);
        u.written = epoch_;
        u.writer = thread;
    }

    int bytes_;
    std::vector<std::uint32_t> memory_;
    std::vector<Unit> units_;
    std::uint32_t epoch_ = 1;
    int barriers_ = 0;
};

extern SharedMemory* shared_memory;
extern int current_thread;  // whose turn it is

struct Warp {
    int index;

    template <class T>
    T load(int offset) const {
        return shared_memory->load<T>(offset, current_thread);
    }
    template <class T>
    T load_uniform(int offset) const {
        current_thread = 32 * index;
        load<T>(offset);
        ++current_thread;  // a second reader, as good as all
        return load<T>(offset);
    }
    template <class T>
    void store(int offset, T value) const {
        shared_memory->store(offset, value, current_thread);
    }
};

template <class F>
void for_lanes(Warp warp, F f) {
    for (int lane = 0; lane < 32; ++lane) {
        current_thread = 32 * warp.index + lane;
        f(lane);
    }
}

class Block {
  public:
    Block(int index, int count, int warps) : index_(index), count_(count), warps_(warps) {}
    int index() const { return index_; }
    int count() const { return count_; }

    template <class F>
    void phase(F f) {
        for (int i = 0; i < warps_; ++i) f(Warp{emulation.backwards ? warps_ - 1 - i : i});
        shared_memory->barrier();
    }
    template <class T>
    T load(int offset) const {
        return shared_memory->load<T>(offset, 1 << 19);  // as a reader that is none of the threads
    }

  private:
    int index_, count_, warps_;
};

inline float bits_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline std::uint32_t float_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

std::uint16_t to_half(float value);  // to nearest, ties to even
float from_half(std::uint16_t bits);
inline std::uint32_t to_half2(float low, float high) {
    return to_half(low) | static_cast<std::uint32_t>(to_half(high)) << 16;
}
inline std::uint32_t to_finite_half2(float low, float high) {
    std::uint32_t both = to_half2(low, high);
    for (int shift = 0; shift < 32; shift += 16)  // infinities become the largest number
        if ((both >> shift & 0x7fffu) == 0x7c00u) both -= 1u << shift;
    return both;
}
inline std::uint16_t to_bfloat(float value) {
    const std::uint32_t bits = float_bits(value);
    if (value != value) return 0x7fff;
    return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline float to_tf32(float value) {
    return value != value ? value : bits_float((float_bits(value) + 0x1000u) & ~0x1fffu);
}

inline float magnitude(float x) { return std::fabs(x); }
inline float larger(float x, float y) { return std::fmax(x, y); }
inline float smaller(float x, float y) { return std::fmin(x, y); }
inline std::uint32_t shift_in_sign(std::uint32_t word, float x) { return word << 1 | float_bits(x) >> 31; }

inline float exponential(float x) { return std::exp(x); }
inline float quick_power_of_2(float x) { return std::exp2(x); }
inline float logarithm(float x) { return std::log(x); }
inline float not_a_number() { return bits_float(0x7fc00000u); }

// Reads of device memory have to be aligned and stay in what a test has named.
void check_device_read(std::uintptr_t at, std::size_t size);

template <class T>
T load_constant(const T* at) {
    check_device_read(reinterpret_cast<std::uintptr_t>(at), sizeof(T));
    return *at;
}

template <class T>
T load_constant_if(bool wanted, const T* at) {
    return wanted ? load_constant(at) : T(0);
}

void load_matrices(Warp warp, Lanes<std::uint32_t> (&r)[4], const Lanes<int>& address);
void multiply_f16(Lanes<float> (&c)[4], const Lanes<std::uint32_t> (&a)[4],
                  const Lanes<std::uint32_t> (&b)[2]);
void multiply_tf32(Lanes<float> (&c)[4], const Lanes<std::uint32_t> (&a)[4],
                   const Lanes<std::uint32_t> (&b)[2]);

template <class T>
Lanes<T> shuffle_xor(Warp, const Lanes<T>& value, int mask) {
    Lanes<T> other;
    for (int lane = 0; lane < 32; ++lane) other[lane] = value[lane ^ mask];
    return other;
}

}  // namespace semeda_fast::gpu
