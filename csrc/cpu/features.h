// What the processor that runs this code can do, asked at run time.
//
// Kernels are built once per instruction set and chosen by these flags, so one binary serves every machine.
#pragma once

namespace semeda_fast {

// A flag is true only where both the processor and the operating system support the feature.
struct CpuFeatures {
    bool avx2 = false;
    bool fma = false;
    bool f16c = false;
    bool avx512f = false;
    bool avx512bw = false;
    bool avx512vl = false;
    bool avx512_bf16 = false;
    bool neon = false;
    bool neon_bf16 = false;
    bool sve = false;
};

// All flags are false on a platform that is not known here: the portable kernels serve it.
CpuFeatures detect_cpu_features();

}  // namespace semeda_fast
