// The bins of scores of the fused kernel.
#pragma once
#include "sm90/decode_fused/memory.cuh"

namespace adamas {

// A score's position in units of the deviation is t = (score - low) * scale, about kEdgePosition for the k-th best of
// normally distributed scores. Bins divide every octave of t from 2^kFirstOctave on equally, so that they are fine where
// the k-th best should be and reach far. The first bin holds all lower scores, the last one all higher ones.
constexpr int kFirstOctave = -2, kOctaveBits = 5;
constexpr float kEdgePosition = 1.5f;

// The bin of a score; it is monotonic in the score. Each operation is rounded separately, so that the compiler cannot
// contract them in one place and not in another.
__device__ __forceinline__ int edge_bin(float x, float low, float scale) {
  const int t = __float_as_int(fmaxf(__fmul_rn(__fsub_rn(x, low), scale), 0.0f));
  return min(max((t - ((127 + kFirstOctave) << 23) >> (23 - kOctaveBits)) + 1, 0), kEdgeBins - 1);
}

}  // namespace adamas
