// Any processor: 128-bit vectors for the compiler's baseline.
#define ADAMAS_ISA portable
#define ADAMAS_ISA_NAME "portable"
#define ADAMAS_LANES 4
#include "cpu/isa.h"

namespace adamas {
const Kernels& portable_kernels() { return portable::kTable; }
}  // namespace adamas
