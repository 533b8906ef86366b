// Runs the tasks of a plan on all threads, and adds up what they found in a fixed order.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../check.h"
#include "features.h"
#include "plan.h"

#if defined(_OPENMP)
    #include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
    #include <pthread.h>
    #define SEMEDA_FAST_FORKS 1
#endif
#if defined(__linux__)
    #include <sys/mman.h>
#endif

namespace semeda_fast {

namespace {

bool processor_has(const Kernels* kernels) {
    static const CpuFeatures found = detect_cpu_features();
    if (!kernels) return false;
    if (!std::strcmp(kernels->name, "avx512")) {
        return found.avx512f && found.avx512bw && found.avx512vl && found.fma && found.f16c;
    }
    if (!std::strcmp(kernels->name, "avx2")) return found.avx2 && found.fma && found.f16c;
    if (!std::strcmp(kernels->name, "neon")) return found.neon;
    return true;
}

const Kernels* const* all_kernels() {
    static const Kernels* const all[] = {avx512_kernels(), avx2_kernels(), neon_kernels(),
                                         portable_kernels()};
    return all;
}
constexpr int NUM_KERNELS = 4;

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
    if (const Kernels* known = chosen.load()) return *known;
    for (int i = 0; i < NUM_KERNELS; ++i) {
        if (processor_has(all_kernels()[i])) {
            chosen.store(all_kernels()[i]);
            break;
        }
    }
    return *chosen.load();
}

// OpenMP's worker threads do not live on in a forked child, and waiting for them would hang there.
std::atomic<bool> forked{false};

// At load time: torch may have started the worker threads before any call of ours.
#if defined(SEMEDA_FAST_FORKS)
const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
#endif

// Scratch of this thread, kept from call to call so that no call faults its pages in anew.
struct Scratch {
    PlanMemory memory;
    std::uint64_t zeroed_for = 0;  // the number of the run_tasks that zeroed it last
};
Scratch& scratch_of_thread() {
    thread_local Scratch scratch;
    return scratch;
}

struct CallMemory {
    PlanMemory forward_weights, backward_weights, sums, partial;
};
CallMemory& memory_of_caller() {
    thread_local CallMemory memory;
    return memory;
}

std::atomic<std::uint64_t> runs{0};  // of run_tasks, whatever its tasks

// A team larger than this gains nothing, and OpenMP ends the process where the system has no more threads.
int max_threads() {
    static const int most = std::max(64, 4 * static_cast<int>(std::thread::hardware_concurrency()));
    return most;
}

// task(i, scratch, zero) for i in [0, tasks), in any order, on up to `threads` threads. Scratch is zero where
// tasks are not `alike`. Those that are lay it out alike, and leave zero what they expect to be zero; a
// thread's first one is told to zero that itself.
template <class Task>
void run_tasks(std::int64_t tasks, bool alike, int threads, std::size_t scratch_bytes, const Task& task) {
    const std::uint64_t number = ++runs;
    const std::size_t floats = scratch_bytes / sizeof(float) + 1;
    const int team =
        forked.load() ? 1 : static_cast<int>(std::min<std::int64_t>(std::min(threads, max_threads()), tasks));
    std::atomic<bool> out_of_memory{false};
    const auto one = [&](std::int64_t i) {
        if (out_of_memory.load(std::memory_order_relaxed)) return;
        try {
            Scratch& own = scratch_of_thread();
            float* scratch = own.memory.floats(floats);
#if defined(SEMEDA_REDZONES)
            ASAN_UNPOISON_MEMORY_REGION(scratch, scratch_bytes);  // as the last task left it
#endif
            const bool first = own.zeroed_for != number;
            own.zeroed_for = number;
#if defined(SEMEDA_REDZONES)
            if (first) std::memset(scratch, 0xFF, scratch_bytes);
#endif
            if (!alike) std::memset(scratch, 0, scratch_bytes);
            task(i, scratch, !alike || !first);
        } catch (const std::bad_alloc&) {  // no exception may leave a parallel region
            out_of_memory.store(true);
        }
    };
    if (team <= 1) {
        for (std::int64_t i = 0; i < tasks; ++i) one(i);
    } else {
#if defined(_OPENMP)
    #pragma omp parallel for schedule(dynamic, 1) num_threads(team)
#endif
        for (std::int64_t i = 0; i < tasks; ++i) one(i);
    }
    if (out_of_memory.load()) throw std::bad_alloc();
}

// An output of tens of megabytes is fresh memory from the system; in pages of 2 MB instead of 4 KB it is
// faulted in 512 times less often. A hint: where the system has no such pages nothing changes.
void ask_for_huge_pages(const void* data, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t HUGE = 2 << 20;
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    const std::uintptr_t begin = (address + HUGE - 1) / HUGE * HUGE;
    const std::uintptr_t end = (address + static_cast<std::uintptr_t>(bytes)) / HUGE * HUGE;
    if (data && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    static_cast<void>(data);
    static_cast<void>(bytes);
#endif
}

// Bytes from a gradient's address on; it is dense, whatever its layout.
std::int64_t gradient_bytes(const LossParams& p) {
    const std::int64_t rows = p.n * (p.binary ? 1 : p.classes) * (p.logits_h > 0 ? p.logits_h : p.h);
    const std::int64_t elements = rows * (p.logits_w > 0 ? p.logits_w : p.w);
    return std::min(p.d_logits.after, elements * element_bytes(p.d_logits.dtype));
}

// Holds a problem against the memory that came with it.
void check(const LossParams& p, Direction direction) {
    check_sizes(p, MAX_CLASSES);
    check_range("threads", p.threads, 1, std::numeric_limits<int>::max());
    const std::int64_t rows = p.n * p.h;
    check_memory(p, direction, rows * code_bytes_per_row(p), rows * saved_floats_per_row(p) * 4);
}

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

const char* instruction_set() { return kernels().name; }

bool use_instruction_set(const std::string& name) {
    for (int i = 0; i < NUM_KERNELS; ++i) {
        const Kernels* k = all_kernels()[i];
        if (processor_has(k) && name == k->name) {
            chosen.store(k);
            return true;
        }
    }
    return false;
}

const char* const* built_instruction_sets() {
    static const char* names[NUM_KERNELS + 1] = {};
    if (!names[0]) {
        int count = 0;
        for (int i = 0; i < NUM_KERNELS; ++i) {
            if (all_kernels()[i]) names[count++] = all_kernels()[i]->name;
        }
    }
    return names;
}

void forward(const LossParams& p) {
    check(p, Direction::forward);
    if (p.n * p.h * p.w == 0) {
        std::fill_n(p.terms.data, 3 + p.layers, 0.0f);
        std::fill_n(p.counts.data, 2, std::int64_t{0});
        return;
    }
    const Kernels& k = kernels();
    CallMemory& memory = memory_of_caller();
    const Plan plan = make_plan(p, false, k, memory.forward_weights);
    ask_for_huge_pages(p.codes, p.n * p.h * code_bytes_per_row(p));
    ask_for_huge_pages(p.saved_d, p.n * p.h * saved_floats_per_row(p) * 4);
    const int width = SUM_LAYERS + p.layers;
    const std::int64_t rows = p.n * p.h * plan.strips;
    double* sums =
        reinterpret_cast<double*>(memory.sums.floats(static_cast<std::size_t>(rows) * width * 2 + 2));
    run_tasks(plan.tasks, plan.strips == 1, p.threads, k.forward_scratch(plan),
              [&](std::int64_t task, void* scratch, bool zero) {
                  k.forward_task(plan, task, scratch, zero, sums);
              });
    double total[SUM_LAYERS + MAX_LAYERS] = {};
    for (std::int64_t row = 0; row < rows; ++row) {
        for (int i = 0; i < width; ++i) total[i] += sums[row * width + i];
    }
    const bool bad = total[SUM_BAD] > 0;
    double semeda = 0;
    for (int l = 0; l < p.layers; ++l) {
        // coefficient = w_l * inverse
        semeda += total[SUM_LAYERS + l] * p.layer[l].coefficient / p.layer[l].inverse;
        p.terms[3 + l] = static_cast<float>(total[SUM_LAYERS + l]);
    }
    p.terms[0] = static_cast<float>(total[SUM_CE]);
    p.terms[1] = bad ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(semeda);
    p.terms[2] = static_cast<float>(total[SUM_CE_WEIGHT]);
    p.counts[0] = static_cast<std::int64_t>(total[SUM_VALID]);
    p.counts[1] = static_cast<std::int64_t>(total[SUM_BAD]);
}

std::int64_t backward(const LossParams& p) {
    check(p, Direction::backward);
    if (p.n * p.h * p.w == 0) return 0;
    const Kernels& k = kernels();
    CallMemory& memory = memory_of_caller();
    const Plan plan = make_plan(p, true, k, memory.backward_weights);
    ask_for_huge_pages(p.d_logits.data, gradient_bytes(p));
    const bool upsampled = p.logits_h > 0;
    float* partial = upsampled
                         ? memory.partial.floats(static_cast<std::size_t>(plan.tasks * plan.partial_floats))
                         : nullptr;
    std::atomic<std::int64_t> bad{0};
    run_tasks(plan.tasks, plan.strips == 1, p.threads, k.backward_scratch(plan),
              [&](std::int64_t task, void* scratch, bool zero) {
                  bad += k.backward_task(plan, task, scratch, zero,
                                         upsampled ? partial + task * plan.partial_floats : nullptr);
              });
    if (upsampled) {
        run_tasks(
            p.n * p.logits_h, false, p.threads, k.gather_scratch(plan),
            [&](std::int64_t row, void* scratch, bool) { k.gather_partial(plan, row, scratch, partial); });
    }
    return bad;
}

double fma_peak(int threads) {
    check_range("threads", threads, 1, max_threads());
    const Kernels& k = kernels();
    double best = 0;
    const std::int64_t rounds = 4000000;
    for (int attempt = 0; attempt < 5; ++attempt) {
        double flop = 0;
        const double start = seconds();
#if defined(_OPENMP)
    #pragma omp parallel for schedule(static, 1) num_threads(threads) reduction(+ : flop)
#endif
        for (int i = 0; i < threads; ++i) flop += k.fma_loop(rounds);
        best = std::max(best, flop / (seconds() - start));
    }
    return best;
}

double copy_bandwidth(int threads, std::int64_t num_bytes) {
    constexpr std::int64_t MOST = std::int64_t{1} << 32;
    check_range("threads", threads, 1, max_threads());
    check_range("num_bytes", num_bytes, threads, MOST);
    const auto bytes = static_cast<std::size_t>(num_bytes), part = bytes / static_cast<std::size_t>(threads);
    const std::unique_ptr<char[]> from(new (std::nothrow) char[bytes]), to(new (std::nothrow) char[bytes]);
    if (!from || !to) throw std::bad_alloc();
    std::memset(from.get(), 1, bytes);
    std::memset(to.get(), 2, bytes);
    double best = 0;
    for (int attempt = 0; attempt < 5; ++attempt) {
        const double start = seconds();
#if defined(_OPENMP)
    #pragma omp parallel for schedule(static, 1) num_threads(threads)
#endif
        for (int i = 0; i < threads; ++i) std::memcpy(to.get() + i * part, from.get() + i * part, part);
        best = std::max(best, 2.0 * static_cast<double>(part) * threads / (seconds() - start));
    }
    return best;
}

}  // namespace semeda_fast
