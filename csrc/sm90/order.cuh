// Order-preserving maps from scores to unsigned integers, for atomics and radix passes.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace adamas {

// Keys in the order of the floats; -0 and 0 have the same key.
__device__ __forceinline__ uint32_t order_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float from_order_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// The next smaller float; below 0 comes the largest negative float, not -0.
__device__ __forceinline__ float next_below(float x) {
  const uint32_t key = order_key(x);
  return from_order_key(key - (key == 0x80000000u ? 2 : 1));
}

// Bits that represent every token of a context.
__device__ __forceinline__ int token_bits(int length) { return 32 - __clz(length); }

// The key of a score and its token in one integer. All are distinct, so the k-th best is a single token; among equal
// scores the more recent token is better.
__device__ __forceinline__ uint64_t rank_key(uint32_t key, uint32_t token, int bits) {
  return uint64_t(key) << bits | token;
}

}  // namespace adamas
