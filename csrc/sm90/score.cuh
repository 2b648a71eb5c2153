// Scores of tokens from their signatures on the tensor cores, by one warp. scorer.cuh has the products: binary ones on
// Hopper (csrc/sm90), of 8-bit integers on other GPUs (csrc/sm80). Both compute the same integers.
//
// With head quads of four heads, a lane (row = lane / 4, c = lane % 4) gets the complete score of head c for its own
// four tokens, without any exchange between lanes:
//
//   dot        q.level = 2 sum(q * code) - 3 sum(q).
//   manhattan  |a - b|_1 = |a|_1 + |b|_1 - 2 popc(a AND b) over the thermometer planes hi|lo, hi,
//              hi&lo. Column 2c holds head c, column 2c+1 all ones, which yields |a|_1.
//
// A 16-byte load yields one word of four tokens, so a lane loads exactly its own token quad.
#pragma once
#include <cuda_fp16.h>

#ifdef ADAMAS_SM80
#include "sm80/scorer.cuh"
#else
#include "sm90/scorer.cuh"
#endif

namespace adamas {

// The scores of a lane's four tokens for head lane % 4 of head quad q. The product with a token's scale is rounded
// separately (no FMA), so that every kernel computes the same score.
template <int kChunks, Mode kMode, int kQuads>
__device__ __forceinline__ void score_quad(const QueryFragments<kChunks, kMode, kQuads>& query,
                                           const Signatures<kChunks, kMode>& s, int q, float (&score)[4]) {
  const QuadWords<kChunks> words(s);
  int value[4];
  if constexpr (is_dot(kMode)) {
    if constexpr (kHopper) dot_quad(query, words, q, value);
    else dot_quad(query, words, q, value, s);
    const float2 s01 = __half22float2(*reinterpret_cast<const __half2*>(&s.scale.x));
    const float2 s23 = __half22float2(*reinterpret_cast<const __half2*>(&s.scale.y));
    score[0] = __fmul_rn(float(value[0]), s01.x);
    score[1] = __fmul_rn(float(value[1]), s01.y);
    score[2] = __fmul_rn(float(value[2]), s23.x);
    score[3] = __fmul_rn(float(value[3]), s23.y);
  } else {
    manhattan_quad(query, words, q, value);
#pragma unroll
    for (int i = 0; i < 4; ++i) score[i] = float(value[i]);
  }
}

// The logits of a lane's four tokens (dot_max), with the head's log-sum-exp not yet subtracted.
template <int kChunks, int kQuads>
__device__ __forceinline__ void logit_quad(const QueryFragments<kChunks, Mode::dot_max, kQuads>& query,
                                           const Signatures<kChunks, Mode::dot_max>& s, int q, float (&logit)[4]) {
  score_quad(query, s, q, logit);
#pragma unroll
  for (int i = 0; i < 4; ++i) logit[i] = __fmul_rn(logit[i], query.weight[q].factor);
}

// How the scores of token sets are divided among the lanes of a warp that scores 32 tokens at a time: a lane has
// kScores neighbouring tokens, from the quad's kFirst-th on, of set quad_set(q) for each of kSetQuads q; kSetLanes lanes
// have scores of the same set, and lanes that are kSetStride apart.
template <Mode kMode, int kQuads>
struct SetScores {
  static constexpr bool kOne = kMode == Mode::dot_max;  // one set, whose scores four lanes compute together
  static constexpr int kSetQuads = kOne ? 1 : kQuads, kScores = kOne ? 1 : kQuad;
  static constexpr int kSetStride = kOne ? 1 : 4, kSetLanes = 32 / kSetStride;
  static __device__ __forceinline__ int first() { return kOne ? threadIdx.x % 4 : 0; }
  static __device__ __forceinline__ int set(int q) { return kOne ? 0 : q * 4 + threadIdx.x % 4; }
};

// The maximum over the heads of a group, whose lanes hold one head of each quad. Four neighbouring lanes have the same four
// tokens; lane c of them gets the maximum of token c.
template <int kQuads>
__device__ __forceinline__ float maximum_of_heads(const float (&x)[kQuads][4]) {
  float best[4] = {x[0][0], x[0][1], x[0][2], x[0][3]};
#pragma unroll
  for (int h = 1; h < kQuads; ++h)
#pragma unroll
    for (int i = 0; i < 4; ++i) best[i] = fmaxf(best[i], x[h][i]);
  const bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
  const float even_token = fmaxf(upper ? best[2] : best[0], __shfl_xor_sync(kFull, upper ? best[0] : best[2], 2));
  const float odd_token = fmaxf(upper ? best[3] : best[1], __shfl_xor_sync(kFull, upper ? best[1] : best[3], 2));
  return fmaxf(odd ? odd_token : even_token, __shfl_xor_sync(kFull, odd ? even_token : odd_token, 1));
}

// The same of the heads' logits less their log-sum-exp.
template <int kChunks, int kQuads>
__device__ __forceinline__ float weighed_maximum(const QueryFragments<kChunks, Mode::dot_max, kQuads>& query,
                                                 float (&logit)[kQuads][4]) {
#pragma unroll
  for (int h = 0; h < kQuads; ++h)
#pragma unroll
    for (int i = 0; i < 4; ++i) logit[h][i] = __fsub_rn(logit[h][i], query.weight[h].log_sum);
  return maximum_of_heads(logit);
}

// The scores of a set's tokens in kSteps times 32 tokens. All products come first, so that the chains of the steps overlap.
template <int kSteps, int kChunks, Mode kMode, int kQuads, int kScores>
__device__ __forceinline__ void score_steps(const QueryFragments<kChunks, kMode, kQuads>& query,
                                            const Signatures<kChunks, kMode> (&s)[kSteps],
                                            float (&score)[kSteps][kScores]) {
  if constexpr (kMode == Mode::dot_max) {
    float logit[kSteps][kQuads][4];
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int h = 0; h < kQuads; ++h) logit_quad(query, s[i], h, logit[i][h]);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) score[i][0] = weighed_maximum(query, logit[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) score_quad(query, s[i], 0, score[i]);
  }
}

template <int kChunks, Mode kMode, int kQuads, int kScores>
__device__ __forceinline__ void score_set(const QueryFragments<kChunks, kMode, kQuads>& query,
                                          const Signatures<kChunks, kMode>& s, int q, float (&score)[kScores]) {
  static_assert(kScores == SetScores<kMode, kQuads>::kScores);
  if constexpr (kMode == Mode::dot_max) {
    float logit[kQuads][4];
#pragma unroll
    for (int h = 0; h < kQuads; ++h) logit_quad(query, s, h, logit[h]);
    score[0] = weighed_maximum(query, logit);
  } else {
    score_quad(query, s, q, score);
  }
}

}  // namespace adamas
