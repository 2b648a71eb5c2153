// Bins of scores for finding one of a given rank, whatever the distribution of the scores.
#pragma once
#include <cuda_runtime.h>

namespace adamas {

// The number of standard deviations above the mean that a share `p` < 0.5 of a normal distribution exceeds, with an
// error below 0.005 (Abramowitz and Stegun, 26.2.22).
__device__ __forceinline__ float normal_tail(float p) {
  const float t = sqrtf(-2.0f * __logf(p));
  return t - __fdividef(2.30753f + 0.27061f * t, 1.0f + 0.99229f * t + 0.04481f * t * t);
}

// A score's position in units of the deviation is t = (score - low) * scale, about kRankPosition for the wanted score if
// scores are normally distributed. Bins divide every octave of t from 2^kFirstOctave on equally, so that they are fine
// where the wanted score should be and reach far. The first bin holds all lower scores, the last one all higher ones.
constexpr int kSampleBins = 128;
constexpr int kFirstOctave = -2, kOctaveBits = 5;
constexpr float kRankPosition = 1.5f;

// The bin of a score; it is monotonic in the score.
__device__ __forceinline__ int sample_bin(float x, float low, float scale) {
  const int t = __float_as_int(fmaxf(__fmul_rn(__fsub_rn(x, low), scale), 0.0f));
  return min(max((t - ((127 + kFirstOctave) << 23) >> (23 - kOctaveBits)) + 1, 0), kSampleBins - 1);
}

// About the least score of a bin from 1 on, given the deviation, 1 / scale.
__device__ __forceinline__ float bin_floor(int bin, float low, float deviation) {
  return low + __int_as_float(((127 + kFirstOctave) << 23) + (bin - 1 << (23 - kOctaveBits))) * deviation;
}

// The bins for the score that a share of all scores is better than, from a sample's sums. Scores that are equal or that
// hardly differ have no useful bins: scale 0.
struct ScoreBinning {
  float low, scale, deviation;

  __device__ __forceinline__ ScoreBinning(float sum, float squares, float count, float share) {
    const float inverse = __fdividef(1.0f, count), mean = sum * inverse;
    deviation = sqrtf(fmaxf(squares * inverse - mean * mean, 0.0f));
    low = mean + deviation * ((share < 0.5f ? normal_tail(share) : 0.0f) - kRankPosition);
    scale = __fdividef(1.0f, deviation);
    if (!(deviation > 1e-3f * fabsf(mean) && scale < 3e38f)) scale = 0.0f;
  }
};

}  // namespace adamas
