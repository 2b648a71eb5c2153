// append and gather over OpenMP threads.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace adamas {

void append(const Kernels& kernels, const AppendParams& p) {
  // A decode step appends one token per request. For so few tokens, threads cost more than they save.
  constexpr int64_t kSerial = 16;
#pragma omp parallel for schedule(static) if (p.num_tokens > kSerial)
  for (int64_t token = 0; token < p.num_tokens; ++token) kernels.append(p, token);
}

void gather(const Kernels& kernels, const DecodeParams& p, const Rows& key, const Rows& value) {
  int64_t first = 0;
  for (int row = 0; row < p.num_rows; ++row) {
    const int length = p.seq_lens[row], size = p.page.block_size;
    const int num_blocks = (length + size - 1) / size;
#pragma omp parallel for collapse(2) schedule(static)
    for (int block = 0; block < num_blocks; ++block)
      for (int head = 0; head < p.page.num_kv_heads; ++head)
        kernels.gather(p.page, p.blocks(row)[block], head, std::min(size, length - block * size), key, value,
                       first + int64_t(block) * size);
    first += length;
  }
}

bool advise_huge(void* start, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2u << 20;
  const uintptr_t from = (uintptr_t(start) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t to = (uintptr_t(start) + bytes) / kHuge * kHuge;
  if (to <= from || madvise((void*)from, to - from, MADV_HUGEPAGE) != 0) return false;
  // Replaces zero-filled 4 KiB pages by zeroed 2 MiB pages. All are populated now, or each prompt would wait for
  // those it touches first: milliseconds each where memory is scarce. Linux before 5.14 cannot populate.
#pragma omp parallel for schedule(dynamic)
  for (uintptr_t page = from; page < to; page += kHuge) {
    const char* bytes = (const char*)page;
    if (bytes[0] != 0 || std::memcmp(bytes, bytes + 1, kHuge - 1) != 0) continue;  // in use: keep it
    if (madvise((void*)page, kHuge, MADV_DONTNEED) == 0) madvise((void*)page, kHuge, MADV_POPULATE_WRITE);
  }
  return true;
#else
  return false;
#endif
}

}  // namespace adamas
