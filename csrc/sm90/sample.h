// The rank that encode aims at in its sample of a context; backends/cuda/policy.py sizes candidate lists by it.
#pragma once
#include <cmath>

#include "common/element.h"

namespace adamas {

constexpr int kLeastSampleBits = 10, kMostSampleBits = 12;

// How the best scores of a sample gather in its tiles: the variance of a tile's number over its mean. Encode measures
// it (find_pivot) and uses it within these bounds.
constexpr float kLeastSpread = 1.5f, kMostSpread = 8.0f;

// log2 of the tokens of a context that encode samples, if its shared memory holds 2^most.
ADAMAS_BOTH inline int sample_bits(int length, int most) {
  int bits = kLeastSampleBits;
  while (bits < kMostSampleBits && length > 1 << (bits + 6)) ++bits;
  return bits < most ? bits : most;
}

// The minimum rank of a pivot in the sample: six standard deviations below the k-th best. Its rank is at most 1.5
// times that (find_pivot).
ADAMAS_BOTH inline int sample_rank(int need, int sample, int length, float spread) {
#ifdef __CUDA_ARCH__
  const float expected = __fdividef(float(need) * sample, length);
#else
  const float expected = float(need) * sample / length;
#endif
  return int(expected + 6.0f * sqrtf(spread * expected) + 3.0f);
}

}  // namespace adamas
