// x86-64 with AVX-512 F, BW, DQ, VL, VBMI, VNNI, BITALG and VPOPCNTDQ (Ice Lake, Zen 4 and later).
#define ADAMAS_ISA avx512
#define ADAMAS_ISA_NAME "avx512"
#define ADAMAS_LANES 16
#include "cpu/isa.h"

namespace adamas {
const Kernels* avx512_kernels() { return &avx512::kTable; }
}  // namespace adamas
