// How one problem is cut into tasks, and where everything lies in memory; plus the weights in the kernels'
// order.
//
// An image is cut into strips of columns and chunks of rows; a task is one chunk of one strip, with a halo
// that it computes for itself. The cut depends on sizes alone, never on the number of threads, and each sum
// is taken per row first: so any number of threads gives the same bits.
//
// Rows travel through the layers in rings: each layer's rows are made four at a time from the last rows of
// the layer before, so a task's activations stay in cache whatever the image's height.
#pragma once

#include <cstring>
#include <vector>

#include "api.h"

#if defined(__SANITIZE_ADDRESS__)
    #define SEMEDA_REDZONES 1
#elif defined(__has_feature)
    #if __has_feature(address_sanitizer)
        #define SEMEDA_REDZONES 1
    #endif
#endif
#if defined(SEMEDA_REDZONES)
    #include <sanitizer/asan_interface.h>
#endif

namespace semeda_fast {

constexpr int UNIT = 16;         // pixels; strips, code words and pointwise vectors are counted in units
constexpr int BLOCK_ROWS = 4;    // rows that a layer makes at a time, the output tile of F(4,3)
constexpr int WINOGRAD_J = 6;    // rows of a tile in the transformed domain
constexpr int PAIR_COLUMNS = 4;  // columns of a tile in the domain of F(2,3)
constexpr int TILE_2D_UNITS = 6;
constexpr float WINOGRAD_A = 0.75f, WINOGRAD_B = 1.5f;  // points of F(4,3): 0, +-A, +-B, infinity

enum class Scheme : int { plain, winograd_1d, winograd_2d };

// One convolution, forward or backward (then in and out are exchanged and the kernel is turned by 180
// degrees).
struct Conv {
    int in = 0, out = 0, ksize = 0, pad = 0;
    Scheme scheme = Scheme::plain;
    int groups = 1;      // products per tile that are summed apart: rows of Winograd's domain
    int depth = 0;       // channels per group: in, or in * ksize where kernel rows are channels of one group
    int blocks = 0;      // output channels are cut into so many register blocks
    int columns = 1;     // of the kernel in a group; winograd_2d: of Winograd's domain, PAIR_COLUMNS
    int tile_units = 0;  // columns that are taken at a time, in units
    const float* packed = nullptr;  // [blocks][groups][depth][kernel columns][channels of the block]
};

// Internal linkage: a shared inline function could be taken from the AVX-512 file and run on any processor.
namespace {

// Where a block of output channels begins; the first ones have one channel more than the others.
inline int block_begin(const Conv& c, int block) {
    const int base = c.out / c.blocks, extra = c.out % c.blocks;
    return block * base + (block < extra ? block : extra);
}

// Bytes between two parts, poisoned while a sanitizer watches, so that it sees one overrun into the next.
#if defined(SEMEDA_REDZONES)
constexpr std::size_t REDZONE = 256;
#else
constexpr std::size_t REDZONE = 0;
#endif

// Hands out cache-line-aligned parts of a buffer; with base null it only counts. Where the buffer is not zero
// already, take() makes its part so, and take_raw() leaves that to its caller.
struct Arena {
    char* base = nullptr;
    bool zero = true;
    std::size_t used = 0;
    template <class T>
    T* take(std::size_t count) {
        T* p = take_raw<T>(count);
        if (p && !zero) std::memset(static_cast<void*>(p), 0, count * sizeof(T));
        return p;
    }
    template <class T>
    T* take_raw(std::size_t count) {
        T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
        const std::size_t end = used + (count * sizeof(T) + 63) / 64 * 64 + REDZONE;
#if defined(SEMEDA_REDZONES)
        if (p) ASAN_POISON_MEMORY_REGION(p + count, base + end - reinterpret_cast<char*>(p + count));
#endif
        used = end;
        return p;
    }
};

}  // namespace

struct Plan {
    const LossParams* params = nullptr;
    int halo[MAX_LAYERS + 1] = {};  // pixels around a task that layer l needs: sum of the pads behind it
    int reach[MAX_LAYERS + 1] =
        {};  // pixels of labels around a pixel that layer l sees: sum of the pads up to it
    std::int64_t strips = 1, strip_width = 0, chunks = 1, chunk_rows = 0, tasks = 0;
    int strip_halo = 0;        // halo[0], rounded up to units
    int units = 0;             // of the widest task with its halo
    int margin = 0;            // floats left of each row, zero
    std::ptrdiff_t pitch = 0;  // floats from one channel's row to the next
    Conv fwd[MAX_LAYERS], target[MAX_LAYERS], bwd[MAX_LAYERS];
    int target_layers = 0;                // t_l(q) is needed of layers 1..target_layers
    const float* table[MAX_LAYERS] = {};  // [C + 1, K_l]: t_l inside a region of one class; the last is void
    const float* columns = nullptr;       // [taps, C + 1, width16]: weight columns of layer 1, zero for void
    int columns_width = 0;                // K_1 rounded up to UNIT
    // Codes of one row: planes of one bit a pixel, 2 bytes a unit.
    int plane[MAX_LAYERS] = {}, planes_per_feature[MAX_LAYERS] = {}, planes = 0;
    std::int64_t plane_bytes = 0;
    // saved_d of one row, floats: [layer][unit][K_l][UNIT], so that each layer is written and read in one
    // stream.
    int saved_plane[MAX_LAYERS] = {}, saved_planes = 0;
    std::int64_t saved_pitch = 0;  // floats of one feature
    // What a task makes of the gradient of logits that are scaled up: [rows][channels][partial_pitch] floats.
    std::int64_t partial_pitch = 0, partial_floats = 0;
};

// Owns what a plan points to; one for each calling thread, its memory is kept from call to call.
class PlanMemory {
  public:
    PlanMemory() = default;
    PlanMemory(const PlanMemory&) = delete;
    PlanMemory& operator=(const PlanMemory&) = delete;
    ~PlanMemory();
    // At least `count` floats on a cache line; the same as before, content too, unless it has to grow.
    float* floats(std::size_t count);
    // What lies there was made for.
    const std::vector<char>& key() const { return key_; }
    // To be called when all of it is made: an error before must not leave a key without its content.
    void remember(std::vector<char> key) { key_.swap(key); }

  private:
    std::vector<char> key_;
    float* data_ = nullptr;
    std::size_t size_ = 0;
};

struct Kernels;

// Packs forward or backward weights for these kernels.
Plan make_plan(const LossParams& params, bool backward, const Kernels& kernels, PlanMemory& memory);

// What an instruction set's file offers. Scratch is zero, or else the task zeroes of it what it must.
struct Kernels {
    const char* name;
    int max_block, max_block_2d;  // the most output channels that registers hold; in winograd_2d
    std::size_t (*forward_scratch)(const Plan&);
    std::size_t (*backward_scratch)(const Plan&);
    std::size_t (*gather_scratch)(const Plan&);
    // Sums of the task's rows go to sums + (row of the batch * strips + strip) * (SUM_LAYERS + L).
    void (*forward_task)(const Plan&, std::int64_t task, void* scratch, bool zero, double* sums);
    // Gradients of logits that are scaled up go to partial + task * partial_floats, and gather_partial makes
    // each row of d_logits (counted over the batch) of all tasks' parts. Returns how many labels are no
    // class.
    std::int64_t (*backward_task)(const Plan&, std::int64_t task, void* scratch, bool zero, float* partial);
    void (*gather_partial)(const Plan&, std::int64_t row, void* scratch, const float* partial);
    double (*fma_loop)(std::int64_t rounds);  // returns FLOP done
};

constexpr int SUM_CE = 0, SUM_CE_WEIGHT = 1, SUM_VALID = 2, SUM_BAD = 3, SUM_LAYERS = 4;  // of each row

const Kernels* avx512_kernels();  // null where not compiled in
const Kernels* avx2_kernels();
const Kernels* neon_kernels();
const Kernels* portable_kernels();

}  // namespace semeda_fast
