// The normal distribution, which scores mostly follow closely enough for a guess.
#pragma once
#include <cuda_runtime.h>

namespace adamas {

// The number of standard deviations above the mean that a share `p` < 0.5 of a normal distribution exceeds, with an
// error below 0.005 (Abramowitz and Stegun, 26.2.22).
__device__ __forceinline__ float normal_tail(float p) {
  const float t = sqrtf(-2.0f * __logf(p));
  return t - __fdividef(2.30753f + 0.27061f * t, 1.0f + 0.99229f * t + 0.04481f * t * t);
}

}  // namespace adamas
