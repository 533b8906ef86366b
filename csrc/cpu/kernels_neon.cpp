// The kernels for Advanced SIMD, which every arm64 processor has; elsewhere the function is empty.
#if defined(__aarch64__) && defined(__ARM_NEON) && defined(__GNUC__) && !defined(__ARM_BIG_ENDIAN)

    #define SEMEDA_NEON 1
    #define SEMEDA_ISA neon
    #include "kernels.h"

namespace semeda_fast {

const Kernels* neon_kernels() { return &neon::table; }

}  // namespace semeda_fast

#else

    #include "plan.h"

namespace semeda_fast {

const Kernels* neon_kernels() { return nullptr; }

}  // namespace semeda_fast

#endif
