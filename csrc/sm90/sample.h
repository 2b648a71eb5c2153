// The rank that encode aims at in its sample of a context; backends/cuda/policy.py sizes candidate lists by it.
#pragma once
#include <cmath>

#include "common/element.h"

namespace adamas {

// The minimum rank of a pivot in the sample: six standard deviations below the k-th best. Its rank is at most 1.5
// times that, or twice that where scores tie (find_pivot).
ADAMAS_BOTH inline int sample_rank(int need, int sample, int length) {
#ifdef __CUDA_ARCH__
  const float expected = __fdividef(float(need) * sample, length);
#else
  const float expected = float(need) * sample / length;
#endif
  return int(expected + 6.0f * sqrtf(1.5f * expected) + 3.0f);
}

}  // namespace adamas
