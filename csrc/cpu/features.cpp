#include "features.h"

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
    #define SEMEDA_FAST_X86 1
#elif defined(__aarch64__) || defined(_M_ARM64)
    #define SEMEDA_FAST_ARM64 1
#endif

#if defined(SEMEDA_FAST_X86) && defined(_MSC_VER)
    #include <immintrin.h>
    #include <intrin.h>
#elif defined(SEMEDA_FAST_X86)
    #include <cpuid.h>
#elif defined(SEMEDA_FAST_ARM64) && defined(__linux__)
    #include <sys/auxv.h>
#elif defined(SEMEDA_FAST_ARM64) && defined(__APPLE__)
    #include <sys/sysctl.h>

    #include <cstddef>
#endif

namespace semeda_fast {

namespace {

#if defined(SEMEDA_FAST_X86) && defined(_MSC_VER)

// MSVC has no __builtin_cpu_supports: read CPUID, and XCR0 for the register state that the system saves.
void detect(CpuFeatures& found) {
    int leaf[4] = {0, 0, 0, 0};  // eax, ebx, ecx, edx
    __cpuid(leaf, 0);
    const int last_leaf = leaf[0];
    __cpuid(leaf, 1);
    const int ecx1 = leaf[2];
    const bool osxsave = (ecx1 >> 27 & 1) && (ecx1 >> 28 & 1);
    if (!osxsave || last_leaf < 7) return;
    const unsigned long long xcr0 = _xgetbv(0);
    if ((xcr0 & 0x6) != 0x6) return;
    __cpuidex(leaf, 7, 0);
    const int last_subleaf = leaf[0];
    const int ebx7 = leaf[1];
    found.fma = ecx1 >> 12 & 1;
    found.f16c = ecx1 >> 29 & 1;
    found.avx2 = ebx7 >> 5 & 1;
    if ((xcr0 & 0xE6) != 0xE6) return;
    found.avx512f = ebx7 >> 16 & 1;
    found.avx512bw = ebx7 >> 30 & 1;
    found.avx512vl = static_cast<unsigned>(ebx7) >> 31 & 1;
    if (last_subleaf < 1) return;
    __cpuidex(leaf, 7, 1);
    found.avx512_bf16 = found.avx512f && (leaf[0] >> 5 & 1);
}

#elif defined(SEMEDA_FAST_X86)

void detect(CpuFeatures& found) {
    __builtin_cpu_init();
    found.avx2 = __builtin_cpu_supports("avx2");
    found.fma = __builtin_cpu_supports("fma");
    found.avx512f = __builtin_cpu_supports("avx512f");
    found.avx512bw = __builtin_cpu_supports("avx512bw");
    found.avx512vl = __builtin_cpu_supports("avx512vl");
    found.avx512_bf16 = __builtin_cpu_supports("avx512bf16");
    // GCC before 11 rejects the name "f16c", so its CPUID bit is read here; "avx" covers the system's side.
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    found.f16c = __builtin_cpu_supports("avx") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}

#elif defined(SEMEDA_FAST_ARM64) && defined(__linux__)

void detect(CpuFeatures& found) {
    // Bit numbers from the kernel's uapi/asm/hwcap.h, since old C libraries lack the newer names.
    const unsigned long hwcap = getauxval(AT_HWCAP);
    const unsigned long hwcap2 = getauxval(AT_HWCAP2);
    found.neon = hwcap >> 1 & 1;
    found.sve = hwcap >> 22 & 1;
    found.neon_bf16 = hwcap2 >> 14 & 1;
}

#elif defined(SEMEDA_FAST_ARM64)

void detect(CpuFeatures& found) {
    found.neon = true;  // part of the macOS and Windows ABI on this architecture
    #if defined(__APPLE__)
    int value = 0;
    std::size_t size = sizeof(value);
    found.neon_bf16 = sysctlbyname("hw.optional.arm.FEAT_BF16", &value, &size, nullptr, 0) == 0 && value != 0;
    #endif
}

#else

void detect(CpuFeatures&) {}

#endif

}  // namespace

CpuFeatures detect_cpu_features() {
    CpuFeatures found;
    detect(found);
    return found;
}

}  // namespace semeda_fast
