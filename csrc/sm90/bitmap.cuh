// The set of selected tokens as a bitmap in shared memory, one bit per token of the context. Words are padded.
#pragma once
#include "sm90/memory.cuh"
#include "sm90/reduce.cuh"

namespace adamas {

__host__ __device__ constexpr int bitmap_words(int length) { return padded((length + 31) / 32) + 1; }

__device__ __forceinline__ void set_bit(uint32_t* bitmap, uint32_t token) {
  atomicOr(bitmap + padded(token / 32), 1u << token % 32);
}

// Calls visit(rank, token) for every set bit; rank is the bit's number in ascending order. Each thread passes twice
// over a run of words, with one barrier in between. `sums`: kThreads / 32 words. Returns the number of set bits. The
// caller synchronises before it uses what visit() wrote.
template <int kThreads, class Visit>
__device__ int each_set_bit(const uint32_t* bitmap, int words, uint32_t* sums, Visit visit) {
  const int per_thread = (words + kThreads - 1) / kThreads;
  const int begin = min(words, int(threadIdx.x) * per_thread), end = min(words, begin + per_thread);
  int own = 0;
  for (int w = begin; w < end; ++w) own += __popc(bitmap[padded(w)]);
  const BlockSum<int> sum = block_prefix_sum<kThreads>(own, reinterpret_cast<int*>(sums));
  int rank = sum.prefix - own;
  for (int w = begin; w < end; ++w)
    for (uint32_t bits = bitmap[padded(w)]; bits; bits &= bits - 1) visit(rank++, w * 32 + __ffs(bits) - 1);
  return sum.total;
}

}  // namespace adamas
