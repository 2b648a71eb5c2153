// Chooses the kernel table for the processor.
#include <cstring>

#include "cpu/kernels.h"

namespace adamas {

#if defined(__x86_64__)
static bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
static bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("avx512vpopcntdq");
}
#else
const Kernels* avx2_kernels() { return nullptr; }
const Kernels* avx512_kernels() { return nullptr; }
static bool runs_avx2() { return false; }
static bool runs_avx512() { return false; }
#endif

const Kernels* find_kernels(const char* isa) {
  const bool any = std::strcmp(isa, "auto") == 0;
  if ((any || std::strcmp(isa, "avx512") == 0) && runs_avx512()) return avx512_kernels();
  if ((any || std::strcmp(isa, "avx2") == 0) && runs_avx2()) return avx2_kernels();
  if (any || std::strcmp(isa, "portable") == 0) return &portable_kernels();
  return nullptr;
}

}  // namespace adamas
