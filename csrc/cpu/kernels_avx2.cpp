// The kernels for AVX2, FMA and F16C; setup.py compiles this file with the flags for it, or leaves the
// function empty.
#if defined(__AVX2__) && (defined(__FMA__) || defined(_MSC_VER))

    #define SEMEDA_AVX2 1
    #define SEMEDA_ISA avx2
    #include "kernels.h"

namespace semeda_fast {

const Kernels* avx2_kernels() { return &avx2::table; }

}  // namespace semeda_fast

#else

    #include "plan.h"

namespace semeda_fast {

const Kernels* avx2_kernels() { return nullptr; }

}  // namespace semeda_fast

#endif
