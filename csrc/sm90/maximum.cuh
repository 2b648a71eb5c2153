// A group's scores as one: the maximum over its query heads of a token's logit less the head's log-sum-exp over a
// sample of the context. Every backend computes the same bits: terms are added in fixed point, in any order, and each
// operation in float is rounded separately.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "sm90/params.h"

namespace adamas {

// A head's logit in base 2 is its score times this.
__device__ __forceinline__ float logit_factor(float step, float logit_scale) {
  return fminf(__fmul_rn(step, logit_scale), kLargestFactor);
}

// The tile that is number i of the sample of a context of `tiles` tiles; i < min(tiles, kSampleTiles).
__device__ __forceinline__ int sum_tile(int i, int tiles) {
  return tiles <= kSampleTiles ? i : int(int64_t(i) * tiles / kSampleTiles);
}

// 2^(logit - top) in fixed point, interpolated linearly between powers of two.
__device__ __forceinline__ uint32_t sum_term(float logit, float top) {
  const float x = fmaxf(__fsub_rn(logit, top), float(kLeastExponent)), exponent = floorf(x);
  const float mantissa = __fadd_rn(1.0f, __fsub_rn(x, exponent));
  return uint32_t(__fmul_rn(mantissa, float(1 << kFractionBits))) >> int(-exponent);
}

// log2 of a sum of terms over the tokens of a whole sample, interpolated likewise.
__device__ __forceinline__ float log_sum(float top, uint32_t sum) {
  const int exponent = 31 - __clz(int(sum));
  const float mantissa = __fmul_rn(__uint2float_rn(sum), __int_as_float((127 - exponent) << 23));  // [1, 2]
  return __fadd_rn(top, __fadd_rn(float(exponent - kFractionBits - kSampleBits), __fsub_rn(mantissa, 1.0f)));
}

}  // namespace adamas
