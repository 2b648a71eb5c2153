// The merge of softmax states. The state of a part of a context is, per head, its largest logit (`top`, base 2), the
// sum of the weights exp2(logit - top) and the sum of the V rows so weighted. Parts are scaled to a common top and
// added.
#pragma once
#include <cuda_runtime.h>

namespace adamas {

// The scale of a part with logits up to `top` if `best` is the largest top of all parts. A part without tokens has
// top -inf and scale 0, even if no part has tokens.
__device__ __forceinline__ float softmax_weight(float top, float best) {
  return exp2f(top - (best == -INFINITY ? 0.0f : best));
}

// Merges another part into (top, sum); returns the scales of the values of both parts.
struct MergeScales {
  float own, other;
};
__device__ __forceinline__ MergeScales merge_softmax(float& top, float& sum, float other_top, float other_sum) {
  const float best = fmaxf(other_top, top);
  const MergeScales scale{softmax_weight(top, best), softmax_weight(other_top, best)};
  sum = sum * scale.own + other_sum * scale.other;
  top = best;
  return scale;
}

// One value of a head's output before the division by the sum.
struct SoftmaxValue {
  float top, value, sum;
};

// Merges dimension d of parts that are `stride` floats apart in shared memory, each [top, sum, -, -, values]
// (Attention::share).
__device__ __forceinline__ SoftmaxValue merge_parts(const float* from, int parts, int stride, int d) {
  SoftmaxValue merged{-INFINITY, 0, 0};
  for (int i = 0; i < parts; ++i) merged.top = fmaxf(merged.top, from[i * stride]);
  for (int i = 0; i < parts; ++i) {
    const float weight = softmax_weight(from[i * stride], merged.top);
    merged.value += weight * from[i * stride + 4 + d];
    merged.sum += weight * from[i * stride + 1];
  }
  return merged;
}

// The output value; 0 without tokens.
__device__ __forceinline__ float softmax_output(float value, float sum, float v_scale) {
  return sum == 0 ? 0.0f : value / sum * v_scale;
}

}  // namespace adamas
