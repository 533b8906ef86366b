// The kernels for the compiler's default target: SSE2 on x86-64, NEON on arm64, scalar code elsewhere.
#define SEMEDA_ISA portable
#include "kernels.h"

namespace semeda_fast {

const Kernels* portable_kernels() { return &portable::table; }

}  // namespace semeda_fast
