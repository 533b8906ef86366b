// The body of every kernels_<isa>.cpp: the headers above in one namespace of their own, and the table of
// entry points. SEMEDA_ISA is that namespace's name. Everything else in it has internal linkage.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "plan.h"

#if defined(SEMEDA_AVX512) || defined(SEMEDA_AVX2)
    #include <immintrin.h>
#elif defined(SEMEDA_NEON)
    #include <arm_neon.h>
#endif

// Register blocks are arrays that live in registers only where every loop over them is unrolled early.
#if defined(__clang__)
    #define SEMEDA_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
    #define SEMEDA_UNROLL _Pragma("GCC unroll 8")
#else
    #define SEMEDA_UNROLL
#endif

namespace semeda_fast {
namespace {
namespace SEMEDA_ISA {

// clang-format off: each needs those above it
#include "simd.h"
#include "rows.h"
#include "pixels.h"
#include "ahead.h"
#include "conv.h"
#include "rings.h"
#include "upsample.h"
#include "distance.h"
#include "forward.h"
#include "backward.h"
// clang-format on

template <class Scratch>
std::size_t scratch_bytes(const Plan& plan) {
    Arena arena;
    Scratch scratch(plan, arena);
    return arena.used;
}

void forward_task(const Plan& plan, std::int64_t task, void* scratch, bool zero, double* sums) {
    ForwardTask(plan, task, scratch, zero, sums).run();
}

std::int64_t backward_task(const Plan& plan, std::int64_t task, void* scratch, bool zero, float* partial) {
    return BackwardTask(plan, task, scratch, zero, partial).run();
}

// Independent chains of fused multiply-adds in registers, as many as hide their latency.
double fma_loop(std::int64_t rounds) {
    constexpr int CHAINS = 12;
    F acc[CHAINS];
    for (int i = 0; i < CHAINS; ++i) acc[i] = set1(static_cast<float>(i));
    const F a = set1(0.999f), b = set1(0.001f);
    for (std::int64_t r = 0; r < rounds; ++r) {
        for (int i = 0; i < CHAINS; ++i) acc[i] = fma(acc[i], a, b);
    }
    float sink[VL];
    volatile float keep;
    for (int i = 0; i < CHAINS; ++i) {
        store(sink, acc[i]);
        keep = sink[0];
    }
    static_cast<void>(keep);
    return static_cast<double>(rounds) * CHAINS * VL * 2;
}

#define SEMEDA_TEXT(x) #x
#define SEMEDA_NAME(x) SEMEDA_TEXT(x)
const Kernels table = {SEMEDA_NAME(SEMEDA_ISA),
                       MAX_MB,
                       MAX_MB_2D,
                       scratch_bytes<ForwardScratch>,
                       scratch_bytes<BackwardScratch>,
                       scratch_bytes<GatherScratch>,
                       forward_task,
                       backward_task,
                       gather_partial,
                       fma_loop};

}  // namespace SEMEDA_ISA
}  // namespace
}  // namespace semeda_fast
