// The sample of a context's scores that encode takes, and how deep a pivot lies in it.
#pragma once
#include <cuda_runtime.h>

namespace adamas {

// log2 of the tokens of a context that encode samples.
__host__ __device__ inline int sample_bits(int max_seq_len) {
  return max_seq_len <= 65536 ? 10 : max_seq_len <= 1 << 18 ? 11 : 12;
}

// The rank in the sample that a pivot has at least: six standard deviations below the k-th best. Its rank is at
// most half as large again, or twice as large where scores tie (find_pivot); candidate_capacity() of
// backends/cuda/backend.py sizes the lists for the half.
__device__ __forceinline__ int sample_rank(int need, int sample, int length) {
  const float expected = __fdividef(float(need) * sample, length);
  return int(expected + 6.0f * sqrtf(1.5f * expected) + 3.0f);
}

}  // namespace adamas
