// The merge of softmax states. The state of a part of a context is, per head, its largest logit (`top`, base 2), the
// sum of the weights exp2(logit - top) and the sum of the V rows so weighted. Parts are scaled to a common top and
// added.
#pragma once
#include <cuda_runtime.h>

#include "sm90/params.h"

namespace adamas {

// A logit between -cap and cap: cap * tanh(x / cap), with an error of a few 1e-7 of the cap. The approximate divisions
// save the registers of exact ones.
__device__ __forceinline__ float soft_cap(float x, float cap) {
  constexpr float kTwoLog2E = 2.8853900817779268f;
  return cap - __fdividef(2 * cap, 1 + exp2f(__fdividef(kTwoLog2E * x, cap)));
}

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
template <int kUnrolled = 4>
__device__ __forceinline__ SoftmaxValue merge_parts(const float* from, int parts, int stride, int d) {
  SoftmaxValue merged{-INFINITY, 0, 0};
#pragma unroll kUnrolled
  for (int i = 0; i < parts; ++i) merged.top = fmaxf(merged.top, from[i * stride]);
#pragma unroll kUnrolled
  for (int i = 0; i < parts; ++i) {
    const float weight = softmax_weight(from[i * stride], merged.top);
    merged.value += weight * from[i * stride + 4 + d];
    merged.sum += weight * from[i * stride + 1];
  }
  return merged;
}

// Writes the natural logarithm of the sum of exp(logit) of a query head's tokens, if it is wanted; -inf without tokens.
__device__ __forceinline__ void store_lse(const DecodeParams& p, int row, int head, float top, float sum) {
  if (p.lse) p.lse[int64_t(row) * p.num_query_heads + head] = (top + __log2f(sum)) / float(kLog2E);
}

// The output value of a query head; 0 without tokens. Its learned sink adds to the sum alone: at most infinity, with
// which the output is 0.
__device__ __forceinline__ float softmax_output(const DecodeParams& p, int head, const SoftmaxValue& x) {
  if (x.sum == 0) return 0;
  const float sum = p.sinks ? x.sum + exp2f(p.sinks[head] * float(kLog2E) - x.top) : x.sum;
  return x.value / sum * p.page.v_scale;
}

}  // namespace adamas
