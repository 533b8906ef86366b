// The kernels for AVX-512 (F, BW, VL); setup.py compiles this file with the flags for it, or leaves the
// function empty.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

    #define SEMEDA_AVX512 1
    #define SEMEDA_ISA avx512
    #include "kernels.h"

namespace semeda_fast {

const Kernels* avx512_kernels() { return &avx512::table; }

}  // namespace semeda_fast

#else

    #include "plan.h"

namespace semeda_fast {

const Kernels* avx512_kernels() { return nullptr; }

}  // namespace semeda_fast

#endif
