// Hadamard transform and 2-bit codes (arXiv 2510.18413, section 3.1), one warp per vector: lane i holds dimension
// 32*w + i in x[w].
#pragma once
#include <cuda_fp16.h>

#include "sm90/params.h"
#include "sm90/reduce.cuh"

namespace adamas {

// Orthonormal; block-diagonal, with blocks of the largest power of two that divides D.
template <int kWords>
__device__ __forceinline__ void hadamard(float (&x)[kWords], int head_size, float norm) {
  const int lane = threadIdx.x % 32;
  const int block = head_size & -head_size;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const float other = __shfl_xor_sync(kFull, x[w], step);
      x[w] = lane & step ? other - x[w] : x[w] + other;
    }
  }
#pragma unroll
  for (int step = 1; step < kWords; step *= 2) {
    if (step * kWord >= block) break;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if ((w & step) || w + step >= kWords) continue;
      const float a = x[w], b = x[w + step];
      x[w] = a + b;
      x[w + step] = a - b;
    }
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) x[w] *= norm;
}

// Loads a vector without converting it; widen() converts it later, so that no thread waits for the load yet.
template <int kWords>
__device__ __forceinline__ void load_raw(uint16_t (&raw)[kWords], const Rows& rows, int64_t token, int head,
                                         int words) {
  const int64_t at = token * rows.token_stride + head * rows.head_stride + threadIdx.x % 32;
#pragma unroll
  for (int w = 0; w < kWords; ++w) raw[w] = w < words ? static_cast<const uint16_t*>(rows.data)[at + w * kWord] : 0;
}

template <int kWords>
__device__ __forceinline__ void widen(float (&x)[kWords], const uint16_t (&raw)[kWords], Element element) {
#pragma unroll
  for (int w = 0; w < kWords; ++w)
    x[w] = element == Element::bf16 ? __uint_as_float(uint32_t(raw[w]) << 16) : __half2float(__ushort_as_half(raw[w]));
}

template <int kWords>
__device__ __forceinline__ void load_vector(float (&x)[kWords], const Rows& rows, int64_t token, int head,
                                            int words) {
  uint16_t raw[kWords];
  load_raw(raw, rows, token, head, words);
  widen(x, raw, rows.element);
}

template <int kWords>
__device__ __forceinline__ float outer_threshold(const float (&x)[kWords], Coding coding, int head_size) {
  if (!coding.relative) return coding.threshold;
  float squares = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) squares += x[w] * x[w];
  return coding.threshold * sqrtf(warp_sum(squares) / head_size);
}

// The number of thresholds -t, 0, t at or below x. NaN compares false: code 0.
__device__ __forceinline__ int bucketize(float x, float t) {
  return int(x >= -t) + int(x >= 0.0f) + int(x >= t);
}

}  // namespace adamas
