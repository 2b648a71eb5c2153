// x86-64 with AVX2, FMA and F16C.
#define ADAMAS_ISA avx2
#define ADAMAS_ISA_NAME "avx2"
#define ADAMAS_LANES 8
#include "cpu/isa.h"

namespace adamas {
const Kernels* avx2_kernels() { return &avx2::kTable; }
}  // namespace adamas
